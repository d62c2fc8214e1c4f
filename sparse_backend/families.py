"""The checkpoint families that are served: what config.json and tensors must be like, and which model class computes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sparse_backend.errors import UserError


@dataclass(frozen=True)
class Family:
    """Checkpoints with one ``model_type``."""

    model_type: str
    architectures: tuple[str, ...]
    """What their config.json may name."""
    model_class: str
    """The vLLM model class of ours that computes them, in ``sparse_backend.vllm_plugin.models``."""
    brings_code: bool = False
    """Published with modelling code (``auto_map``), which our classes stand in for. It is never run."""


FAMILIES = (
    Family("llama", ("LlamaForCausalLM", "SparseLlamaForCausalLM"), "SparseLlamaForCausalLM"),
    Family("sparsellama", ("SparseLlamaForCausalLM", "LlamaForCausalLM"), "SparseLlamaForCausalLM", brings_code=True),
    Family("llama_sparse_relu", ("SparseLlamaForCausalLM",), "SparseLlamaForCausalLM", brings_code=True),
    Family("mistral", ("MistralForCausalLM",), "SparseMistralForCausalLM"),
    Family("sparsemistral", ("SparseMistralForCausalLM",), "SparseMistralForCausalLM"),
    Family("bamboo", ("BambooForCausalLM",), "SparseBambooForCausalLM", brings_code=True),
    Family("qwen2", ("Qwen2ForCausalLM",), "SparseQwen2ForCausalLM"),
    Family("sparseqwen2", ("SparseQwen2ForCausalLM",), "SparseQwen2ForCausalLM"),
    Family("qwen3", ("Qwen3ForCausalLM",), "SparseQwen3ForCausalLM"),
    Family("sparseqwen3", ("SparseQwen3ForCausalLM",), "SparseQwen3ForCausalLM"),
    Family("minicpm", ("MiniCPMForCausalLM",), "SparseMiniCPMForCausalLM", brings_code=True),
)
"""SparseLLM's ProSparse is "sparsellama", its ReluLLaMA "llama"; SakanaAI's SparseLM "llama_sparse_relu"; PowerInfer's Bamboo and
TurboSparse-Mistral "bamboo"; OpenBMB's MiniCPM-S "minicpm", its LLaMA-format copy "llama". The offline job exports the others."""

MODEL_CLASSES = tuple(dict.fromkeys(family.model_class for family in FAMILIES))

# Fields of config.json that must be positive integers; the second kind may be missing or null.
_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "vocab_size",
)
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim")
_LARGEST_COUNT = 2**31 - 1

# Architectures with ReLU whose feed-forward layers have no gate.
_UNGATED = ("OPTForCausalLM", "FalconForCausalLM", "RWForCausalLM", "PhiForCausalLM", "GPTNeoXForCausalLM")


def family_of(config: Mapping[str, Any], where: str | Path = "config.json") -> Family:
    """The family a config.json belongs to.

    Args:
        config: its content.
        where: the file, for the error.

    Raises:
        UserError: it is none that is served; or it names code of its own where the family has none, so that what it computes
            is not known.
    """
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture in _UNGATED:
        raise UserError(
            f"{where} names the architecture {architecture!r}, whose feed-forward layers have no gate. Served are gated ones,"
            " (act(gate) * up) down: the sparse kernels compute no other. Serve it with plain vLLM."
        )
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type != model_type or architecture not in family.architectures:
            continue
        if config.get("auto_map") and not family.brings_code:
            raise UserError(
                f"{where} names code of its own (auto_map) for model_type {model_type!r}, which needs none: what the model"
                " computes is not known, and code in a checkpoint is never run. Remove auto_map if the model is the plain"
                f" {architecture} with the activation that hidden_act names."
            )
        return family
    served = "; ".join(f"{family.model_type}: {' or '.join(family.architectures)}" for family in FAMILIES)
    raise UserError(
        f"{where} names the architecture {architectures!r} and model_type {model_type!r}; served are (model_type:"
        f" architecture) {served}."
    )


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Check the sizes in the config.json of a served family.

    Raises:
        UserError: a field is missing or no size, or the kernels cannot compute it.
    """
    present = [field for field in _OPTIONAL_COUNTS if config.get(field) is not None]
    for field in (*_COUNTS, *present):
        value = config.get(field)
        if type(value) is not int or not 0 < value <= _LARGEST_COUNT:
            raise UserError(
                f"{where}: {field} is {value!r}; it must be a positive integer of at most {_LARGEST_COUNT}."
            )
    # In each pair the second must divide the first.
    pairs = [("hidden_size", "num_attention_heads")]
    if "num_key_value_heads" in present:
        pairs.append(("num_attention_heads", "num_key_value_heads"))
    for whole, part in pairs:
        if config[whole] % config[part]:
            raise UserError(f"{where}: {whole} is {config[whole]}, which is no multiple of {part}, {config[part]}.")
    for field in ("hidden_size", "intermediate_size"):
        if config[field] % 8:
            raise UserError(f"{where}: {field} is {config[field]}; the kernels compute multiples of 8 only.")
    if config.get("mlp_bias"):
        raise UserError(f"{where}: mlp_bias is set; feed-forward layers with biases are not supported.")
    if config.get("num_experts"):
        raise UserError(f"{where}: num_experts is {config['num_experts']}; mixtures of experts are not supported.")
    # SakanaAI's config can describe two more kinds of layer.
    if config.get("sparsity_gated_mlp") is False:
        raise UserError(f"{where}: sparsity_gated_mlp is false; feed-forward layers without a gate are not supported.")
    width = config.get("sparsity_new_intermediate_size")
    if width is not None and width != config["intermediate_size"]:
        raise UserError(
            f"{where}: sparsity_new_intermediate_size is {width} and intermediate_size {config['intermediate_size']}. Set"
            " both to the number of neurons that the weights have."
        )


def check_tensors(config: Mapping[str, Any], shards: Sequence[Path], folder: Path) -> None:
    """Check that the shards hold every feed-forward matrix under its name and, unless quantised, in its shape.

    Raises:
        UserError: a shard cannot be read, or a matrix is missing or has another shape.
    """
    d_model, d_ff = config["hidden_size"], config["intermediate_size"]
    shapes = {"gate_proj": [d_ff, d_model], "up_proj": [d_ff, d_model], "down_proj": [d_model, d_ff]}
    found: dict[str, list[int]] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as tensors:
                names = [name for name in tensors.keys() if ".mlp." in name]  # noqa: SIM118 - not a dict
                found |= {name: tensors.get_slice(name).get_shape() for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{shard} is not a complete safetensors file ({error}). Copy the checkpoint again."
            ) from None
    quantised = bool(config.get("quantization_config"))
    quantised_layers = {name.rpartition(".")[0] for name in found} if quantised else set()
    for layer in range(config["num_hidden_layers"]):
        for part, shape in shapes.items():
            name = f"model.layers.{layer}.mlp.{part}"
            if name in quantised_layers:
                continue
            if f"{name}.weight" not in found:
                others = sorted({other for other in found if other.startswith(f"model.layers.{layer}.")} or set(found))
                has = f"it has {', '.join(others[:4])}" if others else "none has .mlp. in its name"
                raise UserError(
                    f"{folder} has no tensor {name}.weight, which num_hidden_layers {config['num_hidden_layers']} calls for;"
                    f" {has}. A gated feed-forward layer is gate_proj, up_proj and down_proj: convert the checkpoint to the"
                    " names of its family, or copy what is missing."
                )
            if found[f"{name}.weight"] != shape:
                raise UserError(
                    f"{folder}: the tensor {name}.weight is {found[f'{name}.weight']}, config.json makes it {shape}. They do not"
                    " belong together: copy the checkpoint again."
                )
