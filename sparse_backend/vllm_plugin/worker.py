"""What our server can ask of a vLLM worker (``worker_extension_cls``): the live sparsity counters."""

from typing import TYPE_CHECKING, Any

import torch

from sparse_backend.ffn import native
from sparse_backend.ffn.counters import ACTIVE, ROWS, STEPS, UNION
from sparse_backend.vllm_plugin.mlp import SparseGatedMLP
from sparse_backend.vllm_plugin.snapshot import PATHS, LayerSnapshot, Path, PathCounts, SparsitySnapshot


class SparsityWorkerExtension:
    """Mixed into vLLM's worker class; each method is callable through ``collective_rpc`` by its name."""

    if TYPE_CHECKING:
        device: torch.device
        model_runner: Any

    def _sparse_mlps(self) -> list[SparseGatedMLP]:
        return [module for module in self.model_runner.get_model().modules() if isinstance(module, SparseGatedMLP)]

    def sparsity_snapshot(self) -> SparsitySnapshot:
        """Copy the counters of every feed-forward layer this worker holds."""
        kernel = native.kernel_info(self.device.type)
        return {
            "kernel": {"name": kernel.name, "isa": kernel.isa, "reason": kernel.reason},
            "layers": [_layer_snapshot(mlp) for mlp in self._sparse_mlps()],
        }

    def sparsity_reset(self) -> None:
        """Set all counters to zero. Called once the engine is ready, so that warm-up rows are not counted."""
        for mlp in self._sparse_mlps():
            mlp.counters.zero_()


def path_counts(mlp: SparseGatedMLP) -> dict[Path, PathCounts]:
    """The counters of one layer, by name."""
    counts = mlp.counters.tolist()
    return {
        path: {
            "rows": counts[index][ROWS],
            "active": counts[index][ACTIVE],
            "union": counts[index][UNION],
            "steps": counts[index][STEPS],
        }
        for index, path in enumerate(PATHS)
    }


def _layer_snapshot(mlp: SparseGatedMLP) -> LayerSnapshot:
    return {
        "layer": str(mlp.layer_index),
        "d_ff": mlp.d_ff,
        "max_sparse_rows": mlp.max_sparse_rows,
        "paths": path_counts(mlp),
    }
