"""The sensitivity plot shows every part, whatever their number, and leaves matplotlib as it was."""

import warnings
from pathlib import Path

import matplotlib
import pytest

from tightrec.snapshot.plot import MOST_PARTS, plot_sensitivity
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.search import Found
from tightrec.snapshot.sensitivity import Cost


def made(tables: int, layers: int = 3, budget: float = 0.0002, loss: float = 1e-5) -> Found:
    """A result in which later tables and lower types lose more."""
    costs = []
    for number, (part, kinds) in enumerate(
        [(f"table:t_C{i}", ("fp16", "int8", "int4", "int2")) for i in range(tables)]
        + [(f"layer:top.{i}", ("bf16", "fp16", "int8")) for i in range(layers)]
    ):
        for place, kind in enumerate(kinds):
            expected = loss * 8**place * (1 + number)
            costs.append(
                Cost(
                    part=part,
                    kind=kind,
                    ne_loss=expected,
                    ne_loss_error=expected,
                    expected_loss=expected,
                    bytes=4000 >> place,
                    float32_bytes=8000,
                )
            )
    return Found(
        plan=Plan(
            tables={f"t_C{i}": ("fp32", "int4")[i % 2] for i in range(tables)},
            layers={f"top.{i}": "int8" for i in range(layers)},
        ),
        ne_loss=0.0001,
        ne_loss_error=0.00001,
        expected_loss=0.0001,
        costs=costs,
        steps=[],
        bytes=3000,
        float32_bytes=12_000,
        budget_ne=budget,
        rows=1000,
    )


def drawn(found: Found, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The SVG, its text as text."""
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    plot_sensitivity(found, path)
    return path.read_text()


@pytest.mark.parametrize("tables", [0, 1, 3, 26])
def test_every_part_is_named_and_the_most_sensitive_stands_first(
    tables: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svg = drawn(made(tables), tmp_path / "plot.svg", monkeypatch)
    names = [f"t_C{i}" for i in reversed(range(tables))] + ["top.2", "top.1", "top.0"]
    places = [svg.index(f">{name}<") for name in names]
    assert places == sorted(places)
    assert "25.0% of float32" in svg and "within 0.02 % in all" in svg
    assert "not drawn" not in svg


def test_many_parts_are_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svg = drawn(made(200), tmp_path / "plot.svg", monkeypatch)
    assert f"({203 - MOST_PARTS} less sensitive parts are not drawn)" in svg
    assert ">t_C199<" in svg and ">t_C0<" not in svg


@pytest.mark.parametrize(("budget", "loss"), [(0.0, 1e-5), (0.0, 0.0), (0.9, 0.0), (1e-9, 1e-3)])
def test_any_budget_and_loss_can_be_drawn(
    budget: float, loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        # Of an axis that cannot be logarithmic, for one.
        warnings.simplefilter("error")
        svg = drawn(made(3, budget=budget, loss=loss), tmp_path / "plot.svg", monkeypatch)
    assert ">t_C2<" in svg and "nan" not in svg


def test_the_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        plot_sensitivity(made(3), tmp_path / f"{name}.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_a_picture_is_written_as_well(tmp_path: Path) -> None:
    plot_sensitivity(made(3), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    plot_sensitivity(made(3), tmp_path / "plot.svg")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend(auto_select=False) == backend
