"""What MP-Cache does to deep hash embeddings: latency with and without each level, hit rates, and what each
level costs in accuracy.

    make bench SCRIPT=serving_cache
    make bench SCRIPT=serving_cache ARGS="hashes=2048 decoder=512,256 kind=int8"
    make bench SCRIPT=serving_cache ARGS="snapshot=runs/latest/snapshot/current data=data/movielens"

Without ``snapshot`` the decoders are random, of the published size, for 26 features of Criteo Kaggle's
cardinalities up to ``cardinality``, with ids by Zipf's law; then only the embeddings are timed. With it, rows
are those of the prepared folder ``data``: frequencies come from its training split, queries from its test
split, and accuracy, AUC and normalised entropy from test rows that are not timed.

Variants take turns query by query, in an order drawn anew each time, so that a busy machine slows all alike.
Ratios are of medians, with the 95 % interval of a bootstrap over stretches of consecutive calls; above 1 the
variant is faster than ``none``.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from snapshot_latency import interval, timed
from snapshot_models import machine
from torch import Tensor

from tightrec.formats.columns import Columns
from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.models.config import ModelConfig, RepresentationConfig
from tightrec.models.dhe import Decoders
from tightrec.models.scores import Scores, score
from tightrec.serving.caching.cache import Caches, Frequencies, attach, frequencies
from tightrec.serving.caching.centroids import build_clusters
from tightrec.serving.paths import CACHE_LEVELS, CacheConfig
from tightrec.snapshot.hashed import HashedLookup, decoder_layer
from tightrec.snapshot.layers import make_layer, store_layer
from tightrec.snapshot.loader import Snapshot, load
from tightrec.snapshot.rows import feature_major, read_rows, replay
from tightrec.trainer.data.synthetic import SyntheticConfig, SyntheticSource

GOAL = 5.0
"""Speed of the embeddings with both levels, over none, at query size 128."""

Query = tuple[Tensor, Tensor, Tensor]
"""Dense values, ids and offsets of all features."""


@dataclass(frozen=True, kw_only=True)
class CacheBenchConfig:
    """The words of this script."""

    snapshot: Path | None = None
    """A snapshot with deep hash embeddings; null: random decoders of the published size."""

    data: Path | None = None
    """A prepared folder with the snapshot's columns."""

    rows: int = 128
    """Of a query."""

    calls: int = 200
    """Timed queries of every variant."""

    memory_mb: str = "8"
    """Of the caches, by commas."""

    centroids: int = 256
    """A feature."""

    pieces: int = 8
    """Of a vector (product quantisation); 1: k-means."""

    compare: bool = False
    """Whether to cluster the largest feature in every way and print the errors."""

    train_rows: int = 400_000
    """That frequencies are counted on."""

    test_rows: int = 50_000
    """That accuracy is measured on."""

    hashes: int = 1024
    """k of random decoders."""

    decoder: str = "128"
    """Hidden widths of random decoders, by commas."""

    kind: str = "fp32"
    """Type of random decoders' layers."""

    cardinality: int = 100_000
    """Most ids of a feature with random decoders."""

    threads: int = 1
    """Of torch."""

    seed: int = 0
    """Of random weights, rows, turns and the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    hashed: HashedLookup
    names: tuple[str, ...]
    """Of all sparse columns."""

    warm: Columns
    """Past rows."""

    queries: Columns
    """Rows to time."""

    tests: Columns
    """Rows to judge by; none with random decoders."""

    snapshot: Snapshot | None


def random_case(config: CacheBenchConfig) -> Case:
    synthetic = SyntheticConfig(
        preset="kaggle",
        max_cardinality=config.cardinality,
        train_rows=config.train_rows,
        valid_rows=config.rows * config.calls,
        seed=config.seed,
    )
    parts = []
    for split in ("train", "valid"):
        source = SyntheticSource(synthetic, split)
        parts.append(Columns.concat([source.read(group) for group in range(len(source.row_counts))]))
    columns = [(column.name, column.cardinality) for column in source.schema.sparse]
    widths = tuple(int(width) for width in config.decoder.split(","))
    shape = RepresentationConfig(kind="dhe", hashes=config.hashes, decoder=widths)
    torch.manual_seed(config.seed)
    decoders = Decoders(len(columns), 16, shape)
    layers = {
        decoder_layer(name, place): make_layer(
            store_layer(weight[feature], bias[feature], config.kind),
            relu=place < len(widths),
            nonnegative=place > 0,
            device=torch.device("cpu"),
        )
        for feature, (name, _) in enumerate(columns)
        for place, (weight, bias) in enumerate(zip(decoders.weights, decoders.biases, strict=True))
    }
    model = ModelConfig(embedding_dim=16, representation=shape)
    hashed = HashedLookup(columns, model, layers, torch.device("cpu"))
    return Case(
        hashed=hashed,
        names=tuple(name for name, _ in columns),
        warm=parts[0],
        queries=parts[1],
        tests=parts[1].slice(0, 0),
        snapshot=None,
    )


def snapshot_case(config: CacheBenchConfig) -> Case:
    if config.snapshot is None or config.data is None:
        raise ValueError("snapshot=FOLDER needs data=FOLDER, a prepared folder with its columns.")
    snapshot = load(config.snapshot)
    hashed = snapshot.scorer.hashed
    if hashed is None:
        raise ValueError(f"{config.snapshot} has no deep hash embedding: there is nothing to cache.")
    timed_rows = config.rows * config.calls
    return Case(
        hashed=hashed,
        names=tuple(feature.name for feature in snapshot.features),
        warm=read_rows(config.data, "train", config.train_rows),
        queries=read_rows(config.data, "test", timed_rows),
        tests=read_rows(config.data, "test", config.test_rows, start=timed_rows),
        snapshot=snapshot,
    )


def queries_of(columns: Columns, size: int) -> list[Query]:
    """All whole queries of ``size`` rows."""
    parts = [columns.slice(at, at + size) for at in range(0, len(columns) - size + 1, size)]
    return [tuple(tensor.clone() for tensor in feature_major(part)[:3]) for part in parts]


def parts_of(case: Case, query: Query, size: int) -> Query:
    """The ids and offsets of a query that the embeddings read."""
    if case.snapshot is None:
        return query
    return (query[0], *case.snapshot.scorer.hashed_bags(query[1], query[2], size))


def measure(
    case: Case, caches: dict[str, Caches], config: CacheBenchConfig
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Seconds of every variant, of the embeddings alone and of the whole query."""
    queries = queries_of(case.queries, config.rows)
    of_hashes = [parts_of(case, query, config.rows) for query in queries]

    def embed(own: Caches) -> Callable[[Query], Tensor]:
        def run(query: Query) -> Tensor:
            case.hashed.vectors = own if own.config.levels != "none" else case.hashed.compute
            return case.hashed(query[1], query[2], config.rows)

        return run

    def whole(own: Caches, snapshot: Snapshot) -> Callable[[Query], Tensor]:
        def run(query: Query) -> Tensor:
            case.hashed.vectors = own if own.config.levels != "none" else case.hashed.compute
            return snapshot.logits(*query)

        return run

    with torch.inference_mode():
        found = {
            "embeddings": timed(
                {name: embed(own) for name, own in caches.items()}, of_hashes, config.calls, config.seed
            )
        }
        if case.snapshot is not None:
            variants = {name: whole(own, case.snapshot) for name, own in caches.items()}
            found["query"] = timed(variants, queries, config.calls, config.seed)
    return found


def judged(case: Case, own: Caches) -> tuple[float, Scores]:
    """Share of right clicks, and the scores of the test rows."""
    assert case.snapshot is not None
    case.hashed.vectors = own if own.config.levels != "none" else case.hashed.compute
    logits = torch.cat([case.snapshot.logits(*rows[:3]) for rows in replay(case.tests, 4096)])
    labels = torch.from_numpy(np.array(case.tests.labels))
    return float(((logits >= 0) == (labels > 0)).double().mean()), score(logits, labels)


def latency_table(found: dict[str, NDArray[np.float64]], seed: int) -> list[str]:
    lines = ["| caches | p50, ms | p99, ms | over none (95 %) |", "|---|---|---|---|"]
    for name, seconds in found.items():
        middle, low, high = interval(found["none"], seconds, seed)
        p50, p99 = 1e3 * np.median(seconds), 1e3 * np.quantile(seconds, 0.99)
        lines.append(f"| {name} | {p50:.3f} | {p99:.3f} | {middle:.1f} ({low:.1f} - {high:.1f}) |")
    return lines


def report(case: Case, warm: Frequencies, memory_mb: float, config: CacheBenchConfig) -> None:
    """All figures of one cache size."""
    caches = {}
    for levels in CACHE_LEVELS:
        settings = CacheConfig(
            levels=levels, memory_mb=memory_mb, centroids=config.centroids, pieces=config.pieces
        )
        caches[levels] = attach(case.hashed, settings, None, "benchmark", warm)
    exact = list(caches["decoder"].features.values())
    print(
        f"\n{memory_mb:g} MB, query of {config.rows} rows; decoder level: "
        f"{exact.count('exact')} features exact, {exact.count('approximate')} approximate, "
        f"{exact.count('none')} without\n"
    )
    found = measure(case, caches, config)
    for what, seconds in found.items():
        print("\n".join([f"{what}:", "", *latency_table(seconds, config.seed), ""]))
    ratio = float(np.median(found["embeddings"]["none"]) / np.median(found["embeddings"]["both"]))
    print(f"goal: embeddings with both levels at least {GOAL:g}x none: {ratio:.1f}x", end=", ")
    print("met" if ratio >= GOAL else "MISSED", end="\n\n")
    for levels, own in caches.items():
        shares = [f"{level} {hits / max(hits + miss, 1):.4f}" for level, (hits, miss) in own.counts.items()]
        print(f"{levels}: {own.memory_bytes / 1e6:.3f} MB; hits of ids asked for: {', '.join(shares) or '-'}")
    if case.snapshot is not None:
        print("\n| caches | accuracy | AUC | NE | AUC - none | NE - none |\n|---|---|---|---|---|---|")
        _, base = judged(case, caches["none"])
        for levels, own in caches.items():
            right, scores = judged(case, own)
            print(
                f"| {levels} | {right:.4f} | {scores.auc:.5f} | {scores.ne:.5f} | "
                f"{scores.auc - base.auc:+.5f} | {scores.ne - base.ne:+.5f} |"
            )
    sys.stdout.flush()


def compared(case: Case, warm: Frequencies, config: CacheBenchConfig) -> None:
    """Mean squared error of the largest feature's vectors over past ids, as a share of their variance."""
    hashed = case.hashed
    feature = int(np.argmax(hashed.cardinalities))
    ids, times = warm[feature]
    with torch.inference_mode():
        vectors = hashed.compute(feature, ids)
    weights = torch.ones(hashed.cardinalities[feature])
    weights[ids] += times.float()
    share = (times / times.sum())[:, None]
    variance = float(((vectors - (share * vectors).sum(0)).square() * share).sum())
    print(f"\n{hashed.names[feature]}, {hashed.cardinalities[feature]:,} ids, {config.centroids} centroids:")
    print("\n| clustered | result | pieces | error / variance |\n|---|---|---|---|")
    plain = CacheConfig(levels="decoder", centroids=config.centroids, pieces=1)
    for settings, results in (
        (replace(plain, space="encoder"), "centroid"),
        (replace(plain, space="encoder"), "mean"),
        *((replace(plain, pieces=pieces), "mean") for pieces in (1, 2, 4, 8)),
    ):
        with torch.inference_mode():
            made = build_clusters(hashed, feature, settings, weights, results=results)
        rows = made.codes[ids] * settings.pieces + torch.arange(settings.pieces)
        near = made.results.flatten(0, 1)[rows].flatten(1)
        error = float(((vectors - near).square() * share).sum()) / variance
        print(f"| {settings.space} | {results} | {settings.pieces} | {error:.4f} |", flush=True)
    searched(hashed, feature, config)


def searched(hashed: HashedLookup, feature: int, config: CacheBenchConfig) -> None:
    """What a decoder level would take that searches the nearest centroid of a code when it is asked."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randperm(hashed.cardinalities[feature], generator=generator)[: config.rows]
    with torch.inference_mode():
        codes = hashed.encode(feature, ids)
        centres = torch.randn(codes.shape[1], config.centroids, generator=generator)
        seconds = timed(
            {
                "encoder": lambda _: hashed.encode(feature, ids),
                "decoder": lambda _: hashed.decode(feature, codes),
                "search": lambda _: (codes @ centres).argmin(1),
            },
            [None],
            config.calls,
            config.seed,
        )
    spent = ", ".join(f"{name} {1e3 * np.median(each):.3f} ms" for name, each in seconds.items())
    print(f"\n{config.rows} ids of it, medians: {spent} (of the nearest of {config.centroids} codes)")


def main(words: Sequence[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        print(describe("serving_cache", CacheBenchConfig))
        return 0
    try:
        config = from_words(CacheBenchConfig, words, "serving_cache")
        torch.set_num_threads(config.threads)
        case = snapshot_case(config) if config.snapshot else random_case(config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    hashed = case.hashed
    print(machine(config.threads))
    print(
        f"{config.snapshot or 'random decoders'}: {len(hashed.names)} features with "
        f"{sum(hashed.cardinalities):,} ids, k {len(hashed.hashes[0].a):,}, D {hashed.dim}",
        flush=True,
    )
    warm = frequencies(case.warm, case.names, case.hashed)
    for memory_mb in config.memory_mb.split(","):
        report(case, warm, float(memory_mb), config)
    if config.compare:
        compared(case, warm, config)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
