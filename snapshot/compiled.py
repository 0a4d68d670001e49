"""``compile``: a snapshot as one torch.export or TorchScript file, which runs without this package.

The file holds its tables and layers, and calls operators of torch and fbgemm only:

    import torch, fbgemm_gpu
    model = torch.export.load("model.pt2").module()      # or torch.jit.load("model.pt")
    probabilities = model(dense, ids, offsets).sigmoid()

Inputs are those of :meth:`tightrec.snapshot.model.Scorer.forward` and are not checked: an id outside its
table reads memory that is not the table's. Such files contain pickles of torch's own, unlike a snapshot, and
no checksum: open only those that you trust.
"""

import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_settings

from tightrec.models.representation import with_dhe
from tightrec.snapshot.compiled_hashed import PlainBags, PlainHashes
from tightrec.snapshot.compiled_layers import CPU, exported_layer, scripted_layer
from tightrec.snapshot.differences import ScorerInputs
from tightrec.snapshot.loader import Snapshot, load
from tightrec.snapshot.lookup import Lookup
from tightrec.snapshot.model import CONSTANT, Scorer, layer_specs, places_of
from tightrec.snapshot.store import read_dense

Form = Literal["torch.export", "torchscript"]

BATCH_SIZES = (2, 0, 1, 3, 64, 1024)
"""Rows of the batches that the file is verified on; the first one is what it is traced with."""

MOST_IDS = 4
"""Ids of a bag in these batches; bags may be empty."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """``compile``: a snapshot as one file that runs without this package."""

    snapshot: Path
    """A snapshot's folder."""

    out: Path
    """The file, outside of the snapshot's folder; must not be there yet."""

    form: Form = "torch.export"
    """``torch.export``: a graph of plain tensors, for further compilation. ``torchscript``: the snapshot's
    own operators, also for LibTorch; the faster one as it is."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A file that was written and verified."""

    path: Path
    """The file."""

    form: Form
    """What it is."""

    size_bytes: int
    """Its length."""

    rows: int
    """Rows on which another process got the snapshot's logits out of it, bit for bit."""

    seconds: float
    """How long it took, verification included."""


def compile_snapshot(config: CompileConfig, say: Callable[[str], None]) -> int:
    """Write and verify the file that the settings ask for; returns 0.

    Raises:
        ValueError: as :func:`compile_to`.
    """
    done = compile_to(config.snapshot, config.out, config.form)
    say(
        f"{done.path}: {done.form}, {done.size_bytes:,} bytes, in {done.seconds:.1f} s; a process with torch "
        f"and fbgemm_gpu alone got the snapshot's logits for {done.rows:,} random rows, bit for bit"
    )
    return 0


def compile_to(snapshot: Path | str, out: Path | str, form: Form = "torch.export") -> Compiled:
    """Write a snapshot as one file, and compare it with the snapshot in a fresh process.

    The batch size and the number of ids stay free. The file appears under its name once it is verified.

    Args:
        snapshot: a snapshot's folder.
        out: the file.

    Raises:
        ValueError: the snapshot is damaged, ``out`` is taken or inside the snapshot, the form is unknown,
            this processor lacks an operator, or the file does not give the snapshot's logits.
    """
    began = time.perf_counter()
    # Resolved once, as in load(), which may be given a link that moves on before the layers are read again.
    folder, path = Path(snapshot).resolve(), Path(out)
    if form not in get_args(Form):
        raise ValueError(f"form={form!r} is not known. Give one of {', '.join(get_args(Form))}.")
    if path.exists():
        raise ValueError(f"out={path} is there already. Give another file name.")
    if not path.parent.is_dir():
        raise ValueError(f"out={path}: the folder {path.parent} does not exist. Make it first.")
    if folder in path.resolve().parents:
        raise ValueError(
            f"out={path} is inside the snapshot {folder}, where only its exporter and its watcher write. "
            "Give a file outside."
        )
    eager = load(folder)
    batches = random_batches(eager)
    # With the ending of the whole file, of which torch makes a format.
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        _write(_model(folder, eager, form), batches[0], form, partial)
        with torch.inference_mode():
            wanted = [eager.scorer(*batch) for batch in batches]
        require_same(partial, form, batches, wanted)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return Compiled(
        path=path,
        form=form,
        size_bytes=path.stat().st_size,
        rows=sum(BATCH_SIZES),
        seconds=time.perf_counter() - began,
    )


def random_batches(snapshot: Snapshot) -> list[ScorerInputs]:
    """Batches of BATCH_SIZES rows, the same every time: bags of 0 to MOST_IDS ids, some the overflow row."""
    generator = torch.Generator().manual_seed(0)
    rows = [feature.cardinality for feature in snapshot.features]
    batches = []
    for size in BATCH_SIZES:
        sizes = torch.randint(0, MOST_IDS + 1, (len(rows) * size,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        ids = [
            torch.randint(0, count + 1, (int(part.sum()),), generator=generator)
            for count, part in zip(rows, sizes.view(len(rows), size), strict=True)
        ]
        dense = torch.randn(size, len(snapshot.dense_names), generator=generator)
        batches.append((dense, torch.cat(ids), offsets))
    return batches


class _Tables(nn.Module):
    """The lookup's operator with what it takes as buffers, which a file can hold."""

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        before, after = lookup.operator_arguments()
        self.before, self.after = self._kept("before", before), self._kept("after", after)

    def _kept(self, part: str, values: Sequence[Any]) -> list[tuple[str, Any]]:
        """Name of the buffer or value of each argument."""
        kept = []
        for place, value in enumerate(values):
            name = f"{part}_{place}" if isinstance(value, Tensor) else ""
            if name:
                self.register_buffer(name, value)
            kept.append((name, None if name else value))
        return kept

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        before, after = (
            [getattr(self, name) if name else value for name, value in part]
            for part in (self.before, self.after)
        )
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            *before, ids, offsets, *after
        )


class _Constant(nn.Module):
    """The vector of a model without dense columns, once for each row."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.register_buffer("vector", vector)

    def forward(self, dense: Tensor) -> Tensor:
        # Not len(): a trace would keep the number.
        return self.vector.expand(dense.shape[0], -1)


def _model(folder: Path, eager: Snapshot, form: Form) -> Scorer:
    """The snapshot's model, made of modules that ``form`` can write; shares the memory of its tables."""
    manifest, config, count = eager.manifest, eager.manifest.config, len(eager.features)
    stored, extras = read_dense(folder, manifest)
    layer = exported_layer if form == "torch.export" else scripted_layer
    specs = layer_specs(config, len(eager.dense_names), manifest.columns)
    layers = {spec.name: layer(stored[spec.name], spec.relu) for spec in specs}
    names = with_dhe(manifest.columns, config.representation)
    chosen = [column for column in manifest.columns if column[0] in names]
    hashed = PlainHashes(chosen, config, layers, CPU) if chosen else None
    if CONSTANT in extras:
        layers = {f"bottom.{CONSTANT}": _Constant(extras[CONSTANT]), **layers}
    tables = _Tables(eager.scorer.lookup) if eager.scorer.lookup else None
    places = places_of(manifest.columns, config)
    model = Scorer(config, count, tables, layers, {}, CPU, hashed=hashed, places=places)
    model.table_bags, model.hashed_bags = (PlainBags(own, count) for own in places)
    return model.eval()


def _write(model: Scorer, example: ScorerInputs, form: Form, path: Path) -> None:
    # In memory first: torch ends the process where a disk is full.
    archive = io.BytesIO()
    with torch.no_grad(), _quiet():
        if form == "torchscript":
            torch.jit.save(torch.jit.trace(model, example, check_trace=False), archive)
            path.write_bytes(archive.getbuffer())
            return
        rows, ids = torch.export.Dim("rows", min=0), torch.export.Dim("ids", min=0)
        sizes = ({0: rows}, {0: ids}, {0: model.sparse * rows + 1})
        # Else torch takes 0 and 1 for sizes of their own kind, and the file for none but larger batches.
        with shape_settings.patch(backed_size_oblivious=True):
            program = torch.export.export(model, example, dynamic_shapes=sizes, strict=False)
        torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())


@contextmanager
def _quiet() -> Any:
    """TorchScript is deprecated from Python 3.14 on, and so are quantised tensors: nothing to tell a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_FRESH = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, fbgemm_gpu
form, path, expected = sys.argv[1:]
model = torch.jit.load(path) if form == "torchscript" else torch.export.load(path).module()
# More than once: TorchScript goes over to another executor after the first calls.
with torch.inference_mode():
    for batch, wanted in torch.load(expected, weights_only=True):
        for time in range(4):
            found = model(*batch)
            if not torch.equal(found.view(torch.int32), wanted.view(torch.int32)):
                off = (found - wanted).abs().max().item() if found.shape == wanted.shape else found.shape
                sys.exit(f"{len(wanted)} rows, call {time}: logits differ by up to {off}")
if "tightrec" in sys.modules:
    sys.exit("it imports tightrec")
"""


def require_same(path: Path, form: Form, batches: Sequence[ScorerInputs], wanted: Sequence[Tensor]) -> None:
    """Compare a file with logits bit for bit, in a process that imports torch and fbgemm_gpu only.

    Raises:
        ValueError: it cannot be loaded there, or its logits differ.
    """
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.pt"
        torch.save(list(zip(batches, wanted, strict=True)), expected)
        # The same threads: sums of float32 layers are split among them.
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        words = [sys.executable, "-I", "-c", _FRESH, form, str(path.resolve()), str(expected)]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=scratch, env=os.environ | threads, check=False
        )
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ValueError(
            f"the {form} file of this snapshot does not give its logits in another process ({last}); it was "
            "not kept. Serve the snapshot itself, or try the other form."
        )
