"""A worker extension that records what the feed-forward layers are given, and counts active neurons from it again."""

from typing import TypedDict

import torch
from torch import nn

from sparse_backend.bench import synthetic_loader  # noqa: F401 - workers import this module, and need its load format
from sparse_backend.ffn import op
from sparse_backend.vllm_plugin.snapshot import Path, PathCounts
from sparse_backend.vllm_plugin.worker import SparsityWorkerExtension, path_counts


class LayerRecount(TypedDict):
    """One layer over a recorded stretch, counted three times."""

    layer: int
    counters: PathCounts
    """What the kernel counted."""
    same_gates: PathCounts
    """A plain PyTorch count over the very gate (dReLU: and up) values that the kernel computes for the recorded inputs."""
    gates: int
    """Values that were compared with the threshold."""
    moved: int
    """Those of them on another side of it when recomputed in float64."""
    moved_beyond_rounding: int
    """Those of them further from the threshold than the rounding error of the layer's dtype can explain."""


class RecordingWorkerExtension(SparsityWorkerExtension):
    """Works in eager mode only: compiled graphs do not call module hooks."""

    _inputs: dict[int, list[torch.Tensor]]
    _hooks: list[torch.utils.hooks.RemovableHandle]

    def start_recording(self) -> None:
        """Set the counters to zero and keep a copy of each input from now on."""
        self.sparsity_reset()
        self._inputs = {mlp.layer_index: [] for mlp in self._sparse_mlps()}

        def keep(mlp: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._inputs[mlp.layer_index].append(arguments[0].clone())

        self._hooks = [mlp.register_forward_pre_hook(keep) for mlp in self._sparse_mlps()]

    def stop_recording(self) -> list[LayerRecount]:
        """Stop, and count the recorded stretch again, layer by layer."""
        for hook in self._hooks:
            hook.remove()
        return [self._recount(mlp) for mlp in self._sparse_mlps()]

    def _recount(self, mlp: nn.Module) -> LayerRecount:
        weight = mlp.gate_up_proj.weight
        compared = [(op.gate_values, weight[: mlp.d_ff]), (op.up_values, weight[mlp.d_ff :])][: 2 if mlp.drelu else 1]
        threshold = torch.tensor(mlp.threshold, dtype=torch.float32)
        same: PathCounts = {"rows": 0, "active": 0, "union": 0, "steps": 0}
        gates = moved = beyond = 0
        for x in self._inputs[mlp.layer_index]:
            active = torch.ones(x.shape[0], mlp.d_ff, dtype=torch.bool)
            for values_of, rows_of in compared:
                values = values_of(x, weight, mlp.max_sparse_rows)
                above = values > threshold
                active &= above
                gates += above.numel()
                exact = x.double() @ rows_of.double().t()
                differs = (exact > threshold.double()) != above
                # |computed - exact| <= n * u * sum|x_i w_i| for any order of summation (Higham 2002, eq. 3.5), u the unit
                # roundoff.
                bound = x.shape[1] * torch.finfo(torch.float32).eps * (x.double().abs() @ rows_of.double().abs().t())
                if values.dtype != torch.float32:
                    bound += torch.finfo(values.dtype).eps * exact.abs()
                moved += int(differs.sum())
                beyond += int((differs & ((exact - threshold).abs() > bound)).sum())
            same["rows"] += x.shape[0]
            same["active"] += int(active.sum())
            same["union"] += int(active.any(0).sum())
            same["steps"] += 1
        path: Path = "sparse" if mlp.max_sparse_rows > 0 else "dense"
        return {
            "layer": mlp.layer_index,
            "counters": path_counts(mlp.counters.tolist())[path],
            "same_gates": same,
            "gates": gates,
            "moved": moved,
            "moved_beyond_rounding": beyond,
        }
