"""The one line that a torchrec program changes."""

import atexit
import warnings
import weakref
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tightrec.sharding.codecs import codec_registry, require_own
from tightrec.sharding.compat import require_checked_torchrec, unsupported
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.sharded import CompressedShardedEmbeddingBagCollection

LOSSY = CodecConfig(forward="lossy", backward="lossy")
"""Error-bounded in both directions at the default bounds."""


class CompressedEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards EmbeddingBagCollections so that their pooled rows and gradients travel compressed.

    Stands in for torchrec's sharder; state-dict and optimizer keys stay the same, so checkpoints interchange
    with plain torchrec::

        DistributedModelParallel(model, sharders=[CompressedEmbeddingBagCollectionSharder()])

    With ``dedup=False`` and no ``lossy`` or ``auto`` direction the module is torchrec's own.

    Args:
        fused_params: as torchrec's.
        qcomm_codecs_registry: torchrec's own codecs; refused, ``codec`` says it.
        rest: further arguments of torchrec's sharder.
        codec: what travels; default: both directions error-bounded at the default bounds.
        more: further arguments of torchrec's sharder.

    Raises:
        ValueError: a torchrec release that this was not checked on, or a registry of codecs.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        *rest: Any,
        codec: CodecConfig = LOSSY,
        **more: Any,
    ) -> None:
        require_checked_torchrec()
        if qcomm_codecs_registry:
            raise ValueError(
                "CompressedEmbeddingBagCollectionSharder does not take qcomm_codecs_registry: say "
                "codec=CodecConfig(forward='int8', backward='fp16'), for example."
            )
        _refuse_half_outputs(fused_params or {})
        super().__init__(fused_params, None, *rest, **more)
        self.codec = codec
        self._used = False
        _watched.add(self)

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Shard ``module``; see torchrec.

        Raises:
            ValueError: the module or the environment is not supported; says which.
        """
        self._used = True
        why = unsupported(module, env)
        require_own(self.codec, device or torch.device("cpu"))
        if why:
            raise ValueError(
                f"CompressedEmbeddingBagCollectionSharder: {why}. Shard it with torchrec's sharder."
            )
        arguments: dict[str, Any] = {
            "module": module,
            "table_name_to_parameter_sharding": params,
            "env": env,
            "fused_params": self.fused_params,
            "device": device,
            "module_fqn": module_fqn,
        }
        if not self.codec.dedup and not self.codec.framed:
            dim = max(config.embedding_dim for config in module.embedding_bag_configs())
            registry = codec_registry(self.codec, dim)
            return ShardedEmbeddingBagCollection(qcomm_codecs_registry=registry, **arguments)
        return CompressedShardedEmbeddingBagCollection(self.codec, **arguments)

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        """See torchrec."""
        return CompressedShardedEmbeddingBagCollection


def _refuse_half_outputs(fused_params: dict[str, Any]) -> None:
    """The exchange takes float32 from the lookups; what travels is for ``codec`` to say."""
    wanted = fused_params.get("output_dtype")
    if wanted is not None and wanted != SparseType.FP32:
        raise ValueError(
            f"fused_params: output_dtype={wanted} is not supported by the compressed exchange, which takes "
            "float32. Leave it out, and say codec=CodecConfig(forward='fp16') for half the bytes."
        )


_watched: "weakref.WeakSet[CompressedEmbeddingBagCollectionSharder]" = weakref.WeakSet()


@atexit.register
def _warn_of_unused() -> None:
    """A sharder that never sharded was put before torchrec's in the list, where the last one counts."""
    for sharder in _watched:
        if not sharder._used:
            warnings.warn(
                "a CompressedEmbeddingBagCollectionSharder was made but never used, so nothing was "
                "compressed: of several sharders for one type torchrec takes the last in the list. Put it "
                "last, or give it alone.",
                stacklevel=1,
            )
