"""Bounds on JSON schemas that clients send, checked before a grammar is compiled from one."""

import json
from collections.abc import Iterator
from typing import Any

from server.errors import RefusalError
from server.limits import RequestLimits

# Keywords whose value maps names that a client chose to schemas: their keys are no keywords.
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})

# Keywords that a grammar unrolls, each time as often as it says.
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MOST_REPEATS = 4096


def check_schema(schema: object, field: str, limits: RequestLimits) -> None:
    """Refuse a schema that is too long, too deep, has regular expressions, large repeats or references to elsewhere.

    Raises:
        RefusalError: 400, naming ``field``.
    """
    if len(json.dumps(schema, ensure_ascii=False).encode()) > limits.max_schema_bytes:
        raise RefusalError(400, f"{field} has a schema of more than {limits.max_schema_bytes} bytes.", param=field)
    for node, depth in _walk(schema, field):
        if depth > limits.max_schema_depth:
            raise RefusalError(400, f"{field} has a schema of more than {limits.max_schema_depth} levels.", param=field)
        _check_node(node, field, limits)


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
