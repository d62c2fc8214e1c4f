"""The OpenAPI document of what is served: vLLM's, without the request fields that our policy refuses."""

from typing import Any

from fastapi import FastAPI

from server.policy import SERVED_FIELDS


def document_served_fields(app: FastAPI) -> None:
    """Make ``app`` describe the requests that ``policy.py`` lets through; whoever generates a client from it gets no others."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema is not None
        document = generate()
        if not known:
            for path, fields in SERVED_FIELDS.items():
                for model in _request_models(document, path):
                    model["properties"] = {name: field for name, field in model["properties"].items() if name in fields}
                    model["additionalProperties"] = False
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _request_models(document: dict[str, Any], path: str) -> list[dict[str, Any]]:
    operation = document["paths"].get(path, {}).get("post")
    if operation is None:
        return []
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    references = [alternative["$ref"] for alternative in schema.get("anyOf", [schema])]
    return [document["components"]["schemas"][reference.rpartition("/")[2]] for reference in references]
