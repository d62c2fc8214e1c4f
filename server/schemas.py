"""Bounds on JSON schemas that clients send, checked before a grammar is compiled from one."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from server.errors import RefusalError
from server.limits import RequestLimits

# Keywords whose value maps names that a client chose to schemas: their keys are no keywords.
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})

# Keywords that a grammar unrolls, each time as often as it says.
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MOST_REPEATS = 4096

# Objects in one schema: the time to compile them grows faster than their number.
_MOST_OBJECTS = 512


def check_schema(schema: object, field: str, limits: RequestLimits) -> None:
    """Refuse a schema that is too long, too deep, has regular expressions, large repeats or references to elsewhere.

    Raises:
        RefusalError: 400, naming ``field``.
    """
    if len(json.dumps(schema, ensure_ascii=False).encode()) > limits.max_schema_bytes:
        raise RefusalError(400, f"{field} has a schema of more than {limits.max_schema_bytes} bytes.", param=field)
    for count, (node, depth) in enumerate(_walk(schema, field), 1):
        if count > _MOST_OBJECTS:
            raise RefusalError(400, f"{field} has a schema of more than {_MOST_OBJECTS} objects.", param=field)
        if depth > limits.max_schema_depth:
            raise RefusalError(400, f"{field} has a schema of more than {limits.max_schema_depth} levels.", param=field)
        _check_node(node, field, limits)
    if _is_endless(schema):
        raise RefusalError(400, f"{field} has a schema that is defined by nothing but itself.", param=field)


def _check_node(node: dict[str, Any], field: str, limits: RequestLimits) -> None:
    patterns = [*(node.get("patternProperties") or ()), *([node["pattern"]] if "pattern" in node else [])]
    for pattern in patterns:
        if not isinstance(pattern, str) or not 0 < len(pattern.encode()) <= limits.max_pattern_bytes:
            raise RefusalError(
                400,
                f"{field} has a regular expression of more than {limits.max_pattern_bytes} bytes in its schema.",
                param=field,
            )
    for keyword in _REPEATS:
        value = node.get(keyword)
        if isinstance(value, int | float) and not 0 <= value <= _MOST_REPEATS:
            raise RefusalError(
                400, f"{field} has a schema whose {keyword} is not from 0 to {_MOST_REPEATS}.", param=field
            )
    for keyword in ("$ref", "$dynamicRef"):
        reference = node.get(keyword)
        if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
            raise RefusalError(400, f"{field} has a schema that refers to another document.", param=field)


def _walk(schema: object, field: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Every object in ``schema`` that a reference could make a schema of, with its depth from 1.

    Without recursion, since a client chooses the depth.
    """
    todo = [(schema, 1)]
    while todo:
        node, depth = todo.pop()
        if isinstance(node, list):
            todo.extend((child, depth) for child in node)
        if not isinstance(node, dict):
            continue
        yield node, depth
        for keyword, value in node.items():
            if keyword not in _MAPS or not isinstance(value, dict):
                todo.append((value, depth + 1))
                continue
            if not all(isinstance(child, dict | bool) for child in value.values()):
                raise RefusalError(400, f"{field} has a schema whose {keyword} are no schemas.", param=field)
            todo.extend((child, depth + 1) for child in value.values())


def _is_endless(schema: object) -> bool:
    """Whether a reference comes back to itself through references and alternatives alone.

    No text matches such a schema, which a grammar shows only once the engine wants its first token.
    """
    finished: set[int] = set()
    for start, _ in _walk(schema, ""):
        path: list[tuple[int, Iterator[object]]] = [(id(start), _same_text(start, schema))]
        on_path = {id(start)}
        while path:
            node, following = path[-1]
            child = next(following, None)
            if child is None:
                path.pop()
                on_path.discard(node)
                finished.add(node)
            elif id(child) in on_path:
                return True
            elif id(child) not in finished and isinstance(child, dict):
                path.append((id(child), _same_text(child, schema)))
                on_path.add(id(child))
    return False


def _same_text(node: dict[str, Any], schema: object) -> Iterator[object]:
    """The schemas that the text of ``node`` itself, not a part of it, has to match."""
    if isinstance(reference := node.get("$ref"), str) and (target := _resolve(reference, schema)) is not None:
        yield target
    for keyword in ("allOf", "anyOf", "oneOf"):
        if isinstance(choices := node.get(keyword), list):
            yield from (choice for choice in choices if choice is not None)


def _resolve(reference: str, schema: object) -> object:
    """What a JSON pointer behind a # points to; None if to nothing."""
    node = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(name)
        elif isinstance(node, list):
            node = node[int(name)] if name.isdecimal() and len(name) < 6 and int(name) < len(node) else None
        else:
            return None
    return node
