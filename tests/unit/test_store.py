"""Stored files: round trips, atomic writing, and that nothing in a file is trusted."""

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adversarial import check_bound
from mutations import mutations
from torch import Tensor

from tightrec.compression import index as index_module
from tightrec.compression import store
from tightrec.compression.bounds import Bound
from tightrec.compression.codec import MODES, Mode
from tightrec.compression.frames import FrameError, checksummed
from tightrec.compression.index import HEAD, aligned
from tightrec.compression.inspection import describe
from tightrec.compression.store import load, read_index, save, split_shape
from tightrec.kernels.format import Fault

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (),
    (1,),
    (0,),
    (5, 0),
    (0, 7),
    (4099,),
    (4096,),
    (3, 4096),
    (2, 2053),
    (70, 33),
    (2, 3, 5, 7),
    (300, 1),
]


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values with repeated rows, and some NaN, Inf and large ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1 and values.numel():
        values = values[torch.randint(0, max(1, shape[0] // 4), (shape[0],), generator=generator)]
    flat = values.reshape(-1)
    for at, special in zip(range(3, flat.numel(), 29), (math.nan, math.inf, -math.inf, 3e4), strict=False):
        flat[at] = special
    return flat.view(shape).to(dtype)


def check_round_trip(path: Path, tensors: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    """Every value of every tensor is within the bound that its frame states."""
    assert list(again) == list(tensors)
    for name, _, block in describe(path).rows():
        assert again[name].dtype == tensors[name].dtype
        assert again[name].shape == tensors[name].shape
        check_bound(tensors[name], again[name], block.bound)


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_type_and_mode_comes_back_within_its_bound(
    tmp_path: Path, dtype: torch.dtype, mode: Mode, backend: str
) -> None:
    tensors = {str(shape): tensor_of(shape, dtype) for shape in SHAPES}
    bounds = [(0.01, Bound(value=0.05, of="rms"), Bound(value=0.03, of="range"))[i % 3] for i in range(12)]
    path = tmp_path / "a.trec"
    written = save(path, tensors, bounds, mode, backend=backend)
    assert read_index(path) == written
    check_round_trip(path, tensors, load(path, backend=backend))
    for (name, _, block), bound in zip(describe(path).rows(), bounds, strict=True):
        if isinstance(bound, float) and mode != "raw" and tensors[name].numel():
            assert block.bound == np.float32(bound)


def test_types_modes_and_bounds_may_differ_and_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    tensors = {
        "a": tensor_of((40, 64), torch.float32).t().requires_grad_(),
        "b": tensor_of((40, 64), torch.bfloat16)[::3],
        "é\n": tensor_of((7,), torch.float16),
    }
    path = tmp_path / "a.trec"
    save(path, tensors, {"é\n": 0.5, "b": 0.1, "a": Bound(value=0.02, of="rms")}, ["packed", "raw", "auto"])
    check_round_trip(path, {k: v.detach().contiguous() for k, v in tensors.items()}, load(path))
    assert [block.mode for _, _, block in describe(path).rows()][:2] == ["packed", "raw"]


def test_a_tensor_gets_a_codebook_of_its_own_symbols_where_that_makes_it_smaller(tmp_path: Path) -> None:
    skewed = {"wide": torch.randn(1 << 16, generator=torch.Generator().manual_seed(1))}
    sizes = {}
    for mode in ("packed", "entropy", "auto"):
        sizes[mode] = save(tmp_path / "a.trec", skewed, 0.02, mode).entries[0].size  # type: ignore[arg-type]
    ((_, _, block),) = describe(tmp_path / "a.trec").rows()
    assert (block.mode, block.brings_codebook) == ("entropy", True)
    assert sizes["auto"] == sizes["entropy"] < 0.95 * sizes["packed"]
    # Too few values to pay for the book: it is left out, and the frame is that of the first pass.
    few = {"few": skewed["wide"][:200].clone()}
    packed = save(tmp_path / "b.trec", few, 0.02, "packed").entries[0].size
    assert save(tmp_path / "b.trec", few, 0.02, "auto").entries[0].size == packed


def test_rows_and_dim_make_up_every_shape() -> None:
    for shape in [*SHAPES, (2049,), (2048,), (5, 2048), (5, 2049), (4099, 64, 4099), (2**31 - 1,), (7, 0, 9)]:
        rows, dim = split_shape(shape)
        assert rows * dim == math.prod(shape)
        assert 1 <= dim <= 2048
    assert split_shape((100, 64)) == (100, 64)
    assert split_shape((100, 8192)) == (400, 2048)
    assert split_shape((64, 4099)) == (4099, 64)
    assert split_shape((4096,)) == (2, 2048)


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.zeros(3, dtype=torch.float64), r"'bad' is torch\.float64; float32, float16 and bfloat16"),
        (torch.zeros(3, dtype=torch.int32), r"'bad' is torch\.int32"),
        (torch.empty(2**31, device="meta"), r"'bad' has 2147483648 values; at most 2\^31 - 1 can be stored"),
        (torch.zeros([1] * 65), "'bad' has 65 dimensions; at most 64"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, tensor: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        save(tmp_path / "a.trec", {"good": torch.zeros(2), "bad": tensor}, 0.1)
    with pytest.raises(ValueError, match=r"its name '.udc00' is not valid Unicode"):
        save(tmp_path / "a.trec", {"\udc00": torch.zeros(2)}, 0.1)
    with pytest.raises(ValueError, match=r"unknown \['x'\], missing \['a'\]"):
        save(tmp_path / "a.trec", {"a": torch.zeros(2)}, {"x": 0.1})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")]
)
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: str
) -> None:
    path = tmp_path / "a.trec"
    save(path, {"old": torch.ones(3)}, 0.1)

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, at, fails)
        with pytest.raises(type(error)) as caught:
            save(path, {"other": torch.ones(3)}, 0.1)
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["a.trec"]
    assert list(load(path)) == ["old"]
    save(path, {"other": torch.ones(3)}, 0.1)
    assert list(load(path)) == ["other"]


def test_what_takes_too_few_bytes_is_packed_so_that_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (store, index_module):
        monkeypatch.setattr(module, "SPARSE_VALUES", 100_000)
    path = tmp_path / "a.trec"
    tensors = {name: torch.full((1000, 64), 0.75) for name in "ab"}
    save(path, tensors, 0.01, "dedup")
    assert [block.mode for _, _, block in describe(path).rows()] == ["dedup", "packed"]
    check_round_trip(path, tensors, load(path))
    monkeypatch.setattr(store, "SPARSE_VALUES", 10**9)
    save(path, tensors, 0.01, "dedup")
    with pytest.raises(
        ValueError, match=r"a\.trec: it says that 128000 values lie in less than a byte for 256"
    ):
        load(path)


def test_the_limit_on_sparse_files_is_the_one_that_is_documented() -> None:
    index_module.check_claims([(256 * 48, 48), (2**26, 48), (10**12, 4 * 10**9)])
    with pytest.raises(ValueError, match="67108865 values lie in less"):
        index_module.check_claims([(2**26 - 256, 48), (257, 1)])


def stored(path: Path) -> bytes:
    """A small file with frames of several modes."""
    tensors = {
        "rows": tensor_of((60, 16), torch.float32),
        "empty": torch.zeros(0, 3),
        "coded": torch.randn(3000, generator=torch.Generator().manual_seed(3)).half(),
        "same": torch.ones(50, 8),
        "bits": tensor_of((9, 5), torch.bfloat16),
    }
    save(path, tensors, 0.02, ["packed", "auto", "entropy", "auto", "raw"])
    return path.read_bytes()


def with_index(data: bytes, text: bytes) -> bytes:
    """A file with another index text, its length and padding put right."""
    length = HEAD.unpack_from(data)[2]
    frames = data[aligned(HEAD.size + length) :]
    head = HEAD.pack(b"TRECFILE", 1, len(text), zlib.crc32(text)) + text
    return head.ljust(aligned(len(head)), b"\0") + frames


def index_in(data: bytes) -> dict[str, Any]:
    """The index of a file."""
    return json.loads(data[HEAD.size : HEAD.size + HEAD.unpack_from(data)[2]])


def test_the_file_is_laid_out_as_documented(tmp_path: Path) -> None:
    data = stored(tmp_path / "a.trec")
    magic, version, length, checksum = struct.unpack_from("<8sIII", data)
    assert (magic, version) == (b"TRECFILE", 1)
    assert checksum == zlib.crc32(data[20 : 20 + length])
    start = -(-(20 + length) // 16) * 16
    assert data[20 + length : start] == bytes(start - 20 - length)
    end = start
    for entry in index_in(data)["tensors"]:
        assert list(entry) == ["name", "dtype", "shape", "rows", "dim", "offset", "size"]
        assert start + entry["offset"] == end
        frame = data[end : end + entry["size"]]
        assert frame[:4] == b"TREC"
        assert frame == checksummed(frame)
        end += entry["size"]
    assert end == len(data)


def test_a_flipped_bit_in_the_index_is_noticed(tmp_path: Path) -> None:
    """Also where the index stays well-formed, as in a name."""
    path = tmp_path / "a.trec"
    data = bytearray(stored(path))
    at = data.index(b"bits")
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.trec: damaged: the checksum of its index does not match"):
        load(path)


Edit = Callable[[dict[str, Any]], object]
EDITS: list[tuple[Edit, str]] = [
    (lambda i: i.pop("tensors"), "not an object with a list 'tensors'"),
    (lambda i: i.update(tensors={}), "not an object with a list 'tensors'"),
    (lambda i: i["tensors"].insert(0, 3), "tensor 0 of its index is not an object"),
    (lambda i: i["tensors"][0].pop("name"), "tensor 0 of its index: its name is None, not a text"),
    (lambda i: i["tensors"][0].update(name=4), "its name is 4, not a text"),
    (lambda i: i["tensors"][0].update(name="\ud800"), "is not valid Unicode"),
    (lambda i: i["tensors"][1].update(name="rows"), "two tensors are named 'rows'"),
    (lambda i: i["tensors"][0].update(dtype="float64"), "its type is 'float64', not one of float32"),
    (lambda i: i["tensors"][0].update(dtype=[]), r"its type is \[\], not one of"),
    (lambda i: i["tensors"][0].update(dtype="float16"), "another type than expected"),
    (lambda i: i["tensors"][0].update(shape=960), "its shape 960 is not a list"),
    (lambda i: i["tensors"][0].update(shape=[60.0, 16]), r"its shape \[60\.0, 16\] is not a list"),
    (lambda i: i["tensors"][0].update(shape=[-60, -16]), r"its shape \[-60, -16\] is not a list"),
    (
        lambda i: i["tensors"][0].update(shape=[60, 17]),
        r"60 rows of 16 values do not make the shape \[60, 17",
    ),
    (lambda i: i["tensors"][0].update(shape=[1] * 65), "is not a list of at most 64 sizes"),
    (lambda i: i["tensors"][1].update(shape=[0, 2**62, 2**62]), "is larger than tensors can be"),
    (lambda i: i["tensors"][0].update(rows=True), "its rows is True, not an integer from 0"),
    (lambda i: i["tensors"][0].update(rows=-60, dim=-16), "its rows is -60, not an integer"),
    (lambda i: i["tensors"][0].update(rows=None), "its rows is None"),
    (
        lambda i: i["tensors"][0].update(rows=30, dim=32),
        "number of rows than|another dimension than expected",
    ),
    (lambda i: i["tensors"][0].update(dim=0), "its dim is 0, not an integer from 1 to 2048"),
    (lambda i: i["tensors"][0].update(dim="9" * 500), r"its dim is '9{76}\.\.\., not an integer"),
    (lambda i: i["tensors"][3].update(rows=2**31 - 1, dim=8, shape=[8, 2**31 - 1]), "more than the 2.31 - 1"),
    (lambda i: i["tensors"][3].update(rows=2**27, dim=8, shape=[2**30]), "1073741824 values lie in less"),
    (lambda i: i["tensors"][0].update(offset=16), "starts at byte 16 of the frames"),
    (lambda i: i["tensors"][0].update(size=24), "its size is 24, not an integer from 48"),
    (lambda i: i["tensors"][0].update(size=56), "not a multiple of 16"),
    (lambda i: i["tensors"][4].update(size=2**50), "cut short: tensor 'bits' ends at"),
    (lambda i: i["tensors"].pop(), "bytes behind its last frame belong to nothing"),
    (lambda i: i["tensors"].reverse(), "tensor 'bits' starts at byte"),
]


@pytest.mark.parametrize(("edit", "sentence"), EDITS, ids=range(len(EDITS)))
def test_every_lie_of_an_index_is_told(tmp_path: Path, edit: Edit, sentence: str) -> None:
    path = tmp_path / "a.trec"
    content = index_in(stored(path))
    edit(content)
    path.write_bytes(with_index(path.read_bytes(), json.dumps(content).encode()))
    for reader in (load, describe):
        with pytest.raises(ValueError, match=sentence) as caught:
            reader(path)
        assert str(caught.value).startswith(str(path))


def damaged_heads(data: bytes) -> Iterator[tuple[bytes, str]]:
    """Files whose first bytes or index text are wrong."""
    start = aligned(HEAD.size + HEAD.unpack_from(data)[2])
    padded = with_index(data, json.dumps(index_in(data)).encode().ljust(1003))
    yield b"", "does not start with TREC"
    yield b"TRECTILE" + data[8:], "does not agree|version"
    yield b"PK\x03\x04" + data[4:], "does not start with TREC"
    yield data[:11], "cut short within its first 20 bytes"
    yield data[:8] + b"\x02" + data[9:], "version 2 are not known"
    yield data[:12] + b"\xff\xff\xff\xff" + data[16:], "not 4294967295 bytes long"
    yield data[: start - 1], "cut short, or its index"
    yield (
        padded[: HEAD.size + 1003] + b"\x01" + padded[HEAD.size + 1004 :],
        "padding behind its index is not zero",
    )
    yield with_index(data, b"{"), "not valid JSON"
    yield with_index(data, b'{"tensors": []} x'), "not valid JSON"
    yield with_index(data, b"\xff" + json.dumps(index_in(data)).encode()), "not valid JSON in UTF-8"
    yield with_index(data, b"[" * 200_000), "nested too deeply|not valid JSON"
    yield with_index(data, b'{"tensors": [], "tensors": []}'), "a key stands twice"
    yield with_index(data, b"9" * 5000), "not valid JSON"
    yield with_index(data, b"NaN"), "not an object with a list"
    yield data[:-16], "cut short: tensor 'bits'"
    yield data + bytes(16), "16 bytes behind its last frame"


def test_a_file_that_is_cut_or_another_kind_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.trec"
    for data, sentence in damaged_heads(stored(path)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=sentence):
            describe(path)
        with pytest.raises(ValueError, match=r"not a stored file|" + sentence):
            load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        load(tmp_path / "pipe")


def test_damage_anywhere_in_a_frame_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.trec"
    data = stored(path)
    index = read_index(path)
    headers = [index.start + entry.offset + at for entry in index.entries for at in range(48)]
    for at in [*headers, *range(index.start, len(data), 11)]:
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(FrameError, match=r"a\.trec: tensor '\w+': bad frame: ") as caught:
            load(path)
        assert caught.value.fault == Fault.CHECKSUM
        with pytest.raises(FrameError):
            describe(path)


def told(reader: Callable[[Path], Any], path: Path) -> tuple[Any, str]:
    """What a reader returns, or None and what it says."""
    try:
        return reader(path), ""
    except ValueError as error:
        return None, str(error)


def test_a_damaged_file_ends_in_a_sentence_or_within_its_limits(tmp_path: Path) -> None:
    """Frames that break the format get a right checksum, so that the decoder behind it is reached."""
    path = tmp_path / "a.trec"
    data = stored(path)
    whole = load(path)
    index = read_index(path)
    generator = np.random.default_rng(0)
    cases: list[bytes] = [data[: int(cut)] for cut in generator.integers(0, len(data), 300)]
    for _ in range(1500):  # the head and the index, a byte or a few
        changed = bytearray(data)
        for at in generator.integers(0, index.start, int(generator.integers(1, 4))):
            changed[at] = (
                int(generator.integers(0, 256))
                if generator.random() < 0.5
                else int(generator.choice(list(b'0"[{,5')))
            )
        cases.append(bytes(changed))
    for entry in index.entries:
        begin = index.start + entry.offset
        frame = data[begin : begin + entry.size]
        for broken in mutations(frame, generator, 300):
            fixed = broken.ljust(entry.size, b"\0")[: entry.size]
            cases.append(data[:begin] + checksummed(fixed) + data[begin + entry.size :])
    refused = 0
    for case in cases:
        path.write_bytes(case)
        again, sentence = told(load, path)
        assert sentence.startswith(str(path)) or again is not None
        refused += again is None
        if again is not None:
            assert sum(v.numel() for v in again.values()) == sum(v.numel() for v in whole.values())
        found, sentence = told(describe, path)
        assert sentence.startswith(str(path)) or found is not None
        assert found is not None or again is None, "what loads can be inspected"
    assert len(cases) > 3000
    assert refused > 2000
