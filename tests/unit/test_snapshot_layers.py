"""Dense layers of a snapshot: the operators compute what the plain definition says, exactly."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightrec.snapshot import layers
from tightrec.snapshot.layer_reference import reference_layer, summation_error
from tightrec.snapshot.layers import StoredLayer, layer_bytes, make_layer, row_steps, store_layer
from tightrec.snapshot.precision import LAYER_TYPES
from tightrec.snapshot.ranges import affine

CPU = torch.device("cpu")
FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
pytestmark = pytest.mark.skipif(not FBGEMM, reason="fbgemm's operators need an x86-64 processor with AVX2")

KINDS = [("fp32", None), ("bf16", None), ("fp16", None), ("int8", None), ("int8", (-1.5, 2.5))]


def example_of(
    seed: int, rows: int, inputs: int, outputs: int, power: int = 0, positive: bool = False, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, inputs, generator=generator) + 0.3) * 10.0**power
    weight = torch.randn(outputs, inputs, generator=generator) * 10.0 ** (power // -2)
    added = torch.randn(outputs, generator=generator) if bias else None
    return x.relu() if positive else x, weight, added


def run(stored: StoredLayer, x: Tensor, relu: bool = False) -> Tensor:
    with torch.inference_mode():
        return make_layer(stored, relu=relu, device=CPU)(x)


shapes = st.builds(
    example_of,
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 40),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 70),
    power=st.integers(-6, 4),
    positive=st.booleans(),
    bias=st.booleans(),
)


@given(case=shapes, relu=st.booleans(), fixed=st.booleans(), low=st.floats(-3, 0), high=st.floats(0, 3))
@example(case=example_of(1, 1, 1, 1), relu=False, fixed=False, low=-1.0, high=1.0)
@example(case=example_of(2, 3, 1, 40), relu=False, fixed=True, low=-1.0, high=1.0)
@example(case=example_of(3, 5, 1500, 33), relu=True, fixed=False, low=-1.0, high=1.0)
@settings(max_examples=150, deadline=None)
def test_int8_equals_the_definition_bit_for_bit(
    case: tuple[Tensor, Tensor, Tensor | None], relu: bool, fixed: bool, low: float, high: float
) -> None:
    x, weight, bias = case
    spread = float(x.abs().max()) if x.numel() else 1.0
    stored = store_layer(weight, bias, "int8", (low * spread, high * spread) if fixed else None)
    assert torch.equal(run(stored, x, relu), reference_layer(stored, x, relu))


@given(case=shapes, relu=st.booleans())
@example(case=example_of(4, 1, 37, 40), relu=False)  # one row: a kernel of its own with AVX2
@example(case=example_of(5, 7, 600, 37), relu=False)  # two blocks of inputs, a rest of outputs
@example(case=example_of(6, 2, 513, 64), relu=True)
@settings(max_examples=40, deadline=None)
def test_fp16_equals_the_definition_bit_for_bit(
    case: tuple[Tensor, Tensor, Tensor | None], relu: bool
) -> None:
    x, weight, bias = case
    stored = store_layer(weight, bias, "fp16")
    found, expected = run(stored, x, relu), reference_layer(stored, x, relu)
    if AVX512:
        assert torch.equal(found, expected)
    assert ((found - expected).abs() <= summation_error(stored, x)).all()


@given(case=shapes, relu=st.booleans(), kind=st.sampled_from(["fp32", "bf16"]))
@settings(max_examples=80, deadline=None)
def test_native_types_are_off_by_the_summation_and_one_rounding(
    case: tuple[Tensor, Tensor, Tensor | None], relu: bool, kind: str
) -> None:
    x, weight, bias = case
    stored = store_layer(weight, bias, kind)
    found, expected = run(stored, x, relu), reference_layer(stored, x, relu)
    one_ulp = expected.abs() * (2.0**-23 if kind == "fp32" else 2.0**-7)
    assert ((found - expected).abs() <= one_ulp + summation_error(stored, x)).all()


WORST = """
import os, ctypes, sys, torch
from tightrec.snapshot import layers
from tightrec.snapshot.layers import make_layer, store_layer
from tightrec.snapshot.layer_reference import reference_layer
isa = int(sys.argv[1])
if isa >= 0:
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    force = getattr(library, "_ZN6fbgemm14fbgemmForceIsaENS_10inst_set_tE", None)
    if force is None:
        sys.exit(77)
    force(ctypes.c_int(isa))
for inputs in (2, 64, 515):
    signs = torch.ones(20, inputs)
    signs[1] = -1
    signs[2, ::2] = -1
    for high in ((255.0, 0.0), (255.0, 255.0)):
        x = torch.tensor(high).repeat(7, inputs)[:, :inputs].contiguous()
        for activation in ((0.0, 255.0), None):
            stored = store_layer(signs, None, "int8", activation)
            assert int(stored.weight.abs().max()) == 64
            found = make_layer(stored, relu=False, device=torch.device("cpu"))(x)
            assert torch.equal(found, reference_layer(stored, x, False)), (inputs, high, activation)
if isa == 1:  # the control: with weights up to 127 these kernels do saturate
    layers.WEIGHT_LIMIT = 127
    stored = store_layer(signs, None, "int8", (0.0, 255.0))
    found = make_layer(stored, relu=False, device=torch.device("cpu"))(x)
    assert not torch.equal(found, reference_layer(stored, x, False))
"""


@pytest.mark.parametrize("instructions", [-1, 1])
def test_largest_inputs_and_weights_do_not_saturate(instructions: int) -> None:
    """Also with the kernels of a processor without VNNI: fbgemm is told to use AVX2 alone (1)."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORST, str(instructions)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if run.returncode == 77:
        pytest.skip("this build of torch does not let one choose fbgemm's kernels")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "int8"])
def test_close_to_float32(kind: str) -> None:
    x, weight, bias = example_of(7, 200, 64, 32)
    exact = x @ weight.t() + bias
    error = (run(store_layer(weight, bias, kind), x) - exact).pow(2).mean() / exact.pow(2).mean()
    assert error < {"fp32": 1e-12, "bf16": 1e-4, "fp16": 1e-6, "int8": 1e-3}[kind]


@pytest.mark.parametrize("activation", [None, (-1.5, 2.5)])
def test_an_int8_row_does_not_depend_on_its_batch(activation: tuple[float, float] | None) -> None:
    x, weight, bias = example_of(8, 50, 40, 30)
    x[3] *= 1000
    layer = make_layer(store_layer(weight, bias, "int8", activation), relu=False, device=CPU)
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    assert torch.equal(together[10:20], layer(x[10:20]))


@pytest.mark.parametrize(("kind", "activation"), KINDS)
@pytest.mark.parametrize("relu", [False, True])
def test_relu_follows_exactly(kind: str, activation: tuple[float, float] | None, relu: bool) -> None:
    x, weight, bias = example_of(9, 9, 12, 50)
    stored = store_layer(weight, bias, kind, activation)
    plain = run(stored, x)
    assert (plain < 0).any()
    assert torch.equal(run(stored, x, relu), plain.relu() if relu else plain)


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_shapes_at_the_edge(kind: str, activation: tuple[float, float] | None) -> None:
    for rows, inputs, outputs in [(0, 5, 3), (1, 1, 1), (3, 1, 1), (2, 1, 9), (2, 9, 1)]:
        x, weight, bias = example_of(10, rows, inputs, outputs)
        for added in (bias, None):
            stored = store_layer(weight, added, kind, activation)
            found = run(stored, x)
            assert found.shape == (rows, outputs) and found.dtype == torch.float32
            if added is None:
                zeros = store_layer(weight, torch.zeros(outputs), kind, activation)
                assert torch.equal(found, run(zeros, x))


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_strides_do_not_matter_and_the_input_stays(kind: str, activation: tuple[float, float] | None) -> None:
    wide, weight, bias = example_of(11, 8, 24, 10)
    layer = make_layer(store_layer(weight[:, :8], bias, kind, activation), relu=True, device=CPU)
    for x in (wide[:, ::3], wide[:, 8:16], wide[:, :8].t().contiguous().t()):
        before = x.clone()
        assert not x.is_contiguous()
        found, expected = layer(x), layer(x.contiguous())
        if kind in ("int8", "fp16"):
            assert torch.equal(found, expected)
        else:  # the BLAS may sum in another order
            assert torch.allclose(found, expected, rtol=2**-7 if kind == "bf16" else 1e-5, atol=1e-5)
        assert torch.equal(x, before)


def test_zero_inputs_are_exact_in_int8() -> None:
    """Whatever the range, a zero adds nothing: outputs of zeros are the bias, bit for bit."""
    _, weight, bias = example_of(12, 1, 30, 20)
    x = torch.zeros(4, 30)
    for activation in (None, (-0.7, 1.3), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)):
        assert torch.equal(run(store_layer(weight, bias, "int8", activation), x), bias.expand(4, 20))
    x[:, 0] = torch.tensor([1.0, -1.0, 0.37, -3e-5])
    lone = store_layer(torch.cat([torch.zeros(20, 1), weight[:, 1:]], 1), bias, "int8")
    assert torch.allclose(run(lone, x), bias.expand(4, 20), rtol=0, atol=1e-6)


@given(low=st.floats(-1e6, 1e6, width=32), high=st.floats(-1e6, 1e6, width=32))
@settings(max_examples=200, deadline=None)
def test_a_row_fits_its_steps(low: float, high: float) -> None:
    x = torch.tensor([[low, high, 0.0, (low + high) / 2]])
    step, zero = row_steps(x)
    levels = torch.round(x.div(step).sub_(zero))
    assert -255 <= float(zero) <= 0 and float(zero) == int(zero)
    assert float(levels.min()) >= 0 and float(levels.max()) <= 255
    assert float(((levels + zero) * step - x).abs().max()) <= float(step) * 0.5001
    assert float(levels[0, 2] + zero) == 0.0


def test_values_beyond_a_fixed_range_are_clipped() -> None:
    stored = store_layer(torch.ones(1, 1), None, "int8", (-1.0, 2.0))
    scale, zero_point = affine(-1.0, 2.0, 8)
    found = run(stored, torch.tensor([[-50.0], [50.0], [1e30]])).flatten()
    expected = torch.tensor([-zero_point, 255 - zero_point, 255 - zero_point]) * scale
    assert torch.allclose(found, expected, rtol=1e-6)


def test_threads_do_not_change_a_bit() -> None:
    x, weight, bias = example_of(13, 70, 130, 90)
    threads = torch.get_num_threads()
    for kind, activation in KINDS[2:]:
        layer = make_layer(store_layer(weight, bias, kind, activation), relu=False, device=CPU)
        found = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(layer(x))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*found)


def test_the_engine_that_a_program_chose_stays() -> None:
    x, weight, bias = example_of(14, 5, 20, 10)
    stored = store_layer(weight, bias, "int8")
    before, expected = torch.backends.quantized.engine, run(stored, x)
    try:
        torch.backends.quantized.engine = "qnnpack"
        assert torch.equal(run(stored, x), expected)
        assert torch.backends.quantized.engine == "qnnpack"
    finally:
        torch.backends.quantized.engine = before


def test_nothing_packed_can_be_saved() -> None:
    x, weight, bias = example_of(15, 5, 20, 10)
    for kind, activation in KINDS:
        stored = store_layer(weight, bias, kind, activation)
        layer = make_layer(stored, relu=False, device=CPU)
        assert not layer.state_dict()
        for save in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="make another from its StoredLayer"):
                save(layer)
        again = pickle.loads(pickle.dumps(stored))
        assert torch.equal(run(again, x), layer(x))


def test_layers_make_no_noise() -> None:
    code = (
        "import torch\nfrom tightrec.snapshot.layers import *\n"
        "for kind in ('fp32', 'bf16', 'fp16', 'int8'):\n"
        "    make_layer(store_layer(torch.ones(3, 4), None, kind), relu=True, device=torch.device('cpu'))"
        "(torch.ones(2, 4))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("kind", LAYER_TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_are_those_of_the_tensors(kind: str, bias: bool) -> None:
    stored = store_layer(torch.ones(7, 13), torch.ones(7) if bias else None, kind)
    tensors = [t for t in (stored.weight, stored.bias, stored.scale) if t is not None]
    assert layer_bytes(kind, 7, 13, bias) == sum(t.numel() * t.itemsize for t in tensors)
    assert (stored.bias is not None) == bias


def test_rows_of_zeros_and_tiny_weights_are_stored() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [1e-30, -1e-30], [3e38, -3e38]])
    stored = store_layer(weight, None, "int8")
    assert stored.scale is not None and bool((stored.scale >= torch.finfo(torch.float32).tiny).all())
    restored = stored.weight * stored.scale[:, None]
    assert torch.equal(restored[:2], torch.zeros(2, 2))
    assert torch.allclose(restored[2:], weight[2:], rtol=1e-6)
    assert torch.isfinite(run(stored, torch.ones(1, 2))).all()


@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_values_that_a_type_cannot_hold_are_refused_by_output(kind: str) -> None:
    weight = torch.ones(5, 3)
    weight[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 5 outputs have weights that are NaN or infinite.* output 3"):
        store_layer(weight, None, kind)
    with pytest.raises(ValueError, match=r"2 of 5 outputs have a bias that is NaN.* output 1"):
        store_layer(torch.ones(5, 3), torch.tensor([0, torch.inf, 0, torch.nan, 0]), kind)


def test_float16_overflow_is_refused() -> None:
    weight = torch.ones(5, 3)
    weight[2, 0] = 70_000
    with pytest.raises(ValueError, match="beyond 65504, the largest fp16, the first of them output 2"):
        store_layer(weight, None, "fp16")
    store_layer(weight, None, "bf16")


def test_mistakes_are_refused() -> None:
    good = store_layer(torch.ones(4, 3), torch.ones(4), "int8")
    with pytest.raises(ValueError, match="'int9' is no type of a dense layer"):
        store_layer(torch.ones(4, 3), None, "int9")
    with pytest.raises(ValueError, match=r"not \[4, 3\] and \[3\]"):
        store_layer(torch.ones(4, 3), torch.ones(3), "fp32")
    with pytest.raises(ValueError, match="only int8 layers have a range"):
        store_layer(torch.ones(4, 3), None, "fp16", (0.0, 1.0))
    for activation in ((1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="finite, low before high"):
            store_layer(torch.ones(4, 3), None, "int8", activation)
    with pytest.raises(ValueError, match="at most 131586 inputs, not 131587"):
        store_layer(torch.ones(1, 131_587), None, "int8")
    for bad, words in (
        ({"weight": torch.full((4, 3), 100, dtype=torch.int8)}, "between -64 and 64"),
        ({"weight": torch.full((4, 3), -128, dtype=torch.int8)}, "between -64 and 64"),
        ({"weight": torch.ones(4, 3)}, "cannot have a weight torch.float32"),
        ({"scale": None}, "needs the scales"),
        ({"scale": torch.ones(3)}, r"scale of a layer with 4 outputs must be float32 \[4\]"),
        ({"bias": torch.ones(5)}, "bias of a layer with 4 outputs"),
    ):
        fields = {"kind": "int8", "weight": good.weight, "bias": good.bias, "scale": good.scale, **bad}
        with pytest.raises(ValueError, match=words):
            make_layer(StoredLayer(**fields), relu=False, device=CPU)


def test_processors_without_fbgemm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_engines", lambda: ["qnnpack"])
    for kind in ("int8", "fp16"):
        with pytest.raises(ValueError, match=f"{kind} layers need an x86-64 processor with AVX2"):
            make_layer(store_layer(torch.ones(2, 2), None, kind), relu=False, device=CPU)
    make_layer(store_layer(torch.ones(2, 2), None, "bf16"), relu=False, device=CPU)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_inputs_that_are_promised_not_negative_give_the_same_numbers(
    batch: int, inputs: int, outputs: int, relu: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    stored = store_layer(weight, torch.randn(outputs, generator=generator), "int8")
    x = torch.randn(batch, inputs, generator=generator).relu_() * 10.0 ** (seed % 7 - 3)
    plain, promised = (
        make_layer(stored, relu=relu, device=CPU, nonnegative=nonnegative) for nonnegative in (False, True)
    )
    assert torch.equal(plain(x), promised(x))
