"""The gated feed-forward layer of our vLLM models: vLLM's own linear layers hold the weights, our op computes."""

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.platforms import current_platform

from sparse_backend.activation import Activation
from sparse_backend.ffn import counters, gated_activation, sparse_gated_ffn
from sparse_backend.ffn.counters import FIRST, ROWS, SECOND, VIEWS
from sparse_backend.vllm_plugin.padding import gated_activation_of_real_rows, sparse_gated_ffn_of_real_rows

# Rows of the dense path after which it is known which view is the sparser one; and by how much it must be.
_VIEW_ROWS = 1024
_VIEW_MARGIN = 0.98


class SparseGatedMLP(nn.Module):
    """y = (act(x gate^T) * (x up^T)) down^T, computed for active neurons only where that pays.

    Takes the place of one of vLLM's gated feed-forward layers, whose linear layers it keeps: loading and tensor-parallel
    sharding are vLLM's. Each rank holds the same share of the neurons in gate, up and down; partial outputs are summed over
    ranks.
    """

    def __init__(
        self, stock: nn.Module, *, layer_index: int, activation: Activation, max_sparse_rows: int, dense_reason: str
    ) -> None:
        """Args:
        stock: a layer of vLLM's, with ``gate_up_proj`` and ``down_proj``, before its weights are loaded.
        layer_index: of the decoder layer.
        activation: in place of the stock layer's.
        max_sparse_rows: up to how many rows the sparse path is taken.
        dense_reason: why the linear layers must compute by themselves, as the op knows only what they are without an
            adapter or quantisation; "" where it may read their weights.
        """
        super().__init__()
        self.layer_index = layer_index
        self.threshold = activation.threshold
        self.drelu = activation.kind == "drelu"
        self.dense_reason = dense_reason
        self.max_sparse_rows = 0 if dense_reason else max_sparse_rows
        self.gate_up_proj, self.down_proj = stock.gate_up_proj, stock.down_proj
        if not dense_reason:
            # On a CPU vLLM would repack the weights for its own matmul and leave `.weight` empty; our op reads `.weight`.
            self.gate_up_proj._cpu_skip_gemm_dispatch = True
            self.down_proj._cpu_skip_gemm_dispatch = True
        self.d_ff = self.down_proj.input_size_per_partition
        self.tp_size = self.down_proj.tp_size
        # On a CPU no step is padded, and an op less is called.
        on_cpu = current_platform.is_cpu()
        self.gated_ffn = sparse_gated_ffn if on_cpu else sparse_gated_ffn_of_real_rows
        self.gated_activation = gated_activation if on_cpu else gated_activation_of_real_rows
        self.row_active: torch.Tensor | None
        self.register_buffer("row_active", None, persistent=False)
        self.register_buffer(
            "counters", counters.new_counters(torch.get_default_device(), drelu=self.drelu), persistent=False
        )

    def make_neuron_major(self) -> None:
        """Transpose down_proj once, in place of the original, so that a neuron's down weights are contiguous."""
        if not self.dense_reason:
            weight = self.down_proj.weight
            weight.data = weight.data.t().contiguous()

    def put_sparser_view_first(self, views: list[int]) -> None:
        """With dReLU, exchange gate and up rows if fewer up values than gates are above the threshold.

        The sparse path reads all rows of the first half of gate_up_proj, and of the second those that the first calls for.
        Which half is which changes no result. Call it between steps, on the thread that runs the model.

        Args:
            views: the last row of the counters.
        """
        if self.dense_reason or views[ROWS] < _VIEW_ROWS or views[SECOND] > _VIEW_MARGIN * views[FIRST]:
            return
        first, second = self.gate_up_proj.weight.data.chunk(2)
        held = first.clone()
        first.copy_(second)
        second.copy_(held)
        self.counters[VIEWS].zero_()
        if first.is_cuda:
            # Kernels read gate weights ahead of what was queued before them.
            torch.cuda.synchronize()

    def count_rows(self, row_active: torch.Tensor) -> None:
        """From now on, add each row's active neurons to ``row_active``, int32, which other layers may share."""
        self.row_active = row_active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states [rows, d_model] to [rows, d_model], same dtype."""
        if self.dense_reason:
            gate_up, _ = self.gate_up_proj(x)
            h = self.gated_activation(
                gate_up, self.threshold, self.counters, drelu=self.drelu, row_active=self.row_active
            )
            y, _ = self.down_proj(h)
            return y
        y = self.gated_ffn(
            x,
            self.gate_up_proj.weight,
            self.down_proj.weight,
            self.threshold,
            self.counters,
            self.max_sparse_rows,
            drelu=self.drelu,
            row_active=self.row_active,
        )
        return tensor_model_parallel_all_reduce(y) if self.tp_size > 1 else y
