"""The OpenAPI 3 document of the server's endpoints, for one model."""

from typing import Any

from tightrec.serving.open_inference import HEADER_LENGTH, MOST_TARGET_MS, OUTPUT
from tightrec.serving.server.protocol import BINARY, JSON, Protocol

VERSION = "1"
"""Of the endpoints."""

_ERROR = {"$ref": "#/components/schemas/Error"}
_DATATYPES = {"INT64": ["INT64", "INT32"], "FP32": ["FP32"]}
_INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}


def document(protocol: Protocol, paths: list[str], any_id: bool) -> dict[str, Any]:
    """The document.

    Args:
        paths: names of the paths that a request may force.
        any_id: whether ids outside their tables are taken too.
    """
    model = f"/v2/models/{protocol.model}"
    found: dict[str, Any] = {
        "/v2/health/live": _get("Whether the server runs.", "Live", {}),
        "/v2/health/ready": _get(
            "Whether queries are taken.", "Ready", {"503": _answer("Not now.", "Ready")}
        ),
        "/v2": _get("The server.", "Object", {}),
        "/v2/repository/index": {
            "post": {
                "summary": "The models: one.",
                "responses": {"200": _answer("As Triton's repository extension.", "Index")},
            }
        },
        "/metrics": {"get": {"summary": "For Prometheus.", "responses": {"200": _text("text/plain")}}},
        "/api/status": _get("What the page shows.", "Object", {}),
        "/openapi.json": _get("This document.", "Object", {}),
        "/": {"get": {"summary": "A page.", "responses": {"200": _text("text/html")}}},
    }
    for base in (model, f"{model}/versions/{protocol.version}"):
        absent = {"404": _answer("Another version is served by now.", "Error")}
        found[base] = _get("The model's inputs and outputs.", "Object", absent)
        busy = {**absent, "503": _answer("Not now.", "Ready")}
        found[f"{base}/ready"] = _get("Whether queries are taken.", "Ready", busy)
        found[f"{base}/config"] = _get("As Triton's model configuration.", "Object", absent)
        found[f"{base}/stats"] = _get("As Triton's statistics.", "Object", absent)
        found[f"{base}/infer"] = {"post": _infer()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "tightrec: multi-path recommendation server", "version": VERSION},
        "paths": found,
        "components": {"schemas": {**_schemas(), "InferRequest": _request(protocol, paths, any_id)}},
    }


def _infer() -> dict[str, Any]:
    answers = {
        "200": {
            "description": "The scores.",
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/InferResponse"}},
                BINARY: {"schema": {"type": "string", "format": "binary"}},
            },
        }
    }
    for status, meaning in {
        "400": "A request that must be changed.",
        "404": "Another version is served by now.",
        "408": "The body came too slowly.",
        "411": "The body's length is missing.",
        "413": "The body is too large.",
        "415": "Another content type or encoding.",
        "500": "A worker failed.",
    }.items():
        answers[status] = _answer(meaning, "Error")
    answers["503"] = {
        **_answer("Shed: the header X-Shed says why in a word.", "Error"),
        "headers": {
            "X-Shed": {"schema": {"type": "string"}},
            "Retry-After": {"schema": {"type": "string"}},
        },
    }
    return {
        "summary": "Score rows.",
        "description": f"As octet-stream: JSON of {HEADER_LENGTH} bytes, then the tensors in order.",
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/InferRequest"}}},
        },
        "responses": answers,
    }


def _request(protocol: Protocol, paths: list[str], any_id: bool) -> dict[str, Any]:
    inputs = protocol.metadata()["inputs"]
    output = _closed(
        {
            "name": {"type": "string", "enum": [OUTPUT]},
            "parameters": _closed({"binary_data": {"type": "boolean"}}, []),
        },
        ["name"],
    )
    parameters = _closed(
        {
            "target_ms": {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_TARGET_MS},
            "path": {"type": "string", "enum": paths},
            "binary_data_output": {"type": "boolean"},
        },
        [],
    )
    return _closed(
        {
            "id": {"type": "string", "maxLength": 1024},
            "inputs": {
                "type": "array",
                "minItems": sum(not tensor["name"].endswith(".offsets") for tensor in inputs),
                "maxItems": len(inputs),
                "items": {"oneOf": [_tensor(tensor, any_id) for tensor in inputs]},
            },
            "outputs": {"type": "array", "maxItems": 1, "items": output},
            "parameters": parameters,
        },
        ["inputs"],
    )


def _tensor(tensor: dict[str, Any], any_id: bool) -> dict[str, Any]:
    sizes = {"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "integer", "minimum": 0}}
    if tensor["datatype"] == "FP32":
        values: dict[str, Any] = {"type": "number"}
    else:
        values = {**_INT64, "minimum": 0}
        if "parameters" in tensor:
            cardinality = tensor["parameters"]["cardinality"]
            values = _INT64 if any_id else {**values, "maximum": cardinality - 1}
    return _closed(
        {
            "name": {"type": "string", "enum": [tensor["name"]]},
            "datatype": {"type": "string", "enum": _DATATYPES[tensor["datatype"]]},
            "shape": sizes,
            "data": {"type": "array", "items": {"anyOf": [values, {"type": "array", "items": values}]}},
        },
        ["name", "datatype", "shape", "data"],
    )


def _schemas() -> dict[str, Any]:
    output = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": [OUTPUT]},
            "datatype": {"type": "string", "enum": ["FP32"]},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}},
        },
        "required": ["name", "datatype", "shape"],
    }
    response = {
        "type": "object",
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "step": {"type": "integer"},
                    "queue_ms": {"type": "number"},
                    "compute_ms": {"type": "number"},
                },
            },
            "outputs": {"type": "array", "items": output, "minItems": 1, "maxItems": 1},
        },
        "required": ["model_name", "model_version", "outputs"],
    }
    return {
        "Error": _closed({"error": {"type": "string"}}, ["error"]),
        "Live": _closed({"live": {"type": "boolean"}}, ["live"]),
        "Ready": _closed({"ready": {"type": "boolean"}}, ["ready"]),
        "Object": {"type": "object"},
        "Index": {"type": "array", "items": {"type": "object"}},
        "InferResponse": response,
    }


def _closed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """An object with no other properties."""
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": required} if required else found


def _get(summary: str, schema: str, others: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": _answer(summary, schema), **others}}}


def _answer(description: str, schema: str) -> dict[str, Any]:
    reference = _ERROR if schema == "Error" else {"$ref": f"#/components/schemas/{schema}"}
    return {"description": description, "content": {JSON: {"schema": reference}}}


def _text(content_type: str) -> dict[str, Any]:
    return {"description": "Text.", "content": {content_type: {"schema": {"type": "string"}}}}
