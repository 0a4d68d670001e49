"""What the snapshot benchmarks share: models of random weights, float32 baselines, and a line on the machine.

Legend: B rows of a batch, F sparse features.
"""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import sched_getaffinity
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from tightrec.formats.columns import Columns
from tightrec.formats.schema import Schema
from tightrec.models.config import ModelConfig
from tightrec.models.dlrm import DLRM, build_tables
from tightrec.models.interaction import DotInteraction, side_by_side
from tightrec.snapshot.calibrate import input_histograms
from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.export import Material, build
from tightrec.snapshot.loader import Snapshot, load
from tightrec.snapshot.model import CONSTANT, layer_specs
from tightrec.snapshot.parts import read_parts
from tightrec.snapshot.plans import forced_plan
from tightrec.snapshot.source import Checkpoint

PUBLISHED = ModelConfig(embedding_dim=64, bottom_layers=(512, 256), top_layers=(512, 256))
"""Widths of the published Kaggle model: bottom 512-256-64, top 512-256-1."""

_TABLES = "sparse_arch.embedding_bag_collection.embedding_bags."


@dataclass(frozen=True, kw_only=True)
class MadeCheckpoint:
    """Random weights behind what :class:`tightrec.snapshot.source.Checkpoint` offers."""

    model: ModelConfig
    """Shape of the model."""

    schema: Schema
    """Its columns."""

    state: dict[str, Tensor]
    """The state dict of :class:`DLRM`, float32."""

    path: Path = Path("random-weights")
    step: int = 0
    fingerprint: str = "0" * 64
    data: str | None = None

    def table(self, name: str) -> Tensor:
        """float32 [R, D], not a copy."""
        return self.state[f"{_TABLES}{name}.weight"]

    def parameter(self, key: str) -> Tensor:
        """Any other tensor by its key."""
        return self.state[key]


def random_state(
    config: ModelConfig, schema: Schema, *, tables: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """A state dict of normal values, scaled so that neither activations nor scores run away.

    Args:
        tables: whether to make the tables too.
    """
    generator = torch.Generator().manual_seed(seed)
    meta = torch.device("meta")
    state = {}
    for key, shape_of in _dlrm(config, schema, meta).state_dict().items():
        if key.startswith(_TABLES) and not tables:
            continue
        # He's scale keeps what a ReLU passes; a cross layer multiplies and adds instead.
        gain = 0.2 if "crossnet" in key else 2.0
        scale = (gain / shape_of.shape[-1]) ** 0.5 if shape_of.dim() == 2 else 0.1
        state[key] = torch.randn(shape_of.shape, generator=generator).mul_(scale)
    return state


def float32_model(checkpoint: Checkpoint | MadeCheckpoint) -> DLRM:
    """The model as it was trained, on torchrec's modules; tables are not copied."""
    model = _dlrm(checkpoint.model, checkpoint.schema, torch.device("cpu"))
    state = {
        key: checkpoint.table(key.removeprefix(_TABLES).removesuffix(".weight"))
        if key.startswith(_TABLES)
        else checkpoint.parameter(key)
        for key in model.state_dict()
    }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _dlrm(config: ModelConfig, schema: Schema, device: torch.device) -> DLRM:
    columns = [(column.name, column.cardinality) for column in schema.sparse]
    return DLRM(build_tables(columns, config), len(schema.dense), config, device)


class PlainModel(nn.Module):
    """A DLRM as one writes it for serving in float32: an nn.EmbeddingBag a table, nn.Linear, no torchrec.

    Args:
        trained: whose weights it shares.
        config: its shape.
        dense: number of dense columns.
        bags: look up by nn.EmbeddingBag; else by nn.functional.embedding, which has less overhead and reads
            one id a row only.
    """

    constant: Tensor | None

    def __init__(self, trained: DLRM, config: ModelConfig, dense: int, *, bags: bool = True) -> None:
        super().__init__()
        state = trained.state_dict()
        rows = [tensor for key, tensor in state.items() if key.startswith(_TABLES)]
        self.tables = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(table, mode=config.pooling, include_last_offset=True)
            for table in rows
        )
        self.bags = bags
        parts: dict[str, list[nn.Module]] = {"bottom": [], "cross": [], "top": []}
        for spec in layer_specs(config, dense):
            bias = state[spec.bias] if spec.bias else None
            part = parts[spec.name.split(".")[0]]
            part.append(_linear(state[spec.weight], bias))
            if spec.relu:
                part.append(nn.ReLU(inplace=True))
        self.bottom, self.top = nn.Sequential(*parts["bottom"]), nn.Sequential(*parts["top"])
        self.cross = nn.ModuleList(parts["cross"])
        self.register_buffer(CONSTANT, None if dense else state["dense_arch.vector"])
        self.interaction = DotInteraction(1 + len(rows)) if config.architecture == "dlrm" else None

    def forward(self, dense: Tensor, ids: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
        """Logits [B] of dense values [B, Dn] and, a feature, ids and offsets [B + 1] of its bags."""
        vector = self.bottom(dense) if self.constant is None else self.constant.expand(len(dense), -1)
        if self.bags:
            columns = [table(*bags) for table, *bags in zip(self.tables, ids, offsets, strict=True)]
        else:
            columns = [embedding(one, table.weight) for table, one in zip(self.tables, ids, strict=True)]
        if self.interaction is not None:
            mixed = self.interaction(vector, columns)
        else:
            first = mixed = side_by_side(vector, columns)
            for low, high in zip(self.cross[::2], self.cross[1::2], strict=True):
                mixed = first * high(low(mixed)) + mixed
        return self.top(mixed).squeeze(1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)


def material_of(checkpoint: Checkpoint | MadeCheckpoint, rows: Columns) -> Material:
    """What an export gathers, with ``rows`` to find the ranges of layers' inputs on and none to verify on."""
    parts = read_parts(checkpoint, [rows])  # type: ignore[arg-type]
    histograms = input_histograms(parts.scorer(parts.exact), parts.narrowed(rows), 1024)
    return Material(
        checkpoint=checkpoint,  # type: ignore[arg-type]
        parts=parts,
        search_rows=rows,
        verify_rows=None,
        histograms=histograms,
    )


def exported(material: Material, folder: Path, precision: str, **settings: str) -> Snapshot:
    """A snapshot as the exporter builds it, written into ``folder`` and loaded from there."""
    config = dataclasses.replace(PrecisionConfig(), precision=precision, **settings)  # type: ignore[arg-type]
    plan = forced_plan(config, list(material.parts.tables), list(material.parts.layers))
    build(material, plan, None, folder, config, verified=False)
    return load(folder, check=False)


def machine(threads: int) -> str:
    """Two lines: where this was measured, and with which versions."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = names[0].partition(":")[2].strip() if names else platform.machine()
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchrec", "fbgemm-gpu-cpu", "numpy")
    )
    return (
        f"{processor}, {len(sched_getaffinity(0))} cores, {threads} thread(s) of torch; vectors: "
        f"{torch.backends.cpu.get_cpu_capability()}\nPython {platform.python_version()}, {libraries}"
    )


def shape_line(config: ModelConfig, schema: Schema) -> str:
    """The model's shape in a line."""
    rows = [column.cardinality for column in schema.sparse]
    cross = f"cross {config.cross_layers} x rank {config.cross_rank}, "
    bottom = "-".join(map(str, (*config.bottom_layers, config.embedding_dim))) if schema.dense else "none"
    return (
        f"{config.architecture}, {len(schema.dense)} dense columns, {len(rows)} tables of {min(rows):,} to "
        f"{max(rows):,} rows ({sum(rows):,} in all), dim {config.embedding_dim}, bottom {bottom}, "
        f"{cross if config.architecture == 'dcnv2' else ''}top {'-'.join(map(str, (*config.top_layers, 1)))}"
    )
