"""Synthetic clicks from a planted model, generated as they are read.

Row group i of a split comes from a generator seeded by (seed, split, i), so that every rank and worker sees
the same rows. The planted model keeps no tables: the effect of an id is a hash of (seed, column, id).

    logit = bias + strength * (sum of id effects + dense part + products of two id effects)

Ids follow a power law (continuous Zipf, by inversion of its distribution function), popular ids lying
scattered over the table. Because the true probability of every label is known, so is the best AUC that any
model can reach.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tightrec.formats.columns import Bags, Columns, Floats, Ids, offsets_of
from tightrec.formats.schema import SPLITS, Schema, SparseColumn

# Distinct values per categorical column of the two published Criteo data sets, as in facebookresearch/dlrm.
KAGGLE = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306),
    *(10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
TERABYTE = (
    *(227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10, 2209, 11938),
    *(155, 4, 976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36),
)
PRESETS = {"small": tuple(min(c, 10_000) for c in KAGGLE), "kaggle": KAGGLE, "terabyte": TERABYTE}

_SPARSE_SHARE, _DENSE_SHARE, _PAIR_SHARE = 0.6, 0.2, 0.2
_SCATTER = 2_654_435_761  # a prime above every cardinality: multiplication modulo one is a bijection


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The planted model and the size of its splits."""

    preset: Literal["small", "kaggle", "terabyte"] = "small"
    """Cardinalities of 26 sparse columns: Criteo's Kaggle or Terabyte; ``small``: Kaggle's up to 10,000."""

    max_cardinality: int | None = None
    """Cap on every cardinality; None: as in the preset. (MLPerf caps Terabyte at 40,000,000.)"""

    train_rows: int = 2_000_000
    """Rows of the training split."""

    valid_rows: int = 100_000
    """Rows of the validation split; 0: no such split."""

    test_rows: int = 200_000
    """Rows of the test split; 0: no such split."""

    row_group_rows: int = 16_384
    """Rows made in one go."""

    dense: int = 13
    """Number of dense columns."""

    multi_hot: int = 0
    """How many sparse columns, counted from the last, hold a bag of ids instead of one."""

    multi_hot_mean: float = 3.0
    """Mean number of ids in such a bag (Poisson: some are empty)."""

    exponent: float = 1.05
    """The k-th most popular id of a column has a probability proportional to k ** -exponent; 0: uniform."""

    click_rate: float = 0.25
    """About this share of labels is 1."""

    strength: float = 1.5
    """Standard deviation of the planted logit; 0: labels are pure chance."""

    label_noise: float = 0.0
    """Share of labels that are turned over after the draw."""

    seed: int = 0
    """Seeds the planted model and all rows."""

    def __post_init__(self) -> None:
        minimum = {
            "train_rows": 0,
            "valid_rows": 0,
            "test_rows": 0,
            "row_group_rows": 1,
            "dense": 0,
            "seed": 0,
        }
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ValueError(f"synthetic.{name}={getattr(self, name)} must be at least {least}.")
        if self.max_cardinality is not None and self.max_cardinality < 1:
            raise ValueError(f"synthetic.max_cardinality={self.max_cardinality} must be at least 1, or null.")
        if not 0 <= self.multi_hot <= len(PRESETS[self.preset]):
            raise ValueError(
                f"synthetic.multi_hot={self.multi_hot} must lie between 0 and {len(PRESETS[self.preset])}, "
                "the number of sparse columns."
            )
        if not 0 < self.multi_hot_mean < 1000:
            raise ValueError(f"synthetic.multi_hot_mean={self.multi_hot_mean} must lie between 0 and 1000.")
        if not 0 <= self.exponent <= 10:
            raise ValueError(f"synthetic.exponent={self.exponent} must lie between 0 and 10.")
        if not 0 < self.click_rate < 1:
            raise ValueError(f"synthetic.click_rate={self.click_rate} must lie between 0 and 1.")
        if not 0 <= self.strength <= 100:
            raise ValueError(f"synthetic.strength={self.strength} must lie between 0 and 100.")
        if not 0 <= self.label_noise <= 0.5:
            raise ValueError(f"synthetic.label_noise={self.label_noise} must lie between 0 and 0.5.")

    @property
    def cardinalities(self) -> list[int]:
        """Number of ids of each sparse column."""
        return [min(c, self.max_cardinality or c) for c in PRESETS[self.preset]]


class _Drawn(NamedTuple):
    columns: Columns
    probabilities: NDArray[np.float64]


class SyntheticSource:
    """One split (``train``, ``valid`` or ``test``) of the synthetic data."""

    def __init__(self, config: SyntheticConfig, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"synthetic data has no split {split!r}; it has {', '.join(SPLITS)}.")
        self._config = config
        self._split = SPLITS.index(split)
        rows = {name: getattr(config, f"{name}_rows") for name in SPLITS}
        settings = dataclasses.asdict(config)
        self.schema: Schema = Schema(
            dense=tuple(f"I{i + 1}" for i in range(config.dense)),
            sparse=tuple(
                SparseColumn(name=f"C{i + 1}", cardinality=c, multi_hot=i >= self._first_multi_hot)
                for i, c in enumerate(config.cardinalities)
            ),
            label="label",
            rows={name: count for name, count in rows.items() if count},
            source=f"synthetic, preset {config.preset}",
            preparation={key: value for key, value in settings.items() if not key.endswith("_rows")},
        )
        whole, rest = divmod(rows[split], config.row_group_rows)
        self.row_counts: list[int] = [config.row_group_rows] * whole + ([rest] if rest else [])
        self._planted = _Planted(config)

    @property
    def _first_multi_hot(self) -> int:
        return len(self._config.cardinalities) - self._config.multi_hot

    def read(self, group: int) -> Columns:
        """Row group ``group``."""
        return self._draw(group).columns

    def bayes_auc(self, rows: int | None = None) -> float:
        """AUC of the true probabilities on the first ``rows`` rows of this split (None: on all of it).

        No model is better on these rows but by chance. NaN where all labels are alike.
        """
        labels, probabilities, left = [], [], sum(self.row_counts) if rows is None else rows
        for group in range(len(self.row_counts)):
            if left <= 0:
                break
            drawn = self._draw(group)
            labels.append(drawn.columns.labels[:left])
            probabilities.append(drawn.probabilities[:left])
            left -= len(labels[-1])
        if not labels:
            return math.nan
        return _auc(np.concatenate(probabilities), np.concatenate(labels))

    def _draw(self, group: int) -> _Drawn:
        config, rows = self._config, self.row_counts[group]
        random = np.random.default_rng([config.seed, self._split, group])
        dense = random.standard_exponential((rows, config.dense), dtype=np.float32)
        sparse = []
        for column, cardinality in enumerate(config.cardinalities):
            sizes = None
            if column >= self._first_multi_hot:
                sizes = random.poisson(config.multi_hot_mean, rows)
            count = rows if sizes is None else int(sizes.sum())
            ids = _power_law(random.random(count), cardinality, config.exponent)
            sparse.append(Bags(ids, None if sizes is None else offsets_of(sizes)))
        probabilities = self._planted.probabilities(dense, sparse)
        labels = (random.random(rows) < probabilities).astype(np.float32)
        return _Drawn(Columns(dense, labels, tuple(sparse)), probabilities)


class _Planted:
    """True click probabilities; every effect has mean 0 and variance 1 over ids."""

    def __init__(self, config: SyntheticConfig) -> None:
        self._config = config
        columns = len(config.cardinalities)
        random = np.random.default_rng([config.seed, len(SPLITS)])
        self._salts = random.integers(2**63, size=(2, columns), dtype=np.uint64)
        weights = random.normal(size=config.dense)
        length = math.sqrt(float(weights @ weights)) or 1.0
        self._dense_weights: Floats = (weights / length).astype(np.float32)
        shuffled = random.permutation(columns)
        self._pairs = list(zip(shuffled[0:8:2].tolist(), shuffled[1:8:2].tolist(), strict=True))
        # Odds whose average over normal logits of this strength is the wanted rate (probit approximation).
        spread = math.sqrt(1 + math.pi / 8 * config.strength**2)
        self._bias = math.log(config.click_rate / (1 - config.click_rate)) * spread

    def probabilities(self, dense: Floats, sparse: list[Bags]) -> NDArray[np.float64]:
        """The probability [n] that a label is 1."""
        columns = len(sparse)
        ids_part = np.zeros(len(dense))
        for column in range(columns):
            ids_part += self._effect(0, column, sparse[column])
        pair_part = np.zeros(len(dense))
        for left, right in self._pairs:
            pair_part += self._effect(1, left, sparse[left]) * self._effect(1, right, sparse[right])
        dense_part = (dense - 1) @ self._dense_weights
        logit = self._bias + self._config.strength * (
            ids_part * math.sqrt(_SPARSE_SHARE / columns)
            + dense_part * math.sqrt(_DENSE_SHARE)
            + pair_part * math.sqrt(_PAIR_SHARE / len(self._pairs))
        )
        clean = 1 / (1 + np.exp(-logit))
        noise = self._config.label_noise
        return clean * (1 - noise) + (1 - clean) * noise

    def _effect(self, kind: int, column: int, bags: Bags) -> NDArray[np.float64]:
        effects = _hashed(bags.ids, self._salts[kind, column])
        if bags.offsets is None:
            return effects
        rows = np.repeat(np.arange(len(bags)), bags.sizes)
        sums = np.bincount(rows, weights=effects, minlength=len(bags))
        return sums / math.sqrt(self._config.multi_hot_mean)


def _power_law(uniform: NDArray[np.float64], cardinality: int, exponent: float) -> Ids:
    if abs(exponent - 1) < 1e-9:
        ranks = np.exp(uniform * math.log(cardinality + 1))
    else:
        power = 1 - exponent
        ranks = (1 + uniform * ((cardinality + 1) ** power - 1)) ** (1 / power)
    ids: Ids = np.minimum(ranks.astype(np.int64), cardinality) - 1
    ids *= _SCATTER
    ids %= cardinality
    return ids


def _hashed(ids: Ids, salt: np.uint64) -> NDArray[np.float64]:
    """Uniform on [-sqrt(3), sqrt(3)): splitmix64's finaliser (Steele et al. 2014) of id and salt."""
    mixed = ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed.astype(np.float64) * (2 * math.sqrt(3) / 2**64) - math.sqrt(3)


def _auc(scores: NDArray[np.float64], labels: Floats) -> float:
    """Area under the ROC curve by the rank sum (ties, which have probability 0 here, in any order)."""
    ordered = labels[np.argsort(scores, kind="stable")].astype(np.float64)
    positives = ordered.sum()
    negatives = len(ordered) - positives
    if not positives or not negatives:
        return math.nan
    rank_sum = float(np.arange(1, len(ordered) + 1) @ ordered)
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))
