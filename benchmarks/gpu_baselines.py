"""Other codecs on the same values, where they can be imported: FBGEMM int8 and MX4, nvCOMP Bitcomp.

The quantisers keep no error bound and have fixed ratios; Bitcomp's lossy mode keeps a bound that it rounds
down to a power of two.
"""

import ctypes
import glob
import site
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Baseline(NamedTuple):
    """A codec: ``encode`` leaves what ``decode`` reads."""

    name: str
    encode: Callable[[], object]
    decode: Callable[[], object]
    compressed_bytes: Callable[[], int]


def find(values: Tensor, bound: float) -> tuple[list[Baseline], dict[str, str]]:
    """The baselines that are here, and why the others are not."""
    there, missing = [], {}
    for name, make in (("fbgemm int8", _int8), ("fbgemm mx4", _mx4), ("nvcomp bitcomp lossy", _bitcomp)):
        try:
            made = make(values, bound)
            made.encode()
            made.decode()
            there.append(made._replace(name=name))
        except Exception as error:  # whatever a foreign library does, the others are measured
            missing[name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
    return there, missing


def _held(encode: Callable[[], Tensor], decode: Callable[[Tensor], Tensor]) -> Baseline:
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = [encode()]

    return Baseline("", run, lambda: decode(kept[0]), lambda: kept[0].numel() * kept[0].element_size())


def _int8(values: Tensor, bound: float) -> Baseline:
    import fbgemm_gpu

    assert fbgemm_gpu is not None
    ops = torch.ops.fbgemm
    return _held(lambda: ops.FloatToFused8BitRowwiseQuantized(values), ops.Fused8BitRowwiseQuantizedToFloat)


def _mx4(values: Tensor, bound: float) -> Baseline:
    from fbgemm_gpu.quantize_utils import fp32_to_mx4, mx4_to_fp32

    return _held(lambda: fp32_to_mx4(values.view(-1)), mx4_to_fp32)


def _bitcomp(values: Tensor, bound: float) -> Baseline:
    """nvCOMP's native C interface, which alone has the lossy mode; float32 only."""
    places = [folder + "/nvidia/*nvcomp*/**/libnvcomp*.so*" for folder in site.getsitepackages()]
    names = [name for place in places for name in glob.glob(place, recursive=True)] + ["libnvcomp.so"]
    library = next(filter(None, (_load(name) for name in names)), None)
    if library is None:
        raise ImportError("no libnvcomp with bitcompCreatePlan was found")
    pointer = ctypes.c_void_p
    library.bitcompMaxBuflen.restype = ctypes.c_size_t
    count, handle, fp32, lossy_signed = values.numel(), pointer(), 9, 1
    packed = torch.empty(
        library.bitcompMaxBuflen(ctypes.c_size_t(4 * count)), dtype=torch.uint8, device=values.device
    )
    again = torch.empty_like(values)

    def checked(result: int) -> None:
        if result:
            raise RuntimeError(f"Bitcomp failed with {result}")

    def compressed_bytes() -> int:
        size = ctypes.c_size_t()
        torch.cuda.synchronize()
        checked(library.bitcompGetCompressedSize(pointer(packed.data_ptr()), ctypes.byref(size)))
        return size.value

    checked(library.bitcompCreatePlan(ctypes.byref(handle), ctypes.c_size_t(count), fp32, lossy_signed, 0))
    checked(library.bitcompSetStream(handle, pointer(torch.cuda.current_stream().cuda_stream)))
    given, middle, back = (pointer(tensor.data_ptr()) for tensor in (values, packed, again))
    delta = ctypes.c_float(2 * bound)
    return Baseline(
        "",
        lambda: checked(library.bitcompCompressLossy_fp32(handle, given, middle, delta)),
        lambda: checked(library.bitcompUncompress(handle, middle, back)),
        compressed_bytes,
    )


def _load(name: str) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    return library if hasattr(library, "bitcompCreatePlan") else None
