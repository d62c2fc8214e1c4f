"""The flags that override single settings of a recipe."""

import argparse
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError

from sparse_backend.errors import UserError
from sparse_backend.prosparse.recipe import Data, Recipe, Section, ThresholdRecipe, Training
from sparse_backend.prosparse.recipe_file import ModelT, message, presets, read_recipe, validated

DEFAULT_PRESET = "fixed-l1"


class _Flags(Section):
    """The flags that stand for no single setting of a section, or for one of a section with few flags."""

    tokens: int | None = Field(default=None, gt=0, description="stretch the stages to this many tokens in all")
    l1: float | None = Field(default=None, ge=0, description="scale the stages' λ so that the last is this")
    threshold_budget: float | None = Field(
        default=None, ge=0, description=ThresholdRecipe.model_fields["budget"].description
    )
    target_sparsity: float | None = Field(
        default=None, gt=0, lt=1, description=Recipe.model_fields["target_sparsity"].description
    )
    keep_held_out: bool | None = Field(default=None, description=Data.model_fields["keep_held_out"].description)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """``--recipe`` and the flags that override single settings of it."""
    parser.add_argument(
        "--recipe",
        default=DEFAULT_PRESET,
        metavar="FILE",
        help=f"YAML file with every setting, or a preset: {', '.join(presets())} (default: {DEFAULT_PRESET})",
    )
    add_flags(parser, _Flags, defaults="of the recipe")
    add_flags(parser, Training, defaults="of the recipe")


def recipe_from(args: argparse.Namespace, source: str | None = None) -> Recipe:
    """The recipe named by ``--recipe``, with what the other flags (and ``--corpus``, ``--corpus-name``) replace.

    Args:
        args: the parsed flags.
        source: a preset or file to read in place of that of ``--recipe``.

    Raises:
        UserError: as ``read_recipe``, or a flag is out of its range; the text names the flag.
    """
    source = source or args.recipe
    recipe = read_recipe(source)
    flags = with_flags(_Flags(), args)
    settings = recipe.model_dump() | {"training": with_flags(recipe.training, args).model_dump()}
    if flags.tokens is not None:
        settings["stages"] = recipe.stretched_stages(flags.tokens)
    if flags.threshold_budget is not None:
        settings["threshold"]["budget"] = flags.threshold_budget
    if flags.target_sparsity is not None:
        settings["target_sparsity"] = flags.target_sparsity
    settings["data"] = _data(recipe.data, getattr(args, "corpus", None), getattr(args, "corpus_name", None))
    if flags.keep_held_out is not None and settings["data"] is not None:
        settings["data"]["keep_held_out"] = flags.keep_held_out
    given = f", stretched to --tokens {flags.tokens}" if flags.tokens is not None else ""
    recipe = validated(Recipe, settings, f"--recipe {source}{given}")
    return recipe if flags.l1 is None else _peaking_at(recipe, flags.l1)


def _data(data: Data | None, corpus: str | None, name: str | None) -> dict[str, Any] | None:
    settings = data.model_dump() if data is not None else {}
    if corpus is not None:
        # That a recipe's text may be passed on says nothing of another text.
        settings |= {"sources": [{"path": corpus}], "name": "", "keep_held_out": False}
    if name is not None and settings:
        settings["name"] = name
    return settings or None


def add_flags(parser: argparse.ArgumentParser, section: type[BaseModel], defaults: str | None = None) -> None:
    """Add one flag for each setting of ``section``; those not given are absent from the parsed namespace.

    ``defaults`` says where the defaults come from if not from ``section`` itself.
    """
    group = parser.add_argument_group("training" if issubclass(section, Training) else "the recipe as a whole")
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if get_origin(kind) is UnionType:
            kind = get_args(kind)[0]
        text = f"{field.description} (default: {defaults or field.default})"
        if kind is bool:
            group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            choices = get_args(kind) if get_origin(kind) is Literal else None
            group.add_argument(
                _flag(name), type=str if choices else kind, choices=choices, default=argparse.SUPPRESS, help=text
            )


def with_flags(section: ModelT, args: argparse.Namespace) -> ModelT:
    """``section`` with the settings given on the command line in place of its own.

    Raises:
        UserError: a setting is out of its range; the text names the flag.
    """
    given = {name: value for name, value in vars(args).items() if name in type(section).model_fields}
    try:
        return type(section).model_validate(section.model_dump() | given)
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"{_flag(str(fault['loc'][0]))} is {fault['input']}: " if fault["loc"] else ""
        raise UserError(f"{where}{message(fault)}.") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _peaking_at(recipe: Recipe, peak: float) -> Recipe:
    """The same stages with λ scaled so that the last peak is ``peak``.

    Raises:
        UserError: the last peak is 0, so there is nothing to scale.
    """
    last = recipe.stages[-1].peak
    if last == 0:
        raise UserError("--l1 scales the λ of the recipe's stages, and all of them are 0. Set the peaks in a recipe.")
    stages = [stage.model_dump() | {"peak": stage.peak * peak / last} for stage in recipe.stages]
    return validated(Recipe, recipe.model_dump() | {"stages": stages}, "--l1")
