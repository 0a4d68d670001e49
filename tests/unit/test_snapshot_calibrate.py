"""Which layers have a range fixed on held-out rows, and from what."""

from pathlib import Path

import pytest
import torch
from snapshot_run import save

from tightrec.snapshot.calibrate import chosen_ranges, input_histograms
from tightrec.snapshot.layers import ACTIVATION_BITS
from tightrec.snapshot.model import behind_relu
from tightrec.snapshot.parts import batches, read_parts
from tightrec.snapshot.precision import RANGE_METHODS
from tightrec.snapshot.ranges import Histogram
from tightrec.snapshot.rows import read_rows
from tightrec.snapshot.source import open_checkpoint

LAYERS = ["bottom.0", "bottom.1", "cross.0.v", "cross.0.w", "top.0", "top.1", "top.2"]


def histograms() -> dict[str, Histogram]:
    """Of inputs that differ from layer to layer."""
    found = {}
    for place, name in enumerate(LAYERS):
        found[name] = Histogram()
        values = torch.rand(1_000_000, generator=torch.Generator().manual_seed(place)) - 0.1
        # So rare that it pays to clip it.
        values[0] = 20.0
        found[name].update(values.relu_() if behind_relu(name) else values)
    return found


def test_behind_a_relu_are_an_mlps_layers_but_its_first() -> None:
    assert [name for name in LAYERS if behind_relu(name)] == ["bottom.1", "top.1", "top.2"]


def test_mixed_fixes_by_l2_what_is_behind_a_relu_and_nothing_else() -> None:
    seen = histograms()
    behind = ["bottom.1", "top.1", "top.2"]
    mixed, widest = chosen_ranges(seen, "mixed"), chosen_ranges(seen, "min_max", behind)
    assert mixed == chosen_ranges(seen, "l2", behind)
    assert all(mixed[name][1] < 0.9 * widest[name][1] for name in behind)


def test_dynamic_fixes_nothing() -> None:
    assert chosen_ranges(histograms(), "dynamic") == {}
    assert chosen_ranges({}, "dynamic", LAYERS) == {}


@pytest.mark.parametrize("method", [m for m in RANGE_METHODS if m not in ("mixed", "dynamic")])
def test_every_other_method_fixes_all_layers_that_are_asked_for(method: str) -> None:
    seen = histograms()
    asked = ["bottom.0", "top.1"]
    assert chosen_ranges(seen, method, asked) == {
        name: seen[name].range(method, ACTIVATION_BITS) for name in asked
    }
    assert list(chosen_ranges(seen, method)) == LAYERS


def test_histograms_hold_what_every_layer_takes_in_over_all_rows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "run", 1))
    assert checkpoint.data is not None
    rows = read_rows(checkpoint.data, "valid", None, checkpoint.schema)
    parts = read_parts(checkpoint, [rows])
    scorer, narrowed = parts.scorer(parts.exact), parts.narrowed(rows)
    found = input_histograms(scorer, narrowed, 37)
    assert list(found) == list(parts.layers)
    for name, taken in scorer.layer_inputs(*next(batches(narrowed, len(rows)))):
        low, high = found[name].range("min_max", ACTIVATION_BITS)
        assert low == pytest.approx(min(0.0, float(taken.min())), rel=1e-5, abs=1e-6)
        assert high == pytest.approx(max(0.0, float(taken.max())), rel=1e-5, abs=1e-6)
