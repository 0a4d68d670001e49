"""The served model: a DLRM's arithmetic on low-precision tables and layers, without torchrec.

Legend: B rows, F sparse features, D embedding dim, N = F + 1 vectors a row (the first from the dense part).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tightrec.models.config import ModelConfig
from tightrec.models.interaction import DotInteraction, side_by_side

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


def layer_specs(config: ModelConfig, dense: int) -> list[LayerSpec]:
    """The dense layers of a model with ``dense`` dense columns, in the order in which they run."""
    specs = []

    def linear(name: str, key: str, relu: bool) -> None:
        specs.append(LayerSpec(name=name, weight=f"{key}.weight", bias=f"{key}.bias", relu=relu))

    if dense:
        for i in range(len(config.bottom_layers) + 1):
            linear(f"bottom.{i}", f"dense_arch.model._mlp.{i}._linear", True)
    if config.architecture == "dcnv2":
        for i in range(config.cross_layers):
            key = "inter_arch.crossnet"
            specs.append(LayerSpec(name=f"cross.{i}.v", weight=f"{key}.V_kernels.{i}", bias=None, relu=False))
            specs.append(
                LayerSpec(
                    name=f"cross.{i}.w",
                    weight=f"{key}.W_kernels.{i}",
                    bias=f"{key}.bias.{i}",
                    relu=False,
                )
            )
    for i in range(len(config.top_layers)):
        linear(f"top.{i}", f"over_arch.model.0._mlp.{i}._linear", True)
    linear(f"top.{len(config.top_layers)}", "over_arch.model.1", False)
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

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """Logits float32 [B].

        Args:
            dense: float32 [B, dense columns].
            ids: int64 [sum of bag sizes], each in its table or the overflow row.
            offsets: int64 [F * B + 1]; bag f * B + b is feature f of row b.
        """
        for _name, out in self.stages(dense, ids, offsets):
            last = out
        return last

    def stages(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What every part puts out, in order: ``tables`` [B, F * D], layers, ``interaction``, ``logits``."""
        for name, _, out in self._steps(dense, ids, offsets):
            yield name, out

    def layer_inputs(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What every layer takes in [B, in], by the layer's name, in order."""
        for name, taken, _ in self._steps(dense, ids, offsets):
            if taken is not None:
                yield name, taken

    def _steps(
        self, dense: Tensor, ids: Tensor, offsets: Tensor
    ) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        names = iter(self.names)
        pooled = self.lookup(ids, offsets)
        yield "tables", None, pooled
        if self.constant is not None:
            vector = self.constant.expand(dense.shape[0], -1)
        else:
            vector = dense
            for layer in self.bottom:
                taken, vector = vector, layer(vector)
                yield next(names), taken, vector
        columns = pooled.unflatten(1, (self.sparse, self.dim)).unbind(1)
        if self.interaction is not None:
            mixed = self.interaction(vector, columns)
        else:
            first = mixed = side_by_side(vector, columns)
            for v, w in zip(self.cross[::2], self.cross[1::2], strict=True):
                low = v(mixed)
                yield next(names), mixed, low
                # The bias is the layer's own here and added to the same sum in the trained model.
                high = w(low)
                yield next(names), low, high
                mixed = first * high + mixed
        yield "interaction", None, mixed
        for layer in self.top:
            taken, mixed = mixed, layer(mixed)
            yield next(names), taken, mixed
        yield "logits", None, mixed.squeeze(1)
