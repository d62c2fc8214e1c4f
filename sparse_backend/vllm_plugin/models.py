"""vLLM's model classes with our feed-forward layers: attention, loading and parallelism are vLLM's, the MLP is ours."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.lora.utils import is_in_target_modules
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.minicpm import MiniCPMForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from sparse_backend.activation import Activation
from sparse_backend.vllm_plugin import norm, padding
from sparse_backend.vllm_plugin.ffn_path import layer_table, max_sparse_rows_per_layer, plugin_settings
from sparse_backend.vllm_plugin.mlp import SparseGatedMLP
from sparse_backend.vllm_plugin.step_records import StepRecordWriter, WorkerFacts, file_of, most_rows

logger = logging.getLogger(__name__)

_LINEAR_LAYERS = ("gate_up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


class SparseFeedForward:
    """What makes a model class of vLLM's sparse: mixed in before it."""

    if TYPE_CHECKING:
        model: nn.Module
        packed_modules_mapping: dict[str, list[str]]

    _step_records: StepRecordWriter | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model for one worker.

        Raises:
            UserError: the config's activation is not one we compute.
            ValueError: the neurons cannot be shared out among the tensor-parallel ranks.
        """
        config = vllm_config.model_config.hf_config
        d_ff: int = config.intermediate_size
        ranks = get_tensor_model_parallel_world_size()
        if d_ff % (8 * ranks):
            raise ValueError(
                f"--tensor-parallel-size {ranks} would give each rank {d_ff / ranks:g} of the {d_ff} neurons"
                " (intermediate_size) of a layer, but the kernels take multiples of 8. Give a number that divides"
                f" {d_ff // 8}."
            )
        activation = Activation.from_hf_config(config.to_dict())
        if not current_platform.is_cpu():
            padding.check_mask()
        with _as_swish(config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        limits = max_sparse_rows_per_layer(vllm_config)
        for index, layer in enumerate(self.model.layers):
            if isinstance(layer, PPMissingLayer):
                continue
            layer.mlp = SparseGatedMLP(
                layer.mlp,
                layer_index=index,
                activation=activation,
                max_sparse_rows=limits[index],
                dense_reason=self._dense_reason(layer.mlp, vllm_config),
            )
            if norm.pays(vllm_config.model_config.dtype, config.hidden_size, layer.mlp.max_sparse_rows):
                for name in _NORMS:
                    setattr(layer, name, norm.EarlyRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        if get_tensor_model_parallel_rank() == 0:
            self._tell_of_dense_layers()
        self._step_records = self._count_rows(vllm_config) if plugin_settings(vllm_config).count_rows else None

    def process_weights_after_loading(self) -> None:
        """Called by vLLM when all weights are in place."""
        for mlp in self._sparse_mlps():
            mlp.make_neuron_major()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As vLLM's; called once a step behind the layers and outside their graphs, it also passes the rows' counts on."""
        self._publish_step_record()
        return super().compute_logits(hidden_states)  # type: ignore[misc]

    def reset_step_records(self) -> None:
        """Forget the rows counted so far, once the layers' counters are zero."""
        if self._step_records is not None:
            self._step_records.reset()

    def _publish_step_record(self) -> None:
        if self._step_records is not None:
            self._step_records.publish()

    def _count_rows(self, vllm_config: VllmConfig) -> StepRecordWriter | None:
        mlps = self._sparse_mlps()
        row_active = torch.zeros(most_rows(vllm_config), dtype=torch.int32, device=mlps[0].counters.device)
        for mlp in mlps:
            mlp.count_rows(row_active)
        if get_tensor_model_parallel_rank() > 0 or not get_pp_group().is_last_rank:
            return None
        table = layer_table(vllm_config)
        facts: WorkerFacts = {
            "neurons": sum(mlp.d_ff for mlp in mlps),
            "max_sparse_rows": [mlp.max_sparse_rows for mlp in mlps],
            "sparse_us": list(table.sparse),
            "dense_us": list(table.dense),
        }
        try:
            return StepRecordWriter(file_of(vllm_config), mlps[0].counters, row_active, facts)
        except OSError as error:
            logger.warning("The rows' counts cannot be shared, densities of requests stay unknown: %s", error)
            return None

    def _sparse_mlps(self) -> list[SparseGatedMLP]:
        return [layer.mlp for layer in self.model.layers if not isinstance(layer, PPMissingLayer)]

    def _dense_reason(self, mlp: nn.Module, vllm_config: VllmConfig) -> str:
        layers = {name: getattr(mlp, name) for name in _LINEAR_LAYERS}
        # Later vLLM puts its LoRA layers in their place, around them.
        if lora := vllm_config.lora_config:
            for name, layer in layers.items():
                for module in (name, layer.prefix):
                    if is_in_target_modules(module, lora.target_modules, self.packed_modules_mapping):
                        return "lora"
        if any(not isinstance(layer.quant_method, UnquantizedLinearMethod) for layer in layers.values()):
            return "quantization"
        return ""

    def _tell_of_dense_layers(self) -> None:
        reasons = {
            "lora": "they may have LoRA adapters (--lora-target-modules q_proj k_proj v_proj o_proj leaves them out)",
            "quantization": "their weights are quantised",
        }
        for reason, text in reasons.items():
            layers = [mlp.layer_index for mlp in self._sparse_mlps() if mlp.dense_reason == reason]
            if layers:
                logger.warning(
                    "The feed-forward layers %s are computed densely, by vLLM's own linear layers: %s.",
                    ", ".join(map(str, layers)),
                    text,
                )


@contextmanager
def _as_swish(config: PreTrainedConfig) -> Iterator[None]:
    """vLLM's own feed-forward layers, built to be replaced, refuse every other activation."""
    hidden_act, config.hidden_act = config.hidden_act, "silu"
    try:
        yield
    finally:
        config.hidden_act = hidden_act


class _SharedSampling(SparseFeedForward):
    """Of the classes whose ranks may share the sampling out."""

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What vLLM then calls in place of ``compute_logits``."""
        self._publish_step_record()
        return super().compute_logits_local(hidden_states)  # type: ignore[misc]


class SparseLlamaForCausalLM(_SharedSampling, LlamaForCausalLM):
    """LLaMA: ProSparse, ReluLLaMA, SparseLM, MiniCPM-S in LLaMA's format."""


class SparseMistralForCausalLM(_SharedSampling, MistralForCausalLM):
    """Mistral."""


class SparseBambooForCausalLM(_SharedSampling, MistralForCausalLM):
    """Mistral with dReLU: Bamboo and TurboSparse-Mistral.

    TurboSparse's folders also hold predictors, small networks that guess from the residual stream which neurons will be active
    and switch the others off. Here it is computed which ones are, so that they are not loaded.
    """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Called by vLLM with the checkpoint's tensors; returns the names of the parameters filled."""
        return super().load_weights((name, weight) for name, weight in weights if ".mlp.predictor." not in name)


class SparseQwen2ForCausalLM(SparseFeedForward, Qwen2ForCausalLM):
    """Qwen2."""


class SparseQwen3ForCausalLM(SparseFeedForward, Qwen3ForCausalLM):
    """Qwen3."""


class SparseMiniCPMForCausalLM(SparseFeedForward, MiniCPMForCausalLM):
    """MiniCPM: MiniCPM-S."""
