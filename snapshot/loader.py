"""Loads a snapshot and scores rows with it.

Needs torch, fbgemm_gpu, numpy and safetensors only. Nothing is unpickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrec.snapshot import store
from tightrec.snapshot.hashed import hashed_lookup
from tightrec.snapshot.inputs import Inputs
from tightrec.snapshot.layers import ACTIVATION_BITS, make_layer
from tightrec.snapshot.lookup import Lookup, TableShape
from tightrec.snapshot.manifest import MANIFEST, DamagedSnapshot, Feature, SnapshotManifest, read_manifest
from tightrec.snapshot.model import Scorer, extra_keys, layer_specs, places_of
from tightrec.snapshot.monitor import Monitor, MonitorConfig
from tightrec.snapshot.precision import Plan


class Snapshot:
    """A loaded snapshot; threads may call its methods at once.

    Args:
        manifest: what it says of itself.
        scorer: the model.
        inputs: checks what :meth:`predict` is given.
        device: where it computes.
    """

    def __init__(
        self, manifest: SnapshotManifest, scorer: Scorer, inputs: Inputs, device: torch.device
    ) -> None:
        self.manifest = manifest
        self.scorer = scorer
        self.device = device
        self._inputs = inputs

    @property
    def plan(self) -> Plan:
        """Type of every table and layer."""
        return self.manifest.precision

    @property
    def features(self) -> tuple[Feature, ...]:
        """The sparse features, in order."""
        return self.manifest.sparse

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names of the dense columns, in order."""
        return self.manifest.dense

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that hold tables and layers."""
        return self.manifest.weight_bytes

    def predict(self, dense: Any, sparse: Mapping[str, Any]) -> NDArray[np.float32] | Tensor:
        """Probabilities of B rows, float32 [B]; a tensor on the snapshot's device if any input is a tensor,
        else a numpy array.

        Args:
            dense: [B, Dn] real numbers, in the order of ``dense_names``; None where the model has none.
            sparse: by feature's name, in any order: ids [B]; [B, H]; a pair (values, offsets [B + 1]); or a
                list of B lists. See :mod:`tightrec.snapshot.inputs`.

        Raises:
            ValueError: a feature is missing, unknown, of another number of rows, of another type or shape; an
                id is out of range (unless loaded with ``out_of_range="overflow"``); a dense value is not
                finite, or so large that the score is not. Names the feature or column and the row.
        """
        batch = self._inputs.convert(dense, sparse)
        if len(batch):
            logits = self.logits(batch.dense, batch.ids, batch.offsets)
            _refuse_not_finite(logits)
            # Outside inference mode a tensor is made that autograd's users can go on with.
            probabilities = logits.sigmoid()
        else:
            probabilities = torch.empty(0, device=self.device)
        return probabilities if batch.of_torch else probabilities.cpu().numpy()

    def logits(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """Logits float32 [B] of checked inputs, as :meth:`tightrec.snapshot.model.Scorer.forward` takes
        them."""
        with torch.inference_mode():
            return self.scorer(dense, ids, offsets)

    def monitor(self, **settings: Any) -> Monitor:
        """A new monitor of this snapshot's scores in service; its state is not shared with other monitors.

        Args:
            **settings: fields of :class:`tightrec.snapshot.monitor.MonitorConfig`.

        Raises:
            ValueError: a setting that does not exist or fit; a snapshot without a histogram of scores.
        """
        if self.manifest.score_histogram is None:
            raise ValueError(
                "this snapshot was exported without scoring held-out rows (verify=false): it has nothing to "
                "compare with. Export it with verify=true, and data=FOLDER if its checkpoint names no rows."
            )
        known = MonitorConfig.__dataclass_fields__
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"monitor has no setting {', '.join(unknown)}. It has {', '.join(known)}.")
        return Monitor(self.manifest.score_histogram, MonitorConfig(**settings))


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    out_of_range: Literal["refuse", "overflow"] = "refuse",
    threads: int | None = None,
    check: bool = True,
) -> Snapshot:
    """Load the snapshot in the folder ``path`` (or a link to it).

    Table files are mapped and copied into the operator's memory one after the other, so that memory beyond
    it is at most one table's file, which the system can drop.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        out_of_range: what ``predict`` does with an id outside its table: ``refuse`` raises; ``overflow``
            becomes the overflow id, whose vector is zero (with mean pooling it counts as an id).
        threads: intra-op threads of torch, for the whole process; None leaves them alone.
        check: compare every file's SHA-256 with the manifest; without it, sizes and shapes only.

    Raises:
        ValueError: there is no snapshot, or it is damaged or of an unknown version (names the file); the
            device is not there; a setting is wrong.
    """
    # Resolved once: a link such as a watcher's `current` may move on while files are read.
    folder = Path(path).resolve()
    where = _device(device)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1, or None.")
        torch.set_num_threads(threads)
    manifest = read_manifest(folder)
    inputs = Inputs(manifest.dense, manifest.sparse, out_of_range, where)
    int8 = any(layer.kind == "int8" for layer in manifest.layers.values())
    if int8 and manifest.activation_bits != ACTIVATION_BITS:
        raise DamagedSnapshot(
            folder,
            f"{MANIFEST}: its int8 layers take inputs of {manifest.activation_bits} bits, those here "
            f"{ACTIVATION_BITS}",
        )
    store.check(folder, manifest, contents=check)
    snapshot = Snapshot(manifest, _scorer(folder, manifest, where), inputs, where)
    _try_out(folder, snapshot)
    return snapshot


def _refuse_not_finite(logits: Tensor) -> None:
    # numpy takes a third of torch's time for one row.
    finite = np.isfinite(logits.cpu().numpy())
    if not finite.all():
        raise ValueError(
            f"row {int(finite.argmin())}: the score is not a number, since dense values are too large "
            "for the model. Scale them as the training data was scaled."
        )


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not known. Give 'cpu', 'cuda' or 'cuda:N'.")
    if found.type == "cpu":
        return torch.device("cpu")
    if (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}: this process sees {torch.cuda.device_count()} CUDA devices. "
            "Give 'cpu', or install the CUDA stack."
        )
    return torch.device("cuda", found.index or 0)


def _scorer(folder: Path, manifest: SnapshotManifest, device: torch.device) -> Scorer:
    config = manifest.config
    specs = layer_specs(config, len(manifest.dense), manifest.columns)
    if [spec.name for spec in specs] != list(manifest.layers):
        raise DamagedSnapshot(folder, f"{MANIFEST}: its layers are not those of its model")
    stored, extras = store.read_dense(folder, manifest)
    if set(extras) != set(extra_keys(len(manifest.dense))):
        raise DamagedSnapshot(folder, f"{store.DENSE_FILE}: its small tensors are not those of its model")
    layers = {
        spec.name: make_layer(stored[spec.name], relu=spec.relu, device=device, nonnegative=spec.nonnegative)
        for spec in specs
    }
    shapes = [
        TableShape(name=table.name, kind=table.kind, rows=table.rows, dim=table.dim)
        for table in manifest.tables
    ]
    lookup = Lookup(shapes, config.pooling, device) if shapes else None
    for table in manifest.tables:
        assert lookup is not None
        lookup.fill(table.name, store.read_table(folder, table))
    scorer = Scorer(
        config,
        len(manifest.sparse),
        lookup,
        layers,
        extras,
        device,
        hashed=hashed_lookup(manifest.columns, config, layers, device),
        places=places_of(manifest.columns, config),
    )
    return scorer.eval().requires_grad_(False)


def _try_out(folder: Path, snapshot: Snapshot) -> None:
    """Score one row of zeros: layers whose shapes do not fit together are found now, not in service."""
    count = len(snapshot.features)
    inputs = (
        torch.zeros(1, len(snapshot.dense_names)),
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count + 1),
    )
    try:
        logits = snapshot.logits(*(tensor.to(snapshot.device) for tensor in inputs))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise DamagedSnapshot(
            folder, f"{store.DENSE_FILE}: its layers do not make the manifest's model ({first})"
        ) from None
    if logits.shape != (1,):
        raise DamagedSnapshot(folder, f"{store.DENSE_FILE}: its layers give {list(logits.shape)} for one row")
