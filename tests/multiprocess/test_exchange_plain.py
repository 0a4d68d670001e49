"""Dedup and our exchange change only the order of sums: beside plain torchrec, and beside whole tables."""

from dataclasses import replace

import pytest
from exchange_cases import (
    FEATURES,
    OPTIMIZERS,
    Case,
    Worst,
    against_plain,
    against_unsharded,
    each,
    lossy,
    without_dedup,
    worst_of,
)
from ranks import run_ranks

pytestmark = pytest.mark.multiprocess

LIMIT = 1e-6
ODD = Case(batches=(13, 0, 7, 1), turning=True, steps=4, evaluate=(5, 0))
WIDE = tuple((names, rows, 256) for names, rows, _ in FEATURES)
"""A column block of grid sharding has 128 columns."""


def _agree(cases: list[Case], found: list[list[Worst]]) -> None:
    for case, worst in zip(cases, worst_of(found), strict=True):
        assert max(worst.values()) <= LIMIT, (case.kinds, case.optimizer, case.codec.forward, worst)


def test_fifty_steps_of_every_type_and_optimizer_are_those_of_plain_torchrec():
    cases = [Case(kinds="dtcrh", optimizer=name, steps=50) for name in OPTIMIZERS]
    # Two tables that share a feature, and one of two features, are of one type here.
    cases += [Case(kinds=kind, optimizer="adagrad") for kind in "tcrhkd"]
    cases += [Case(kinds="tcrhkd", weighted=True), Case(kinds="r", weighted=True, pooling="m")]
    cases += [without_dedup(Case(kinds="tcrhkd", codec=lossy("lossless")))]
    _agree(cases, run_ranks(2, each, against_plain, cases, 2, timeout=240))


def test_unequal_and_empty_batches_and_mixed_pooling_are_those_of_whole_tables():
    """Plain torchrec stops at row-wise tables and unequal batches, and divides mixed pooling wrongly."""
    cases = [
        replace(ODD, kinds="tcrhkd", pooling="sm"),
        replace(ODD, kinds="tcrhkd", pooling="mms", longest=1),
        replace(ODD, kinds="r", pooling="ms"),
        replace(ODD, kinds="tr0", weighted=True),
        replace(ODD, kinds="tcr", codec=replace(lossy("lossless"), dedup=False)),
        replace(ODD, kinds="0r", batches=(0, 0)),
    ]
    _agree(cases, run_ranks(2, each, against_unsharded, cases, 2, timeout=240))


def test_two_machines_of_two_ranks_are_those_of_plain_torchrec_and_of_whole_tables():
    cases = [Case(kinds="thrkd", optimizer="rowwise"), Case(kinds="gthrg", shapes=WIDE, steps=4)]
    odd = [replace(ODD, kinds="htrkdc", pooling="sm"), replace(ODD, kinds="ghrgd", pooling="ms", shapes=WIDE)]
    for compared, some in ((against_plain, cases), (against_unsharded, odd)):
        _agree(some, run_ranks(4, each, compared, some, 2, timeout=240))
