"""Fixed-rate formats on the project's wire: torchrec's numbers and sizes, run by run, in given buffers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.types import CommOp

from tightrec.sharding.codecs import codec_registry
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.fixed_wire import FIXED_NAMES, FixedCodec, fp8_group, refusal

DIM = 16
ON_CPU = ("fp16", "bf16", "int8", "mx4")
CPU = torch.device("cpu")
GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
EVERYWHERE = [(name, "cpu") for name in ON_CPU] + [
    pytest.param(name, "cuda", marks=GPU) for name in FIXED_NAMES
]
WHOLE = (64, 0, 32, 320)
RAGGED = (0, 1, 64, 33, 0, 31, 16 * 21, 48, 0)
FILL = 0xA5
NAN, INF = float("nan"), float("inf")


def values_of(counts: Sequence[int], device: str = "cpu") -> Tensor:
    """Values of very different size, some beyond fp16, some zero."""
    generator = torch.Generator().manual_seed(len(counts))
    flat = torch.randn(sum(counts), generator=generator)
    flat *= 10.0 ** torch.randint(-4, 6, flat.shape, generator=generator)
    flat[::7] = 0.0
    return flat.to(device)


def as_torchrec(name: str, direction: str, run: Tensor) -> tuple[Tensor, Tensor, int]:
    """Bytes, values and predicted size of one run in torchrec's codec, filled up with zeros."""
    registry = codec_registry(CodecConfig(**{direction: name}), DIM)
    assert registry is not None
    codec: Any = getattr(registry[CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name], direction)
    context = codec.create_context()
    group = {"int8": 32, "mx4": 32, "fp8": DIM}.get(name, 1)
    whole = torch.cat([run, run.new_zeros(-len(run) % group)])
    size = codec.calc_quantized_size(len(whole), context) * codec.quantized_dtype.itemsize
    coded = codec.encode(whole, context)
    values = codec.decode(coded, context)[: len(run)]
    return coded.view(torch.uint8), values, size


def through(name: str, direction: str, flat: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Bytes and values by way of buffers that are too large, whose rest must stay as it was."""
    sender = FixedCodec(name, direction, DIM, flat.device)
    size = sum(sender.encoded_bytes(counts))
    buffer = torch.full((size + 64,), FILL, dtype=torch.uint8, device=flat.device)
    wire = sender.encode(flat, counts, buffer)
    assert wire.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert wire.shape == (size,) and (buffer[size:] == FILL).all()
    room = torch.full((len(flat) + 64,), 1e9, device=flat.device)
    # Another object, which never encoded, like that of a rank without tables.
    values = FixedCodec(name, direction, DIM, flat.device).decode(wire, counts, room)
    assert values.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    assert values.shape == flat.shape and (room[len(flat) :] == 1e9).all()
    return wire, values


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "device"), EVERYWHERE)
# (16, 16): runs that together, but not apart, fill whole groups. A resized buffer is a warning.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", [WHOLE, RAGGED, (16, 16), (0, 0), ()])
def test_bytes_and_values_of_each_run_are_torchrecs(name, device, counts, direction):
    flat = values_of(counts, device)
    wire, values = through(name, direction, flat, counts)
    sizes = FixedCodec(name, direction, DIM, flat.device).encoded_bytes(counts)
    assert len(sizes) == len(counts)
    runs = zip(flat.split(list(counts)), wire.split(sizes), values.split(list(counts)), sizes, strict=True)
    for run, coded, read, size in runs:
        if not len(run):
            assert size == 0
            continue
        expected, expected_values, expected_size = as_torchrec(name, direction, run)
        assert size == expected_size
        assert torch.equal(coded, expected)
        assert torch.equal(read, expected_values)


def test_bf16_is_bf16_on_cpu():
    flat = torch.tensor([1e38, 1 + 2.0**-8, 3.0])
    assert through("bf16", "forward", flat, [3])[1].tolist() == flat.bfloat16().tolist()
    assert through("fp16", "forward", flat, [3])[1].tolist() == [65504.0, 1 + 2.0**-8, 3.0]


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf_spoil_their_own_group_as_documented(name, bad):
    counts, at = (64, 40, 64), 64 + 35
    flat = values_of(counts).clamp(-1e4, 1e4)
    clean = through(name, "forward", flat, counts)[1]
    flat[at] = bad
    values = through(name, "forward", flat, counts)[1]
    group = slice(at, at + 1) if name in ("fp16", "bf16") else slice(64 + 32, 64 + 40)
    assert torch.equal(values[: group.start], clean[: group.start])
    assert torch.equal(values[group.stop :], clean[group.stop :])
    spoilt = values[group]
    if name in ("fp16", "bf16"):
        limit = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16}[name]).max
        expected = {NAN: NAN, INF: limit, -INF: -limit}[bad]
        assert torch.equal(spoilt.nan_to_num(nan=-1), torch.tensor([expected]).nan_to_num(nan=-1))
    elif name == "int8":
        assert spoilt.isfinite().all() if bad is NAN else spoilt.isnan().all()
    else:
        assert (spoilt == 0).all()


@pytest.mark.parametrize(("name", "device"), EVERYWHERE)
def test_zero_is_exact_where_documented(name, device):
    flat = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(device)
    flat[:40:3] = 0.0
    if name == "int8":
        flat.abs_()
    assert (through(name, "backward", flat, [64])[1][:40:3] == 0).all()


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("counts", [WHOLE, RAGGED])
def test_a_second_step_allocates_nothing_on_cpu(name, counts):
    flat, codec = values_of(counts), FixedCodec(name, "forward", DIM, CPU)
    wire = torch.empty(sum(codec.encoded_bytes(counts)), dtype=torch.uint8)
    out = torch.empty_like(flat)
    codec.decode(codec.encode(flat, counts, wire), counts, out)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        codec.decode(codec.encode(flat, counts, wire), counts, out)
    assert len(seen.events()) > 4
    taken = {event.key: event.cpu_memory_usage for event in seen.key_averages() if event.cpu_memory_usage}
    assert taken == {}


def test_fp8_is_refused_on_cpu_alone_and_fbgemm_really_lacks_it():
    assert [name for name in (*FIXED_NAMES, "none") if refusal(name, "cpu")] == ["fp8"]
    assert not any(refusal(name, "cuda") for name in FIXED_NAMES)
    with pytest.raises(ValueError, match=r"codec.backward=fp8 cannot run on cpu: .* codec.backward=int8"):
        FixedCodec("fp8", "backward", DIM, CPU)
    # The refusal must not outlive its reason unnoticed.
    with pytest.raises(RuntimeError, match="fp8 is not supported by CPU"):
        torch.ops.fbgemm.FloatToFP8RowwiseQuantized(torch.ones(1, 4), True)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"codec.forward=none is no fixed-rate format. Use one of fp16, "):
        FixedCodec("none", "forward", DIM, CPU)


def test_fp8_shares_a_scale_over_a_row_where_that_pays():
    assert [fp8_group(dim) for dim in (16, 20, 128, 1, 8, 12, 18)] == [16, 20, 128, 32, 32, 32, 32]
    codec = FixedCodec("fp8", "forward", 20, torch.device("cuda"))
    assert codec.encoded_bytes([0, 1, 20, 21, 400]) == [0, 28, 28, 56, 560]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fp8_gives_fbgemm_rows_of_the_dim_and_its_direction(direction, monkeypatch):
    """With stand-ins for fbgemm's CUDA operators, which keep whole numbers in bytes."""
    asked = []

    def quantise(rows: Tensor, forward: bool) -> Tensor:
        asked.append(forward)
        return torch.nn.functional.pad(rows, (0, 8)).to(torch.uint8)

    def read(coded: Tensor, forward: bool, dtype: int) -> Tensor:
        asked.append(forward)
        return coded[:, :-8].float()

    monkeypatch.setattr(torch.ops.fbgemm, "FloatToFP8RowwiseQuantized", quantise)
    monkeypatch.setattr(torch.ops.fbgemm, "FP8RowwiseQuantizedToFloat", read)
    codec = FixedCodec("fp8", direction, 20, torch.device("cuda"))
    counts = (40, 3, 0, 21)
    flat = torch.arange(64.0)
    wire = codec.encode(flat, counts, torch.empty(5 * 28, dtype=torch.uint8))
    first = [row[:3] for row in wire.view(5, 28).tolist()]
    assert first == [[0, 1, 2], [20, 21, 22], [40, 41, 42], [43, 44, 45], [63, 0, 0]]
    reader = FixedCodec("fp8", direction, 20, torch.device("cuda"))
    assert torch.equal(reader.decode(wire, counts, torch.empty(64)), flat)
    assert asked == [direction == "forward"] * 2


FLAT, WIRE = torch.zeros(64), torch.zeros(84, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "flat", "wire", "message"),
    [
        ("encode", FLAT[:63], WIRE, r"flat is torch.float32 of shape \[63\].* and 64 elements"),
        ("encode", FLAT.double(), WIRE, r"flat is torch.float64"),
        ("encode", FLAT.view(2, 32), WIRE, r"flat is .*one dimension"),
        ("encode", torch.zeros(128)[::2], WIRE, r"flat is .*a contiguous"),
        ("encode", FLAT, WIRE[:79], r"out is .*at least 80 elements"),
        ("encode", FLAT, WIRE[1:81], r"out starts at an address that is no multiple of 4"),
        ("decode", FLAT, WIRE, r"wire is torch.uint8 of shape \[84\].* and 80 elements"),
        ("decode", FLAT, WIRE[:40], r"wire is .*\[40\]"),
        ("decode", FLAT, WIRE[2:82], r"wire starts at"),
        ("decode", FLAT[:60], WIRE[:80], r"out is .*at least 64 elements"),
        ("decode", FLAT.half(), WIRE[:80], r"out is torch.float16"),
    ],
)
def test_a_tensor_that_does_not_fit_the_counts_is_named(call, flat, wire, message):
    codec = FixedCodec("int8", "forward", DIM, CPU)
    tensors = (flat, (32, 32), wire) if call == "encode" else (wire, (32, 32), flat)
    with pytest.raises(ValueError, match=message):
        getattr(codec, call)(*tensors)
