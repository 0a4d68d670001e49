"""``encode`` and ``decode``: blocks of float rows to one frame for each peer, and back.

    layout = Layout.columns(rows=[512, 512], dims=[32, 32, 64], tables=["user", "item", "genre"])
    frames = encode(values, layout, bounds=Bound(value=0.03, of="range"))     # values [1024, 128]
    again = decode(frames, layout)                       # |values - again| <= the bound in the frame

Both run on the device and, for CUDA, on the current stream of the tensors they are given. With ``out`` and
``scratch`` (``encode``: also ``Bounds`` and ``Modes`` made before) they allocate nothing and never wait for
the device. P peers, T tables.

Gradients stop here: neither is differentiable. On a CPU the first call compiles the loops, once for a machine
and release (half a minute; ``kernels/cpu/jit.py``); make it before ``torch.compile`` traces one. In a process
forked from one that used several torch threads, give ``out`` to ``decode``: torch hangs on filling a tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tightrec.compression.bounds import BoundLike, Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.frames import Frames, max_frame_bytes, raise_for_status
from tightrec.compression.layout import Layout
from tightrec.kernels import ops as _registered  # noqa: F401 - defines torch.ops.tightrec
from tightrec.kernels.backends import backend as find_backend
from tightrec.kernels.format import DTYPES, Request
from tightrec.kernels.job import Stages

Mode = Literal["auto", "raw", "half", "packed", "dedup", "entropy"]
MODES: tuple[Mode, ...] = ("auto", "raw", "half", "packed", "dedup", "entropy")
_HALF = frozenset({Request.HALF, Request.AUTO})
_PACKED = frozenset({Request.PACKED, Request.ENTROPY, Request.AUTO})
_DEDUP = frozenset({Request.DEDUP, Request.ENTROPY, Request.AUTO})
_ENTROPY = frozenset({Request.ENTROPY, Request.AUTO})


@dataclass(frozen=True, eq=False)
class Modes:
    """What is asked of each table; made once, used in many calls.

    ``auto`` takes what is smallest for each block; the others force one, which falls back to raw for a block
    that it would make larger (or, ``half``, that it would carry past its bound). ``entropy`` chooses between
    packed and dedup rows and codes them where that is smaller and the table has a codebook.

    Raises:
        ValueError: a mode is unknown; the table is named.
    """

    modes: tuple[Mode, ...]
    """[T] one for each table."""
    tables: tuple[str, ...]
    """Their names."""
    requests: tuple[Request, ...] = field(init=False)
    """The same as the kernels take them."""
    _on_device: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.modes) != len(self.tables):
            raise ValueError(f"{len(self.modes)} modes for {len(self.tables)} tables; give one for each")
        for table, mode in zip(self.tables, self.modes, strict=True):
            if mode not in MODES:
                raise ValueError(f"table {table!r}: unknown mode {mode!r}; choose one of {', '.join(MODES)}")
        object.__setattr__(self, "requests", tuple(Request[mode.upper()] for mode in self.modes))

    @classmethod
    def of(cls, modes: "Mode | Sequence[Mode] | Mapping[str, Mode]", tables: Sequence[str]) -> "Modes":
        """One mode for all tables, one for each in order, or one for each by name."""
        if isinstance(modes, Mapping):
            if set(modes) != set(tables):
                raise ValueError(f"modes by name must name every table once, not {sorted(modes)}")
            modes = [modes[table] for table in tables]
        return cls((modes,) * len(tables) if isinstance(modes, str) else tuple(modes), tuple(tables))

    def on(self, device: torch.device) -> Tensor:
        """uint8 [T] ``Request`` on a device; copied there once."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.requests, dtype=torch.uint8).to(device)
        return self._on_device[device]

    def stages(self, bounds: Bounds, codebooks: bool) -> Stages:
        """What the kernels have to run for these modes and bounds."""
        asked = set(self.requests)
        return Stages(
            relative=bounds.relative,
            half=bool(asked & _HALF),
            packed=bool(asked & _PACKED),
            dedup=bool(asked & _DEDUP),
            entropy=codebooks and bool(asked & _ENTROPY),
        )


def encode(
    values: Tensor,
    layout: Layout,
    bounds: "Bounds | BoundLike | Sequence[BoundLike] | Mapping[str, BoundLike]",
    modes: "Modes | Mode | Sequence[Mode] | Mapping[str, Mode]" = "auto",
    out: Frames | None = None,
    scratch: Tensor | None = None,
    *,
    codebooks: Codebooks | None = None,
    backend: str = "",
) -> Frames:
    """One frame for each peer, no value of it further than its table's bound from the original.

    Args:
        values: contiguous, of the layout's shape; float32, float16 or bfloat16.
        layout: where the blocks lie in it.
        bounds: of each table; floats are absolute. NaN and Inf come back with the same bits at any bound.
        modes: of each table.
        out: from ``Frames.empty``, written and returned.
        scratch: uint8, ``encode_scratch_bytes`` long.
        codebooks: of this sender, for ``entropy`` and ``auto``; counts symbols for their next refresh.
        backend: ``reference``, ``cpu`` or ``cuda``; default the device's own. All write the same bytes.

    Raises:
        ValueError: a bound, mode, shape, type, device or buffer that does not fit; says which.
    """
    _check_values(values, layout, "values")
    device = values.device
    if not isinstance(bounds, Bounds):
        bounds = Bounds.of(bounds, layout.tables)
    if not isinstance(modes, Modes):
        modes = Modes.of(modes, layout.tables)
    for name, tables in {"bounds": bounds.tables, "modes": modes.tables}.items():
        if tables != layout.tables:
            raise ValueError(f"the {name} are for the tables {tables}, but the layout has {layout.tables}")
    stages = modes.stages(bounds, codebooks is not None)
    if out is None:
        out = Frames.empty(layout, values.dtype, device)
    _check_bytes(out.buffer, max_frame_bytes(layout, values.dtype), device, "out.buffer", "Frames.empty")
    _check_counts(out, layout, "out")
    needed = find_backend(backend, device).encode_scratch_bytes(layout.totals, stages, values.element_size())
    if scratch is None:
        scratch = torch.empty(needed, dtype=torch.uint8, device=device)
    _check_bytes(scratch, needed, device, "scratch", "encode_scratch_bytes")
    books = codebooks or _no_codebooks(layout, device)
    _check_codebooks(books.sent, layout, device)
    bound, kind = bounds.on(device)
    torch.ops.tightrec.encode_(
        values,
        layout.on(device),
        list(astuple(layout.totals)),
        stages.bits,
        bound,
        kind,
        modes.on(device),
        books.lengths,
        books.ids,
        books.sent,
        None if codebooks is None else codebooks.histogram,
        out.buffer,
        out.offsets,
        out.sizes,
        scratch,
        backend,
    )
    return out


def decode(
    frames: Frames,
    layout: Layout,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    codebooks: ReceivedCodebooks | None = None,
    status: Tensor | None = None,
    backend: str = "",
) -> Tensor:
    """The values of every peer's frame.

    Args:
        frames: as encoded, or ``Frames.received``; nothing in them is trusted.
        layout: the blocks that are expected, and where their values go.
        out: contiguous, of the layout's shape; elements outside all blocks are left as they are. Default: a
            new tensor of ``dtype``, zero outside the blocks.
        scratch: uint8, ``decode_scratch_bytes`` long.
        dtype: of the values, where ``out`` is not given.
        codebooks: those received so far; without, each frame must bring its own.
        status: int64 [1]; if given it is written and not looked at, so that nothing waits for the device:
            call ``raise_for_status`` when it suits.
        backend: as in ``encode``.

    Returns:
        ``out``; the blocks of a bad frame are NaN.

    Raises:
        FrameError: a frame is bad and ``status`` was not given.
        ValueError: a shape, type, device or buffer that does not fit; says which.
    """
    device = frames.buffer.device
    if out is None:
        out = torch.zeros(layout.shape, dtype=dtype, device=device)
    _check_values(out, layout, "out")
    if out.device != device:
        raise ValueError(f"out is on {out.device}, but the frames are on {device}")
    peers = layout.totals.peers
    if frames.buffer.dtype != torch.uint8 or not frames.buffer.is_contiguous() or frames.buffer.dim() != 1:
        raise ValueError("frames.buffer must be a flat contiguous uint8 tensor")
    _check_counts(frames, layout, "frames")
    needed = decode_scratch_bytes(layout, out.dtype, device=device, backend=backend)
    if scratch is None:
        scratch = torch.empty(needed, dtype=torch.uint8, device=device)
    _check_bytes(scratch, needed, device, "scratch", "decode_scratch_bytes")
    own = _received_bytes(layout)
    books = codebooks or ReceivedCodebooks.within(scratch[:own], peers, layout.totals.tables)
    _check_codebooks(books.ids, layout, device)
    found = torch.zeros(1, dtype=torch.int64, device=device) if status is None else status
    if found.dtype != torch.int64 or tuple(found.shape) != (1,) or found.device != device:
        raise ValueError(
            f"status must be an int64 tensor of one element on {device}, not {found.dtype} of shape "
            f"{tuple(found.shape)} on {found.device}"
        )
    torch.ops.tightrec.decode_(
        frames.buffer,
        frames.offsets,
        frames.sizes,
        layout.on(device),
        list(astuple(layout.totals)),
        books.lengths,
        books.ids,
        out,
        found,
        scratch[own:],
        backend,
    )
    if status is None:
        raise_for_status(found, layout)
    return out


def encode_scratch_bytes(
    layout: Layout,
    dtype: torch.dtype,
    bounds: Bounds,
    modes: Modes,
    *,
    codebooks: bool = False,
    device: torch.device | str = "cpu",
    backend: str = "",
) -> int:
    """Bytes of scratch for ``encode``; ``codebooks``: whether it will be given some."""
    stages = modes.stages(bounds, codebooks)
    return find_backend(backend, torch.device(device)).encode_scratch_bytes(
        layout.totals, stages, dtype.itemsize
    )


def decode_scratch_bytes(
    layout: Layout, dtype: torch.dtype, *, device: torch.device | str = "cpu", backend: str = ""
) -> int:
    """Bytes of scratch for ``decode``."""
    found = find_backend(backend, torch.device(device))
    return _received_bytes(layout) + found.decode_scratch_bytes(layout.totals, dtype.itemsize)


def _no_codebooks(layout: Layout, device: torch.device) -> Codebooks:
    """Stands for "none" in a call, which leaves it as it is; kept so that calls do not allocate."""
    totals = layout.totals
    return layout.kept(("no codebooks", device), lambda: Codebooks(totals.peers, totals.tables, device))


def _received_bytes(layout: Layout) -> int:
    """Scratch for the codebooks that come along where the caller keeps none."""
    return ReceivedCodebooks.bytes_for(layout.totals.peers, layout.totals.tables)


def _check_values(values: Tensor, layout: Layout, name: str) -> None:
    if values.dtype not in DTYPES:
        raise ValueError(f"{name} is {values.dtype}; the codec takes float32, float16 and bfloat16")
    if tuple(values.shape) != tuple(layout.shape):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but the layout's is {tuple(layout.shape)}")
    if not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() or describe the strides in a Layout")


def _check_counts(frames: Frames, layout: Layout, name: str) -> None:
    peers = layout.totals.peers
    for part, tensor in {"sizes": frames.sizes, "offsets": frames.offsets}.items():
        if tensor.numel() != peers:
            raise ValueError(
                f"the layout has {peers} peers, but there are {tensor.numel()} frames ({name}.{part})"
            )
        if tensor.dtype != torch.int64 or tensor.device != frames.buffer.device or not tensor.is_contiguous():
            raise ValueError(f"{name}.{part} must be a contiguous int64 tensor on {frames.buffer.device}")


def _check_bytes(tensor: Tensor, needed: int, device: torch.device, name: str, maker: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous uint8 tensor on {device}; {maker} tells or makes it")
    if tensor.numel() < needed:
        raise ValueError(
            f"{name} has {tensor.numel()} bytes, but {needed} are needed; {maker} tells or makes it"
        )
    if tensor.numel() and tensor.data_ptr() % 16:
        raise ValueError(f"{name} must start at a multiple of 16 bytes")


def _check_codebooks(books: Tensor, layout: Layout, device: torch.device) -> None:
    shape = (layout.totals.peers, layout.totals.tables)
    if tuple(books.shape) != shape or books.device != device:
        raise ValueError(
            f"the codebooks are for {tuple(books.shape)} peers and tables on {books.device}, but the layout "
            f"has {shape} and the tensors are on {device}"
        )
