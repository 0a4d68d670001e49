"""Dense layers of a snapshot on a GPU: the CPU's integers, and half types close to the CPU's."""

import pytest
import torch

from tightrec.snapshot.layer_reference import reference_layer
from tightrec.snapshot.layers import make_layer, store_layer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPES = [(0, 5, 3), (1, 1, 1), (1, 512, 256), (17, 13, 9), (64, 512, 256), (33, 1000, 1)]


@pytest.mark.parametrize("activation", [None, (-1.5, 2.5)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_int8_on_the_gpu_is_the_definition(
    rows: int, inputs: int, outputs: int, relu: bool, activation: tuple[float, float] | None
) -> None:
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, inputs, generator=generator)
    weight, bias = (
        torch.randn(outputs, inputs, generator=generator),
        torch.randn(outputs, generator=generator),
    )
    for added in (bias, None):
        stored = store_layer(weight, added, "int8", activation)
        found = make_layer(stored, relu=relu, device=torch.device("cuda"))(x.cuda())
        assert found.is_cuda and found.shape == (rows, outputs)
        assert torch.equal(found.cpu(), reference_layer(stored, x, relu))


@pytest.mark.parametrize(("kind", "near"), [("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_float_types_on_the_gpu_are_near(
    kind: str, near: float, rows: int, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, inputs, generator=generator)
    stored = store_layer(torch.randn(outputs, inputs, generator=generator), torch.ones(outputs), kind)
    found = make_layer(stored, relu=False, device=torch.device("cuda"))(x.cuda()).cpu()
    assert found.dtype == torch.float32
    assert (
        (found - reference_layer(stored, x, False)).abs() <= near * (1 + x.norm(dim=1)[:, None] * 3)
    ).all()
