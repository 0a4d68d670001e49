"""What the types of tables and layers cost in NE, alone and together, on held-out rows.

A part is ``table:NAME`` or ``layer:NAME``. Shapes: n rows, D embedding dim, V pooled vectors a row: of the
tables, then of the deep hash embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tightrec.formats.columns import Columns
from tightrec.models.config import table_name
from tightrec.models.representation import with_dhe, with_table
from tightrec.snapshot.calibrate import Ranges
from tightrec.snapshot.hashed import decoder_layers
from tightrec.snapshot.lookup import Lookup
from tightrec.snapshot.model import Scorer
from tightrec.snapshot.parts import CPU, Parts
from tightrec.snapshot.precision import LAYER_TYPES, TABLE_TYPES, Plan
from tightrec.snapshot.rows import feature_major
from tightrec.snapshot.verify import ne_loss

EXACT = "fp32"

Types = dict[str, str]
"""A type for every part, tables first, in the order of the model."""

CERTAIN_ERRORS = 3.0
"""So many standard errors are not luck, even of the best of some dozen mixtures that were tried."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a mixture of types loses against float32 on the same rows."""

    ne_loss: float
    """NE divided by float32's, minus 1; below 0 it is better."""

    ne_loss_error: float
    """Standard error of ``ne_loss``, paired by rows."""

    expected_loss: float
    """The same if clicks came with float32's own probabilities: the mean divergence KL(float32 || mixture)
    divided by float32's log loss. Never below 0 and without the noise of labels, hence far steadier, but
    blind to a float32 model that is overconfident, which coarser types may cure."""

    @property
    def bound(self) -> float:
        """What is held against a budget: the worse of the two losses and one standard error on top, or what
        the labels alone exclude with certainty if that is less."""
        return min(
            max(self.ne_loss, self.expected_loss) + self.ne_loss_error,
            self.ne_loss + CERTAIN_ERRORS * self.ne_loss_error,
        )


@dataclass(frozen=True, kw_only=True)
class Cost(Loss):
    """One part at one type while everything else is float32."""

    part: str
    """``table:NAME`` or ``layer:NAME``."""

    kind: str
    """Its type, see precision.py."""

    bytes: int
    """Size of the whole part at this type."""

    float32_bytes: int
    """Its size in float32."""

    @property
    def charge(self) -> float:
        """What is added up over parts: the expected loss, as far as the labels do not contradict it with
        certainty. Never below 0, so that luck with one part buys nothing elsewhere."""
        margin = CERTAIN_ERRORS * self.ne_loss_error
        return max(min(max(self.expected_loss, self.ne_loss - margin), self.ne_loss + margin), 0.0)


class Bench:
    """Scores the same rows at one mixture of types after the other.

    A mixture's scores are bit for bit those of ``parts.scorer(...)`` on batches of the same size. Kept are
    the pooled vectors float32 [n, V * D] of the last mixture, of which the next one replaces those of tables
    and decoders that differ, and each table in the types that were asked for, together about twice its
    float32 size.

    Args:
        columns: rows with ids that count within ``parts.tables``.
        ranges: of int8 layers' inputs, by layer's name.
        row_search: of int4 and int2 rows.
        batch_size: rows scored at once.
        like: a bench of the same parts and settings on other rows, to share tables and layers with.

    Raises:
        ValueError: the rows are of one label only, or float32 scores some of them as no number.
    """

    def __init__(
        self,
        parts: Parts,
        columns: Columns,
        ranges: Ranges,
        row_search: str,
        batch_size: int,
        like: "Bench | None" = None,
    ) -> None:
        self.parts, self.ranges, self.row_search = parts, ranges, row_search
        self._batch_size = batch_size
        rows = feature_major(columns)
        self._dense, self._labels = rows.dense, rows.labels
        clicks = float(self._labels.sum())
        if not 0 < clicks < len(columns):
            raise ValueError(
                f"{clicks:,.0f} of the {len(columns):,} rows to search on are clicks, but NE needs both "
                "labels: give search_split=NAME or more search_rows."
            )
        n = len(columns)
        bounds = [rows.offsets[place * n : (place + 1) * n + 1] for place in range(len(parts.columns))]
        self._bags = {
            name: (rows.ids[ends[0] : ends[-1]], ends - ends[0])
            for (name, _), ends in zip(parts.columns, bounds, strict=True)
        }
        shape = parts.config.representation
        self._with_table, self._with_dhe = with_table(parts.columns, shape), with_dhe(parts.columns, shape)
        self._lookups: dict[tuple[str, str], Lookup] = {} if like is None else like._lookups
        self._layers: dict[tuple[str, str], nn.Module] = {} if like is None else like._layers
        self._vectors = len(self._with_table) + len(self._with_dhe)
        self._pooled = torch.empty(n, self._vectors * parts.config.embedding_dim)
        self._held: dict[int, tuple[str, ...]] = {}
        self.exact: Types = {
            **{f"table:{name}": EXACT for name in parts.tables},
            **{f"layer:{name}": EXACT for name in parts.layers},
        }
        self._exact_logits = self._logits(self.exact)
        if not self._exact_logits.isfinite().all():
            raise ValueError(
                "the float32 model scores some of the search rows as no finite number. Export a checkpoint "
                "from before its training broke."
            )

    def __len__(self) -> int:
        return len(self._labels)

    def loss(self, types: Types) -> Loss:
        """What the mixture ``types`` loses.

        Raises:
            ValueError: a part cannot have its type, for its values do not fit or the CPU has no operator.
        """
        logits = self._logits(types)
        measured, error = ne_loss(self._exact_logits, logits, self._labels)
        return Loss(
            ne_loss=measured,
            ne_loss_error=error,
            expected_loss=expected_loss(self._exact_logits, logits, self._labels),
        )

    def cost(self, part: str, kind: str) -> Cost:
        """What ``part`` at ``kind`` loses alone.

        Raises:
            ValueError: as :meth:`loss`.
        """
        loss = self.loss({**self.exact, part: kind})
        return Cost(
            part=part,
            kind=kind,
            ne_loss=loss.ne_loss,
            ne_loss_error=loss.ne_loss_error,
            expected_loss=loss.expected_loss,
            bytes=self.parts.part_bytes(part, kind),
            float32_bytes=self.parts.part_bytes(part, EXACT),
        )

    def plan(self, types: Types, ranges: str) -> Plan:
        """``types`` as a plan."""
        return Plan(
            tables={name: types[f"table:{name}"] for name in self.parts.tables},
            layers={name: types[f"layer:{name}"] for name in self.parts.layers},
            row_search=self.row_search,
            ranges=ranges,
        )

    @torch.inference_mode()
    def _logits(self, types: Types) -> Tensor:
        parts = self.parts
        layers = {name: self._layer(name, types[f"layer:{name}"]) for name in parts.layers}
        for place, feature in enumerate(self._with_table):
            name = table_name(feature)
            kind = types[f"table:{name}"]
            if self._held.get(place) != (kind,):
                self._columns(place).copy_(self._lookup(name, kind)(*self._bags[feature]))
                self._held[place] = (kind,)
        for place, feature in enumerate(self._with_dhe, start=len(self._with_table)):
            kinds = tuple(types[f"layer:{name}"] for name in decoder_layers(feature, parts.config))
            if self._held.get(place) != kinds:
                self._decode(feature, layers, self._columns(place))
                self._held[place] = kinds
        scorer = Scorer(parts.config, self._vectors, _Pooled(), layers, parts.extras, CPU)
        nothing = torch.empty(0, dtype=torch.int64)
        batches = zip(self._dense.split(self._batch_size), self._pooled.split(self._batch_size), strict=True)
        return torch.cat([scorer(dense, pooled, nothing) for dense, pooled in batches])

    def _columns(self, place: int) -> Tensor:
        dim = self.parts.config.embedding_dim
        return self._pooled[:, place * dim : (place + 1) * dim]

    def _decode(self, feature: str, layers: Mapping[str, nn.Module], out: Tensor) -> None:
        """Pooled deep hash embeddings of a feature, batch by batch: distinct ids are those of a batch."""
        hashed = self.parts.hashed(layers, [feature])
        assert hashed is not None
        ids, offsets = self._bags[feature]
        for rows in torch.arange(len(out)).split(self._batch_size):
            ends = offsets[int(rows[0]) : int(rows[-1]) + 2]
            out[rows] = hashed(ids[ends[0] : ends[-1]], ends - ends[0], len(rows))

    def _lookup(self, name: str, kind: str) -> Lookup:
        if (name, kind) not in self._lookups:
            lookup = self.parts.lookup({name: kind}, self.row_search)
            assert lookup is not None
            self._lookups[name, kind] = lookup
        return self._lookups[name, kind]

    def _layer(self, name: str, kind: str) -> nn.Module:
        if (name, kind) not in self._layers:
            activation = self.ranges.get(name) if kind == "int8" else None
            self._layers[name, kind] = self.parts.layer(name, kind, activation)
        return self._layers[name, kind]


class _Pooled(nn.Module):
    """Stands where a scorer has its lookup; what it is given as ids is pooled already."""

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return ids


def expected_loss(exact: Tensor, other: Tensor, labels: Tensor) -> float:
    """Relative loss of NE that ``other`` has if ``exact``'s probabilities are the true ones.

    Args:
        exact: logits [n].
        other: logits [n].
        labels: [n], 0 or 1; only for the log loss that it is relative to.
    """
    exact, other = exact.double(), other.double()
    bce = functional.binary_cross_entropy_with_logits
    truth = exact.sigmoid()
    divergence = bce(other, truth) - bce(exact, truth)
    # Rounding may leave -1e-17. A NaN stays one: max() would turn it into 0.
    return float(divergence.clamp(min=0) / bce(exact, labels.double()))


def types_of(part: str) -> tuple[str, ...]:
    """The types that a part may have besides float32, in the order of precision.py."""
    known = TABLE_TYPES if part.startswith("table:") else LAYER_TYPES
    return tuple(kind for kind in known if kind != EXACT)
