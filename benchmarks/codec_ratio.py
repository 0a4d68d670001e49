"""Compression ratios of the codec on what crossed a real exchange, beside those of the published baseline.

    .venv/bin/python benchmarks/codec_ratio.py dump.npz [--bound 0.03] [--kinds forward,backward,...]

The dump is benchmarks/dump_exchange.py's. A ratio is the float32 bytes of all rows, duplicate bags included,
over the bytes on the wire: frames whole, with headers and padding. Tables are dealt out to as many senders as
there are peers, each of which makes a frame of its tables for each peer. Kinds: forward and backward, a row a
sample; forward_bags and backward_bags, a row a distinct bag of ids (the gradients of equal bags added up),
where both sides know the bags and no index travels.

Columns: the SC'24 scheme (benchmarks/sc24_baseline.py; published for the kind forward alone), without frame
headers, and ours by what is asked of the codec. Entropy and auto use codebooks built at the dumped step
before, so the first step only makes books; a book is sent once in --refresh steps and counted so. Every frame
is decoded and every value checked against its block's bound.

Then: where the bytes of a block go, and what another coder than Huffman could save: the symbols' entropy (a
free book of their own), and their cross entropy under the counts that the book was built from (tANS at best).
"""

import argparse
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sc24_baseline import compress

from tightrec.compression.bounds import Bound
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks, code_lengths
from tightrec.compression.codec import Mode, decode, encode
from tightrec.compression.layout import Layout
from tightrec.kernels.format import (
    BLOCK_FLAG_CODEBOOK,
    BLOCK_HEADER_BYTES,
    CODEBOOK_BYTES,
    FRAME_HEADER_BYTES,
    SEGMENT_TILES,
    STRIP_VALUES,
    TILE_VALUES,
)
from tightrec.kernels.format import Mode as Written

Array = np.ndarray[Any, Any]
Step = dict[str, list[Array]]
"""The arrays of one step: by table, one for each peer."""

KINDS = {
    "forward": "forward",
    "forward_bags": "forward",
    "backward": "backward",
    "backward_bags": "summed",
}
"""Kinds of this program, and the kind in the dump that each is made of."""

OURS: tuple[Mode, ...] = ("packed", "dedup", "entropy", "auto")
ALL = "all"


@dataclass
class Ledger:
    """Bytes of one way of sending, over all measured steps."""

    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Block headers and payloads, by table and part of the block."""
    frames: float = 0
    """Frame headers and padding."""
    modes: Counter[str] = field(default_factory=Counter)
    """Blocks by the mode that they were written in."""

    def add(self, table: str, mode: Written, parts: Mapping[str, float]) -> None:
        """Count one block."""
        of_table = self.parts.setdefault(table, defaultdict(float))
        for name, count in parts.items():
            of_table[name] += count
        self.modes[mode.name.lower()] += 1

    def table(self, name: str) -> float:
        """All bytes of a table's blocks."""
        return sum(self.parts[name].values())

    def total(self) -> float:
        """All bytes."""
        return sum(map(self.table, self.parts)) + self.frames


@dataclass
class Coding:
    """Bits of the symbols of one table under several coders, over all measured steps."""

    values: float = 0
    entropy: float = 0
    own_book: float = 0
    book: float = 0
    cross_entropy: float = 0

    def add(self, counts: Array, earlier: Array, lengths: Array) -> None:
        """Count symbols [256] sent with code ``lengths`` built from the counts of ``earlier`` symbols."""
        sent = counts > 0
        # What has a code word was never counted as impossible; elsewhere the sender's escape takes its place.
        model = np.where(lengths > 0, np.maximum(earlier, 1), 0)
        known = sent & (model > 0)
        self.values += counts.sum()
        self.entropy -= _dot(counts[sent], np.log2(counts[sent] / counts.sum()))
        self.own_book += _dot(counts, np.array(code_lengths(counts.tolist())))
        self.book += _dot(counts[known], lengths[known])
        self.cross_entropy -= _dot(counts[known], np.log2(model[known] / model.sum()))


class Sender:
    """One rank's side of the exchange: its tables, their codebooks, and what its receivers keep."""

    def __init__(self, tables: list[str], peers: int, mode: Mode, given: argparse.Namespace) -> None:
        self.tables, self.mode, self.given = tables, mode, given
        self.bound = Bound(value=given.bound, of="range")
        self.books = Codebooks(peers, len(tables))
        self.received = ReceivedCodebooks(peers, len(tables))
        self.earlier = torch.zeros_like(self.books.histogram)

    def send(self, step: Step, ledger: Ledger) -> None:
        """Encode, decode, check and count one step.

        Raises:
            AssertionError: a bound is not what was asked for, or a value came back further than its bound.
        """
        blocks = [[step[table][peer] for table in self.tables] for peer in range(len(step[self.tables[0]]))]
        rows = [[len(block) for block in peer] for peer in blocks]
        layout = Layout.flat(rows, [block.shape[1] for block in blocks[0]], self.tables)
        values = torch.from_numpy(np.concatenate([block.ravel() for peer in blocks for block in peer]))
        backend = self.given.backend
        frames = encode(values, layout, self.bound, self.mode, codebooks=self.books, backend=backend)
        again = decode(frames, layout, codebooks=self.received, backend=backend).numpy()
        at = 0
        for peer, of_peer in enumerate(blocks):
            frame = frames.frame(peer).numpy().tobytes()
            ledger.frames += len(frame) - sum(len(payload) for _, payload in _blocks(frame))
            for table, block, (header, payload) in zip(self.tables, of_peer, _blocks(frame), strict=True):
                assert header.bound <= self.bound.value * np.ptp(block) * (1 + 1e-6), (table, peer)
                error = np.abs(again[at : at + block.size].astype(np.float64) - block.ravel())
                assert (error <= header.bound).all(), (table, peer)
                at += block.size
                ledger.frames -= BLOCK_HEADER_BYTES
                book = CODEBOOK_BYTES if header.has_book else 0
                ledger.add(table, header.mode, _parts(header.mode, payload[book:], *block.shape))
                ledger.parts[table]["header"] += BLOCK_HEADER_BYTES
                ledger.parts[table]["book"] += book / self.given.refresh

    def count(self, coding: dict[str, Coding]) -> None:
        """Add the symbols that have been sent since :meth:`learn`."""
        for row, table in enumerate(self.tables):
            counts = self.books.histogram[row].numpy(), self.earlier[row].numpy()
            lengths = self.books.lengths[row].numpy().astype(int)
            coding[table].add(*counts, lengths)

    def learn(self) -> None:
        """Build the books for the next step from the symbols of this one."""
        self.earlier = self.books.histogram.clone()
        self.books.refresh()


@dataclass(frozen=True)
class _Header:
    mode: Written
    has_book: bool
    bound: float


def _blocks(frame: bytes) -> list[tuple[_Header, bytes]]:
    """Header and payload of every block of a frame (docs/FORMAT.md, sections 1 and 2)."""
    (count,) = struct.unpack_from("<I", frame, 8)
    start, blocks = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * count, []
    for block in range(count):
        place = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * block
        mode, flags, bound, size = struct.unpack_from("<BB6xf4xQ", frame, place)
        header = _Header(Written(mode), bool(flags & BLOCK_FLAG_CODEBOOK), bound)
        blocks.append((header, frame[start : start + size]))
        start += size
    return blocks


def _parts(mode: Written, payload: bytes, rows: int, dim: int) -> dict[str, int]:
    """Bytes of a payload without codebook by what they are for (docs/FORMAT.md, section 4)."""
    parts = dict.fromkeys(("index", "directory", "planes", "data"), 0)
    if mode in (Written.DEDUP, Written.DEDUP_ENTROPY):
        (rows_sent,) = struct.unpack_from("<I", payload)
        parts["index"] = 4 + 4 * -(-rows // 32) * (rows_sent - 1).bit_length()
        rows = rows_sent
    values = rows * dim
    if mode in (Written.PACKED, Written.DEDUP):
        tiles = -(-values // TILE_VALUES)
        parts["directory"] = 4 * (tiles + -(-tiles // SEGMENT_TILES) - 1)
        entries = parts["index"] + parts["directory"] - 4 * tiles
        words = np.frombuffer(payload, "<u4", count=tiles, offset=entries)
        parts["planes"] = 4 * int((words >> 17 & 7).sum())
    elif mode in (Written.ENTROPY, Written.DEDUP_ENTROPY):
        strips = -(-values // STRIP_VALUES)
        parts["directory"] = 8 * strips
        words = np.frombuffer(payload, "<u4", count=2 * strips, offset=parts["index"])[1::2]
        parts["planes"] = 4 * int((words >> 16 & 15).sum())
    parts["data"] = len(payload) - sum(parts.values())
    return parts


def _dot(counts: Array, bits: Array) -> float:
    return float((counts * bits).sum())


def dumped_steps(path: Path, kind: str) -> tuple[list[Step], list[dict[str, int]]]:
    """The arrays of a kind of :data:`KINDS`, and the float32 bytes of all rows by table, step by step."""
    steps: dict[int, Step] = {}
    raw: dict[int, Counter[str]] = {}
    with np.load(path) as archive:
        for key in archive.files:
            step, which, table, peer = key.split("/")
            if which != KINDS[kind]:
                continue
            values, bag = archive[key], archive[f"{step}/bag/{table}/{peer}"]
            raw.setdefault(int(step), Counter())[table] += len(bag) * values.shape[1] * 4
            if kind == "forward_bags":
                values = values[np.unique(bag, return_index=True)[1]]
            of_table = steps.setdefault(int(step), {}).setdefault(table, [])
            assert len(of_table) == int(peer), "peers out of order"
            of_table.append(np.ascontiguousarray(values))
    ordered = sorted(steps)
    return [steps[step] for step in ordered], [raw[step] for step in ordered]


def measured(steps: list[Step], given: argparse.Namespace) -> tuple[dict[str, Ledger], dict[str, Coding]]:
    """Ledgers of SC'24 and of every mode of ours, and the coding of ``entropy``'s symbols."""
    tables, peers = list(steps[0]), len(next(iter(steps[0].values())))
    published = Ledger(parts={table: {"payload": 0.0} for table in tables})
    for step in steps[1:]:
        for table, blocks in step.items():
            for block in blocks:
                published.parts[table]["payload"] += len(compress(block, given.bound).payload)
    ledgers = {"SC'24": published}
    coding: dict[str, Coding] = {table: Coding() for table in tables}
    for mode in OURS:
        ledger = ledgers[mode] = Ledger(parts={table: defaultdict(float) for table in tables})
        for first in range(min(peers, len(tables))):
            sender = Sender(tables[first::peers], peers, mode, given)
            sender.send(steps[0], Ledger())
            for step in steps[1:]:
                sender.learn()
                sender.send(step, ledger)
                if mode == "entropy":
                    sender.count(coding)
    return ledgers, coding


def print_ratios(ledgers: Mapping[str, Ledger], raw: Mapping[str, int]) -> None:
    """Ratios by table and in all."""
    _row("table", *ledgers)
    _row(*["---"] * (1 + len(ledgers)))
    for table in raw:
        _row(table, *(f"{raw[table] / ledger.table(table):.2f}" for ledger in ledgers.values()))
    total = sum(raw.values())
    _row(f"**{ALL}**", *(f"**{total / ledger.total():.2f}**" for ledger in ledgers.values()))
    for name in ("entropy", "auto"):
        modes = ", ".join(f"{count} {mode}" for mode, count in ledgers[name].modes.most_common())
        print(f"\nblocks of {name}: {modes}")


def print_parts(ledger: Ledger, blocks: int) -> None:
    """Mean bytes of a block by part; ``blocks`` a table."""
    names = ("header", "index", "directory", "planes", "data", "book")
    _row("table", *names, "block")
    _row(*["---"] * (2 + len(names)))
    whole = {name: sum(parts[name] for parts in ledger.parts.values()) for name in names}
    for table, parts, count in [
        *((table, parts, blocks) for table, parts in ledger.parts.items()),
        ("mean", whole, blocks * len(ledger.parts)),
    ]:
        cells = [parts[name] / count for name in names]
        _row(table, *(f"{cell:.0f}" for cell in [*cells, sum(cells)]))
    print(f"\nframe headers and padding: {ledger.frames / blocks / len(ledger.parts):.0f} a block")


def print_coding(coding: Mapping[str, Coding], ledger: Ledger, raw: int) -> None:
    """Bits a value of the symbols that ``entropy`` would code, under each coder."""
    _row("table", "values", "entropy", "Huffman, own book", "Huffman, earlier book", "tANS at best", "saves")
    _row(*["---"] * 7)
    whole = Coding()
    for table, each in [*coding.items(), (ALL, whole)]:
        bits = [each.entropy, each.own_book, each.book, each.cross_entropy]
        saves = 1 - each.cross_entropy / each.book
        _row(table, f"{each.values:,.0f}", *(f"{b / each.values:.3f}" for b in bits), f"{saves:.1%}")
        if each is not whole:
            for name in vars(whole):
                setattr(whole, name, getattr(whole, name) + getattr(each, name))
    saved = (whole.book - whole.cross_entropy) / 8
    best = raw / (ledger.total() - saved)
    print(f"\nratio with Huffman {raw / ledger.total():.2f}, with tANS at best {best:.2f}")


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def main(words: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dump", type=Path, help="a file written by benchmarks/dump_exchange.py")
    parser.add_argument("--bound", type=float, default=0.03, help="share of a block's range")
    parser.add_argument("--kinds", default=",".join(KINDS), help="those to measure")
    parser.add_argument("--backend", default="", help="of the codec; all write the same bytes")
    parser.add_argument("--refresh", type=int, default=100, help="steps that a codebook serves")
    given = parser.parse_args(list(words))
    if not given.dump.is_file():
        parser.error(f"there is no file {given.dump}: benchmarks/dump_exchange.py writes one")
    if not any(key.count("/") == 3 for key in np.load(given.dump).files):
        parser.error(f"{given.dump} was not written by benchmarks/dump_exchange.py")
    for kind in given.kinds.split(","):
        steps, raw_steps = dumped_steps(given.dump, kind)
        raw = sum((Counter(each) for each in raw_steps[1:]), Counter[str]())
        ledgers, coding = measured(steps, given)
        blocks = (len(steps) - 1) * len(next(iter(steps[0].values())))
        print(f"\n## {kind}, bound {given.bound:g} of the range, {len(steps) - 1} steps\n")
        print_ratios(ledgers, raw)
        for mode in ("dedup", "entropy"):
            print(f"\n{mode}, mean bytes of a block\n")
            print_parts(ledgers[mode], blocks)
        print("\nentropy, bits a value\n")
        print_coding(coding, ledgers["entropy"], sum(raw.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
