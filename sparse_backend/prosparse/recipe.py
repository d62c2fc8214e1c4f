"""What the offline job does: the sections of its YAML file, and the checks before anything is loaded.

    description: ...
    extends: demo            # optional: a preset, whose sections are kept where this file says nothing
    data:                    # what is trained and measured on; --corpus replaces it
      sources: [{path: texts/, name: prose, weight: 2}, {path: code.parquet, weight: 1}]
    training: {context: 2048, batch: 32, learning_rate: 1e-3}
    stages: [{peak: 0, tokens: 3_000_000}, {peak: 3e-4, tokens: 57_000_000}]
    l1: {reduction: mean_tokens_sum_dff, scale: 1}
    threshold: {budget: 0.005}

Unknown keys are refused everywhere. λ, T_i and the steps are those of ProSparse (arXiv 2402.13516, Algorithm 1).
"""

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparse_backend.errors import UserError
from sparse_backend.prosparse.schedule import L1Schedule, Stage

# The source that is no path.
STANDARD_LIBRARY = "stdlib"

# In units of the gate's root mean square, which differs between models: where it is 1, the paper's 0.01 does nothing.
SWEEP = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)


class Section(BaseModel):
    """A part of a recipe: unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Training(Section):
    """How a model is trained: AdamW, whose learning rate rises linearly, then follows its schedule."""

    context: int = Field(default=1024, ge=8, description="tokens in one training sequence")
    batch: int = Field(default=64, gt=0, description="sequences in one optimiser step, over all devices")
    micro_batch: int = Field(
        default=0,
        ge=0,
        description="sequences in one forward pass of one device, a divisor of the batch; 0 is the device's whole share",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    learning_rate_schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="after the warm-up: a cosine to the end; 'wsd' stays at the peak and falls during the last stage;"
        " constant",
    )
    final_learning_rate: float = Field(
        default=0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak"
    )
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's weight decay, on matrices only")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the gradient's mean")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's decay of the gradient's square")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    gradient_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass: less memory, a third more time"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the initial weights and of the order of the text")

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Self:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"--batch {self.batch} is not a multiple of --micro-batch {self.micro_batch}")
        return self

    @property
    def pass_sequences(self) -> int:
        """Sequences in one forward pass on a single device."""
        return self.micro_batch or self.batch

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimiser step."""
        return self.batch * self.context


class TrainingRecipe(Training):
    """One run of the optimiser: how, and how long."""

    tokens: int = Field(default=100_000_000, gt=0, description="tokens to train on, all passes over the text counted")

    @property
    def steps(self) -> int:
        """Optimiser steps that reach ``tokens``."""
        return -(-self.tokens // self.step_tokens)


class Source(Section):
    """One source of documents; see ``sparse_backend.prosparse.corpus`` for what ``path`` may be."""

    path: str = Field(min_length=1, description="'stdlib', a folder, or a .jsonl, .parquet or text file")
    name: str = Field(default="", description="the domain's name in tables; by default made from the path")
    weight: float | None = Field(
        default=None, gt=0, description="share of the training tokens, relative to the other sources' weights"
    )
    text: str = Field(default="text", min_length=1, description="field or column that holds a record's text")


class Data(Section):
    """A mixture of sources."""

    name: str = Field(default="", description="what the manifest calls the corpus; by default made from the sources")
    sources: tuple[Source, ...] = Field(min_length=1)
    held_out: float = Field(default=0.02, gt=0, lt=1, description="share of the documents that nothing is trained on")
    keep_held_out: bool = Field(
        default=False,
        description="leave the held-out text in OUT, so that `prosparse inspect --verify` needs nothing else",
    )

    @model_validator(mode="after")
    def _sources_fit_together(self) -> Self:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            path = self.sources[weighted.index(False)].path
            raise ValueError(f"source {path!r} has no weight, others have: give all sources one, or none")
        return self


class StageRecipe(Section):
    """One stage of Algorithm 1: λ reaches ``peak`` at its end; its length is given in steps or in tokens."""

    name: str = Field(default="", description="what the plan and the report call it")
    peak: float = Field(ge=0, description="λ at the stage's end; 0 for the ReLU stage")
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("a stage's length is given by either 'steps' or 'tokens', and by one of them only")
        return self


class L1Recipe(Section):
    """What λ weighs. ProSparse leaves both open, so λ carries over between models only together with them."""

    reduction: Literal["mean_tokens_sum_dff", "sum", "mean"] = Field(
        default="mean_tokens_sum_dff",
        description="of |act(gate)*up| within a layer; layers are always summed. 'sum' is over the tokens of one"
        " forward pass and d_ff, 'mean' over both",
    )
    scale: float = Field(default=1.0, gt=0, description="constant factor of the norm: the loss gains λ * scale * L1")


class ThresholdRecipe(Section):
    """Step 3: which thresholds are tried, and what the chosen one may cost."""

    sweep: tuple[float, ...] = Field(default=SWEEP, min_length=1, description="thresholds to try, rising")
    unit: Literal["gate_rms", "absolute"] = Field(
        default="gate_rms", description="what 'sweep' counts in: the gate's root mean square, or the gate's own values"
    )
    budget: float = Field(
        default=0.005,
        ge=0,
        description="nats of held-out loss that the activation threshold may cost; 0 costs nothing measurable",
    )
    per_layer: bool = Field(default=True, description="also try one threshold per layer, and take them if they win")

    @field_validator("sweep")
    @classmethod
    def _sweep_rises(cls, sweep: tuple[float, ...]) -> tuple[float, ...]:
        if not all(math.isfinite(threshold) and threshold >= 0 for threshold in sweep):
            raise ValueError("thresholds must be numbers of 0 or more")
        if any(after <= before for before, after in pairwise(sweep)):
            raise ValueError("thresholds must rise")
        return sweep


class SftRecipe(Section):
    """Instruction tuning after the stages (ProSparse, appendix J): its own text, a fixed rate, a smaller fixed λ."""

    data: Data | None = Field(default=None, description="instruction data only")
    peak: float = Field(ge=0, description="λ, at most that of the last stage; without any, sparsity is lost again")
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    learning_rate: float = Field(gt=0, description="fixed learning rate")
    batch: int = Field(gt=0, description="sequences in one optimiser step")
    context: int = Field(ge=8, description="tokens in one sequence")
    micro_batch: int = Field(default=0, ge=0, description="as in 'training'")

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("its length is given by either 'steps' or 'tokens', and by one of them only")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        return self

    @property
    def n_steps(self) -> int:
        """Optimiser steps."""
        return self.steps or -(-(self.tokens or 0) // (self.batch * self.context))


class Shape(Section):
    """The sizes of a model, in Hugging Face's names: what a plan reckons with."""

    hidden_size: int = Field(gt=0, description="d_model")
    intermediate_size: int = Field(gt=0, description="d_ff")
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the sizes out of a ``config.json``.

        Raises:
            ValidationError: one is missing or no positive integer.
        """
        own = {name: config[name] for name in cls.model_fields if config.get(name) is not None}
        return cls.model_validate({"num_key_value_heads": own.get("num_attention_heads")} | own)

    @property
    def parameters(self) -> int:
        """Number of weights; biases and norms of attention heads left out."""
        d_model, d_ff = self.hidden_size, self.intermediate_size
        d_head = self.head_dim or d_model // self.num_attention_heads
        attention = 2 * d_model * d_head * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * d_model * d_ff + 2 * d_model
        embeddings = self.vocab_size * d_model * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + d_model


class Hardware(Section):
    """What a plan reckons with; a run takes the devices that it is given."""

    devices: int = Field(default=1, gt=0)
    memory_gib: float = Field(default=141e9 / 2**30, gt=0, description="of one device")
    tflops: float = Field(default=989.0, gt=0, description="of one device, dense bfloat16, as its maker states")
    utilisation: float = Field(default=0.4, gt=0, le=1, description="share of them that training reaches")


class Recipe(Section):
    """The whole job."""

    description: str = ""
    model: Shape | None = Field(default=None, description="the model planned for when --dry-run is given no BASE")
    hardware: Hardware = Hardware()
    data: Data | None = None
    training: Training = Training()
    stages: tuple[StageRecipe, ...] = Field(min_length=1)
    l1: L1Recipe = L1Recipe()
    threshold: ThresholdRecipe = ThresholdRecipe()
    sft: SftRecipe | None = None
    target_sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="sparsity to steer λ towards, instead of the stages' peaks, before the threshold is raised",
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        peaks = [stage.peak for stage in self.stages]
        for index, (before, after) in enumerate(pairwise(peaks), start=1):
            if after < before:
                raise ValueError(
                    f"stages.{index}.peak is {after}, below the {before} of the stage before: λ never falls"
                )
        ends = [0, *self.stage_ends]
        for index, (begin, end) in enumerate(pairwise(ends)):
            if end <= begin:
                raise ValueError(
                    f"stages.{index} has {self.stages[index].tokens} tokens, not one more step of"
                    f" {self.training.step_tokens} (batch * context): lengthen it, or shrink the batch"
                )
        if self.sft is not None and self.sft.peak > peaks[-1]:
            raise ValueError(
                f"sft.peak is {self.sft.peak}, above the {peaks[-1]} of the last stage: it must be smaller or equal"
            )
        return self

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """T_i: the last step of each stage, counted from 1 over the whole run."""
        step_tokens, tokens, ends = self.training.step_tokens, 0, []
        for stage in self.stages:
            # Tokens are added up before they are rounded to steps, so that many short stages do not lengthen the run.
            tokens += stage.tokens or (stage.steps or 0) * step_tokens
            ends.append(-(-tokens // step_tokens))
        return tuple(ends)

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages; SFT comes after them."""
        return self.stage_ends[-1]

    @property
    def run(self) -> TrainingRecipe:
        """The optimiser run of steps 1 and 2."""
        return TrainingRecipe(**self.training.model_dump(), tokens=self.steps * self.training.step_tokens)

    @property
    def sft_run(self) -> TrainingRecipe | None:
        """The optimiser run of the SFT phase, if there is one."""
        if self.sft is None:
            return None
        own = self.sft.model_dump(include={"batch", "context", "micro_batch", "learning_rate"})
        settings = self.training.model_dump() | own | {"learning_rate_schedule": "constant", "warmup": 0.0}
        return TrainingRecipe(**settings, tokens=self.sft.n_steps * self.sft.batch * self.sft.context)

    @property
    def l1_schedule(self) -> L1Schedule:
        """λ by step of ``run``; ``l1.scale`` is not in it."""
        pairs = list(zip(self.stage_ends, self.stages, strict=True))
        zero = [end for end, stage in pairs if stage.peak == 0]
        return L1Schedule(max(zero, default=0), [Stage(end, stage.peak) for end, stage in pairs if stage.peak > 0])

    @property
    def last_stage_steps(self) -> int:
        """Length of the last stage, in which 'wsd' lowers the learning rate."""
        return self.steps - (self.stage_ends[-2] if len(self.stages) > 1 else 0)

    def require_data(self) -> Data:
        """The data to train on.

        Raises:
            UserError: this recipe, or its SFT phase, names none.
        """
        if self.data is None:
            raise UserError("The recipe has no data. Name sources under 'data' in it, or give --corpus.")
        if self.sft is not None and self.sft.data is None:
            raise UserError(
                "The recipe has an SFT phase without data. Name sources under 'sft.data', or set 'sft' to null."
            )
        return self.data

    def stretched_stages(self, tokens: int) -> list[dict[str, Any]]:
        """The stages over ``tokens`` tokens in all, each with its share of them."""
        lengths = [stage.tokens or (stage.steps or 0) * self.training.step_tokens for stage in self.stages]
        # Ends are rounded, not lengths, so that the last end is ``tokens``.
        ends = [0, *(round(tokens * end / sum(lengths)) for end in accumulate(lengths))]
        return [
            {"name": stage.name, "peak": stage.peak, "tokens": end - begin}
            for stage, (begin, end) in zip(self.stages, pairwise(ends), strict=True)
        ]
