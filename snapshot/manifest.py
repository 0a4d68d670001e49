"""What a snapshot says about itself: the values of ``manifest.json``, checked as they are read.

Only the standard library is needed to read one. Nothing here opens the files that a manifest names.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightrec.models.config import ModelConfig, config_of, table_name
from tightrec.models.representation import representations, with_dhe, with_table
from tightrec.snapshot.precision import LAYER_TYPES, TABLE_TYPES, Plan

FORMAT = "tightrec snapshot"
"""First value of every manifest: tells a snapshot's folder from a training checkpoint's, which has a
``manifest.json`` too."""

FORMAT_VERSION = 2
"""Version of the folder's layout. 1 knows tables only, and is still written where there is nothing else: a
tightrec from before deep hash embeddings reads it, and refuses 2 in words."""

MANIFEST = "manifest.json"
"""Written last: its presence says that the rest is there."""

_FILE_NAME = re.compile(r"(?!\.)[A-Za-z0-9_%.-]+(/(?!\.)[A-Za-z0-9_%.-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "Export the snapshot again, or copy it again from where it is whole"


class DamagedSnapshot(ValueError):
    """A snapshot that must not be served; the message names the file."""

    def __init__(self, folder: Path, problem: str, advice: str = _AGAIN) -> None:
        self.folder = folder
        """The refused snapshot."""
        self.problem = problem
        """What is wrong with it, naming the file."""
        super().__init__(f"The snapshot {folder} is refused: {problem}. {advice}.")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What one file must look like."""

    size_bytes: int
    """Its length."""

    sha256: str
    """SHA-256 of its contents, 64 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class TableRecord:
    """One embedding table."""

    name: str
    """``t_`` and the feature's name."""

    kind: str
    """Type of its rows, see precision.TABLE_TYPES."""

    rows: int
    """R, the feature's cardinality."""

    dim: int
    """D."""

    file: str
    """The file that holds its one tensor ``rows``, uint8 [R, bytes of a row]."""


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One dense layer; its tensors stand in the file of dense weights."""

    kind: str
    """Type of its weight, see precision.LAYER_TYPES."""

    outputs: int
    """N."""

    inputs: int
    """K."""

    bias: bool
    """Whether it has a bias."""

    activation: tuple[float, float] | None
    """int8: the range that its input is quantised in; None: found in each row."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One sparse feature."""

    name: str
    """Key in the ``sparse`` argument of ``predict``."""

    cardinality: int
    """Ids lie in [0, cardinality)."""

    multi_hot: bool = False
    """Whether training rows held lists of ids; both forms are served either way."""


@dataclass(frozen=True, kw_only=True)
class SnapshotManifest:
    """Everything that is known of a snapshot beside its weights."""

    step: int
    """Training steps of the checkpoint it was made from."""

    source: dict[str, Any]
    """The checkpoint: ``fingerprint`` (SHA-256 of its manifest) and where it stood, as ``checkpoint``."""

    model: dict[str, Any]
    """Fields of :class:`tightrec.models.config.ModelConfig`, ``representation`` only where it is not that of
    tables alone."""

    features: dict[str, Any]
    """``dense``: names of the dense columns in order; ``sparse``: name, cardinality and multi_hot of each
    feature, in order."""

    plan: dict[str, Any]
    """Fields of :class:`tightrec.snapshot.precision.Plan`."""

    tables: tuple[TableRecord, ...]
    """In the order of those features that have one."""

    layers: dict[str, LayerRecord]
    """By name, in the order in which they run."""

    activation_bits: int
    """Bits of an int8 layer's input; a loader that would use another number refuses a snapshot with any."""

    files: dict[str, FileRecord]
    """Every file beside the manifest, by name relative to the folder."""

    verification: dict[str, Any] | None = None
    """How the snapshot compared with float32 on held-out rows; None: it was not verified."""

    score_histogram: dict[str, Any] | None = None
    """Scores of the held-out rows, see :func:`tightrec.snapshot.monitor.score_histogram`; None: none was
    made, and there is no monitor."""

    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else that the exporter wants kept."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return config_of(self.model)

    @property
    def precision(self) -> Plan:
        """Type of every table and layer."""
        return Plan(**self.plan)

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the dense columns, in order."""
        return tuple(self.features["dense"])

    @property
    def sparse(self) -> tuple[Feature, ...]:
        """The sparse features, in order."""
        return tuple(Feature(**feature) for feature in self.features["sparse"])

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Name and cardinality of the sparse features, in order."""
        return [(feature.name, feature.cardinality) for feature in self.sparse]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files that hold tables and layers."""
        return sum(record.size_bytes for name, record in self.files.items() if name.endswith(".safetensors"))


def plain(value: Any) -> Any:
    """``value`` in JSON's types: dataclasses and tuples become objects and arrays, paths text, and a float
    that is not finite becomes null, since JSON has no word for it.

    Raises:
        TypeError: something else than text, numbers, booleans, None and containers of them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a manifest: {value!r}")


def to_text(manifest: SnapshotManifest) -> str:
    """The manifest as JSON, with a SHA-256 over its own values."""
    hashed = with_dhe(manifest.columns, manifest.config.representation)
    values = {"format": FORMAT, "format_version": FORMAT_VERSION if hashed else 1, **plain(manifest)}
    if not hashed:
        values["model"].pop("representation", None)
    return json.dumps({**values, "sha256": _own_sha256(values)}, indent=1, allow_nan=False) + "\n"


def from_text(text: str, folder: Path) -> SnapshotManifest:
    """The manifest that ``text`` holds; ``folder`` is where it stood, for messages.

    Raises:
        DamagedSnapshot: the text is no manifest of a snapshot, of another format version, or altered.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DamagedSnapshot(folder, f"{MANIFEST} is not valid JSON ({error})") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise DamagedSnapshot(
            folder, f"{MANIFEST} is not a snapshot's", "Name a folder that `tightrec.snapshot export` wrote"
        )
    version = values.pop("format_version", None)
    if version not in (1, FORMAT_VERSION):
        raise DamagedSnapshot(
            folder,
            f"{MANIFEST} has format version {version!r}, and 1 to {FORMAT_VERSION} are known here",
            "Load it with the tightrec that wrote it, or export it again",
        )
    own = values.pop("sha256", None)
    if own != _own_sha256({"format": FORMAT, "format_version": version, **values}):
        raise DamagedSnapshot(folder, f"{MANIFEST} does not match its own checksum")
    try:
        return _built(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedSnapshot(folder, f"{MANIFEST} does not describe a model ({detail})") from None


def read_manifest(folder: Path) -> SnapshotManifest:
    """The manifest of the snapshot ``folder``.

    Raises:
        ValueError: there is no such folder.
        DamagedSnapshot: the manifest is missing, unreadable, altered or of an unknown format version.
    """
    if not folder.is_dir():
        raise ValueError(
            f"There is no snapshot {folder}. Make one with `python -m tightrec.snapshot export`."
        )
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DamagedSnapshot(folder, f"{MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedSnapshot(folder, f"{MANIFEST} cannot be read ({error})") from None
    return from_text(text, folder)


def _own_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _built(values: dict[str, Any]) -> SnapshotManifest:
    values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
    values["tables"] = tuple(TableRecord(**record) for record in values["tables"])
    values["layers"] = {name: _layer(record) for name, record in values["layers"].items()}
    manifest = SnapshotManifest(**values)
    _check(manifest)
    return manifest


def _layer(record: dict[str, Any]) -> LayerRecord:
    activation = record["activation"]
    if activation is not None:
        low, high = activation
        if not low <= 0 <= high:
            raise ValueError(f"the range {low} to {high} of a layer's input does not hold zero")
        record = {**record, "activation": (float(low), float(high))}
    return LayerRecord(**record)


def _check(manifest: SnapshotManifest) -> None:
    """Hold the values to what the loader relies on; it says what differs as a ValueError."""
    for name, file in manifest.files.items():
        _demand(_FILE_NAME.fullmatch(name) and name != MANIFEST, f"file name {name!r} leaves the folder")
        _demand(_count(file.size_bytes) and _SHA256.fullmatch(file.sha256), f"record of {name} is malformed")
    config, plan, sparse = manifest.config, manifest.precision, manifest.sparse
    _demand(config.architecture in ("dlrm", "dcnv2"), f"architecture {config.architecture!r} is not known")
    _demand(config.pooling in ("sum", "mean"), f"pooling {config.pooling!r} is not known")
    _demand(_count(manifest.step), f"step {manifest.step!r} is no count")
    _demand(all(isinstance(name, str) for name in manifest.dense), "dense columns are not names")
    _demand(sparse, "it names no sparse feature")
    names = [feature.name for feature in sparse] + list(manifest.dense)
    _demand(len(set(names)) == len(names), "a feature stands in it twice")
    for feature in sparse:
        _demand(_count(feature.cardinality) and feature.cardinality, f"cardinality of {feature.name}")
    _check_representations(manifest, config)
    rows = dict(manifest.columns)
    _demand(
        [table.name for table in manifest.tables]
        == [table_name(name) for name in with_table(manifest.columns, config.representation)],
        "tables and features differ",
    )
    for name, table in zip(with_table(manifest.columns, config.representation), manifest.tables, strict=True):
        _demand(
            (table.rows, table.dim) == (rows[name], config.embedding_dim),
            f"table {table.name} is {table.rows} x {table.dim} where the model has "
            f"{rows[name]} x {config.embedding_dim}",
        )
        _demand(table.kind in TABLE_TYPES, f"type {table.kind!r} of table {table.name} is not known")
        _demand(plan.tables.get(table.name) == table.kind, f"the plan has another type for {table.name}")
        _demand(table.file in manifest.files, f"{table.file} is not among the files")
    for name, layer in manifest.layers.items():
        _demand(layer.kind in LAYER_TYPES, f"type {layer.kind!r} of layer {name} is not known")
        _demand(plan.layers.get(name) == layer.kind, f"the plan has another type for {name}")
        _demand(_count(layer.outputs) and _count(layer.inputs), f"shape of layer {name}")


def _check_representations(manifest: SnapshotManifest, config: ModelConfig) -> None:
    """That the deep hash embeddings are of a kind that is known, and their decoders as large as it says."""
    shape = config.representation
    kinds = representations(manifest.columns, shape)
    for feature, kind in kinds.items():
        _demand(kind in ("table", "dhe", "hybrid"), f"representation {kind!r} of {feature} is not known")
    if set(kinds.values()) == {"table"}:
        return
    _demand(shape.transform in ("uniform", "gaussian"), f"transform {shape.transform!r} is not known")
    _demand(
        shape.activation in ("sigmoid", "relu", "mish", "linear"),
        f"activation {shape.activation!r} is not known",
    )
    _demand(all(map(_count, (shape.hashes, shape.buckets))), "hashes and buckets are not counts")
    _demand(isinstance(shape.hash_seed, int), "hash_seed is no number")
    widths = (shape.hashes, *shape.decoder, config.embedding_dim)
    for feature in with_dhe(manifest.columns, shape):
        # Here, since the hashes are made before a layer is tried out.
        found = [layer for name, layer in manifest.layers.items() if _is_of_decoder(name, feature)]
        _demand(
            [(layer.inputs, layer.outputs) for layer in found] == list(itertools.pairwise(widths)),
            f"the decoder of {feature} is not {' -> '.join(map(str, widths))}",
        )


def _is_of_decoder(name: str, feature: str) -> bool:
    return name.rpartition(".")[0] == f"dhe.{feature}"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _demand(holds: Any, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
