"""Speed of encode and decode on the CPU: GB/s of uncompressed bytes and ratio to a copy in the same run.

    make bench SCRIPT=codec_speed
    make bench SCRIPT=codec_speed ARGS="--threads 2 --rows 128"

26 tables x 8 peers of float32 rows, N(0,1) values at a bound that gives 3 to 4 bits a value; for the modes
that look for equal rows, rows are drawn by Zipf's law from as many as there are. Every round times a copy of
the values and each mode once, so that a busy machine slows all alike; min, median and max over the rounds.
`make bench-gpu` measures the same on a GPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from tightrec.compression.bounds import Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import (
    Modes,
    decode,
    decode_scratch_bytes,
    encode,
    encode_scratch_bytes,
)
from tightrec.compression.frames import Frames
from tightrec.compression.layout import Layout

MODES = ("packed", "dedup", "entropy", "auto")


def rows_of(layout: Layout, rows: int, dim: int, duplicates: bool) -> torch.Tensor:
    """Values of all blocks; with duplicates, rows repeat as ids do in click data."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(layout.shape, generator=generator)
    if duplicates:
        weights = 1.0 / torch.arange(1, rows + 1, dtype=torch.float64)
        for block in (block for blocks in layout.blocks for block in blocks):
            part = values[block.offset : block.offset + rows * dim].view(rows, dim)
            drawn = torch.multinomial(weights, rows, replacement=True, generator=generator)
            part.copy_(part[drawn])
    return values


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def figures(seconds: list[float], copies: list[float], size: int) -> str:
    """Min, median and max GB/s and the median ratio of times to the copies beside them."""
    speeds = sorted(size / second / 1e9 for second in seconds)
    ratio = statistics.median(second / copy for second, copy in zip(seconds, copies, strict=True))
    return f"{speeds[0]:6.2f} {statistics.median(speeds):6.2f} {speeds[-1]:6.2f}   {ratio:6.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048, help="rows of a block (default 2048)")
    parser.add_argument("--dim", type=int, default=128, help="values of a row (default 128)")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--bound", type=float, default=0.25, help="absolute (default 0.25: 3 to 4 bits)")
    parser.add_argument("--threads", type=int, default=1, help="cores to use (default 1)")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for name in ("rows", "dim", "tables", "peers", "threads", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; give 1 or more")
    torch.set_num_threads(arguments.threads)
    rows, dim = arguments.rows, arguments.dim
    layout = Layout.flat([[rows] * arguments.tables] * arguments.peers, [dim] * arguments.tables)
    bounds = Bounds.of(arguments.bound, layout.tables)
    distinct = {duplicates: rows_of(layout, rows, dim, duplicates) for duplicates in (False, True)}
    size = distinct[False].numel() * 4
    target = torch.empty_like(distinct[False])

    runs: dict[str, Callable[[], object]] = {}
    ratios: dict[str, float] = {}
    for mode in MODES:
        values = distinct[mode != "packed"]
        modes = Modes.of(mode, layout.tables)
        sender = receiver = None
        if mode in ("entropy", "auto"):
            sender = Codebooks(arguments.peers, arguments.tables)
            receiver = ReceivedCodebooks(arguments.peers, arguments.tables)
            encode(values, layout, bounds, modes, codebooks=sender)
            sender.refresh()
        frames = Frames.empty(layout, values.dtype)
        needed = encode_scratch_bytes(layout, values.dtype, bounds, modes, codebooks=sender is not None)
        scratch = torch.empty(needed, dtype=torch.uint8)
        back = torch.empty(decode_scratch_bytes(layout, values.dtype), dtype=torch.uint8)
        encode(values, layout, bounds, modes, frames, scratch, codebooks=sender)
        decode(frames, layout, target, back, codebooks=receiver)
        assert bool(((target - values).abs() <= arguments.bound).all())
        encode(values, layout, bounds, modes, frames, scratch, codebooks=sender)
        ratios[mode] = size / int(frames.sizes.sum())
        runs[f"{mode} encode"] = lambda v=values, m=modes, f=frames, s=scratch, c=sender: encode(
            v, layout, bounds, m, f, s, codebooks=c
        )
        runs[f"{mode} decode"] = lambda f=frames, s=back, c=receiver: decode(
            f, layout, target, s, codebooks=c
        )

    seconds: dict[str, list[float]] = {name: [] for name in ("copy", *runs)}
    for round_number in range(arguments.rounds + 1):
        for name, run in {"copy": lambda: target.copy_(distinct[False]), **runs}.items():
            second = timed(run)
            if round_number:  # the first round warms up
                seconds[name].append(second)

    print(
        f"{arguments.tables} tables x {arguments.peers} peers x {rows} rows x dim {dim} float32 = "
        f"{size / 1e6:.0f} MB, bound {arguments.bound}, {arguments.threads} thread(s), "
        f"torch {torch.__version__}"
    )
    print(f"{'':16} {'GB/s of uncompressed bytes':>20}   time in")
    print(f"{'':16} {'min':>6} {'median':>6} {'max':>6}   copies   compressed to")
    for name, times in seconds.items():
        mode = name.split()[0]
        share = f"   1/{ratios[mode]:.1f}" if mode in ratios else ""
        print(f"{name:16} {figures(times, seconds['copy'], size)}{share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
