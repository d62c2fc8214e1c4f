"""The contract with vLLM 0.32's server internals: flags, routes, error handlers. Starts no engine."""

import itertools
import json
import os
import signal
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname

from server.app import api_app
from server.paths import API_PATHS, CHAT_PATH, COMPLETIONS_PATH, DETOKENIZE_PATH, TOKENIZE_PATH
from server.policy import SERVED_FIELDS
from server.settings import Settings
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.scheduler import SparseScheduler
from tests.checkpoints import edit_config, write_tiny_checkpoint
from tests.vllm_plugin.simulated_card import GRAPH_SIZES


@pytest.fixture(scope="module")
def compat():
    from server import vllm_compat

    return vllm_compat


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> dict[str, str]:
    """Of each test a copy of its own, which the defaults for a CPU go into."""
    copy = dict(os.environ)
    monkeypatch.setattr(os, "environ", copy)
    return copy


def parse(compat, folder: Path, *flags: str, **settings: object) -> Namespace:
    return compat.parse_flags(
        Settings.load({"model": folder, "vllm_flags": flags, **settings}), Checkpoint.open(folder)
    )


def test_settings_become_vllm_arguments(compat, folder):
    arguments = parse(compat, folder, "--max-num-seqs", "3", "--enforce-eager", ffn_path="dense", dtype="float32")
    assert arguments.model == str(folder)
    assert arguments.served_model_name == ["tiny"]
    assert arguments.dtype == "float32"
    assert arguments.additional_config == {"prosparse": {"ffn_path": "dense", "count_rows": True}}
    assert resolve_obj_by_qualname(arguments.scheduler_cls) is SparseScheduler
    assert arguments.hf_overrides == {"architectures": ["SparseLlamaForCausalLM"]}
    assert (arguments.max_num_seqs, arguments.enforce_eager, arguments.trust_remote_code) == (3, True, False)
    assert parse(compat, folder, served_model_name="m").served_model_name == ["m"]


def test_prompts_must_be_allowed_in_pieces(compat, folder):
    with pytest.raises(UserError, match="--batching sparse reads prompts in pieces"):
        parse(compat, folder, "--no-enable-chunked-prefill", batching="sparse")
    parse(compat, folder, "--no-enable-chunked-prefill")


def test_dtype_auto_is_left_to_the_checkpoint(compat, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    edit_config(folder, dtype="float32")
    assert parse(compat, folder).dtype == Checkpoint.open(folder).engine_dtype("auto") == "float32"


def test_float16_is_for_gpus(compat, tmp_path, monkeypatch):
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    edit_config(folder, dtype="float16")
    assert parse(compat, folder).dtype == "bfloat16"
    with pytest.raises(UserError, match="--dtype float16 needs a GPU"):
        parse(compat, folder, dtype="float16")
    monkeypatch.setattr(compat.current_platform, "is_cpu", lambda: False)
    assert parse(compat, folder).dtype == "float16"
    assert parse(compat, folder, dtype="float16").dtype == "float16"
    assert parse(compat, folder).kv_cache_memory_bytes is None


@pytest.mark.parametrize(
    ("flags", "full", "count"),
    [
        ((), 2048, 67),
        (("--max-num-batched-tokens", "600"), 600, 53),
        (("--max-num-batched-tokens", "2k"), 2000, 67),
        (("--max-num-batched-tokens", "8192"), 2048, 67),
        (("--max-num-seqs", "100"), 100, 68),
        (("--max-num-seqs", "3"), 3, 68),
        (("--performance-mode", "throughput"), 2048, 67),
    ],
)
def test_graphs_on_a_gpu_hold_prompts_too_and_full_steps(compat, folder, monkeypatch, flags, full, count):
    assert parse(compat, folder, *flags).cudagraph_capture_sizes is None
    monkeypatch.setattr(compat.current_platform, "is_cpu", lambda: False)
    assert parse(compat, folder, *flags).cudagraph_capture_sizes is None
    monkeypatch.setattr(compat.current_platform, "is_cuda", lambda: True)
    sizes = parse(compat, folder, *flags).cudagraph_capture_sizes
    assert full in sizes
    assert len(sizes) == count
    # Each is at most an eighth larger than the one before, or eight rows.
    assert all(after <= max(before * 9 / 8, before + 8) for before, after in itertools.pairwise(sizes))
    assert set(GRAPH_SIZES) <= {*sizes, *range(sizes[-1], 2049)}


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-cudagraph-capture-size", "256"),
        ("-cc.max_cudagraph_capture_size=256",),
        ("-cc.cudagraph_capture_sizes=[4]",),
        ("-cc.compile_sizes=[1000]",),
        ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'),
        ("--spec-method", "ngram"),
        ("--spec-model", "folder"),
        ("--spec-tokens", "2"),
        ("--performance-mode", "interactivity"),
    ],
)
def test_graphs_are_vllms_where_the_user_chooses(compat, folder, monkeypatch, flags):
    monkeypatch.setattr(compat.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(compat.current_platform, "is_cuda", lambda: True)
    assert parse(compat, folder, *flags).cudagraph_capture_sizes is None
    assert parse(compat, folder, "--cudagraph-capture-sizes", "1", "2").cudagraph_capture_sizes == [1, 2]


@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        ((), None),
        (("-tp", "2"), "0,1,2|3,4,5"),
        (("-dp", "2", "-tp", "2"), "0|1,2|3|4,5"),
        (("-dp", "4", "-dpl", "1", "-tp", "2"), "0,1,2|3,4,5"),
        (("-pp", "2", "-tp", "4"), "0|0|1|2|3|3|4|5"),
    ],
)
def test_cpu_workers_share_the_cores_out(compat, folder, monkeypatch, flags, bound):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(compat, "_can_compile", lambda: True)
    monkeypatch.setattr(compat.os, "sched_getaffinity", lambda _: set(range(6)))
    parse(compat, folder, *flags)
    assert os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == bound
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "5")
    parse(compat, folder, *flags)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "5"


def test_products_kept_for_numbers_of_tokens_are_bounded_on_a_cpu(compat, folder, monkeypatch):
    monkeypatch.setattr(compat, "_can_compile", lambda: True)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is undone
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    parse(compat, folder)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    assert os.environ["LRU_CACHE_CAPACITY"] == "7", "what the user has set stays"


def test_stages_of_a_pipeline_are_scheduled_by_vllm(compat, folder, monkeypatch):
    monkeypatch.setattr(compat, "_can_compile", lambda: True)
    arguments = parse(compat, folder, "-pp", "2")
    assert arguments.scheduler_cls is None
    assert not arguments.additional_config["prosparse"]["count_rows"]
    with pytest.raises(UserError, match="--batching sparse does not work with --pipeline-parallel-size"):
        parse(compat, folder, "-pp", "2", batching="sparse")
    with pytest.raises(UserError, match="--step-log does not work with --pipeline-parallel-size"):
        parse(compat, folder, "--pipeline-parallel-size", "2", step_log=folder / "steps")


@pytest.mark.parametrize("can_compile", [True, False])
def test_an_uncompiled_pipeline_on_a_cpu_is_refused(compat, folder, monkeypatch, can_compile):
    monkeypatch.setattr(compat, "_can_compile", lambda: can_compile)
    flags = ("--enforce-eager",) if can_compile else ()
    with pytest.raises(UserError, match=r"--pipeline-parallel-size 2 on a CPU needs the compiled model"):
        parse(compat, folder, "-pp", "2", *flags)


class Replicas:
    """Stands in for vLLM's engines, of two tensor-parallel workers each, who are done with a copy after so many questions."""

    def __init__(self, *patience: tuple[int, int]) -> None:
        self.patience = list(patience)
        self.asked: list[str] = []

    async def call_utility_all_async(self, utility, method, *arguments):
        assert (utility, arguments) == ("collective_rpc", (None, (), None))
        self.asked.append(method)
        answers = [
            [None if left > 0 else worker_snapshot(rows=10 + replica) for left in workers]
            for replica, workers in enumerate(self.patience)
        ]
        self.patience = [(first - 1, second - 1) for first, second in self.patience]
        return answers


def worker_snapshot(rows):
    counts = {"rows": rows, "active": 5, "union": 3, "steps": 2}
    layer = {"layer": "0", "d_ff": 64, "neuron_bytes": 32, "max_sparse_rows": 4, "dense_reason": ""}
    return {"kernel": {}, "layers": [{**layer, "paths": {"sparse": counts, "dense": counts}}]}


@pytest.mark.parametrize(
    ("patience", "polls"),
    [([(0, 0)], 0), ([(1, 0)], 1), ([(0, 3)], 3), ([(0, 0), (0, 2)], 2), ([(1, 0), (0, 0), (0, 0)], 1)],
)
async def test_the_workers_are_asked_until_all_have_their_counters(compat, monkeypatch, patience, polls):
    monkeypatch.setattr(compat, "_SNAPSHOT_INTERVAL", 0)
    engine = compat.Engine.__new__(compat.Engine)
    replicas = Replicas(*patience)
    engine._llm = SimpleNamespace(engine_core=replicas)
    snapshots = await engine.snapshots()
    assert replicas.asked == ["sparsity_snapshot_begin"] + ["sparsity_snapshot_poll"] * polls
    # One for each replica, its ranks' shares joined.
    layers = [snapshot["layers"][0] for snapshot in snapshots]
    assert [layer["paths"]["sparse"]["rows"] for layer in layers] == [10 + replica for replica in range(len(patience))]
    assert all(layer["d_ff"] == 128 and layer["paths"]["sparse"]["active"] == 10 for layer in layers)


async def test_an_engine_at_rest_is_asked_and_its_workers_are_not(compat):
    from vllm.v1.engine.core import EngineCore

    asked = []

    async def ask(method):
        asked.append(method)

    engine = compat.Engine.__new__(compat.Engine)
    engine._llm = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=ask))
    await engine._ask()
    assert asked == ["is_sleeping"]
    assert callable(EngineCore.is_sleeping)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--max-num-seq", "3"), r"has no flag --max-num-seq \(did you mean --max-num-seqs\?\)"),
        (("--max-num-seqs", "many"), "vLLM cannot use the flags after `--`: argument --max-num-seqs"),
        (("stray",), "has no flag stray"),
        (("--max-model-len", "257"), "--max-model-len 257 is longer than the 256 tokens"),
        (("--max-model-len", "1k"), "--max-model-len 1000 is longer"),
        (("-cc.cudagraph_mode=FULL",), r"cudagraph_mode FULL .* gives wrong text with FlashAttention 3"),
        (("--tensor-parallel-size", "3"), r"--tensor-parallel-size 3 would give each rank 85\.3333 of the 256 neurons"),
        (("-tp", "64"), r"--tensor-parallel-size 64 would give each rank 4 .* Give a number that divides 32"),
        # Front-end flags of vLLM's that our server replaces are not even known.
        (("--ssl-keyfile", "k"), "has no flag --ssl-keyfile"),
        (("--middleware", "m.M"), "has no flag --middleware"),
    ],
)
def test_unusable_vllm_flags_are_named(compat, folder, flags, expected):
    with pytest.raises(UserError, match=expected) as caught:
        parse(compat, folder, *flags)
    assert "\n" not in str(caught.value)


def test_replicas_that_answer_to_several_servers_are_refused_under_every_name():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = {
        option
        for action in parser._actions
        if action.dest.startswith("data_parallel_")
        for option in action.option_strings
        if not option.startswith("--no-")
    }
    served = {f"--data-parallel-{name}" for name in ("size", "size-local", "address", "rpc-port", "backend")}
    served |= {"-dp", "-dpl", "-dpa", "-dpp", "-dpb"}
    Settings.load({"model": "m", "vllm_flags": [*served]})
    assert served < flags
    for flag in flags - served:
        with pytest.raises(UserError, match=f"{flag} is refused"):
            Settings.load({"model": "m", "vllm_flags": [flag]})


@pytest.mark.parametrize("length", ["256", "100", "auto"])
def test_contexts_within_the_checkpoints_pass(compat, folder, length):
    assert parse(compat, folder, "--max-model-len", length).max_model_len == (-1 if length == "auto" else int(length))


def test_limits_and_traces_are_vllms_too(compat, folder):
    arguments = parse(compat, folder, "--otlp-traces-endpoint", "http://127.0.0.1:4317", max_tokens=7, max_logprobs=50)
    assert arguments.otlp_traces_endpoint == "http://127.0.0.1:4317"
    assert arguments.override_generation_config["max_new_tokens"] == 7
    assert arguments.max_logprobs == 50
    assert parse(compat, folder).max_logprobs == 20


def test_cve_2026_22807_27893_code_in_a_checkpoint_is_not_run(compat, tmp_path):
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs

    folder = write_tiny_checkpoint(tmp_path / "tiny")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit_config(folder, model_type="sparsellama", auto_map={name: f"evil.{name}" for name in names})
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    arguments = parse(compat, folder, "--enforce-eager")
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.model_config.trust_remote_code is False
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model_config.trust_remote_code)
    assert not ran.exists()


class Models:
    """Stands in for vLLM's model list; raises what a test gives it."""

    error: Exception

    async def show_available_models(self):
        raise self.error


@pytest.fixture
async def client(compat):
    app = api_app([])
    app.state.args = Namespace(log_error_stack=False, enable_offline_docs=True)
    app.state.openai_serving_models = Models()
    compat.attach(app)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


async def test_only_the_served_paths_are_there(compat, client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths) == set(API_PATHS)
    assert (await client.get("/docs")).status_code == 200
    assert (await client.get("/static/swagger-ui-bundle.js")).status_code == 200
    assert (await client.get("/version")).json() == {"version": "0.32.0"}


async def test_the_document_describes_the_fields_that_are_served(client):
    document = (await client.get("/openapi.json")).json()
    models = document["components"]["schemas"]
    for path, names in {
        CHAT_PATH: ["ChatCompletionRequest"],
        COMPLETIONS_PATH: ["CompletionRequest"],
        TOKENIZE_PATH: ["TokenizeCompletionRequest", "TokenizeChatRequest"],
        DETOKENIZE_PATH: ["DetokenizeRequest"],
    }.items():
        described = set().union(*(models[name]["properties"] for name in names))
        # Every field that we let through is one of vLLM's.
        assert described == set(SERVED_FIELDS[path])
        assert all(models[name]["additionalProperties"] is False for name in names)
    assert (await client.get("/openapi.json")).json() == document


@pytest.mark.parametrize(
    "path",
    [
        "/v1/embeddings",
        "/v1/chat/completions/batch",
        "/v1/load_lora_adapter",
        "/collective_rpc",
        "/pause",
        "/load",
        "/v1/models/",
    ],
)
async def test_other_paths_are_openai_shaped_404(client, path):
    response = await client.post(path, json={})
    assert response.status_code == 404
    expected = {"message": "There is nothing at this path.", "type": "NotFoundError", "param": None, "code": 404}
    assert response.json() == {"error": expected}


@pytest.mark.parametrize(
    ("path", "request_", "status"),
    [
        ("/v1/completions", {"content": b"{"}, 400),
        ("/v1/completions", {"content": b""}, 400),
        ("/v1/completions", {"content": b"[" * 100_000}, 400),
        ("/v1/completions", {"content": b"\xff\xfe\x00"}, 400),
        ("/v1/completions", {"json": []}, 400),
        ("/v1/completions", {"json": {"prompt": "x", "max_tokens": "many"}}, 400),
        ("/v1/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 400),
        ("/v1/chat/completions", {"json": {"messages": "hello"}}, 400),
        ("/tokenize", {"json": {}}, 400),
        ("/v1/models", {"json": {}}, 405),
    ],
)
async def test_malformed_requests_are_openai_shaped(client, path, request_, status):
    request = {**request_, "headers": {"content-type": "application/json", **request_.get("headers", {})}}
    response = await client.post(path, **request)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status


async def test_a_bug_is_a_500_that_tells_nothing(client):
    Models.error = RuntimeError("the secret in /home/me/file")
    response = await client.get("/v1/models")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The server failed to answer this request."


async def test_a_dead_engine_is_a_503(client):
    from vllm.v1.engine.exceptions import EngineDeadError

    Models.error = EngineDeadError()
    response = await client.get("/v1/models")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    assert "retry-after" in response.headers


def test_an_engine_that_ends_by_itself_while_all_are_killed_is_no_error(compat, monkeypatch):
    first, second = (subprocess.Popen(["sleep", "60"]) for _ in range(2))

    def children(process: psutil.Process, recursive: bool) -> list[psutil.Process]:
        # The first is listed by now, and not killed yet.
        if process.pid == second.pid:
            first.terminate()
            first.wait(10)
        return []

    monkeypatch.setattr(psutil.Process, "children", children)
    monkeypatch.setattr(compat.multiprocessing, "active_children", lambda: [first, second])
    compat.kill_engines()
    assert (first.returncode, second.wait(10)) == (-signal.SIGTERM, -signal.SIGKILL)


@pytest.mark.parametrize("missing", ["compiler", "Python.h"])
def test_what_cannot_be_compiled_runs_eager(compat, folder, environment, monkeypatch, tmp_path, missing):
    if not compat.current_platform.is_cpu():
        pytest.skip("the CPU's defaults")
    monkeypatch.setattr(compat.shutil, "which", lambda _command: None if missing == "compiler" else "/usr/bin/g++")
    monkeypatch.setattr(compat.sysconfig, "get_path", lambda _name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    environment.pop("TORCH_COMPILE_DISABLE", None)
    assert parse(compat, folder).enforce_eager is (missing == "compiler")
    assert environment.get("TORCH_COMPILE_DISABLE") == ("1" if missing == "compiler" else None)
    (tmp_path / "Python.h").unlink()
    assert parse(compat, folder).enforce_eager
