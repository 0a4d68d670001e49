"""Whole-number arithmetic of int8 layers, and the definition that it is compared with."""

import ast
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tightrec import snapshot
from tightrec.snapshot import integers, layer_reference
from tightrec.snapshot.layers import _GpuInt8, make_layer, store_layer
from tightrec.snapshot.ranges import affine

SNAPSHOT = Path(str(snapshot.__file__)).parent


@pytest.mark.parametrize("fused", [integers.fused_multiply_add, layer_reference.rounded_once])
def test_a_product_and_a_sum_are_rounded_once(fused: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Against Python's exact rational arithmetic, at ties too, where rounding twice goes wrong."""
    generator = torch.Generator().manual_seed(16)
    a, b, c = (torch.randn(3000, generator=generator) for _ in range(3))
    scale = torch.tensor(2.0) ** torch.randint(-60, 30, (3000,), generator=generator)
    c = c * scale
    # A product that ends on a tie of float32, and an addend below what float64 would keep of it.
    a[:4], b[:4], c[:4] = 1 + 2.0**-12, 1 + 2.0**-12, torch.tensor([1, -1, 1, -1]) * 2.0**-80
    a[2:4], c[2:4] = -a[2:4], -c[2:4]
    # The same product alone: a tie that goes to the even value, whichever side that is on.
    a[4:6], b[4:6], c[4:6] = torch.tensor([1, -1]) * (1 + 2.0**-12), 1 + 2.0**-12, 0
    found = fused(a, b, c)
    for i in range(3000):
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        off = abs(Fraction(found[i].item()) - exact)
        for neighbour in (torch.inf, -torch.inf):
            other = torch.nextafter(found[i], torch.tensor(neighbour)).item()
            assert off <= abs(Fraction(other) - exact)
    assert found[0] != found[1]
    assert found[2] != found[3]
    assert (found[4], found[5]) == (1 + 2.0**-11, -1 - 2.0**-11)


def test_products_are_those_of_whole_numbers() -> None:
    generator = torch.Generator().manual_seed(17)
    levels = torch.randint(0, 256, (20, 70), generator=generator)
    levels[0], levels[1] = 0, 255
    weight = torch.randint(-64, 65, (70, 33), generator=generator, dtype=torch.int8)
    found = integers.products(levels.to(torch.float32), weight, weight.sum(0, dtype=torch.int32))
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), levels @ weight.long())


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="needs an x86-64 processor with AVX2"
)
def test_levels_of_a_fixed_range_are_the_operators() -> None:
    """A layer with the weight 1 gives back the levels: a level less the zero point, times the scale."""
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(18)) * 2
    for low, high in ((-1.5, 2.5), (0.0, 3.0), (-0.7, 0.1)):
        scale, zero_point = affine(low, high, 8)
        layer = make_layer(
            store_layer(torch.full((1, 1), 64.0), None, "int8", (low, high)),
            relu=False,
            device=torch.device("cpu"),
        )
        operator = torch.round(layer(x) / scale / 64) + zero_point
        levels = integers.fixed_levels(x, torch.tensor(scale, dtype=torch.float32), zero_point)
        assert torch.equal(levels, operator)
        assert (levels.min(), levels.max()) == (0, 255)


def test_definitions_and_what_is_served_share_no_arithmetic() -> None:
    for path in SNAPSHOT.glob("*.py"):
        taken = names_taken(path)
        if path.stem == "layer_reference":
            assert taken == {"layers.StoredLayer"}
        if not path.stem.endswith("_reference"):
            assert not any("_reference" in name for name in taken), path.name


def names_taken(path: Path) -> set[str]:
    """What a module of snapshot/ imports from its neighbours, as ``module.name``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tightrec.snapshot"):
            module = str(node.module).removeprefix("tightrec.snapshot").lstrip(".")
            found |= {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
    return found


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="torch._int_mm saturates without VNNI")
@pytest.mark.parametrize("activation", [None, (-3.0, 2.5), (0.0, 4.0)])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(1, 1, 1), (3, 13, 5), (40, 64, 17), (0, 8, 8)])
def test_the_gpus_integers_are_the_cpus_operators_bit_for_bit(
    activation: tuple[float, float] | None, batch: int, inputs: int, outputs: int
) -> None:
    """The code for GPUs, run on the CPU: what it pads is cut off again."""
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    stored = store_layer(weight, torch.randn(outputs, generator=generator), "int8", activation)
    x = torch.randn(batch, inputs, generator=generator) * 2
    for relu in (False, True):
        expected = make_layer(stored, relu=relu, device=torch.device("cpu"))(x)
        assert torch.equal(_GpuInt8(stored, relu, torch.device("cpu"))(x), expected)
