"""The settings of a training run, checked before anything is loaded, and the command-line flags made from them."""

import argparse
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparse_backend.errors import UserError
from sparse_backend.prosparse.schedule import L1Schedule, fixed, progressive

_SCHEDULES = {"fixed": fixed, "progressive": progressive}


class TrainingRecipe(BaseModel):
    """How long and how a model is trained: AdamW, whose learning rate rises linearly and then falls as a cosine."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: int = Field(default=100_000_000, gt=0, description="tokens to train on, all passes over the text counted")
    context: int = Field(default=1024, ge=8, description="tokens in one training sequence")
    batch: int = Field(default=64, gt=0, description="sequences in one optimiser step")
    micro_batch: int = Field(
        default=0, ge=0, description="sequences in one forward pass, a divisor of the batch; 0 is the whole batch"
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    final_learning_rate: float = Field(
        default=0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak"
    )
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's weight decay, on matrices only")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the initial weights and of the order of the text")

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Self:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"--batch {self.batch} is not a multiple of --micro-batch {self.micro_batch}")
        return self

    @property
    def pass_sequences(self) -> int:
        """Sequences in one forward pass."""
        return self.micro_batch or self.batch

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimiser step."""
        return self.batch * self.context

    @property
    def steps(self) -> int:
        """Optimiser steps that reach ``tokens``."""
        return -(-self.tokens // self.step_tokens)


class SparsifyRecipe(TrainingRecipe):
    """The three steps: ReLU with λ = 0, L1 on act(gate)*up, activation threshold."""

    schedule: Literal["fixed", "progressive"] = Field(
        default="fixed", description="λ after the ReLU stage: constant, or the paper's stages (ProSparse, table 6, 7B)"
    )
    l1: float = Field(
        default=5e-5,
        ge=0,
        description="last λ: weight of the L1 norm of relu(gate)*up, mean over tokens, summed over d_ff and layers",
    )
    relu_share: float = Field(
        default=0.05, ge=0, lt=1, description="share of the steps with λ = 0 after ReLU replaces the activation"
    )
    threshold_budget: float = Field(
        default=0.005,
        ge=0,
        description="nats of held-out loss that the activation threshold may cost; 0 costs nothing measurable",
    )

    @property
    def l1_schedule(self) -> L1Schedule:
        """λ by step.

        Raises:
            ValueError: there are too few steps for its stages.
        """
        return _SCHEDULES[self.schedule](self.steps, round(self.relu_share * self.steps), self.l1)

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        try:
            _ = self.l1_schedule
        except ValueError as error:
            raise ValueError(
                f"--tokens {self.tokens} makes {self.steps} steps, too few for --schedule {self.schedule} with"
                f" --relu-share {self.relu_share}: {error}"
            ) from None
        return self


RecipeT = TypeVar("RecipeT", bound=TrainingRecipe)


def add_flags(parser: argparse.ArgumentParser, recipe: type[TrainingRecipe], defaults: str | None = None) -> None:
    """Add one flag for each setting of ``recipe``; those not given are absent from the parsed namespace.

    ``defaults`` says where the defaults come from if not from ``recipe`` itself.
    """
    group = parser.add_argument_group("training")
    for name, field in recipe.model_fields.items():
        kind: Any = field.annotation
        choices = get_args(kind) if get_origin(kind) is Literal else None
        group.add_argument(
            _flag(name),
            type=str if choices else kind,
            choices=choices,
            default=argparse.SUPPRESS,
            help=f"{field.description} (default: {defaults or field.default})",
        )


def with_flags(recipe: RecipeT, args: argparse.Namespace) -> RecipeT:
    """``recipe`` with the settings given on the command line in place of its own.

    Raises:
        UserError: a setting is out of its range; the text names the flag.
    """
    given = {name: value for name, value in vars(args).items() if name in type(recipe).model_fields}
    return checked(type(recipe), {**recipe.model_dump(), **given})


def checked(kind: type[RecipeT], settings: dict[str, Any]) -> RecipeT:
    """Validate settings, with the first fault as a ``UserError`` that names its flag."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"{_flag(str(fault['loc'][0]))} is {fault['input']}: " if fault["loc"] else ""
        raise UserError(f"{where}{fault['msg'].removeprefix('Value error, ')}.") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
