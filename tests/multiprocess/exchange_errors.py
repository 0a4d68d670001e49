"""What arrives in both directions beside what was sent, for tests of bounds and formats."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from exchange_cases import Case, Trained, Unsharded, batch_of, in_hosts_of, initial, lossy, our_sharder
from torch import Tensor

from tightrec.sharding.config import CodecConfig
from tightrec.sharding.step import Step


@dataclass(frozen=True, kw_only=True)
class Block:
    """Worst error of some values, and what it may depend on."""

    name: str
    """Table; in backward with its part's sharding type."""
    error: float
    range: float
    """Largest less smallest of the exact values; of sums over ranks, what the partial sums of the others make
    of it: the mean over ranks of their ranges."""
    largest: float
    own: bool = False
    """Whether this rank sent it to itself."""


def errors(case: Case, rank: int, world: int) -> tuple[list[Block], list[Block]]:
    """Blocks of the forward exchange, by feature, and of the backward one, by slot and rank."""
    # Without dedup and bounds the module would be torchrec's own.
    exact_codec = CodecConfig() if case.codec.dedup else replace(lossy("lossless"), dedup=False)
    exact_case = replace(case, codec=exact_codec)
    exact, ours = (Trained(one, world, our_sharder(one)) for one in (exact_case, case))
    whole = Unsharded(case, world)
    forward, backward = [], []
    for step in range(case.steps):
        batch, gradient = batch_of(case, step, rank, world)
        arrived: list[list[tuple[str, Tensor, Any]]] = []
        pooled = []
        for model in (exact, ours):
            found: list[tuple[str, Tensor, Any]] = []
            with patch.object(Step, "land_back", _kept(found)):
                out = model.model(batch)
                (out * gradient).sum().backward()
            pooled.append(out.detach())
            arrived.append(found)
        at = 0
        for i, (features, rows, dim) in enumerate(case.shapes):
            for feature in features:
                block = [one[:, at : at + dim] for one in pooled]
                span = _span(block[0])
                if case.kind(i) == "r":
                    span = _partial_span(whole, case, i, feature, rank, world, step, -(-rows // world))
                if block[0].numel():
                    forward.append(_block(case.names[i], block[0], block[1], span))
                at += dim
        for (name, one, cells), (_, other, _) in zip(*arrived, strict=True):
            for peer, slots in enumerate(cells.tolist()):
                for offset, rows, stride, dim in slots:
                    if rows:
                        pair = [t.as_strided((rows, dim), (stride, 1), offset) for t in (one, other)]
                        backward.append(_block(name, *pair, _span(pair[0]), own=peer == rank))
        for model in (exact, ours):
            for name, part, slices in model.shards():
                part.copy_(initial(case)[name][slices])
            if model.dense is not None:
                model.dense.zero_grad()
    return forward, backward


def _kept(found: list[tuple[str, Tensor, Any]]) -> Any:
    land_back = Step.land_back

    def keeping(self: Step) -> list[Tensor]:
        grads = land_back(self)
        for number, grad in zip(self.remote, grads, strict=True):
            cells = self.moves._legs[number][0].far.cells
            found.append((self.parts[number].sharding_type, grad.clone().view(-1), cells))
        return grads

    return keeping


def _partial_span(
    whole: Unsharded, case: Case, table: int, feature: str, rank: int, world: int, step: int, height: int
) -> float:
    """Mean over ranks of the range of each other rank's partial sums of a row-wise table."""
    bag = batch_of(case, step, rank, world)[0][feature]
    owners = torch.repeat_interleave(bag.lengths().long())
    rows = whole.tables[case.names[table]].detach()[bag.values()]
    spans = []
    for peer in range(world):
        mine = (bag.values() // height == peer).unsqueeze(1)
        partial = torch.zeros(len(bag.lengths()), rows.shape[1]).index_add(0, owners, rows * mine)
        spans.append(_span(partial) if peer != rank else 0.0)
    return sum(spans) / world


def _span(values: Tensor) -> float:
    return float(values.max() - values.min()) if values.numel() else 0.0


def _block(name: str, exact: Tensor, other: Tensor, span: float, own: bool = False) -> Block:
    error = float((exact - other).abs().max())
    return Block(name=name, error=error, range=span, largest=float(exact.abs().max()), own=own)


def all_errors(rank: int, world: int, cases: list[Case], local: int) -> list[tuple[list[Block], list[Block]]]:
    """:func:`errors` of several cases in the same processes."""
    in_hosts_of(local, rank)
    return [errors(case, rank, world) for case in cases]
