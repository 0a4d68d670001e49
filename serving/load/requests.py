"""Infer requests of the Open Inference Protocol from rows, and what an answer says.

Tensors travel as binary data behind a JSON header, as the protocol's binary extension describes: the header's
length stands in ``Inference-Header-Content-Length``, and every tensor says how many bytes of the rest are its
own. Bags of ids are one tensor NAME [N] of all ids and one NAME.offsets [B + 1].

Legend: B rows of a query, Dn dense columns, N ids of a feature.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tightrec.formats.columns import Bags, Columns, Ids, offsets_of
from tightrec.formats.schema import Schema
from tightrec.serving.open_inference import HEADER_LENGTH, OUTPUT

Order = Literal["consecutive", "random"]
"""Rows of a query: neighbours in the data, as of one user, or drawn one by one."""

MOST_IDS = 5
"""Ids in a bag of synthetic rows: 1 to this many, each as likely."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a served query was told."""

    path: str
    """Name of the path that scored it; empty where the server does not say."""

    rows: int
    """Scores that came."""


class InferRequests:
    """Bodies of infer requests, cut from rows that are kept in memory.

    Args:
        columns: the rows, at least one.
        schema: their columns.
        max_rows: most rows of one request.
        order: see :data:`Order`.
        seed: of the order.
        dense_name: name of the input of dense values.
    """

    def __init__(
        self,
        columns: Columns,
        schema: Schema,
        *,
        max_rows: int,
        order: Order = "consecutive",
        seed: int = 0,
        dense_name: str = "dense",
    ) -> None:
        if not len(columns):
            raise ValueError("there are no rows to send. Give a data set or a split that has some.")
        self.rows = len(columns)
        """Different rows; a request may start at each."""
        chosen: Ids = np.arange(self.rows)
        if order == "random":
            chosen = np.random.default_rng(seed).permutation(self.rows)
        # The first rows once more behind the last, so that every request is one stretch.
        columns = columns.take(np.resize(chosen, self.rows + max_rows - 1))
        self.kept = len(columns)
        """Rows in memory, the repeated ones too."""
        self._columns = columns
        self._dense = np.ascontiguousarray(columns.dense, "<f4")
        self._ids = [np.ascontiguousarray(bags.ids, "<i8") for bags in columns.sparse]
        self._offsets = [bags.offsets for bags in columns.sparse]
        self._names, self._dense_name = schema.sparse_names, dense_name
        self._headers: dict[tuple[int, str], bytes] = {}

    def columns(self, start: int, rows: int) -> Columns:
        """The rows of the request from ``start`` on."""
        return self._columns.slice(start, start + rows)

    def body(self, start: int, rows: int, parameters: str = "{}") -> tuple[bytes, int]:
        """The body of a request for ``rows`` rows from ``start`` on, and the length of its JSON header.

        Args:
            parameters: of the request, as JSON (:func:`parameters_of`).
        """
        stop = start + rows
        parts: list[Any] = [self._dense[start:stop]] if self._dense.shape[1] else []
        for ids, offsets in zip(self._ids, self._offsets, strict=True):
            if offsets is None:
                parts.append(ids[start:stop])
            else:
                own = offsets[start : stop + 1]
                parts += [ids[own[0] : own[-1]], np.subtract(own, own[0], dtype="<i8")]
        fixed = all(offsets is None for offsets in self._offsets)
        header = self._headers.get((rows, parameters)) if fixed else None
        if header is None:
            header = self._header(parts, parameters)
            if fixed:
                self._headers[rows, parameters] = header
        return b"".join((header, *(part.data for part in parts))), len(header)

    def _header(self, parts: list[Any], parameters: str) -> bytes:
        names = [self._dense_name] if self._dense.shape[1] else []
        for name, offsets in zip(self._names, self._offsets, strict=True):
            names += [name] if offsets is None else [name, f"{name}.offsets"]
        inputs = [
            {
                "name": name,
                "shape": list(part.shape),
                "datatype": "FP32" if part.dtype.kind == "f" else "INT64",
                "parameters": {"binary_data_size": part.nbytes},
            }
            for name, part in zip(names, parts, strict=True)
        ]
        outputs = [{"name": OUTPUT, "parameters": {"binary_data": True}}]
        text = json.dumps({"inputs": inputs, "outputs": outputs}, separators=(",", ":"))
        return f'{text[:-1]},"parameters":{parameters}}}'.encode()


def parameters_of(target_ms: float, path: str | None = None) -> str:
    """The parameters of a request, as JSON.

    Args:
        path: None: the server chooses.
    """
    values: dict[str, Any] = {"target_ms": target_ms}
    return json.dumps(values if path is None else {**values, "path": path})


def read_answer(headers: Mapping[str, str], body: bytes) -> Answer:
    """What an answer with status 200 says.

    Raises:
        ValueError: it is no answer of this protocol, or a score is no probability.
    """
    try:
        length = int(headers.get(HEADER_LENGTH, len(body)))
        values = json.loads(body[:length])
        output = next(one for one in values["outputs"] if one["name"] == OUTPUT)
        scores = output.get("data")
        if scores is None:
            scores = np.frombuffer(body, "<f4", offset=length)
        scores = np.asarray(scores, np.float32)
        path = str(values.get("parameters", {}).get("path", ""))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"an answer cannot be read ({type(error).__name__}: {error})") from None
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("an answer holds a score that is no probability")
    return Answer(path=path, rows=len(scores))


def synthetic_columns(schema: Schema, rows: int, exponent: float, seed: int = 0) -> Columns:
    """Made-up rows: normal dense values, ids with a heavy tail, no labels.

    Id i has the share of i + 1 to i + 2 under the curve x ** -``exponent``, cut at the cardinality: Zipf's
    law but for its rounding, and 0 gives every id the same share. Bags hold 1 to 5 ids.
    """
    generator = np.random.default_rng(seed)
    sparse = []
    for column in schema.sparse:
        sizes = generator.integers(1, MOST_IDS + 1, rows) if column.multi_hot else None
        count = rows if sizes is None else int(sizes.sum())
        ids = _zipf(generator.random(count), column.cardinality, exponent)
        sparse.append(Bags(ids, None if sizes is None else offsets_of(sizes)))
    dense = generator.standard_normal((rows, len(schema.dense)), np.float32)
    return Columns(dense, np.zeros(rows, np.float32), tuple(sparse))


def _zipf(drawn: np.ndarray, cardinality: int, exponent: float) -> Ids:
    """Ids [n] from uniform numbers [n], by the inverse of the distribution."""
    if exponent == 1:
        places = (cardinality + 1.0) ** drawn
    else:
        power = 1 - exponent
        places = (1 + drawn * ((cardinality + 1.0) ** power - 1)) ** (1 / power)
    return np.clip(places.astype(np.int64) - 1, 0, cardinality - 1)
