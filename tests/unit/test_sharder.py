"""What our sharder does not take is refused by name, before anything is sharded."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.types import ShardingEnv2D
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tightrec.sharding import compat
from tightrec.sharding.sharded import CompressedShardedEmbeddingBagCollection
from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder


class OwnCollection(EmbeddingBagCollection):
    pass


def tables(kind: type[EmbeddingBagCollection]) -> EmbeddingBagCollection:
    table = EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=4, embedding_dim=4)
    return kind(tables=[table], device=torch.device("meta"))


def test_sharding_over_two_dimensions_is_refused() -> None:
    env = ShardingEnv2D.__new__(ShardingEnv2D)
    with pytest.raises(ValueError, match=r"2D.*torchrec's sharder"):
        CompressedEmbeddingBagCollectionSharder().shard(tables(EmbeddingBagCollection), {}, env)


def test_other_collections_are_refused_by_their_name() -> None:
    with pytest.raises(ValueError, match=r"OwnCollection.*torchrec's sharder"):
        CompressedEmbeddingBagCollectionSharder().shard(tables(OwnCollection), {}, None)


def test_a_registry_of_torchrecs_codecs_is_refused_with_what_to_say_instead() -> None:
    with pytest.raises(ValueError, match=r"qcomm_codecs_registry.*codec=CodecConfig"):
        CompressedEmbeddingBagCollectionSharder(qcomm_codecs_registry={"x": None})


def test_an_unknown_torchrec_is_refused_with_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: "2.0.0")
    with pytest.raises(ValueError, match=r"torchrec 2\.0\.0 .*1\.8\.0"):
        CompressedEmbeddingBagCollectionSharder()


def test_half_precision_lookups_are_refused_with_what_to_say_instead() -> None:
    with pytest.raises(ValueError, match=r"output_dtype.*forward='fp16'"):
        CompressedEmbeddingBagCollectionSharder({"output_dtype": SparseType.FP16})


def test_moving_tables_in_a_running_job_is_refused() -> None:
    module = CompressedShardedEmbeddingBagCollection.__new__(CompressedShardedEmbeddingBagCollection)
    with pytest.raises(ValueError, match="checkpoint"):
        module.update_shards({}, None, None)
