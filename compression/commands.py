"""The three commands of ``python -m tightrec.compression``: what they take, do and print."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tightrec.compression.bounds import Bound, Bounds, Kind
from tightrec.compression.codec import MODES, Mode, decode
from tightrec.compression.frames import FrameError, Frames
from tightrec.compression.index import DTYPE_NAMES, DamagedFrame, check_claims
from tightrec.compression.inspection import Block, Description, describe
from tightrec.compression.layout import Layout
from tightrec.compression.proof import Proof, prove
from tightrec.compression.sources import read_tensors
from tightrec.compression.store import save, stream

_KINDS: dict[str, Kind] = {"bound": "absolute", "range": "range", "rms": "rms"}
_LOSSLESS = Bound(value=1.0)  # stands where mode raw makes no use of a bound


class Mistake(Exception):
    """Words of the command line that do not fit together; told with exit status 2."""


def run(words: list[str]) -> int:
    """Run the command that ``words`` name; returns the exit status.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file is damaged or of the wrong kind; the message says what to do.
    """
    for stream_ in (sys.stdout, sys.stderr):
        # A tensor's name may hold what the terminal cannot show.
        if hasattr(stream_, "reconfigure"):
            stream_.reconfigure(errors="backslashreplace")
    parser = _parser()
    if not words:
        parser.print_help()
        return 0
    options = parser.parse_args(words)
    try:
        return {"inspect": inspect, "compress": compress, "verify": verify}[options.command](options)
    except Mistake as mistake:
        parser.exit(2, f"{parser.prog}: error: {mistake}\n")


def compress(options: argparse.Namespace) -> int:
    """Compress the tensors of a ``.npy`` or ``.safetensors`` file into a stored file."""
    source = Path(options.file)
    target = Path(options.out) if options.out else source.with_suffix(".trec")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target}: not a regular file, which is never replaced; choose another --out")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target}: the original itself, which is never overwritten; choose another --out")
    if target.exists() and not options.force:
        raise ValueError(f"{target}: exists; --force replaces it, --out writes elsewhere")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to write to")
    default = _default_bound(options)
    tables = dict(_table(text) for text in options.table)
    tensors, others = read_tensors(source)
    _refuse_others(source, others, options.skip)
    unknown = sorted(set(tables) - set(tensors))
    if unknown:
        raise Mistake(f"--table names {_quoted(unknown)}, but {source} holds {_quoted(sorted(tensors))}")
    if not tensors:
        raise ValueError(f"{source}: no tensor in it that could be compressed")
    modes: list[Mode] = [tables.get(name, (None, None))[1] or options.mode for name in tensors]
    bounds: list[Bound] = []
    for name, mode in zip(tensors, modes, strict=True):
        own = tables.get(name, (None, None))[0]
        if own and mode == "raw":
            raise Mistake(f"--table gives {name!r} a bound, but mode raw is lossless: give it another mode")
        bound = _LOSSLESS if mode == "raw" else own or default
        if bound is None:
            raise Mistake(
                f"no error bound for {name!r}: give --bound, --range or --rms, --table {name}=..., or "
                f"--mode raw for lossless"
            )
        bounds.append(bound)
    if default and not any(bound is default for bound in bounds):
        raise Mistake("--bound, --range or --rms was given, but no tensor uses it")
    save(target, tensors, Bounds(tuple(bounds), tuple(tensors)), modes)
    _print_blocks(describe(target, checksums=False))
    for name, kind in others.items():
        print(f"left out: {_shown(name)} ({kind})")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print the headers of a stored file or a frame, and check them and the checksums."""
    found = describe(options.file)
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
        return 0
    if found.stored:
        print(f"stored file, {_count(found)}, {found.file_bytes} bytes")
    else:
        (frame,) = found.frames
        print(f"frame of version {frame.version}, {frame.dtype}, {_count(found)}, {frame.frame_bytes} bytes")
    _print_blocks(found)
    print(_checksum_sentence(found))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Decode a stored file or a frame, and compare it with the original where that is given."""
    found = describe(options.file)
    if options.original is None:
        for _ in _decoded(found):
            pass
        print(_checksum_sentence(found))
        print(f"proved: all headers are in order and every block decodes to its shape ({_count(found)})")
        print("not proved: that values are within their bounds of the original (give --original)")
        return 0
    if not found.stored:
        raise Mistake(f"{found.path} is a bare frame: --original works with stored files, which have names")
    originals, others = read_tensors(options.original)
    if len(originals) == len(found.entries) == 1 and options.original.endswith(".npy"):
        originals = {found.entries[0].name: next(iter(originals.values()))}
    missing = sorted({entry.name for entry in found.entries} - set(originals))
    if missing:
        raise ValueError(f"{options.original}: does not hold {_quoted(missing)}, which {found.path} does")
    broken = _prove_all(found, originals)
    beyond = sorted(set(originals) - {entry.name for entry in found.entries}) + sorted(others)
    if beyond:
        print(f"not compared, as they are not stored: {', '.join(map(_shown, beyond))}")
    if broken:
        raise ValueError(broken)
    print(_checksum_sentence(found))
    print("proved: every value is within its bound of the original, NaN and Inf have the same bits")
    return 0


def _prove_all(found: Description, originals: dict[str, Tensor]) -> str:
    """Compare and print every tensor; returns a sentence for the first that breaks its bound, or ""."""
    rows: list[tuple[str, ...]] = [("tensor", "values", "bound", "worst error", "of bound", "at")]
    broken = ""
    for (name, _, block), values in zip(found.rows(), _decoded(found), strict=True):
        original = originals[name]
        if original.shape != values.shape or original.dtype != values.dtype:
            raise ValueError(
                f"tensor {name!r} is {original.dtype} {tuple(original.shape)} in the original, but "
                f"{values.dtype} {tuple(values.shape)} in {found.path}"
            )
        proof = prove(original, values, block.bound)
        rows.append(_proof_row(name, proof, block, tuple(values.shape)))
        if proof.first_broken is not None and not broken:
            at, flat = _place(proof.first_broken, tuple(values.shape)), proof.first_broken
            pair = float(original.reshape(-1)[flat]), float(values.reshape(-1)[flat])
            broken = (
                f"{found.path}: tensor {name!r} element {at} is {pair[1]!r}, but {pair[0]!r} in the "
                f"original: beyond the bound {block.bound!r}; {proof.broken} of {proof.values} values are"
            )
    _print_aligned(rows)
    return broken


def _proof_row(name: str, proof: Proof, block: Block, shape: tuple[int, ...]) -> tuple[str, ...]:
    share = f"{proof.worst_error / block.bound:.6f}" if block.bound else "lossless"
    place = "-" if proof.worst_at is None else _place(proof.worst_at, shape)
    return (_shown(name), str(proof.values), f"{block.bound:.6g}", f"{proof.worst_error:.6g}", share, place)


def _decoded(found: Description) -> Iterator[Tensor]:
    """The tensors of a stored file, or the flat values of a bare frame, one after another."""
    if found.stored:
        for _, values in stream(found.path):
            yield values
        return
    (frame,) = found.frames
    check_claims([(block.values, block.payload_bytes) for block in frame.blocks])
    if not frame.blocks:
        return
    layout = Layout.flat([[block.rows for block in frame.blocks]], [block.dim for block in frame.blocks])
    buffer = torch.empty(frame.frame_bytes, dtype=torch.uint8)
    with open(found.path, "rb") as file:
        read = file.readinto(memoryview(buffer.numpy()))
    try:
        frames = Frames.received(buffer, torch.tensor([read]))
        yield decode(frames, layout, dtype=DTYPE_NAMES[frame.dtype])
    except FrameError as error:
        raise DamagedFrame(f"{found.path}: block {error.table}", error.fault) from None


def _print_blocks(found: Description) -> None:
    """A line for each block, and the total."""
    first = ("tensor", "shape") if found.stored else ("block", "rows x dim")
    rows: list[Sequence[str]] = [
        (*first, "type", "mode", "bound", "bytes", "ratio", "bits", "distinct", "codebook")
    ]
    shapes = iter(entry.shape for entry in found.entries)
    original = 0
    for name, frame, block in found.rows():
        shape = next(shapes) if found.stored else (block.rows, block.dim)
        size = frame.frame_bytes if found.stored else block.payload_bytes
        original += block.original_bytes
        rows.append(
            (
                _shown(name),
                " x ".join(map(str, shape)) or "single",
                frame.dtype,
                block.mode,
                f"{block.bound:.6g}" if block.bound else "lossless",
                str(size),
                f"{block.original_bytes / size:.2f}" if block.values else "-",
                f"{8 * size / block.values:.3f}" if block.values else "-",
                "-" if block.distinct is None else f"{block.distinct} of {block.rows}",
                f"{block.codebook}{'' if block.brings_codebook else ' (kept)'}" if block.codebook else "-",
            )
        )
    _print_aligned(rows)
    ratio = f", ratio {original / found.file_bytes:.2f}" if original else ""
    print(f"total: {original} bytes of values, {found.file_bytes} bytes of file{ratio}: {found.path}")


def _print_aligned(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _checksum_sentence(found: Description) -> str:
    states = {frame.checksum for frame in found.frames}
    if not states:
        return "checksums: none, as there are no tensors"
    if states == {"matches"}:
        return "checksums: all match" if found.stored else "checksum: matches"
    return "checksum: the frame has none, so damage to its values may go unseen"


def _count(found: Description) -> str:
    return f"tensors: {len(found.frames)}" if found.stored else f"blocks: {len(found.frames[0].blocks)}"


def _refuse_others(source: Path, others: dict[str, str], skip: bool) -> None:
    """Refuse tensors that the codec does not take, by name, unless they may be left out."""
    if others and not skip:
        listed = ", ".join(f"{name!r} ({kind})" for name, kind in sorted(others.items()))
        raise ValueError(
            f"{source}: the codec takes float32, float16 and bfloat16, not {listed}; convert them, or "
            f"leave them out with --skip"
        )


def _default_bound(options: argparse.Namespace) -> Bound | None:
    for word, kind in _KINDS.items():
        value = getattr(options, word)
        if value is not None:
            return _bound(Bound(value=value, of=kind), f"--{word}")
    return None


def _table(text: str) -> tuple[str, tuple[Bound | None, Mode | None]]:
    """NAME=PART[,PART...] with parts like 0.01, range:0.03, rms:0.1 or a mode."""
    name, equals, parts = text.rpartition("=")
    if not equals or not name:
        raise Mistake(f"--table {text}: write NAME=0.01, NAME=range:0.03, NAME=rms:0.1 or NAME=MODE")
    bound: Bound | None = None
    mode: Mode | None = None
    for part in parts.split(","):
        word, _, number = part.rpartition(":")
        if part in MODES:
            mode = part
        elif word in ("", *_KINDS):
            try:
                bound = Bound(value=float(number), of=_KINDS[word or "bound"])
            except ValueError:
                raise Mistake(
                    f"--table {text}: {part!r} is neither a number nor one of {', '.join(MODES)}"
                ) from None
        else:
            raise Mistake(f"--table {text}: {word!r} is not bound, range or rms")
    return name, (None if bound is None else _bound(bound, f"--table {text}"), mode)


def _bound(bound: Bound, where: str) -> Bound:
    """The bound, if the codec takes it."""
    try:
        Bounds((bound,), (where,))
    except ValueError as error:
        raise Mistake(str(error).removeprefix("table ")) from None
    return bound


def _place(flat: int, shape: tuple[int, ...]) -> str:
    """An element's place in its tensor, [i, j, ...]."""
    place = []
    for size in reversed(shape):
        place.append(flat % size)
        flat //= size
    return f"[{', '.join(map(str, reversed(place)))}]"


def _shown(name: str) -> str:
    """A name as it may be printed: control characters, which could steer a terminal, are escaped."""
    return name if name.isprintable() and name else ascii(name)


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tightrec.compression",
        description="Compress tensors within an error bound into stored files, look at them and check them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pack = commands.add_parser("compress", help="compress a .npy or .safetensors file")
    pack.add_argument("file", metavar="FILE", help=".npy, or .safetensors (needs the safetensors library)")
    pack.add_argument("--out", metavar="FILE", help="the stored file; default: FILE with the ending .trec")
    limit = pack.add_mutually_exclusive_group()
    limit.add_argument("--bound", type=float, metavar="X", help="largest absolute error of any value")
    limit.add_argument("--range", type=float, metavar="X", help="the same, as a share of max - min")
    limit.add_argument("--rms", type=float, metavar="X", help="the same, as a share of the root mean square")
    pack.add_argument("--mode", choices=MODES, default="auto", help="default auto: what is smallest")
    pack.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="NAME=...",
        help="for one tensor: NAME=0.01, NAME=range:0.03, NAME=rms:0.1, NAME=raw, or NAME=0.01,packed",
    )
    pack.add_argument("--skip", action="store_true", help="leave out tensors of other types")
    pack.add_argument("--force", action="store_true", help="replace the output if it exists")
    look = commands.add_parser("inspect", help="print the headers of a stored file or frame; check checksums")
    look.add_argument("file", metavar="FILE")
    look.add_argument("--json", action="store_true", help="print one JSON object")
    check = commands.add_parser("verify", help="decode, and prove the bound against the original")
    check.add_argument("file", metavar="FILE")
    check.add_argument("--original", metavar="FILE", help="the .npy or .safetensors file it was made from")
    return parser
