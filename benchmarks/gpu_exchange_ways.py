"""Ways to bring a rank's rows to its peers, on one device, in the calls of ``sharding/framed_wire.py``.

P peers, T tables. The rank holds T tables and so does every peer: it sends each peer the rows of its own
tables that the peer's batch names, and receives those of the peer's tables for its own batch, P * T features
in all; gradients go the other way round. The wire is a copy on the device: what is received is what was sent.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import gpu_baselines
import numpy as np
import torch
from gpu_measure import Shape
from torch import Tensor

from tightrec.compression.blocks import packed_cells
from tightrec.compression.bounds import Bound, Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import (
    Mode,
    Modes,
    decode,
    decode_scratch_bytes,
    encode,
    encode_scratch_bytes,
)
from tightrec.compression.frames import Frames, max_frame_bytes, raise_for_status
from tightrec.compression.layout import Layout
from tightrec.compression.telemetry import frame_tables, worst_error_over_bound
from tightrec.sharding.expand import Expansion
from tightrec.sharding.parts import Slot
from tightrec.trainer.data.synthetic import KAGGLE

Direction = Literal["forward", "backward"]
EXPONENT = 1.05


class Waits:
    """Copies for which the host waits until the stream has got there, counted by place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts: Counter[str] = Counter()

    def read(self, numbers: Tensor, place: str) -> list[int]:
        """Numbers of the device."""
        self.counts[place] += 1
        return numbers.tolist()

    def upload(self, numbers: Sequence[int], place: str) -> Tensor:
        """int64 on the device, from ordinary memory."""
        self.counts[place] += 1
        return torch.tensor(numbers, dtype=torch.int64).to(self.device)

    def upload_layout(self, layout: Layout, place: str) -> None:
        """The block table of a new layout, which the codec would upload itself."""
        self.counts[place] += 1
        layout.on(self.device)


class Batch:
    """Distinct rows, and gradients of every row, of a batch with ids by Zipf's law.

    Args:
        shape: peers, tables, rows of the batch, dim.
        device: of the tensors.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        numbers = np.random.default_rng(0)
        features = shape.peers * shape.tables
        cardinalities = [KAGGLE[feature % shape.tables % len(KAGGLE)] for feature in range(features)]
        found = [np.unique(_zipf(numbers, shape.rows, c), return_inverse=True) for c in cardinalities]
        self.counts = [len(ids) for ids, _ in found]
        self.inverse = torch.from_numpy(np.stack([inverse.reshape(-1) for _, inverse in found])).to(device)
        names = [str(feature) for feature in range(features)]
        slots = [Slot(name=n, feature=n, table=n, dim=shape.dim, column=0, mean=False) for n in names]
        self.expansion = Expansion(slots, names, names)
        cells = np.zeros((features, 4), dtype=np.int64)
        cells[:, 1], cells[:, 2:] = self.counts, shape.dim
        self.cells = packed_cells(cells).reshape(shape.peers, shape.tables, 4)
        generator = torch.Generator(device=device).manual_seed(1)
        self.distinct = torch.randn(sum(self.counts), shape.dim, generator=generator, device=device)
        self.grads = torch.randn(shape.rows, features * shape.dim, generator=generator, device=device)
        self.index = self.new_index()
        self.cleared = torch.empty_like(self.distinct)

    def new_index(self) -> Tensor:
        """Where each row of the batch comes from, as every step makes it."""
        return self.expansion.index(self.counts, self.inverse, self.shape.rows, self.device)

    def expand(self, distinct: Tensor) -> Tensor:
        """[rows, P * T * dim] of distinct rows, by a new index."""
        return self.expansion.expand(distinct.view(-1), self.new_index(), self.shape.rows)

    def collect(self, into: Tensor) -> None:
        """Add up the gradients of equal rows, and clear where others' gradients will be written."""
        self.cleared.zero_()
        self.expansion.collect(self.grads, self.index, into.view(-1))


def _zipf(numbers: np.random.Generator, count: int, cardinality: int) -> np.ndarray:
    """Ids of a continuous power law, by inversion, as ``trainer/data/synthetic.py`` draws them."""
    power = 1 - EXPONENT
    ranks = (1 + numbers.random(count) * ((cardinality + 1) ** power - 1)) ** (1 / power)
    return np.minimum(ranks.astype(np.int64), cardinality)


class Transfer(Protocol):
    """Brings rows [N, D] over the wire; every use of it marks its parts."""

    def send(self, mark: Callable[[str], None]) -> Tensor:
        """What arrives."""

    def sent_bytes(self) -> int:
        """Bytes of the last use that crossed the wire."""

    def refresh(self) -> None:
        """New codebooks, where there are any."""

    def worst(self) -> float | None:
        """The largest error of the last use by its bound; None: without a bound."""


class Unbounded:
    """float32 as it is, or one of torchrec's fixed-rate formats, on ``rows`` [N, D]."""

    def __init__(self, rows: Tensor, codec: gpu_baselines.Baseline | None = None) -> None:
        self._given_rows, self._codec = rows, codec
        self._wire = torch.empty(2, self.sent_bytes(), dtype=torch.uint8, device=rows.device)
        self._arrived = torch.empty_like(rows)

    def send(self, mark: Callable[[str], None]) -> Tensor:
        """See :class:`Transfer`."""
        if self._codec is None:
            self._arrived.copy_(self._given_rows)
            mark("wire")
            return self._arrived
        self._codec.encode()
        mark("encode")
        self._wire[1].copy_(self._wire[0])
        mark("wire")
        arrived: Any = self._codec.decode()
        mark("decode")
        return arrived.view(-1, self._given_rows.shape[1])

    def sent_bytes(self) -> int:
        """See :class:`Transfer`."""
        return 4 * self._given_rows.numel() if self._codec is None else self._codec.compressed_bytes()

    def refresh(self) -> None:
        """See :class:`Transfer`: there are none."""

    def worst(self) -> float | None:
        """See :class:`Transfer`."""
        return None


class Framed:
    """Error-bounded frames of ``rows``, which lie as ``batch.cells`` says.

    Forward, one call of the encoder writes all frames; backward, one call each, as every peer gets gradients
    of tables of its own.
    """

    def __init__(
        self,
        rows: Tensor,
        batch: Batch,
        direction: Direction,
        bound: Bound,
        mode: Mode,
        waits: Waits,
        backend: str,
    ) -> None:
        device, peers, tables = rows.device, batch.shape.peers, batch.shape.tables
        self._given_rows, self._cells, self._waits, self._backend = rows, batch.cells, waits, backend
        self._groups = [[*range(peers)]] if direction == "forward" else [[peer] for peer in range(peers)]
        whole = self._layout([*range(peers)])
        self._bounds, self._modes = Bounds.of(bound, whole.tables), Modes.of(mode, whole.tables)
        self._books = [Codebooks(len(group), tables, device) for group in self._groups]
        self._known = ReceivedCodebooks(peers, tables, device)
        self._sent, self._packed, self._received = (
            torch.empty(max_frame_bytes(whole, torch.float32), dtype=torch.uint8, device=device)
            for _ in range(3)
        )
        there = encode_scratch_bytes(
            whole, torch.float32, self._bounds, self._modes, codebooks=True, device=device, backend=backend
        )
        back = decode_scratch_bytes(whole, torch.float32, device=device, backend=backend)
        self._scratch = torch.empty(max(there, back), dtype=torch.uint8, device=device)
        self._arrived = torch.empty_like(rows)
        self._lengths: list[int] = []

    def _layout(self, peers: list[int]) -> Layout:
        return Layout.of_cells((self._given_rows.numel(),), self._cells[peers])

    def _encode(self) -> None:
        self._frames, self._layouts, room = [], [], 0
        for group, books in zip(self._groups, self._books, strict=True):
            layout = self._layout(group)
            self._waits.upload_layout(layout, "block table to encode")
            sizes = torch.zeros(len(group), dtype=torch.int64, device=self._given_rows.device)
            frames = Frames(self._sent[room:], sizes, torch.zeros_like(sizes))
            encode(
                self._given_rows.view(-1), layout, self._bounds, self._modes, frames, self._scratch,
                codebooks=books, backend=self._backend,
            )  # fmt: skip
            room += max_frame_bytes(layout, torch.float32)
            self._frames.append(frames)
            self._layouts.append(layout)

    def _pack(self) -> Tensor:
        """The frames back to back; backward they lie where the largest would have had room."""
        if len(self._frames) == 1:
            return self._sent
        at = 0
        for frames, length in zip(self._frames, self._lengths, strict=True):
            self._packed[at : at + length] = frames.buffer[:length]
            at += length
        return self._packed

    def send(self, mark: Callable[[str], None]) -> Tensor:
        """See :class:`Transfer`."""
        waits = self._waits
        self._encode()
        mark("encode")
        self._lengths = waits.read(torch.cat([frames.sizes for frames in self._frames]), "sizes written")
        told = waits.upload(self._lengths, "sizes told").clone()
        sizes = waits.read(told, "sizes heard")
        mark("sizes")
        packed, total = self._pack(), sum(sizes)
        if packed is self._packed:
            mark("pack")
        self._received[:total].copy_(packed[:total])
        mark("wire")
        starts = [sum(sizes[:peer]) for peer in range(len(sizes))]
        layout = self._layout([*range(len(sizes))])
        waits.upload_layout(layout, "block table to decode")
        frames = Frames(
            self._received,
            waits.upload(sizes, "sizes to decode"),
            waits.upload(starts, "offsets to decode"),
        )
        status = torch.zeros(1, dtype=torch.int64, device=self._given_rows.device)
        decode(
            frames, layout, self._arrived.view(-1), self._scratch,
            codebooks=self._known, status=status, backend=self._backend,
        )  # fmt: skip
        if waits.read(status, "decoder's verdict") != [0]:
            raise_for_status(status, layout)
        mark("decode")
        return self._arrived

    def sent_bytes(self) -> int:
        """See :class:`Transfer`."""
        return sum(self._lengths)

    def refresh(self) -> None:
        """See :class:`Transfer`."""
        for books in self._books:
            books.refresh()

    def worst(self) -> float:
        """See :class:`Transfer`."""
        shares = []
        for frames, layout in zip(self._frames, self._layouts, strict=True):
            bound = torch.from_numpy(frame_tables(frames.buffer, frames.offsets, frames.sizes, layout).bound)
            shares.append(
                worst_error_over_bound(self._given_rows.view(-1), self._arrived.view(-1), layout, bound).max()
            )
        return float(torch.stack(shares).max())
