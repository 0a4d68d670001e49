"""A GPU's lookup gives the CPU's values up to the order of its sums, from the same stored rows."""

import pytest
import torch

from tightrec.snapshot.lookup import Lookup, TableShape
from tightrec.snapshot.packed import pack, row_bytes
from tightrec.snapshot.precision import TABLE_TYPES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dim", [4, 12, 16, 20, 64, 100, 128])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_a_gpu_gives_the_values_of_the_cpu(dim: int, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that tables are staged in several pieces, rows padded to 16 bytes.
    monkeypatch.setattr("tightrec.snapshot.lookup._FILL_BYTES", 700)
    generator = torch.Generator().manual_seed(dim)
    shapes = [TableShape(name=kind, kind=kind, rows=40, dim=dim) for kind in TABLE_TYPES]
    on_cpu, on_gpu = (
        Lookup(shapes, pooling, torch.device(place))  # type: ignore[arg-type]
        for place in ("cpu", "cuda")
    )
    for shape in shapes:
        data = pack(torch.randn(40, dim, generator=generator), shape.kind)
        on_cpu.fill(shape.name, data)
        on_gpu.fill(shape.name, data)
    assert on_gpu.size_bytes >= sum(41 * row_bytes(kind, dim) for kind in TABLE_TYPES)
    for batch in (0, 1, 7):
        sizes = torch.randint(0, 51, (5 * batch,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        ids = torch.randint(0, 41, (int(offsets[-1]),), generator=generator)
        found = on_gpu(ids.cuda(), offsets.cuda())
        assert found.is_cuda and found.dtype == torch.float32 and found.shape == (batch, 5 * dim)
        # Sums of up to 50 values of a few units, in another order.
        torch.testing.assert_close(found.cpu(), on_cpu(ids, offsets), rtol=1e-5, atol=1e-4)
    overflow = on_gpu(torch.full((5,), 40).cuda(), torch.arange(6).cuda())
    assert not overflow.any()
