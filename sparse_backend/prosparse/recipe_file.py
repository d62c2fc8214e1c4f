"""A recipe out of a YAML file or a preset, and what is said of one that cannot be used."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sparse_backend.errors import UserError
from sparse_backend.prosparse.recipe import STANDARD_LIBRARY, Data, Recipe

PRESET_FOLDER = Path(__file__).parent / "presets"

ModelT = TypeVar("ModelT", bound=BaseModel)


def presets() -> list[str]:
    """The names of the recipes that come with the product."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def read_recipe(source: str) -> Recipe:
    """A preset by its name, or a YAML file by its path; relative paths of its sources start at the file's folder.

    Raises:
        UserError: there is no such preset or file, or its content is no recipe; the text names file and key.
    """
    path = PRESET_FOLDER / f"{source}.yaml" if source in presets() else Path(source)
    content = _read_yaml(path, source)
    if (base := content.pop("extends", None)) is not None:
        if base not in presets():
            raise UserError(f"--recipe {source}: extends is {base!r}; it must be a preset: {', '.join(presets())}.")
        content = _merged(_read_yaml(PRESET_FOLDER / f"{base}.yaml", base), content)
    recipe = validated(Recipe, content, f"--recipe {source}")
    return recipe if path.parent == PRESET_FOLDER else _resolved(recipe, path.parent)


def validated(kind: type[ModelT], content: Any, where: str) -> ModelT:
    """``content`` as a section; ``where`` names the file or flag that it came from.

    Raises:
        UserError: it is none; the text names the key, and the nearest known one for one that is unknown.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # A misspelt key is also missing under its right name; the spelling is what helps.
        fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            names = _keys_beside(kind, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), names, n=1)
            advice = f"Did you mean {near[0]!r}?" if near else f"Known here are {', '.join(names)}."
            raise UserError(f"{where}: unknown key {key!r}. {advice}") from None
        if fault["type"] == "missing":
            raise UserError(f"{where}: {key} is missing. Add it.") from None
        given = "" if not key or isinstance(fault["input"], dict | list | tuple) else f" is {fault['input']!r}"
        raise UserError(f"{where}: {key}{given}{': ' if key else ''}{message(fault)}.") from None


def message(fault: ErrorDetails) -> str:
    """A validator's own words."""
    return fault["msg"].removeprefix("Value error, ")


def _keys_beside(kind: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys known where an unknown one stands: the fields of the section at ``loc``, indices of lists left out."""
    for name in loc:
        if isinstance(name, str):
            kind = next(section for section in _sections(kind.model_fields[name].annotation))
    return list(kind.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and a key that is there twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a dot and a sign in it: 1.0e-3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: Path, source: str) -> dict[str, Any]:
    try:
        # _Loader is a SafeLoader: no tag of the file constructs anything but plain data.
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except FileNotFoundError:
        raise UserError(
            f"--recipe {source!r} is neither a file on this machine nor a preset: {', '.join(presets())}."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--recipe {source}: cannot be read as YAML: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"--recipe {source}: it must hold a mapping of settings, found {type(content).__name__}.")
    return content


def _merged(base: Any, own: Any) -> Any:
    """``own`` over ``base``: mappings key by key, everything else whole."""
    if isinstance(base, dict) and isinstance(own, dict):
        return base | {key: _merged(base.get(key), value) for key, value in own.items()}
    return own


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    def resolved(data: Data | None) -> Data | None:
        if data is None:
            return None
        sources = tuple(
            source if source.path == STANDARD_LIBRARY else source.model_copy(update={"path": str(folder / source.path)})
            for source in data.sources
        )
        return data.model_copy(update={"sources": sources})

    sft = None if recipe.sft is None else recipe.sft.model_copy(update={"data": resolved(recipe.sft.data)})
    return recipe.model_copy(update={"data": resolved(recipe.data), "sft": sft})
