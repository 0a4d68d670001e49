"""The measurement of benchmarks/step_speed.py on every rank: rates one by one, variants in turns."""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from step_speed_rate import Sample, first_guess, resolved, set_rate, solve
from step_speed_runs import Feed, Turn, build_variants, take_turns
from step_speed_table import percent, table

from tightrec.trainer.config import load
from tightrec.trainer.ranks import Ranks, connected

SHARE = 0.626
TOLERANCE = 0.01
UNLIMITED = ("plain", "dedup", "lossy", "auto")
COMMON = [
    "data=synthetic",
    "data.synthetic.preset=kaggle",
    "model=dlrm",
    "sharding=table_wise",
    "train.device=cpu",
]


def measure(words: argparse.Namespace, rates: list[str], variants: dict[str, list[str]]) -> None:
    """Measure ``variants`` (words of the trainer by name, plain among them) at all ``rates``, and print.

    Raises:
        ValueError: plain torchrec itself cannot run.
    """
    with connected("cpu", 300) as ranks:
        say: Callable[[str], None] = partial(print, flush=True) if ranks.rank == 0 else _nothing
        _measure(words, rates, variants, ranks, say)


def _measure(
    words: argparse.Namespace,
    rates: list[str],
    own: dict[str, list[str]],
    ranks: Ranks,
    say: Callable[[str], None],
) -> None:
    common = [
        *COMMON,
        f"data.synthetic.max_cardinality={words.cardinality}",
        f"data.loader.batch_size={words.batch}",
        f"model.embedding_dim={words.dim}",
        *words.overrides,
    ]
    config, _ = load(common)
    feed = Feed(config, ranks, words.dedup == "loader")
    chosen = {name: [*common, *words_] for name, words_ in own.items()}
    say(
        f"{ranks.world} ranks x {words.batch} rows, dim {words.dim}, tables to {words.cardinality:,} rows; "
        f"{words.rounds} rounds of {words.steps} steps; deduplication in the {words.dedup}"
    )
    needs_share = any(word.startswith("share") for word in rates)
    share_kbit = _share_rate(words, chosen["plain"], feed, ranks, say) if needs_share else None
    variants, refused = build_variants(chosen, ranks, feed)
    cold = dict(variants)
    records = []
    for word in rates:
        rate = resolved(word, share_kbit)
        if "THROTTLED_NAME" in os.environ:
            set_rate(rate, ranks)
        names = [n for n in chosen if words.only or rate != "none" or n in UNLIMITED]
        running = {name: variants[name] for name in names if name in variants}
        # At a rate that they are measured at: some codecs choose by the link that their first steps see.
        warming = {name: cold.pop(name) for name in running if name in cold}
        if warming:
            take_turns(warming, feed, 1, words.warm, 0, 1)
        turns = take_turns(running, feed, words.rounds, words.steps, words.settle, words.profiled)
        rows = [_row(name, turns.get(name), turns["plain"], refused.get(name)) for name in names]
        say(table(word, rate, rows))
        about = {"rate": rate, "rate_word": word, "dedup_in": words.dedup}
        records += [about | row | {"words": own[row["variant"]]} for row in rows]
    settings = vars(words) | {"ranks": ranks.world, "share_kbit": share_kbit, "common": common}
    say("\n" + json.dumps(settings | {"torch": torch.__version__, "threads": torch.get_num_threads()}))
    for record in records:
        say(json.dumps(record))


def _nothing(_text: str) -> None:
    """What ranks other than the first say."""


def _share_rate(
    words: argparse.Namespace, plain: list[str], feed: Feed, ranks: Ranks, say: Callable[[str], None]
) -> int:
    """The rate in kbit/s at which the exchanges take SHARE of plain's step; by a model of its own."""
    variants, refused = build_variants({"plain": plain}, ranks, feed)
    if refused:
        raise ValueError(f"plain torchrec cannot run: {refused['plain']}")
    most, steps, profiled = (2, 2, 2) if words.quick else (8, 6, 8)

    def measured(settle: int) -> Turn:
        return take_turns(variants, feed, 1, steps, settle, profiled)["plain"][0]

    def measure(kbit: int) -> Sample:
        set_rate(f"{kbit}kbit", ranks)
        # Every rank sees the same numbers, so that all take the same turns of the search.
        turn = measured(settle=3)
        return Sample(turn.exchange_ms, turn.profiled_ms)

    set_rate("none", ranks)
    turn = measured(settle=words.warm)
    per_rank = (turn.sent_bytes["forward"] + turn.sent_bytes["backward"]) / ranks.world
    begin = first_guess(turn.profiled_ms - turn.exchange_ms, per_rank, SHARE)
    kbit, tried = solve(measure, begin, SHARE, TOLERANCE, most)
    unlimited = percent(turn.exchange_ms / turn.profiled_ms)
    say(f"plain without a limit: {turn.step_ms:.1f} ms a step, of which the exchanges take {unlimited}")
    for guess, sample in tried:
        say(f"  {guess / 1e3:.1f} Mbit/s: {percent(sample.share)} of {sample.step_ms:.1f} ms, profiled")
    set_rate("none", ranks)
    return kbit


def _row(name: str, turns: list[Turn] | None, plain: list[Turn], refused: str | None) -> dict[str, Any]:
    if turns is None:
        return {"variant": name, "refused": refused}
    speedups = [p.step_ms / t.step_ms for p, t in zip(plain, turns, strict=True)]
    exchange = statistics.fmean(t.exchange_ms for t in turns)
    return {
        "variant": name,
        "step_ms": statistics.median(t.step_ms for t in turns),
        "step_ms_min": min(t.step_ms for t in turns),
        "step_ms_max": max(t.step_ms for t in turns),
        "speedup": statistics.median(speedups),
        "speedup_min": min(speedups),
        "speedup_max": max(speedups),
        "sent_bytes": {p: statistics.fmean(t.sent_bytes[p] for t in turns) for p in turns[0].sent_bytes},
        "exchange_ms": exchange,
        "exchange_share": exchange / statistics.fmean(t.profiled_ms for t in turns),
        "loss": turns[-1].loss,
    }
