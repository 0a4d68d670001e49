"""The operator over mixed tables equals its plain-torch reference bit for bit, and refuses what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightrec.snapshot.lookup import Lookup, TableShape
from tightrec.snapshot.packed import pack, row_bytes, unpack
from tightrec.snapshot.precision import TABLE_TYPES
from tightrec.snapshot.table_reference import reference_lookup

CPU = torch.device("cpu")
DIMS = (4, 8, 12, 16, 20, 32, 64, 100, 128)

Table = tuple[str, int, Tensor]


def stored_rows(kind: str, rows: int, dim: int, generator: torch.Generator, anything: bool) -> Tensor:
    """Packed rows of normal values; ``anything``: codes, scales and biases that no packing would give."""
    if not anything:
        return pack(torch.randn(rows, dim, generator=generator), kind, "min_max")
    if kind == "fp32":
        return (torch.randn(rows, dim, generator=generator) * 1e30).view(torch.uint8)
    if kind == "fp16":
        return (torch.rand(rows, dim, generator=generator) * 131_000 - 65_500).half().view(torch.uint8)
    data = torch.randint(0, 256, (rows, row_bytes(kind, dim)), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(-24, 16, (rows, 2), generator=generator)
    head = (torch.rand(rows, 2, generator=generator) * 4 - 2) * 2.0**exponents
    data[:, :4] = head.clamp(-65504, 65504).half().view(torch.uint8)
    return data


def filled(tables: list[Table], pooling: str) -> Lookup:
    shapes = [
        TableShape(name=f"t{place}", kind=kind, rows=len(data), dim=dim)
        for place, (kind, dim, data) in enumerate(tables)
    ]
    lookup = Lookup(shapes, pooling, CPU)  # type: ignore[arg-type]
    for shape, (_, _, data) in zip(shapes, tables, strict=True):
        lookup.fill(shape.name, data)
    return lookup


def bags(sizes: list[int], rows: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Feature-major bags of random ids, the overflow row's among them."""
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    batch = len(sizes) // len(rows)
    ids = [
        torch.randint(0, rows[place // batch] + 1, (size,), generator=generator)
        for place, size in enumerate(sizes)
    ]
    return torch.cat([*ids, torch.empty(0, dtype=torch.int64)]), offsets


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float32 and found.shape == expected.shape
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@settings(max_examples=120, deadline=None)
@given(
    dims=st.lists(st.sampled_from(DIMS), min_size=5, max_size=5),
    order=st.permutations(TABLE_TYPES),
    rows=st.integers(0, 6),
    sizes=st.integers(0, 3).flatmap(
        lambda batch: st.lists(st.integers(0, 50), min_size=5 * batch, max_size=5 * batch)
    ),
    pooling=st.sampled_from(["sum", "mean"]),
    anything=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example([4] * 5, TABLE_TYPES, 1, [], "sum", False, 0)
@example([128] * 5, TABLE_TYPES, 6, [50] * 15, "mean", True, 1)
def test_the_operator_equals_the_reference_bit_for_bit(
    dims: list[int], order: list[str], rows: int, sizes: list[int], pooling: str, anything: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = [
        (kind, dim, stored_rows(kind, rows, dim, generator, anything))
        for kind, dim in zip(order, dims, strict=True)
    ]
    ids, offsets = bags(sizes, [rows] * 5, generator)
    found = filled(tables, pooling)(ids, offsets)
    assert found.shape == (len(sizes) // 5, sum(dims))
    assert_same_bits(found, reference_lookup(tables, ids, offsets, pooling))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TABLE_TYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_every_dim_of_every_type_in_long_bags(kind: str, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    for pooling in ("sum", "mean"):
        for anything in (False, True):
            tables = [(kind, dim, stored_rows(kind, 40, dim, generator, anything))]
            ids, offsets = bags([50, 0, 1, 2, 17], [40], generator)
            found = filled(tables, pooling)(ids, offsets)
            assert_same_bits(found, reference_lookup(tables, ids, offsets, pooling))  # type: ignore[arg-type]
            assert not found[1].view(torch.int32).any()


@pytest.mark.parametrize("kind", TABLE_TYPES)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_one_id_gives_what_unpack_gives_and_the_overflow_row_zeros(kind: str, pooling: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for anything in (False, True):
        data = stored_rows(kind, 30, 20, generator, anything)
        found = filled([(kind, 20, data)], pooling)(torch.arange(31), torch.arange(32))
        assert_same_bits(found[:30], unpack(data, kind, 20))
        assert not found[30].view(torch.int32).any()
    negative = filled([("fp32", 4, torch.full((1, 4), -0.0).view(torch.uint8))], pooling)
    assert_same_bits(negative(torch.zeros(1, dtype=torch.int64), torch.arange(2)), torch.zeros(1, 4))


def test_the_reference_is_that_of_every_instruction_set(tmp_path: Path) -> None:
    script = tmp_path / "bits.py"
    script.write_text(
        "import json, sys, torch\n"
        "from tightrec.snapshot.lookup import Lookup, TableShape\n"
        "from tightrec.snapshot.packed import pack\n"
        "kinds = ('fp32', 'fp16', 'int8', 'int4', 'int2')\n"
        "shapes = [TableShape(name=kind, kind=kind, rows=20, dim=36) for kind in kinds]\n"
        "lookup = Lookup(shapes, 'mean', torch.device('cpu'))\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "for kind in kinds:\n"
        "    lookup.fill(kind, pack(torch.randn(20, 36, generator=generator), kind, 'min_max'))\n"
        "ids = torch.randint(0, 21, (500,), generator=generator)\n"
        "found = lookup(ids, torch.arange(0, 501, 20))\n"
        "print(json.dumps(found.view(torch.int32).tolist()))\n"
    )
    choices = ({}, {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}, {"FBGEMM_NO_ASMJIT": "1"})
    runs = [
        subprocess.Popen(
            [sys.executable, str(script)], env={**os.environ, **setting}, stdout=subprocess.PIPE, text=True
        )
        for setting in choices
    ]
    seen = [json.loads(run.communicate()[0]) for run in runs]
    assert seen[0] == seen[1] == seen[2]


def test_the_memory_is_the_rows_and_one_more_each() -> None:
    shapes = [TableShape(name=kind, kind=kind, rows=1000, dim=64) for kind in TABLE_TYPES]
    lookup = Lookup(shapes, "sum", CPU)
    rows = sum(1001 * row_bytes(kind, 64) for kind in TABLE_TYPES)
    assert rows <= lookup.size_bytes <= rows + len(TABLE_TYPES) * 128


def test_filling_goes_piece_by_piece_and_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    tables = [(kind, 12, stored_rows(kind, 50, 12, generator, False)) for kind in TABLE_TYPES]
    ids, offsets = torch.arange(51).repeat(5), torch.arange(5 * 51 + 1)
    expected = filled(tables, "sum")(ids, offsets)
    monkeypatch.setattr("tightrec.snapshot.lookup._FILL_BYTES", 100)
    lookup = filled([(kind, dim, 255 - data) for kind, dim, data in tables], "sum")
    for place, (_, _, data) in enumerate(tables):
        lookup.fill(f"t{place}", data)
    assert_same_bits(lookup(ids, offsets), expected)


def test_what_is_wrong_is_refused_by_name() -> None:
    def shape(**changes: object) -> TableShape:
        return TableShape(**{"name": "t_user", "kind": "int8", "rows": 3, "dim": 8, **changes})  # type: ignore[arg-type]

    for shapes, pooling, message in (
        ([], "sum", "at least one table"),
        ([shape(), shape()], "sum", "'t_user' is there twice"),
        ([shape(kind="int3")], "sum", "'int3' is unknown"),
        ([shape(dim=6)], "sum", "dim 6 cannot be stored"),
        ([shape()], "max", "'max' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            Lookup(shapes, pooling, CPU)  # type: ignore[arg-type]
    lookup = Lookup([shape()], "sum", CPU)
    with pytest.raises(RuntimeError, match="t_user are to be filled"):
        lookup(torch.zeros(1, dtype=torch.int64), torch.arange(2))
    data = pack(torch.randn(3, 8), "int8")
    with pytest.raises(ValueError, match="'t_item' is unknown: there are t_user"):
        lookup.fill("t_item", data)
    with pytest.raises(ValueError, match="'t_user' has 3 rows, but 2"):
        lookup.fill("t_user", data[:2])
    with pytest.raises(ValueError, match=r"'t_user': int8 rows of dim 8 have to be uint8 \[R, 12\]"):
        lookup.fill("t_user", data[:, :11])
    with pytest.raises(ValueError, match="uint8"):
        reference_lookup([("int8", 8, data[:, :11])], torch.arange(1), torch.arange(2), "sum")
