"""What the exchange notes: every byte belongs to a table, evaluations are left out, windows start anew."""

import numpy as np
import torch

from tightrec.compression.codec import encode
from tightrec.compression.layout import Layout
from tightrec.compression.telemetry import FrameTables, frame_tables
from tightrec.sharding.measures import Measures

CPU = torch.device("cpu")


def _frames(rows: list[list[int]]) -> tuple[FrameTables, int]:
    """Blocks of two tables for each peer; what their frames hold, and the bytes of all."""
    layout = Layout.flat(rows, [4, 6])
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(3, (layout.shape[0],), generator=generator).float()
    frames = encode(values, layout, 0.1, "dedup")
    return frame_tables(frames.buffer, frames.offsets, frames.sizes, layout), int(frames.sizes.sum())


def test_the_bytes_of_tables_add_up_to_those_of_the_frames() -> None:
    tables = [["a", "b"], ["a", "a"], ["b", "a"]]
    for rows in ([[30, 9], [8, 0], [0, 0]], [[0, 0]], [[0, 5]]):
        found, total = _frames(rows)
        measures = Measures(CPU)
        measures.frames("forward", tables, found, copies=3)
        entries = measures.take()["forward"].tables
        assert np.isclose(sum(entry.sent_bytes for entry in entries.values()), 3 * total)
        held = {"a": 0, "b": 0}
        for peer, blocks in enumerate(rows):
            for place, count in enumerate(blocks):
                held[tables[peer][place]] += 3 * count
        assert {name: entries[name].rows if name in entries else 0 for name in held} == held


def test_rows_values_distinct_ones_and_modes_are_those_of_the_blocks() -> None:
    found, _ = _frames([[30, 9], [8, 0]])
    measures = Measures(CPU)
    for _ in range(2):
        measures.frames("backward", [["a", "b"], ["a", "b"]], found, copies=1)
    entries = measures.take()["backward"].tables
    assert (entries["a"].rows, entries["b"].rows) == (76, 18)
    assert (entries["a"].values, entries["b"].values) == (4 * 76, 6 * 18)
    # Empty blocks have no mode.
    assert [sum(entries[name].modes.values()) for name in "ab"] == [4, 2]
    assert entries["a"].distinct == 2 * int(found.distinct[:, 0].sum())


def test_the_window_and_the_step_are_taken_apart() -> None:
    measures = Measures(CPU)
    for step in range(3):
        measures.begin_step({"forward": step == 0, "backward": False}, timed=False)
        measures.add("forward", exchange_s=1.0, sent_bytes=10, transfers=1)
        if step < 2:
            last = measures.take_step("forward")
            assert last is not None and (last.transfers, last.exchange_s, last.sampled) == (1, 1.0, step == 0)
    assert measures.take_step("backward") is None
    window = measures.take()
    assert (window["forward"].steps, window["forward"].sampled, window["forward"].sent_bytes) == (3, 1, 30)
    assert (window["backward"].steps, window["backward"].sampled, window["backward"].transfers) == (3, 0, 0)
    again = measures.take()["forward"]
    assert (again.steps, again.transfers, again.sent_bytes) == (0, 0, 0)
    last = measures.take_step("forward")
    assert last is not None and last.transfers == 1, "the log does not take what the choice of modes needs"


def test_evaluations_are_left_out() -> None:
    found, _ = _frames([[30, 9]])
    measures = Measures(CPU)
    measures.active = False
    measures.add("forward", encode_s=1.0, transfers=1, framed=1)
    measures.frames("forward", [["a", "b"]], found, copies=1)
    measures.worst("forward", ["a"], [0.5])
    assert measures.take_step("forward") is None
    window = measures.take()["forward"]
    assert (window.transfers, window.encode_s, window.tables) == (0, 0.0, {})


def test_of_errors_the_worst_is_kept() -> None:
    measures = Measures(CPU)
    for errors in ([0.2, 0.9], [0.7, 0.1]):
        measures.worst("forward", ["a", "b"], errors)
    tables = measures.take()["forward"].tables
    assert (tables["a"].worst, tables["b"].worst) == (0.7, 0.9)
