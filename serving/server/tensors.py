"""Input tensors of a request of the Open Inference Protocol, as numpy arrays.

Nothing is allocated by what a shape claims: only by what the body holds.
"""

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATATYPES: dict[str, tuple[Any, tuple[type, ...], str]] = {
    "INT64": (np.int64, (int,), "integers of 64 bits"),
    "INT32": (np.int32, (int,), "integers of 32 bits"),
    "FP32": (np.float32, (int, float), "numbers"),
}
"""By the protocol's name: numpy's type, types of JSON values, in words."""

_FIELDS = ("name", "shape", "datatype", "parameters", "data")
_MOST_DIMENSIONS = 2


class RequestError(ValueError):
    """A request that a client must change; the text says how."""


class Tensors:
    """The list ``inputs`` of a request, with the binary data behind the JSON.

    Args:
        inputs: what the JSON holds.
        binary: the rest of the body.
    """

    def __init__(self, inputs: Any, binary: memoryview) -> None:
        self._inputs, self._binary = inputs, binary
        self._place = 0

    def read(self) -> dict[str, NDArray[Any]]:
        """The tensors by name, ids as int64; they may share the body's memory.

        Raises:
            RequestError: says which input is wrong, and how.
        """
        if not isinstance(self._inputs, list) or not self._inputs:
            raise RequestError("the body must hold a list `inputs` of the model's input tensors.")
        found: dict[str, NDArray[Any]] = {}
        for place, value in enumerate(self._inputs):
            name = value.get("name") if isinstance(value, dict) else None
            if not isinstance(name, str):
                raise RequestError(f"`inputs`: entry {place} must be an object with a string `name`.")
            if name in found:
                raise RequestError(f"input {name!r} is given twice.")
            try:
                found[name] = self._tensor(value)
            except RequestError as error:
                raise RequestError(f"input {name!r}: {error}") from None
        if self._place != len(self._binary):
            raise RequestError(
                f"{len(self._binary)} bytes follow the JSON, but the inputs' `binary_data_size` add up to "
                f"{self._place}."
            )
        return found

    def _tensor(self, value: dict[str, Any]) -> NDArray[Any]:
        unknown = [field for field in value if field not in _FIELDS]
        if unknown:
            raise RequestError(f"the field {unknown[0]!r} is not known. Known: {', '.join(_FIELDS)}.")
        datatype = value.get("datatype")
        if not isinstance(datatype, str) or datatype not in DATATYPES:
            raise RequestError(f"`datatype` must be one of {', '.join(DATATYPES)}.")
        shape = _shape(value.get("shape"))
        parameters = value.get("parameters", {})
        if not isinstance(parameters, dict):
            raise RequestError("`parameters` must be an object.")
        unknown = [name for name in parameters if name != "binary_data_size"]
        if unknown:
            raise RequestError(f"the parameter {unknown[0]!r} is not supported here.")
        if "binary_data_size" in parameters:
            if "data" in value:
                raise RequestError("give `data` or `binary_data_size`, not both.")
            found = self._from_binary(parameters["binary_data_size"], datatype, shape)
        elif isinstance(value.get("data"), list):
            found = _from_json(value["data"], datatype, shape)
        else:
            raise RequestError("there must be a list `data`, or the parameter `binary_data_size`.")
        return found.astype(np.int64) if datatype == "INT32" else found

    def _from_binary(self, size: Any, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        kind = np.dtype(DATATYPES[datatype][0])
        count = math.prod(shape)
        if not is_whole(size) or size != count * kind.itemsize:
            raise RequestError(
                f"`binary_data_size` is {_short(size)} where the shape {list(shape)} of {datatype} has "
                f"{count * kind.itemsize} bytes."
            )
        if size > len(self._binary) - self._place:
            raise RequestError(
                f"{size} bytes are announced, and the body has {len(self._binary) - self._place} left."
            )
        found = np.frombuffer(self._binary, kind.newbyteorder("<"), count, self._place)
        self._place += size
        return found.astype(kind, copy=False).reshape(shape)


def is_whole(value: Any) -> bool:
    """Whether ``value`` is an integer, which JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_DIMENSIONS:
        raise RequestError(f"`shape` must be a list of 1 to {_MOST_DIMENSIONS} numbers.")
    if not all(is_whole(size) and 0 <= size < 2**31 for size in value):
        raise RequestError("`shape` must hold whole numbers from 0 on, below 2^31.")
    return tuple(value)


def _from_json(data: list[Any], datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """``data``, flat or nested as ``shape`` says."""
    kind, types, words = DATATYPES[datatype]
    if len(shape) == 2 and data and isinstance(data[0], list):
        if len(data) != shape[0] or not all(isinstance(r, list) and len(r) == shape[1] for r in data):
            raise RequestError(f"`data` is nested, but not as the shape {list(shape)} says.")
        data = list(itertools.chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise RequestError(
            f"`data` holds {len(data)} values where the shape {list(shape)} has {math.prod(shape)}."
        )
    if not set(map(type, data)) <= set(types):
        raise RequestError(f"`data` must hold {words} alone.")
    try:
        with np.errstate(over="ignore"):  # what becomes infinite is refused by name
            return np.array(data, kind).reshape(shape)
    except OverflowError:
        raise RequestError(f"`data` must hold {words}.") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:20]}..."
