"""The LLaMA family with sparse feed-forward layers: attention, loading and parallelism are vLLM's, the MLP is ours."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from sparse_backend.activation import Activation
from sparse_backend.vllm_plugin import padding
from sparse_backend.vllm_plugin.ffn_path import layer_table, max_sparse_rows_per_layer, plugin_settings
from sparse_backend.vllm_plugin.mlp import SparseGatedMLP
from sparse_backend.vllm_plugin.norm import norm_class
from sparse_backend.vllm_plugin.row_counts import RowCountsWriter, file_of, most_rows


class SparseLlamaDecoderLayer(nn.Module):
    """vLLM's LLaMA decoder layer with our MLP in it."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        layer_index = extract_layer_index(prefix)
        bias = getattr(config, "attention_bias", False)
        self.self_attn = LlamaAttention(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            bias=bias,
            bias_o_proj=bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        max_sparse_rows = max_sparse_rows_per_layer(vllm_config)[layer_index]
        self.mlp = SparseGatedMLP(
            layer_index=layer_index,
            d_model=config.hidden_size,
            d_ff=config.intermediate_size,
            activation=Activation.from_hf_config(config.to_dict()),
            max_sparse_rows=max_sparse_rows,
            prefix=f"{prefix}.mlp",
        )
        norm = norm_class(vllm_config.model_config.dtype, config.hidden_size, max_sparse_rows)
        self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pre-norm decoder layer on [rows, d_model]; the residual stream is carried beside the hidden states."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class SparseLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with ReLU or FATReLU feed-forward layers on the sparse op (SparseLLM's ProSparse and ReLULLaMA checkpoints)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model for one worker.

        Raises:
            UserError: the config's activation is not one we compute.
            ValueError: LoRA or quantisation is asked for, which the op does not know yet and would silently ignore; or the
                neurons cannot be shared out among the tensor-parallel ranks.
        """
        if vllm_config.lora_config is not None:
            raise ValueError(
                "--enable-lora: the sparse feed-forward layers do not apply LoRA adapters; serve without it."
            )
        if vllm_config.quant_config is not None:
            raise ValueError(
                "--quantization: the sparse feed-forward layers need weights that are not quantised; serve without it."
            )
        d_ff: int = vllm_config.model_config.hf_config.intermediate_size
        ranks = get_tensor_model_parallel_world_size()
        if d_ff % (8 * ranks):
            raise ValueError(
                f"--tensor-parallel-size {ranks} would give each rank {d_ff / ranks:g} of the {d_ff} neurons"
                " (intermediate_size) of a layer, but the kernels take multiples of 8. Give a number that divides"
                f" {d_ff // 8}."
            )
        if not current_platform.is_cpu():
            padding.check_mask()
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SparseLlamaDecoderLayer)
        self._row_counts: RowCountsWriter | None = None
        if plugin_settings(vllm_config).count_rows:
            self._count_rows(vllm_config)

    def process_weights_after_loading(self) -> None:
        """Called by vLLM when all weights are in place."""
        for layer in self.model.layers:
            if isinstance(layer, SparseLlamaDecoderLayer):
                layer.mlp.make_neuron_major()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As vLLM's; called once a step behind the layers and outside their graphs, it also passes the rows' counts on."""
        if self._row_counts is not None:
            self._row_counts.publish()
        return super().compute_logits(hidden_states)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What vLLM calls instead where ranks share the sampling out."""
        if self._row_counts is not None:
            self._row_counts.publish()
        return super().compute_logits_local(hidden_states)

    def reset_row_counts(self) -> None:
        """Forget the rows counted so far, once the layers' counters are zero."""
        if self._row_counts is not None:
            self._row_counts.reset()

    def _count_rows(self, vllm_config: VllmConfig) -> None:
        mlps = [layer.mlp for layer in self.model.layers if isinstance(layer, SparseLlamaDecoderLayer)]
        row_active = torch.zeros(most_rows(vllm_config), dtype=torch.int32, device=mlps[0].counters.device)
        for mlp in mlps:
            mlp.count_rows(row_active)
        if get_tensor_model_parallel_rank() == 0 and get_pp_group().is_last_rank:
            table = layer_table(vllm_config)
            self._row_counts = RowCountsWriter(
                file_of(vllm_config),
                mlps[0].counters,
                row_active,
                {
                    "neurons": sum(mlp.d_ff for mlp in mlps),
                    "max_sparse_rows": [mlp.max_sparse_rows for mlp in mlps],
                    "sparse_us": list(table.sparse),
                    "dense_us": list(table.dense),
                },
            )
