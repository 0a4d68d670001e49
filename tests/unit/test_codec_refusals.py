"""What the codec refuses, each by what does not fit and where."""

import numpy as np
import pytest
import torch
from codec_example import LAYOUT, modes_of, rows

from tightrec.compression.bounds import Bound, Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import (
    decode,
    encode,
)
from tightrec.compression.frames import (
    Frames,
)
from tightrec.compression.layout import Block, Layout
from tightrec.kernels import backends
from tightrec.kernels.format import Mode as BlockMode


@pytest.mark.parametrize(
    ("sizes", "offsets", "sentence"),
    [
        (torch.zeros(1).long(), torch.zeros(4).long(), r"4 peers, but there are 1 frames \(out\.sizes\)"),
        (torch.zeros(4).long(), torch.zeros(4).int(), "out.offsets must be a contiguous int64 tensor"),
        (torch.zeros(8).long()[::2], torch.zeros(4).long(), "out.sizes must be a contiguous int64 tensor"),
    ],
)
def test_tensors_for_sizes_that_do_not_fit_are_refused(
    sizes: torch.Tensor, offsets: torch.Tensor, sentence: str
) -> None:
    buffer = Frames.empty(LAYOUT, torch.float32).buffer
    with pytest.raises(ValueError, match=sentence):
        encode(rows(), LAYOUT, 0.1, out=Frames(buffer, sizes, offsets))


@pytest.mark.parametrize(
    "bound", [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-40, 2.0**-127, 2.0**126, 1e300, 5e-324]
)
@pytest.mark.parametrize("of", ["absolute", "range", "rms"])
def test_an_impossible_bound_is_refused_by_the_tables_name(bound: float, of: str) -> None:
    bounds = [0.1, Bound(value=bound, of=of), 0.1]
    with pytest.raises(ValueError, match="table 'item': the error bound is"):
        encode(rows(), LAYOUT, bounds)


@pytest.mark.parametrize("bound", [2.0**-126, 2.0**125, 1.0])
def test_the_smallest_and_largest_bounds_are_taken(bound: float) -> None:
    again = decode(encode(rows(), LAYOUT, bound), LAYOUT)
    assert bool(((again - rows()).abs() <= bound).all())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"values": torch.zeros(3, 3)}, r"values has shape \(3, 3\), but the layout's is \(76, 98\)"),
        ({"values": torch.zeros(76, 98, dtype=torch.float64)}, "values is torch.float64; the codec takes"),
        ({"values": torch.zeros(98, 76).T}, "values must be contiguous"),
        ({"bounds": [0.1, 0.1]}, "2 bounds for 3 tables"),
        ({"bounds": {"user": 0.1, "item": 0.1, "gender": 0.1}}, r"unknown \['gender'\], missing \['genre'\]"),
        ({"bounds": Bound(value=0.1, of="mean")}, "table 'user'.* not 'mean'"),
        (
            {"bounds": Bounds.of(0.1, ["one"])},
            r"the bounds are for the tables \('one',\), but",
        ),
        ({"bounds": "0.1"}, "bounds are a number, a Bound"),
        ({"bounds": None}, "bounds are a number, a Bound"),
        ({"bounds": Bound(value="0.1")}, "table 'user': the error bound is '0.1'; give a number"),
        ({"modes": {"user": "raw"}}, r"modes by name must name every table once, not \['user'\]"),
        ({"modes": "zip"}, "table 'user': unknown mode 'zip'; choose one of auto, raw"),
        ({"modes": ["raw", "raw", "lossy"]}, "table 'genre': unknown mode 'lossy'"),
        ({"modes": ["raw"]}, "1 modes for 3 tables"),
        ({"backend": "gpu"}, "unknown codec backend 'gpu'; choose one of reference, cpu, cuda"),
        ({"backend": "cuda"}, "'cuda' needs CUDA tensors"),
        ({"scratch": torch.zeros(1, dtype=torch.uint8)}, "scratch has 1 bytes, but .* are needed"),
        ({"scratch": torch.zeros(10**6)}, "scratch must be a contiguous uint8 tensor"),
        ({"codebooks": Codebooks(2, 3)}, r"the codebooks are for \(2, 3\) peers and tables"),
        ({"out": Frames.empty(Layout.flat([[1]], [1]), torch.float32)}, "out.buffer has 64 bytes, but"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments: dict, sentence: str) -> None:
    call = {"values": rows(), "layout": LAYOUT, "bounds": 0.1} | arguments
    with pytest.raises(ValueError, match=sentence):
        encode(**call)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"out": torch.zeros(3)}, "out has shape"),
        (
            {"frames": Frames(torch.zeros(64).byte(), torch.zeros(4), torch.zeros(4).long())},
            "frames.sizes must be",
        ),
        ({"frames": Frames(torch.zeros(4).byte(), torch.zeros(4).long(), torch.zeros(3).long())}, "3 frames"),
        (
            {"frames": Frames(torch.zeros(1).byte().expand(64), *(torch.zeros(2, 4).long()))},
            "frames.buffer must",
        ),
        ({"frames": Frames(torch.zeros(64), *(torch.zeros(2, 4).long()))}, "frames.buffer must"),
        ({"status": torch.zeros(1)}, "status must be an int64 tensor of one element"),
        ({"status": torch.zeros(0, dtype=torch.int64)}, "status must be an int64 tensor of one element"),
        ({"dtype": torch.int32}, "out is torch.int32"),
        ({"scratch": torch.zeros(0, dtype=torch.uint8)}, "scratch has 0 bytes"),
        ({"codebooks": ReceivedCodebooks(4, 2)}, r"the codebooks are for \(4, 2\)"),
        ({"layout": Layout.flat([[1]], [1])}, "the layout has 1 peers, but there are 4 frames"),
    ],
)
def test_decode_refuses_what_does_not_fit(arguments: dict, sentence: str) -> None:
    call = {"frames": encode(rows(), LAYOUT, 0.1), "layout": LAYOUT} | arguments
    with pytest.raises(ValueError, match=sentence):
        decode(**call)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (Block(offset=0, rows=1, stride=0, dim=0), "rows of 0 values; a row holds 1 to 2048"),
        (Block(offset=0, rows=1, stride=2049, dim=2049), "rows of 2049 values"),
        (Block(offset=0, rows=-1, stride=1, dim=1), "-1 rows"),
        (Block(offset=0, rows=2**30, stride=2, dim=2), r"a block holds 0 to 2\^31 - 1 values"),
        (Block(offset=0, rows=2, stride=3, dim=4), "overlap, they start 3 elements apart"),
        (Block(offset=8, rows=1, stride=4, dim=4), "elements 8 to 12 of a tensor of 10"),
        (Block(offset=-1, rows=1, stride=4, dim=4), "elements -1 to 3"),
    ],
)
def test_a_layout_refuses_a_block_by_peer_and_table(block: Block, sentence: str) -> None:
    with pytest.raises(ValueError, match="block of table 'item' for peer 0: .*" + sentence):
        Layout((10,), ((block,),), ("item",))


def test_a_layout_refuses_peers_with_different_tables() -> None:
    one = Block(offset=0, rows=1, stride=1, dim=1)
    with pytest.raises(ValueError, match=r"same number of tables for each, not \[1, 2\]"):
        Layout((10,), ((one,), (one, one)))
    with pytest.raises(ValueError, match="2 table names for 1 tables"):
        Layout((10,), ((one,),), ("a", "b"))
    with pytest.raises(ValueError, match="at least one peer"):
        Layout((10,), ())
    with pytest.raises(ValueError, match="peer 1 has rows for 1 tables, but there are 2 dims"):
        Layout.flat([[1, 2], [1]], [4, 4])


def test_a_layout_of_torch_and_numpy_integers_is_that_of_pythons() -> None:
    """Sums over 0-d tensors work in place: a table of them would change under the kernels."""
    plain = Layout.columns([100, 100, 7], [16, 16], ["a", "b"])
    for make in (torch.tensor, np.array):
        other = Layout.columns(make([100, 100, 7]), make([16, 16]), ["a", "b"])
        assert torch.equal(other.on(torch.device("cpu")), plain.on(torch.device("cpu")))
        assert other.totals == plain.totals and other.shape == plain.shape
        assert Layout.flat(make([[3, 4]]), make([2, 2])).totals == Layout.flat([[3, 4]], [2, 2]).totals
    with pytest.raises(ValueError, match=r"a number of rows is 4\.0; give an integer"):
        Layout.columns([4.0], [16])
    with pytest.raises(ValueError, match="two tables have the same name: a, a"):
        Layout.columns([4], [16, 16], ["a", "a"])


def test_bounds_and_modes_by_name_and_as_numpy_numbers() -> None:
    modes = {"genre": "raw", "user": "packed", "item": "dedup"}
    frames = encode(rows(), LAYOUT, np.float32(0.02), modes)
    assert modes_of(frames, 2) == [BlockMode.PACKED, BlockMode.DEDUP, BlockMode.RAW]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(backends, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="backend 'cpu' needs numba, which is not installed"):
        encode(rows(), LAYOUT, 0.1)
