"""The gated feed-forward layer of our vLLM models: vLLM's own linear layers hold the weights, our op computes."""

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from sparse_backend.activation import Activation
from sparse_backend.ffn import counters, sparse_gated_ffn
from sparse_backend.vllm_plugin.padding import sparse_gated_ffn_of_real_rows


class SparseGatedMLP(nn.Module):
    """y = (act(x gate^T) * (x up^T)) down^T, computed for active neurons only where that pays.

    The linear layers are vLLM's, so that loading and tensor-parallel sharding are vLLM's too; each rank holds the same share of
    the neurons in gate, up and down, and partial outputs are summed over ranks.
    """

    def __init__(
        self,
        *,
        layer_index: int,
        d_model: int,
        d_ff: int,
        activation: Activation,
        max_sparse_rows: int,
        prefix: str,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.threshold = activation.threshold
        self.max_sparse_rows = max_sparse_rows
        self.gate_up_proj = MergedColumnParallelLinear(
            d_model, [d_ff, d_ff], bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            d_ff, d_model, bias=False, reduce_results=False, prefix=f"{prefix}.down_proj"
        )
        # On a CPU vLLM would repack the weights for its own matmul and leave `.weight` empty; our op reads `.weight`.
        self.gate_up_proj._cpu_skip_gemm_dispatch = True
        self.down_proj._cpu_skip_gemm_dispatch = True
        self.d_ff = self.down_proj.input_size_per_partition
        self.tp_size = self.down_proj.tp_size
        # On a CPU no step is padded, and an op less is called.
        self.gated_ffn = sparse_gated_ffn if current_platform.is_cpu() else sparse_gated_ffn_of_real_rows
        self.row_active: torch.Tensor | None
        self.register_buffer("row_active", None, persistent=False)
        self.register_buffer("counters", counters.new_counters(self.gate_up_proj.weight.device), persistent=False)

    def make_neuron_major(self) -> None:
        """Transpose down_proj once, in place of the original, so that a neuron's down weights are contiguous."""
        weight = self.down_proj.weight
        weight.data = weight.data.t().contiguous()

    def count_rows(self, row_active: torch.Tensor) -> None:
        """From now on, add each row's active neurons to ``row_active``, int32, which other layers may share."""
        self.row_active = row_active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states [rows, d_model] to [rows, d_model], same dtype."""
        y = self.gated_ffn(
            x,
            self.gate_up_proj.weight,
            self.down_proj.weight,
            self.threshold,
            self.counters,
            self.max_sparse_rows,
            row_active=self.row_active,
        )
        return tensor_model_parallel_all_reduce(y) if self.tp_size > 1 else y
