"""What a worker answers, with layers and, where that matters, a GPU that are not real."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from sparse_backend.vllm_plugin import counter_copy, ffn_path, worker
from sparse_backend.vllm_plugin.counter_copy import CounterCopy
from sparse_backend.vllm_plugin.worker import SparsityWorkerExtension

D_FF = 64


def mlp(index: int):
    counts = torch.arange(8).reshape(2, 4) + 10 * index
    return SimpleNamespace(
        layer_index=index,
        d_ff=D_FF,
        max_sparse_rows=4,
        counters=counts,
        drelu=False,
        dense_reason="",
    )


class Worker(SparsityWorkerExtension):
    """Two layers on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        config = SimpleNamespace(dtype=torch.bfloat16, hf_config=SimpleNamespace(hidden_size=16))
        self.model_runner = SimpleNamespace(model_config=config, get_model=object)
        self.mlps = [mlp(0), mlp(1)]

    def _sparse_mlps(self):
        return self.mlps


@pytest.fixture
def device(monkeypatch):
    """A device that finishes a copy when told to; what arrives is as of the moment the copy was made."""
    device = SimpleNamespace(finished=False, waits=0)

    class Copy(CounterCopy):
        def done(self):
            return device.finished

        def wait(self):
            device.waits += not device.finished
            return super().wait()

    monkeypatch.setattr(worker, "CounterCopy", Copy)
    return device


def test_a_snapshot_names_every_count_of_every_layer():
    (first, second) = Worker().sparsity_snapshot()["layers"]
    assert [first[key] for key in ("layer", "d_ff", "neuron_bytes", "max_sparse_rows")] == ["0", D_FF, 32, 4]
    assert first["paths"] == {
        "sparse": {"rows": 0, "active": 1, "union": 2, "steps": 3},
        "dense": {"rows": 4, "active": 5, "union": 6, "steps": 7},
    }
    assert second["layer"] == "1"
    assert second["paths"]["dense"] == {"rows": 14, "active": 15, "union": 16, "steps": 17}


def test_a_cpu_answers_at_once():
    live = Worker()
    assert live.sparsity_snapshot_begin() == live.sparsity_snapshot_poll() == live.sparsity_snapshot()


def test_a_busy_gpu_is_not_waited_for_and_answers_with_the_counts_of_when_it_was_asked(device):
    live = Worker()
    expected = Worker().sparsity_snapshot()["layers"]
    device.waits = 0
    assert live.sparsity_snapshot_begin() is None
    live.mlps[0].counters += 1000
    assert live.sparsity_snapshot_poll() is None
    assert device.waits == 0
    device.finished = True
    assert live.sparsity_snapshot_poll()["layers"] == expected
    assert live.sparsity_snapshot_begin()["layers"] != expected


def test_who_wants_the_counts_of_now_waits_for_a_busy_gpu(device):
    assert Worker().sparsity_snapshot()["layers"][1]["paths"]["sparse"]["rows"] == 10
    assert device.waits == 1


def test_a_snapshot_asked_for_in_between_leaves_the_begun_one_alone(device):
    live = Worker()
    live.sparsity_snapshot_begin()
    live.mlps[0].counters += 1000
    assert live.sparsity_snapshot()["layers"][0]["paths"]["sparse"]["rows"] == 1000
    device.finished = True
    assert live.sparsity_snapshot_poll()["layers"][0]["paths"]["sparse"]["rows"] == 0


def test_a_reset_forgets_all():
    live = Worker()
    live.sparsity_reset()
    assert not any(count for part in live.sparsity_snapshot()["layers"] for count in part["paths"]["dense"].values())


def test_a_rank_without_layers_has_an_empty_snapshot():
    live = Worker()
    live.mlps = []
    assert live.sparsity_snapshot_begin()["layers"] == []


def test_once_warm_no_request_makes_the_sampler_compile():
    live = Worker()
    live.model_runner.sampler = sampler = Sampler()
    live.model_runner.model_config.get_vocab_size = lambda: 96
    live.warm_up_sampler()
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        for rows in (1, 2, 5):
            logits = torch.zeros(rows, 96)
            tokens, _ = sampler.topk_topp_sampler(logits, {}, None, None)
            assert sampler.gather_logprobs(sampler.compute_logprobs(logits), 3, tokens).logprobs.shape == (rows, 4)


def test_a_sampler_that_vllm_warms_up_itself_is_left_alone():
    live = Worker()
    live.model_runner.sampler = object()
    live.warm_up_sampler()


def test_vllms_workers_have_no_method_of_these_names():
    """vLLM refuses an extension that hides one of its worker's."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker as GpuWorker

    ours = {name for name in dir(SparsityWorkerExtension) if not name.startswith("__")}
    assert {"sparsity_snapshot", "sparsity_snapshot_begin", "sparsity_snapshot_poll", "sparsity_reset"} <= ours
    assert "warm_up_sampler" in ours
    assert not ours & (set(dir(CPUWorker)) | set(dir(GpuWorker)))


@pytest.mark.parametrize(("most", "reason"), [(32, ""), (0, "no sparse cuda kernels for float32 and d_model 16")])
def test_the_record_says_why_a_gpu_has_no_sparse_path(monkeypatch, most, reason):
    kernel = SimpleNamespace(name="cuda", isa="sm_90", reason="")
    monkeypatch.setattr(ffn_path.native, "kernel_info", lambda device_type: kernel)
    monkeypatch.setattr(ffn_path.paths, "largest_sparse_rows", lambda *_: most)
    record = ffn_path.kernel_record("cuda", torch.float32, 16)
    assert (record["name"], record["isa"]) == ("cuda", "sm_90")
    assert reason in record["reason"]
    assert bool(record["reason"]) == bool(reason)


def test_counts_are_of_the_moment_of_the_copy():
    counts = torch.zeros((2, 4), dtype=torch.int64)
    copy = counter_copy.CounterCopy([counts])
    counts += 5
    assert copy.done()
    assert copy.wait() == [[[0] * 4] * 2]
