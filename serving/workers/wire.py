"""What the server and its worker processes say to each other, over a socket of the same machine.

A message is its length (8 bytes, little-endian) and that many bytes. The first message to a worker is JSON
(:class:`tightrec.serving.workers.pool.WorkerPool` writes it), its answer too; after that batches go there and
scores come back, as the numbers in memory: both ends are one program on one machine.

Legend: B rows of a query, Dn dense columns, F sparse features.
"""

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tightrec.snapshot.inputs import Batch

LENGTH = struct.Struct("<Q")
"""In front of every message."""

_BATCH = struct.Struct("<QQ")
_QUERY = struct.Struct("<QQQ")
_SCORES = struct.Struct("<QQQ")

Scores = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview


def json_message(values: Any) -> bytes:
    """``values`` as a whole message."""
    body = json.dumps(values).encode()
    return LENGTH.pack(len(body)) + body


def batch_message(path: int, queries: Sequence[Batch]) -> list[Buffer]:
    """Checked queries for the worker's path number ``path``, as pieces of one message.

    Offsets travel only where a bag does not hold exactly one id.
    """
    head = [_BATCH.pack(path, len(queries))]
    pieces: list[Buffer] = []
    for query in queries:
        ids, offsets = query.ids.numpy(), query.offsets.numpy()
        single = len(ids) == len(offsets) - 1 and bool((np.diff(offsets) == 1).all())
        head.append(_QUERY.pack(len(query), len(ids), single))
        pieces += [memoryview(query.dense.numpy()).cast("B") if query.dense.numel() else b""]
        pieces += [memoryview(ids).cast("B") if len(ids) else b""]
        if not single:
            pieces.append(memoryview(offsets).cast("B"))
    size = sum(map(len, head)) + sum(map(len, pieces))
    return [LENGTH.pack(size), *head, *pieces]


def read_batch(message: Buffer, dense: int, sparse: int) -> tuple[int, Batch, list[int]]:
    """The path's number, all queries as one batch, and the rows of each.

    Args:
        dense: Dn of the model.
        sparse: F of the model.
    """
    path, count = _BATCH.unpack_from(message, 0)
    heads = [_QUERY.unpack_from(message, _BATCH.size + i * _QUERY.size) for i in range(count)]
    place = _BATCH.size + count * _QUERY.size

    def take(kind: Any, size: int) -> Any:
        nonlocal place
        found = np.frombuffer(message, kind, size, place)
        place += found.nbytes
        return found

    values, ids, offsets = [], [], []
    for rows, size, single in heads:
        values.append(take(np.float32, rows * dense).reshape(rows, dense))
        ids.append(take(np.int64, size))
        offsets.append(None if single else take(np.int64, sparse * rows + 1))
    rows = [head[0] for head in heads]
    merged_ids, merged_offsets = _merged(ids, offsets, rows, sparse)
    merged = Batch(
        dense=torch.from_numpy(values[0] if count == 1 else np.concatenate(values)),
        ids=torch.from_numpy(merged_ids),
        offsets=torch.from_numpy(merged_offsets),
        of_torch=False,
    )
    return path, merged, rows


def _merged(
    ids: list[NDArray[np.int64]], offsets: list[NDArray[np.int64] | None], rows: list[int], sparse: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and offsets of all queries, feature after feature."""
    total = sum(rows)
    if all(found is None for found in offsets):
        if len(ids) > 1:
            blocks = [found.reshape(sparse, count) for found, count in zip(ids, rows, strict=True)]
            ids = [np.concatenate(blocks, axis=1).reshape(-1)]
        return ids[0], np.arange(sparse * total + 1)
    whole = [
        np.arange(sparse * count + 1) if found is None else found
        for found, count in zip(offsets, rows, strict=True)
    ]
    if len(ids) == 1:
        return ids[0], whole[0]
    parts = [
        found[starts[feature * count] : starts[(feature + 1) * count]]
        for feature in range(sparse)
        for found, starts, count in zip(ids, whole, rows, strict=True)
    ]
    sizes = [np.diff(starts).reshape(sparse, count) for starts, count in zip(whole, rows, strict=True)]
    merged = np.zeros(sparse * total + 1, np.int64)
    np.cumsum(np.concatenate(sizes, axis=1).reshape(-1), out=merged[1:])
    return np.concatenate(parts), merged


def scores_message(scores: Scores, compute_ns: int, said: dict[str, Any]) -> list[Buffer]:
    """The scores of a batch [sum of B]; ``said`` holds ``error``, a sentence, or counts of caches."""
    words = json.dumps(said).encode() if said else b""
    head = _SCORES.pack(compute_ns, len(words), len(scores))
    numbers = scores.tobytes()
    return [LENGTH.pack(len(head) + len(words) + len(numbers)), head, words, numbers]


def read_scores(message: Buffer) -> tuple[Scores, int, dict[str, Any]]:
    """What :func:`scores_message` was given."""
    compute_ns, size, rows = _SCORES.unpack_from(message, 0)
    words = bytes(message[_SCORES.size : _SCORES.size + size])
    scores = np.frombuffer(message, np.float32, rows, _SCORES.size + size)
    return scores, compute_ns, json.loads(words) if words else {}
