"""The served model: a DLRM's arithmetic on low-precision tables and layers, without torchrec.

Legend: B rows, F sparse features, Ft of them with a table, H with a deep hash embedding (hybrid ones with
both), D embedding dim, N = 1 + Ft + H vectors a row: of the dense part, of the tables, of the hashes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tightrec.models.config import ModelConfig
from tightrec.models.interaction import DotInteraction
from tightrec.models.representation import Cardinalities, with_dhe, with_table
from tightrec.snapshot.hashed import DECODERS, HashedLookup, Tap, decoder_layer

CONSTANT = "constant"
"""The learned vector [D] that stands for the bottom MLP where the model has no dense columns."""

TABLES, HASHED = "tables", "hashed"
"""The stages of all tables and of all deep hash embeddings, pooled."""

DECODER_KEYS = "hashed_arch.decoders"
"""In the DLRM's state dict, before ``.weights.L`` [H, out, in] and ``.biases.L`` [H, out] of the decoders'
layers L."""


class Places(NamedTuple):
    """Numbers of the features with an embedding table, and of those with a deep hash embedding."""

    tables: tuple[int, ...]
    hashed: tuple[int, ...]


def places_of(columns: Cardinalities, config: ModelConfig) -> Places:
    """Where the vectors of each of ``columns`` (name, cardinality) come from."""
    names = [name for name, _ in columns]
    of_tables, of_hashes = (chosen(columns, config.representation) for chosen in (with_table, with_dhe))
    return Places(tuple(map(names.index, of_tables)), tuple(map(names.index, of_hashes)))


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A dense layer of the model, and where a checkpoint keeps it."""

    name: str
    """``dhe.FEATURE.0``, ... of each decoder, ``bottom.0``, ..., ``cross.0.v``, ``cross.0.w``, ...,
    ``top.0``, ...; the last one makes the logit."""

    weight: str
    """Key of the weight [out, in] in the state dict of :class:`tightrec.models.dlrm.DLRM`."""

    bias: str | None
    """Key of the bias [out]; None: the layer has none."""

    relu: bool
    """Whether a ReLU follows."""

    place: int | None = None
    """Which one it is of the weights [H, out, in] and biases [H, out] at these keys; None: they are of this
    layer alone."""

    @property
    def nonnegative(self) -> bool:
        """Whether its input comes out of a ReLU."""
        return behind_relu(self.name)


def behind_relu(name: str) -> bool:
    """Whether the layer ``name`` is one of an MLP or of a decoder, but not its first."""
    part, _, rest = name.partition(".")
    return part in ("bottom", "top", DECODERS) and rest.rpartition(".")[2] != "0"


def takes_codes(name: str) -> bool:
    """Whether the layer ``name`` is the first of a decoder, whose rows are all of one distribution."""
    return name.startswith(f"{DECODERS}.") and not behind_relu(name)


def layer_specs(config: ModelConfig, dense: int, columns: Cardinalities = ()) -> list[LayerSpec]:
    """The dense layers of a model with ``dense`` dense columns, in the order in which they run.

    Args:
        columns: the sparse features; may be left out of a model that has tables for all of them.
    """
    assert columns or config.representation.kind == "table", "decoders are the features'"
    specs: list[LayerSpec] = []

    def linear(name: str, weight: str, bias: str | None, relu: bool = False) -> None:
        specs.append(LayerSpec(name=name, weight=weight, bias=bias, relu=relu))

    def mlp(name: str, key: str, relu: bool = True) -> None:
        linear(name, f"{key}.weight", f"{key}.bias", relu)

    depth = len(config.representation.decoder) + 1
    for place, feature in enumerate(with_dhe(columns, config.representation)):
        for i in range(depth):
            weight, bias = (f"{DECODER_KEYS}.{part}.{i}" for part in ("weights", "biases"))
            name, relu = decoder_layer(feature, i), i < depth - 1
            specs.append(LayerSpec(name=name, weight=weight, bias=bias, relu=relu, place=place))
    if dense:
        for i in range(len(config.bottom_layers) + 1):
            mlp(f"bottom.{i}", f"dense_arch.model._mlp.{i}._linear")
    if config.architecture == "dcnv2":
        key = "inter_arch.crossnet"
        for i in range(config.cross_layers):
            linear(f"cross.{i}.v", f"{key}.V_kernels.{i}", None)
            linear(f"cross.{i}.w", f"{key}.W_kernels.{i}", f"{key}.bias.{i}")
    for i in range(len(config.top_layers)):
        mlp(f"top.{i}", f"over_arch.model.0._mlp.{i}._linear")
    mlp(f"top.{len(config.top_layers)}", "over_arch.model.1", relu=False)
    return specs


def extra_keys(dense: int) -> dict[str, str]:
    """Keys in the DLRM's state dict of small tensors that stay float32, by their name here."""
    return {} if dense else {CONSTANT: "dense_arch.vector"}


class Bags:
    """Takes the ids and offsets of some of F features out of those of all.

    Args:
        places: numbers of the features, ascending.
        sparse: F.
        device: where the ids are.
    """

    def __init__(self, places: Sequence[int], sparse: int, device: torch.device) -> None:
        self.places = tuple(places)
        self.all = len(places) == sparse
        self.index = torch.tensor(places, dtype=torch.int64, device=device)

    def __call__(self, ids: Tensor, offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Of ``rows`` rows, in the layout that :class:`Scorer` takes; not copied where all are asked for."""
        if self.all or not rows:
            return ids, offsets
        ends = offsets[::rows].tolist()
        chosen = torch.cat([ids[ends[place] : ends[place + 1]] for place in self.places])
        sizes = offsets.diff().view(-1, rows).index_select(0, self.index).flatten()
        return chosen, functional.pad(sizes.cumsum(0), (1, 0))


class Scorer(nn.Module):
    """Logits from checked inputs; the order of operations is that of :class:`tightrec.models.dlrm.DLRM`.

    Args:
        config: shape of the model; ``dense_precision`` is not looked at, layers have types of their own.
        sparse: F.
        lookup: ids and offsets of Ft * B bags, feature-major, to pooled embeddings float32 [B, Ft * D]; None:
            there is no table.
        layers: by the names of :func:`layer_specs`; each maps float32 [B, in] to float32 [B, out], its ReLU
            included. Those of decoders are ``hashed``'s.
        extras: by the names of :func:`extra_keys`.
        device: where it computes.
        hashed: the deep hash embeddings; None: there are none.
        places: which features have a table and which are those of ``hashed``; None: all of them.
    """

    constant: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        sparse: int,
        lookup: nn.Module | None,
        layers: Mapping[str, nn.Module],
        extras: Mapping[str, Tensor],
        device: torch.device,
        *,
        hashed: HashedLookup | None = None,
        places: Places | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.sparse = config.embedding_dim, sparse
        self.lookup, self.hashed = lookup, hashed
        everywhere = tuple(range(sparse))
        places = places or Places(() if lookup is None else everywhere, () if hashed is None else everywhere)
        self.table_bags, self.hashed_bags = (Bags(chosen, sparse, device) for chosen in places)
        # A ModuleList a part instead of one ModuleDict: its keys may not hold dots.
        self.names = list(layers)
        self.bottom = nn.ModuleList(layer for name, layer in layers.items() if name.startswith("bottom."))
        self.cross = nn.ModuleList(layer for name, layer in layers.items() if name.startswith("cross."))
        self.top = nn.ModuleList(layer for name, layer in layers.items() if name.startswith("top."))
        self.register_buffer(CONSTANT, extras[CONSTANT].to(device) if CONSTANT in extras else None)
        vectors = 1 + sum(map(len, places))
        self.interaction = DotInteraction(vectors, device) if config.architecture == "dlrm" else None

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Every layer by its name, in the order in which they run."""
        decoders = [] if self.hashed is None else [layer for each in self.hashed.decoders for layer in each]
        return dict(zip(self.names, [*decoders, *self.bottom, *self.cross, *self.top], strict=True))

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor, tap: Tap | None = None) -> Tensor:
        """Logits float32 [B].

        Args:
            dense: float32 [B, dense columns].
            ids: int64 [sum of bag sizes], each in its table or the overflow row.
            offsets: int64 [F * B + 1]; bag f * B + b is feature f of row b.
            tap: called with every part's name, what a layer took in (None of other parts) and what came out.
        """
        pooled = self._pooled(dense.shape[0], ids, offsets, tap)
        if self.constant is None:
            vector = _through(self.bottom, "bottom", dense, tap)
        else:
            vector = self.constant.expand(dense.shape[0], -1)
        both = torch.cat((vector, *pooled), 1)
        mixed = self._crossed(both, tap) if self.interaction is None else self.interaction.mix(vector, both)
        if tap:
            tap("interaction", None, mixed)
        logits = _through(self.top, "top", mixed, tap).squeeze(1)
        if tap:
            tap("logits", None, logits)
        return logits

    def _pooled(self, rows: int, ids: Tensor, offsets: Tensor, tap: Tap | None) -> list[Tensor]:
        """Pooled vectors: of the tables [B, Ft * D], of the deep hash embeddings [B, H * D]."""
        pooled = []
        if self.lookup is not None:
            pooled.append(self.lookup(*self.table_bags(ids, offsets, rows)))
            if tap:
                tap(TABLES, None, pooled[-1])
        if self.hashed is not None:
            pooled.append(self.hashed(*self.hashed_bags(ids, offsets, rows), rows, tap))
            if tap:
                tap(HASHED, None, pooled[-1])
        return pooled

    def stages(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> list[tuple[str, Tensor]]:
        """What every part puts out, in order: ``tables`` [B, Ft * D], decoder layers [U, out] of a feature's
        distinct ids, ``hashed`` [B, H * D], the other layers [B, out], ``interaction``, ``logits``."""
        found: list[tuple[str, Tensor]] = []
        self(dense, ids, offsets, lambda name, _, out: found.append((name, out)))
        return found

    def layer_inputs(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> list[tuple[str, Tensor]]:
        """What every layer takes in, [B, in] or [U, in], by the layer's name, in order."""
        found: list[tuple[str, Tensor | None]] = []
        self(dense, ids, offsets, lambda name, taken, _: found.append((name, taken)))
        return [(name, taken) for name, taken in found if taken is not None]

    def _crossed(self, first: Tensor, tap: Tap | None) -> Tensor:
        """A low-rank cross network (Wang et al. 2021, DCN v2) over [B, N * D]."""
        mixed = first
        for i, (v, w) in enumerate(zip(self.cross[::2], self.cross[1::2], strict=True)):
            low = v(mixed)
            # The bias is the layer's own here and added to the same sum in the trained model.
            high = w(low)
            if tap:
                tap(f"cross.{i}.v", mixed, low)
                tap(f"cross.{i}.w", low, high)
            mixed = first * high + mixed
        return mixed


def _through(layers: nn.ModuleList, part: str, values: Tensor, tap: Tap | None) -> Tensor:
    for i, layer in enumerate(layers):
        taken, values = values, layer(values)
        if tap:
            tap(f"{part}.{i}", taken, values)
    return values
