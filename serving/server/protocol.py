"""Requests and answers of the Open Inference Protocol (KServe v2), JSON and binary tensors.

The protocol: https://github.com/kserve/open-inference-protocol, its binary tensors:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md. Bodies are
read here, ids and dense values are checked by :class:`tightrec.snapshot.inputs.Inputs`.

Legend: B rows of a request, Dn dense columns, H ids a row, N ids in all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tightrec.serving.open_inference import HEADER_LENGTH, MOST_TARGET_MS, OUTPUT
from tightrec.serving.server.tensors import RequestError, Tensors, is_whole
from tightrec.snapshot.manifest import Feature

BINARY, JSON = "application/octet-stream", "application/json"

_MOST_ID = 1024
"""Characters of a request's id, which is echoed."""

_PARAMETERS = ("target_ms", "path", "binary_data_output")


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """What a client asks for."""

    id: str | None
    """To be echoed."""

    dense: NDArray[np.floating] | None
    """[B, Dn], or None where the model has no dense columns."""

    sparse: Mapping[str, Any]
    """By feature: what :meth:`tightrec.snapshot.inputs.Inputs.convert` takes."""

    target_ms: float | None
    """Latency target; None: the server's."""

    path: str | None
    """The path that must be taken; None: any."""

    binary: bool
    """Whether the scores go back as binary data."""


class Protocol:
    """Reads requests to one model, and writes their answers.

    Args:
        model: its name.
        version: of the model, a number as text.
        dense: names of its dense columns.
        sparse: its sparse features.
        max_rows: most rows of a request.
    """

    def __init__(
        self, model: str, version: str, dense: tuple[str, ...], sparse: tuple[Feature, ...], max_rows: int
    ) -> None:
        self.model, self.version = model, version
        self.dense, self.sparse = dense, sparse
        self.max_rows = max_rows
        names = {feature.name for feature in sparse}
        self.dense_name = "dense"
        while self.dense_name in names:
            self.dense_name += "_"

    def read(self, body: bytes, header_length: int | None) -> InferRequest:
        """The request in ``body``, of which the first ``header_length`` bytes are JSON; None: all.

        Raises:
            RequestError: says what is wrong.
        """
        if header_length is None:
            header_length = len(body)
        if not 0 <= header_length <= len(body):
            raise RequestError(
                f"{HEADER_LENGTH} is {header_length}, but the body has {len(body)} bytes, decompressed."
            )
        try:
            values = orjson.loads(memoryview(body)[:header_length])
        except orjson.JSONDecodeError as error:
            raise RequestError(
                f"the body, or its JSON part, is not valid JSON ({error}). JSON has no word for NaN or Inf."
            ) from None
        if not isinstance(values, dict):
            raise RequestError("the body must be a JSON object with a list `inputs`.")
        tensors = Tensors(values.get("inputs"), memoryview(body)[header_length:]).read()
        dense, sparse = self._sorted(tensors)
        parameters = _object(values.get("parameters"), "parameters")
        unknown = [name for name in parameters if name not in _PARAMETERS]
        if unknown:
            raise RequestError(f"the parameter {unknown[0]!r} is not known. Known: {', '.join(_PARAMETERS)}.")
        return InferRequest(
            id=_id(values.get("id")),
            dense=dense,
            sparse=sparse,
            target_ms=_target(parameters.get("target_ms")),
            path=_path(parameters.get("path")),
            binary=_wants_binary(values.get("outputs"), parameters),
        )

    def write(
        self,
        request: InferRequest,
        scores: NDArray[np.float32],
        parameters: Mapping[str, Any],
        version: str | None = None,
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the answer; ``version``: that scored, where a newer one is served by now."""
        output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [len(scores)]}
        values: dict[str, Any] = {"model_name": self.model, "model_version": version or self.version}
        if request.id is not None:
            values["id"] = request.id
        values["parameters"] = parameters
        values["outputs"] = [output]
        if not request.binary:
            output["data"] = np.ascontiguousarray(scores)
            return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY), {"Content-Type": JSON}
        output["parameters"] = {"binary_data_size": scores.nbytes}
        head = orjson.dumps(values)
        return head + scores.tobytes(), {"Content-Type": BINARY, HEADER_LENGTH: str(len(head))}

    def metadata(self) -> dict[str, Any]:
        """What the protocol calls the model's metadata; cardinalities stand in ``parameters``."""
        inputs: list[dict[str, Any]] = []
        if self.dense:
            inputs.append(
                {
                    "name": self.dense_name,
                    "datatype": "FP32",
                    "shape": [-1, len(self.dense)],
                    "parameters": {"columns": list(self.dense)},
                }
            )
        for feature in self.sparse:
            parameters = {"cardinality": feature.cardinality, "multi_hot": feature.multi_hot}
            inputs.append(
                {"name": feature.name, "datatype": "INT64", "shape": [-1], "parameters": parameters}
            )
            if feature.multi_hot:
                inputs.append({"name": f"{feature.name}.offsets", "datatype": "INT64", "shape": [-1]})
        return {
            "name": self.model,
            "versions": [self.version],
            "platform": "tightrec",
            "inputs": inputs,
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1]}],
        }

    def config(self) -> dict[str, Any]:
        """What Triton calls the model's configuration, as far as there is one."""

        def named(tensor: dict[str, Any]) -> dict[str, Any]:
            kind = f"TYPE_{tensor['datatype']}"
            return {"name": tensor["name"], "data_type": kind, "dims": tensor["shape"]}

        told = self.metadata()
        return {
            "name": self.model,
            "platform": told["platform"],
            "max_batch_size": 0,
            "input": [named(tensor) for tensor in told["inputs"]],
            "output": [named(tensor) for tensor in told["outputs"]],
            "parameters": {"max_rows": {"string_value": str(self.max_rows)}},
        }

    def _sorted(self, tensors: Mapping[str, NDArray[Any]]) -> tuple[Any, dict[str, Any]]:
        """Dense values, and ids by feature."""
        left = dict(tensors)
        dense = left.pop(self.dense_name, None) if self.dense else None
        if dense is not None and (dense.dtype.kind != "f" or dense.ndim != 2):
            raise RequestError(
                f"input {self.dense_name!r} must be FP32 with the shape [rows, {len(self.dense)}]."
            )
        sparse: dict[str, Any] = {}
        for feature in self.sparse:
            ids = left.pop(feature.name, None)
            offsets = left.pop(f"{feature.name}.offsets", None)
            if ids is None:
                known = {self.dense_name, *(f.name for f in self.sparse)}
                odd = [name[:100] for name in tensors if name.removesuffix(".offsets") not in known]
                unknown = f" (and {odd[0]!r} is not known)" if odd else ""
                raise RequestError(f"input {feature.name!r} is missing{unknown}: {self._inputs()}")
            if ids.dtype.kind != "i" or (offsets is not None and offsets.dtype.kind != "i"):
                raise RequestError(f"input {feature.name!r} must be INT64 or INT32.")
            sparse[feature.name] = ids if offsets is None else (ids, offsets)
            rows = len(ids) if offsets is None else len(offsets) - 1
            if rows > self.max_rows:
                raise RequestError(
                    f"input {feature.name!r} has {rows} rows, and a request at most {self.max_rows}. "
                    "Split it."
                )
        if left:
            raise RequestError(f"input {next(iter(left))!r} is unknown: {self._inputs()}")
        if dense is None and self.dense:
            raise RequestError(f"input {self.dense_name!r} is missing: {self._inputs()}")
        return dense, sparse

    def _inputs(self) -> str:
        names = [self.dense_name] if self.dense else []
        return f"the model has {', '.join([*names, *(feature.name for feature in self.sparse)])}."


def _object(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"`{what}` must be an object.")
    return value


def _id(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > _MOST_ID):
        raise RequestError(f"`id` must be a string of at most {_MOST_ID} characters.")
    return value


def _target(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_TARGET_MS:
        raise RequestError(
            f"the parameter 'target_ms' must be a number above 0, and at most {MOST_TARGET_MS:.0f}."
        )
    return float(value)


def _path(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RequestError("the parameter 'path' must be the name of a path.")
    return value


def _wants_binary(outputs: Any, parameters: Mapping[str, Any]) -> bool:
    """Whether the output is to be binary: said for it, or for all outputs; JSON by default."""
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise RequestError("the parameter 'binary_data_output' must be true or false.")
    if outputs is None:
        return binary
    if not isinstance(outputs, list):
        raise RequestError("`outputs` must be a list.")
    if len(outputs) > 1:
        raise RequestError(f"`outputs` asks for {len(outputs)} tensors: the model has one, {OUTPUT!r}.")
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != OUTPUT:
            raise RequestError(f"`outputs` asks for what is not there: the model has {OUTPUT!r}.")
        given = _object(output.get("parameters"), "parameters")
        for name, value in given.items():
            if name == "binary_data" and isinstance(value, bool):
                binary = value
            elif not (name == "classification" and is_whole(value) and value == 0):
                raise RequestError(f"the output parameter {name!r} is not supported here, or not valid.")
    return binary
