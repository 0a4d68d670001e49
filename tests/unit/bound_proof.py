"""Rounds of the proof of the bound: adversarial values through a backend, each compared exactly."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from adversarial import GENERATORS, bounds, excess

from tightrec.compression.bounds import Bound
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import Mode, decode, encode
from tightrec.compression.layout import Layout
from tightrec.kernels.format import BLOCK_HEADER_BYTES, FRAME_HEADER_BYTES
from tightrec.kernels.format import Mode as BlockMode

DIMS = (1, 2, 3, 8, 31, 32, 33, 64, 100, 128, 257, 2048)


@dataclass
class Proof:
    """What a number of rounds has shown."""

    values: int = 0
    """Values compared."""
    beyond: int = 0
    """Values further than the bound from the original, or NaN and Inf that came back as other bits."""
    blocks: Counter[str] = field(default_factory=Counter)
    """Blocks by the mode they were sent in."""
    where: list[str] = field(default_factory=list)
    """The first broken value of each broken block."""

    def add(self, other: "Proof") -> None:
        """Count another proof in."""
        self.values += other.values
        self.beyond += other.beyond
        self.blocks += other.blocks
        self.where += other.where


def prove_round(
    count: int, dtype: torch.dtype, mode: Mode, seed: int, backend: str = "", every: int = 1
) -> Proof:
    """One call with about ``count`` values: a peer for each generator, a table for each ``every``-th bound.

    Most bounds are absolute; every fifth is relative, and read from the frame. Entropy coding gets codebooks
    of other values, so that escapes are used.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = list(bounds(8, generator))[seed % every :: every]
    each = max(1, count // (len(GENERATORS) * len(limits)))
    dims = [DIMS[(table + seed) % len(DIMS)] for table in range(len(limits))]
    layout = Layout.flat([[max(1, each // dim) for dim in dims]] * len(GENERATORS), dims)
    values = torch.empty(layout.shape, dtype=dtype)
    for name, blocks in zip(GENERATORS, layout.blocks, strict=True):
        for block, limit in zip(blocks, limits, strict=True):
            size = block.rows * block.dim
            values[block.offset : block.offset + size] = GENERATORS[name](size, dtype, limit, generator)
    asked = [
        Bound(value=0.03, of=("range", "rms")[table % 2]) if table % 5 == 4 else Bound(value=limit)
        for table, limit in enumerate(limits)
    ]
    sender = receiver = None
    if mode in ("entropy", "auto"):
        sender = Codebooks(layout.totals.peers, layout.totals.tables)
        receiver = ReceivedCodebooks(layout.totals.peers, layout.totals.tables)
        sender.histogram.random_(0, 100, generator=generator)[:, 40:254] = 0
        sender.refresh()
    frames = encode(values, layout, asked, mode, codebooks=sender, backend=backend)
    again = decode(frames, layout, dtype=dtype, codebooks=receiver, backend=backend)

    proof = Proof(values=values.numel())
    for peer, (name, blocks) in enumerate(zip(GENERATORS, layout.blocks, strict=True)):
        frame = frames.frame(peer).clone()
        for table, block in enumerate(blocks):
            header = frame[FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * table :][:BLOCK_HEADER_BYTES]
            used = float(header[8:12].clone().view(torch.float32))
            proof.blocks[BlockMode(int(header[0])).name] += 1
            if asked[table].of == "absolute" and mode != "raw":
                assert used == asked[table].value
            part = slice(block.offset, block.offset + block.rows * block.dim)
            wrong = excess(values[part], again[part], used)
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                pair = float(values[part][at]), float(again[part][at])
                proof.beyond += int(wrong.sum())
                proof.where.append(f"{name}, {dtype}, {mode}, seed {seed}, bound {used!r}: {pair}")
    return proof
