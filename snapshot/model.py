"""The served model: a DLRM's arithmetic on low-precision tables and layers, without torchrec.

Legend: B rows, F sparse features, D embedding dim, N = F + 1 vectors a row (the first from the dense part).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tightrec.models.config import ModelConfig
from tightrec.models.interaction import DotInteraction

Tap = Callable[[str, Tensor | None, Tensor], object]
"""Looks on while a model runs: a part's name, what it took in, what came out."""

CONSTANT = "constant"
"""The learned vector [D] that stands for the bottom MLP where the model has no dense columns."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A dense layer of the model, and where a checkpoint keeps it."""

    name: str
    """``bottom.0``, ..., ``cross.0.v``, ``cross.0.w``, ..., ``top.0``, ...; the last one makes the logit."""

    weight: str
    """Key of the weight [out, in] in the state dict of :class:`tightrec.models.dlrm.DLRM`."""

    bias: str | None
    """Key of the bias [out]; None: the layer has none."""

    relu: bool
    """Whether a ReLU follows."""

    @property
    def nonnegative(self) -> bool:
        """Whether its input comes out of a ReLU."""
        return behind_relu(self.name)


def behind_relu(name: str) -> bool:
    """Whether the layer ``name`` is one of an MLP, but not its first."""
    part, _, place = name.partition(".")
    return part in ("bottom", "top") and place != "0"


def layer_specs(config: ModelConfig, dense: int) -> list[LayerSpec]:
    """The dense layers of a model with ``dense`` dense columns, in the order in which they run."""
    specs: list[LayerSpec] = []

    def linear(name: str, weight: str, bias: str | None, relu: bool = False) -> None:
        specs.append(LayerSpec(name=name, weight=weight, bias=bias, relu=relu))

    def mlp(name: str, key: str, relu: bool = True) -> None:
        linear(name, f"{key}.weight", f"{key}.bias", relu)

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


class Scorer(nn.Module):
    """Logits from checked inputs; the order of operations is that of :class:`tightrec.models.dlrm.DLRM`.

    Args:
        config: shape of the model; ``dense_precision`` is not looked at, layers have types of their own.
        sparse: F.
        lookup: ids and offsets of F * B bags, feature-major, to pooled embeddings float32 [B, F * D].
        layers: by the names of :func:`layer_specs`; each maps float32 [B, in] to float32 [B, out], its ReLU
            included.
        extras: by the names of :func:`extra_keys`.
        device: where it computes.
    """

    constant: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        sparse: int,
        lookup: nn.Module,
        layers: Mapping[str, nn.Module],
        extras: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.dim, self.sparse = config.embedding_dim, sparse
        self.lookup = lookup
        # A ModuleList a part instead of one ModuleDict: its keys may not hold dots.
        self.names = list(layers)
        self.bottom = nn.ModuleList(layer for name, layer in layers.items() if name.startswith("bottom."))
        self.cross = nn.ModuleList(layer for name, layer in layers.items() if name.startswith("cross."))
        self.top = nn.ModuleList(layer for name, layer in layers.items() if name.startswith("top."))
        self.register_buffer(CONSTANT, extras[CONSTANT].to(device) if CONSTANT in extras else None)
        self.interaction = DotInteraction(1 + sparse, device) if config.architecture == "dlrm" else None

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor, tap: Tap | None = None) -> Tensor:
        """Logits float32 [B].

        Args:
            dense: float32 [B, dense columns].
            ids: int64 [sum of bag sizes], each in its table or the overflow row.
            offsets: int64 [F * B + 1]; bag f * B + b is feature f of row b.
            tap: called with every part's name, what a layer took in (None of other parts) and what came out.
        """
        pooled = self.lookup(ids, offsets)
        if tap:
            tap("tables", None, pooled)
        if self.constant is None:
            vector = _through(self.bottom, "bottom", dense, tap)
        else:
            vector = self.constant.expand(dense.shape[0], -1)
        both = torch.cat((vector, pooled), 1)
        mixed = self._crossed(both, tap) if self.interaction is None else self.interaction.mix(vector, both)
        if tap:
            tap("interaction", None, mixed)
        logits = _through(self.top, "top", mixed, tap).squeeze(1)
        if tap:
            tap("logits", None, logits)
        return logits

    def stages(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> list[tuple[str, Tensor]]:
        """What every part puts out, in order: ``tables`` [B, F * D], layers, ``interaction``, ``logits``."""
        found: list[tuple[str, Tensor]] = []
        self(dense, ids, offsets, lambda name, _, out: found.append((name, out)))
        return found

    def layer_inputs(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> list[tuple[str, Tensor]]:
        """What every layer takes in [B, in], by the layer's name, in order."""
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
