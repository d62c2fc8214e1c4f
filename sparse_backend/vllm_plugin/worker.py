"""What our server can ask of a vLLM worker (``worker_extension_cls``): the live sparsity counters."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.sampler import Sampler

from sparse_backend.ffn.counters import ACTIVE, ROWS, STEPS, UNION, VIEWS
from sparse_backend.vllm_plugin.counter_copy import CounterCopy
from sparse_backend.vllm_plugin.ffn_path import kernel_record
from sparse_backend.vllm_plugin.mlp import SparseGatedMLP
from sparse_backend.vllm_plugin.snapshot import PATHS, LayerSnapshot, Path, PathCounts, SparsitySnapshot


class SparsityWorkerExtension:
    """Mixed into vLLM's worker class; each method is callable through ``collective_rpc`` by its name."""

    if TYPE_CHECKING:
        device: torch.device
        model_runner: Any

    _sparsity_copy: CounterCopy

    def _sparse_mlps(self) -> list[SparseGatedMLP]:
        return [module for module in self.model_runner.get_model().modules() if isinstance(module, SparseGatedMLP)]

    def sparsity_snapshot(self) -> SparsitySnapshot:
        """The counters of every feed-forward layer this worker holds, now: on a GPU, waits for the steps launched so far."""
        return self._snapshot(self._copy_counters())

    def sparsity_snapshot_begin(self) -> SparsitySnapshot | None:
        """The same for a worker that must not be kept waiting: begins a snapshot, and answers as ``sparsity_snapshot_poll``."""
        self._sparsity_copy = self._copy_counters()
        return self.sparsity_snapshot_poll()

    def sparsity_snapshot_poll(self) -> SparsitySnapshot | None:
        """The snapshot begun last, or None while a GPU is busy with the steps launched before it; never waits.

        All workers that begin at the same time give the counters of the same step, whenever they are asked for them.
        """
        return self._snapshot(self._sparsity_copy) if self._sparsity_copy.done() else None

    def sparsity_reset(self) -> None:
        """Set all counters to zero. Called once the engine is ready, so that warm-up rows are not counted."""
        for mlp in self._sparse_mlps():
            mlp.counters.zero_()
        if hasattr(model := self.model_runner.get_model(), "reset_step_records"):
            model.reset_step_records()

    @torch.inference_mode()
    def warm_up_sampler(self) -> None:
        """Have vLLM compile now what it compiles when a request first asks for log-probabilities.

        On a CPU that takes many seconds, in which the engine takes no step: requests would wait, and it would count as hung.
        """
        # The GPU's newer model runner has another sampler, whose kernels vLLM warms up itself.
        if isinstance(sampler := self.model_runner.sampler, Sampler):
            logprobs = torch.zeros(1, self.model_runner.model_config.get_vocab_size(), device=self.device)
            sampler.gather_logprobs(logprobs, 1, torch.zeros(1, dtype=torch.int64, device=self.device))

    def _copy_counters(self) -> CounterCopy:
        return CounterCopy([mlp.counters for mlp in self._sparse_mlps()])

    def _snapshot(self, copy: CounterCopy) -> SparsitySnapshot:
        model = self.model_runner.model_config
        layers = list(zip(self._sparse_mlps(), copy.wait(), strict=True))
        for mlp, counts in layers:
            if mlp.drelu:
                mlp.put_sparser_view_first(counts[VIEWS])
        d_model = model.hf_config.hidden_size
        return {
            "kernel": kernel_record(self.device.type, model.dtype, d_model),
            "layers": [_layer_snapshot(mlp, d_model * model.dtype.itemsize, counts) for mlp, counts in layers],
        }


def path_counts(counts: list[list[int]]) -> dict[Path, PathCounts]:
    """The counters [path][kind] of one layer, by name."""
    return {
        path: {
            "rows": counts[index][ROWS],
            "active": counts[index][ACTIVE],
            "union": counts[index][UNION],
            "steps": counts[index][STEPS],
        }
        for index, path in enumerate(PATHS)
    }


def _layer_snapshot(mlp: SparseGatedMLP, neuron_bytes: int, counts: list[list[int]]) -> LayerSnapshot:
    return {
        "layer": str(mlp.layer_index),
        "d_ff": mlp.d_ff,
        "neuron_bytes": neuron_bytes,
        "max_sparse_rows": mlp.max_sparse_rows,
        "dense_reason": mlp.dense_reason,
        "paths": path_counts(counts),
    }
