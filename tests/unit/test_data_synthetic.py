"""Synthetic rows: reproducible, of the promised shape, and learnable as far as the Bayes AUC says."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from tightrec.formats.columns import Columns
from tightrec.trainer.data.loader import Loader, LoaderConfig
from tightrec.trainer.data.shards import fingerprint
from tightrec.trainer.data.synthetic import (
    _SCATTER,
    KAGGLE,
    PRESETS,
    TERABYTE,
    SyntheticConfig,
    SyntheticSource,
)

CONFIG = SyntheticConfig(train_rows=5_000, valid_rows=1_000, test_rows=0, row_group_rows=2_000, seed=3)


def train(**changes: object) -> SyntheticSource:
    return SyntheticSource(replace(CONFIG, **changes), "train")  # type: ignore[arg-type]


def equal(left: Columns, right: Columns) -> bool:
    return (
        np.array_equal(left.dense, right.dense)
        and np.array_equal(left.labels, right.labels)
        and all(
            np.array_equal(a.ids, b.ids) and np.array_equal(a.sizes, b.sizes)
            for a, b in zip(left.sparse, right.sparse, strict=True)
        )
    )


def test_a_row_group_is_the_same_whoever_reads_it_and_whenever() -> None:
    source = train(multi_hot=2)
    copy = pickle.loads(pickle.dumps(source))
    copy.read(2)
    assert equal(source.read(1), copy.read(1))
    assert equal(source.read(1), source.read(1))


def test_groups_splits_and_seeds_differ() -> None:
    base = train().read(0)
    others = [
        train().read(1),
        SyntheticSource(replace(CONFIG, valid_rows=2_000), "valid").read(0),
        train(seed=4).read(0),
    ]
    for other in others:
        assert not np.array_equal(base.dense, other.dense)
        assert not np.array_equal(base.sparse[2].ids, other.sparse[2].ids)
        assert not np.array_equal(base.labels, other.labels)


def test_splits_have_their_rows_and_an_empty_one_has_no_group() -> None:
    assert train().row_counts == [2_000, 2_000, 1_000]
    assert len(train().read(2)) == 1_000
    assert SyntheticSource(CONFIG, "test").row_counts == []
    assert train().schema.rows == {"train": 5_000, "valid": 1_000}


@pytest.mark.parametrize("preset", ["small", "kaggle", "terabyte"])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.05, 3.0])
def test_ids_lie_within_the_cardinalities_and_columns_fit_the_schema(preset: str, exponent: float) -> None:
    source = train(preset=preset, exponent=exponent, multi_hot=3)
    columns = source.read(0)
    assert columns.dense.shape == (2_000, 13)
    assert columns.dense.dtype == columns.labels.dtype == np.float32
    assert set(columns.labels.tolist()) == {0.0, 1.0}
    assert [column.multi_hot for column in source.schema.sparse] == [False] * 23 + [True] * 3
    for column, bags in zip(source.schema.sparse, columns.sparse, strict=True):
        assert (bags.offsets is not None) == column.multi_hot
        assert len(bags) == 2_000
        assert bags.ids.dtype == np.int64
        assert bags.ids.min() >= 0
        assert bags.ids.max() < column.cardinality


def test_presets_are_criteos_cardinalities_and_the_cap_caps() -> None:
    assert len(KAGGLE) == len(TERABYTE) == 26
    assert sum(KAGGLE) == 33_762_577
    assert sum(TERABYTE) == 882_774_559
    assert max(PRESETS["small"]) == 10_000
    capped = train(preset="terabyte", max_cardinality=1_000)
    assert [c.cardinality for c in capped.schema.sparse] == [min(c, 1_000) for c in TERABYTE]
    assert all(math.gcd(_SCATTER, c) == 1 for c in (*KAGGLE, *TERABYTE)), "scattering must not merge ids"


def test_ids_follow_the_power_law() -> None:
    ids = train(train_rows=200_000, row_group_rows=200_000, preset="kaggle").read(0).sparse[2].ids
    cardinality, exponent = KAGGLE[2], CONFIG.exponent
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1] / len(ids)
    for top in (1, 10, 1_000):
        # Mass of the first `top` ranks of the continuous law on [1, cardinality + 1).
        power = 1 - exponent
        expected = ((top + 1) ** power - 1) / ((cardinality + 1) ** power - 1)
        assert counts[:top].sum() == pytest.approx(expected, rel=0.05), top


def test_popular_ids_lie_scattered_over_the_table() -> None:
    ids = train().read(0).sparse[2].ids
    popular = np.argsort(np.bincount(ids, minlength=10_000))[::-1][:20]
    assert popular.min() < 3_000
    assert popular.max() > 7_000


def test_bags_have_the_mean_size_asked_for_and_some_are_empty() -> None:
    sizes = train(multi_hot=1, multi_hot_mean=2.0).read(0).sparse[-1].sizes
    assert sizes.mean() == pytest.approx(2.0, rel=0.1)
    assert (sizes == 0).any()


def test_labels_follow_the_known_probabilities() -> None:
    source = SyntheticSource(SyntheticConfig(train_rows=100_000, row_group_rows=100_000), "train")
    drawn = source._draw(0)
    order = np.argsort(drawn.probabilities)
    for part in np.array_split(order, 10):
        expected = drawn.probabilities[part].mean()
        assert drawn.columns.labels[part].mean() == pytest.approx(expected, abs=0.02)
    assert drawn.columns.labels.mean() == pytest.approx(0.25, abs=0.1)


def test_bayes_auc_is_the_share_of_pairs_that_the_probabilities_order_rightly() -> None:
    source = train(train_rows=300, row_group_rows=100)
    drawn = [source._draw(group) for group in range(3)]
    labels = np.concatenate([d.columns.labels for d in drawn])
    scores = np.concatenate([d.probabilities for d in drawn])
    for rows in (300, 150):
        y, s = labels[:rows], scores[:rows]
        pairs = s[y == 1][:, None] > s[y == 0][None, :]
        expected = pairs.mean()
        assert source.bayes_auc(rows) == pytest.approx(expected, abs=1e-12)
    assert source.bayes_auc() == source.bayes_auc(300) == source.bayes_auc(10_000)


def test_bayes_auc_grows_with_strength_and_shrinks_with_noise() -> None:
    def auc(**changes: float) -> float:
        return train(train_rows=20_000, row_group_rows=20_000, **changes).bayes_auc()

    assert auc(strength=0.0) == pytest.approx(0.5, abs=0.02)
    assert 0.75 < auc() < 0.87
    assert auc(strength=4.0) > auc() + 0.05
    assert auc(label_noise=0.2) < auc() - 0.05
    assert auc(label_noise=0.5) == pytest.approx(0.5, abs=0.02)


def test_bayes_auc_of_no_rows_or_one_class_is_not_a_number() -> None:
    assert math.isnan(SyntheticSource(CONFIG, "test").bayes_auc())
    assert math.isnan(train().bayes_auc(1))


def test_a_table_of_click_rates_learned_on_train_predicts_test() -> None:
    """Naive Bayes over ids, with no gradient in sight, must get well above chance and stay below Bayes."""
    config = SyntheticConfig(train_rows=60_000, test_rows=20_000, row_group_rows=60_000, valid_rows=0)
    seen, unseen = (SyntheticSource(config, split).read(0) for split in ("train", "test"))
    base = math.log(seen.labels.mean() / (1 - seen.labels.mean()))
    scores = np.zeros(20_000)
    for cardinality, old, new in zip(config.cardinalities, seen.sparse, unseen.sparse, strict=True):
        shown = np.bincount(old.ids, minlength=cardinality)
        clicked = np.bincount(old.ids, weights=seen.labels, minlength=cardinality)
        rate = (clicked + 20 * seen.labels.mean()) / (shown + 20)
        scores += (np.log(rate / (1 - rate)) - base)[new.ids]
    positives, negatives = scores[unseen.labels == 1], scores[unseen.labels == 0]
    auc = np.searchsorted(np.sort(negatives), positives).mean() / len(negatives)
    bayes = SyntheticSource(config, "test").bayes_auc()
    assert 0.64 < auc < bayes


def test_fingerprint_tells_planted_models_apart_but_not_the_sizes_of_other_splits() -> None:
    assert fingerprint(train()) == fingerprint(train(valid_rows=7))
    prints = {fingerprint(train(**c)) for c in ({}, {"seed": 4}, {"train_rows": 4_000}, {"strength": 1.0})}
    assert len(prints) == 4


def test_loader_reads_it_and_dense_columns_may_be_absent() -> None:
    loader = Loader(train(dense=0), LoaderConfig(batch_size=512), 0, 2)
    batches = list(loader.iterate(loader.start(0)))
    assert sum(batch.weights.sum() for batch in batches) == 2_500
    assert batches[0].dense.shape == (512, 0)


@pytest.mark.parametrize(
    "setting",
    [
        {"train_rows": -1},
        {"row_group_rows": 0},
        {"dense": -1},
        {"seed": -1},
        {"max_cardinality": 0},
        {"multi_hot": 27},
        {"multi_hot_mean": 0.0},
        {"exponent": -0.1},
        {"click_rate": 1.0},
        {"strength": -1.0},
        {"label_noise": 0.6},
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"synthetic\.{next(iter(setting))}="):
        SyntheticConfig(**setting)  # type: ignore[arg-type]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no split 'dev'"):
        SyntheticSource(CONFIG, "dev")
