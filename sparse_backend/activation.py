"""Which activation a checkpoint's gated feed-forward layers use, read from its Hugging Face config."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from sparse_backend.errors import UserError

# Names under which Hugging Face configs spell the dense activations a user is most likely to bring, and the offline job
# replaces.
DENSE_ACTIVATIONS = {
    "silu": "Swish (SiLU)",
    "swish": "Swish (SiLU)",
    "gelu": "GELU",
    "gelu_new": "GELU",
    "gelu_pytorch_tanh": "GELU",
}

# Published classes that compute ReLU whatever hidden_act says: SakanaAI's leave it at their base's.
_ALWAYS_RELU = "llama_sparse_relu"

# Whose published class applies hidden_act to up as well as to gate.
_BOTH_SIDES = "bamboo"

# The kernels compare in float32, where more than this is infinite: no neuron would ever be active.
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


class Activation(BaseModel):
    """The gate's activation: a gate value g passes unchanged where g > threshold and is 0 elsewhere.

    ReLU is threshold 0. FATReLU (Kurtz et al. 2020; ProSparse, arXiv 2402.13516, eq. 3) has a positive threshold. The
    comparison is strict and in float32, as in vLLM's FatreluAndMul; the paper writes >=, its published kernel does what we do.
    dReLU (Turbo Sparse, arXiv 2406.05955) is ReLU of the gate and of the up value: relu(gate) * relu(up).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["relu", "fatrelu", "drelu"]
    threshold: float = Field(default=0.0, ge=0.0, le=_LARGEST_FLOAT32, allow_inf_nan=False)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``hidden_act`` and ``hidden_act_param`` from a Hugging Face ``config.json``, as its ``model_type`` means them.

        Raises:
            UserError: the activation is dense or unknown, or the FATReLU threshold is missing, negative, NaN, or
                infinite in float32.
        """
        name, model_type = config.get("hidden_act"), config.get("model_type")
        if model_type == _ALWAYS_RELU:
            return cls(kind="relu")
        if name == "relu":
            return cls(kind="drelu" if model_type == _BOTH_SIDES else "relu")
        if model_type == _BOTH_SIDES:
            raise UserError(
                f"hidden_act is {name!r}; of model_type {model_type!r} this server computes 'relu' only, which it applies to gate"
                " and up (dReLU). Copy the checkpoint again if it was published so."
            )
        if name == "fatrelu":
            threshold = config.get("hidden_act_param")
            if isinstance(threshold, bool) or not isinstance(threshold, int | float):
                raise UserError(
                    f"hidden_act is 'fatrelu' but hidden_act_param is {threshold!r}. It must be the activation threshold, a"
                    " number of 0 or more (ProSparse-7B has 0.01): set it in config.json."
                )
            if not 0 <= threshold <= _LARGEST_FLOAT32:
                raise UserError(
                    f"hidden_act_param is {threshold}, which is no usable FATReLU threshold. It must be a number of 0 or more,"
                    " finite in float32 (ProSparse-7B has 0.01): set it in config.json."
                )
            return cls(kind="fatrelu", threshold=float(threshold))
        if isinstance(name, str) and name in DENSE_ACTIVATIONS:
            raise UserError(
                f"This model's activation is {DENSE_ACTIVATIONS[name]} (hidden_act: {name!r}), so no neuron is ever inactive and"
                " there is nothing to skip. Turn it into a ProSparse checkpoint first with the offline job"
                " `prosparse sparsify MODEL OUTPUT`, or serve it with plain vLLM."
            )
        raise UserError(
            f"hidden_act is {name!r}; this server computes 'relu' and 'fatrelu' (with hidden_act_param, the threshold)."
            " Set it in config.json if the model was trained with one of them, or make such a model with the offline job"
            " `prosparse sparsify MODEL OUTPUT`."
        )

    def to_hf_config(self) -> dict[str, Any]:
        """The two config fields that ``from_hf_config`` reads beside the model_type."""
        if self.kind == "fatrelu":
            return {"hidden_act": "fatrelu", "hidden_act_param": self.threshold}
        return {"hidden_act": "relu"}

    def __str__(self) -> str:
        names = {"relu": "ReLU", "drelu": "dReLU", "fatrelu": f"FATReLU (threshold {self.threshold:g})"}
        return names[self.kind]
