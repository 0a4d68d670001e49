"""The seam to torchrec: plans, collective codecs and exchange; knows ranks and tables, nothing of data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightrec.sharding.config import CodecConfig
    from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder

__all__ = ["CodecConfig", "CompressedEmbeddingBagCollectionSharder"]


def __getattr__(name: str) -> Any:
    """Import on first use: data workers need only a part of this package, not torchrec's distributed one."""
    if name == "CompressedEmbeddingBagCollectionSharder":
        from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder

        return CompressedEmbeddingBagCollectionSharder
    if name == "CodecConfig":
        from tightrec.sharding.config import CodecConfig

        return CodecConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
