"""torchrec's own quantised collectives by name, and which of them can run where.

torchrec falls back silently (bf16 to fp16 on gloo, fp8 to fp16 in a reduce-scatter) or fails on an
assertion in the first step. Here a combination either runs as named or is refused before training.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from tightrec.sharding.config import CodecConfig, CodecName

_COMM_TYPES: dict[CodecName, CommType] = {
    "none": CommType.FP32,
    "fp16": CommType.FP16,
    "bf16": CommType.BF16,
    "int8": CommType.INT8,
    "fp8": CommType.FP8,
    "mx4": CommType.MX4,
}
_INT8_GROUP = 32
_MX4_GROUP = 32


def bytes_per_value(codec: CodecName, dim: int) -> float:
    """Wire bytes per float of a row of ``dim`` values, scales included.

    int8 carries 8 B a group of 32 values, fp8 8 B a row, mx4 one shared exponent a group of 32 (fbgemm's
    layouts). mx4 pads a rank's columns to whole groups, which is not counted.
    """
    return {
        "none": 4.0,
        "fp16": 2.0,
        "bf16": 2.0,
        "int8": (_INT8_GROUP + 8) / _INT8_GROUP,
        "fp8": ((dim + 3) // 4 * 4 + 8) / dim,
        "mx4": 0.5 + 1 / _MX4_GROUP,
    }[codec]


def refusal(codec: CodecName, direction: str, sharding_type: str, device_type: str) -> str | None:
    """Why torchrec cannot run ``codec`` in ``direction`` for this type of sharding; None if it can.

    Checked by running every combination on two gloo ranks (tests/multiprocess/test_codecs.py); the CUDA
    answers are read from torchrec's and fbgemm's source.
    """
    if codec == "none" or sharding_type == "data_parallel":
        return None
    row_split = "row_wise" in sharding_type or sharding_type == "grid_shard"
    if codec == "fp8" and device_type == "cpu":
        return "fbgemm has no fp8 quantiser on CPU"
    if row_split and codec in ("int8", "fp8", "mx4"):
        collective = "reduce-scatter" if direction == "forward" else "all-gather"
        return f"a row-sharded table's {direction} exchange is a {collective}, which carries no scales"
    return None


class Held(NamedTuple):
    """Columns of a table that a rank holds, whichever rows."""

    table: str
    sharding_type: str
    rank: int
    columns: int


def require_runnable(codec: CodecConfig, plan: Sequence[Held], batch_size: int, device: torch.device) -> None:
    """Check the codec against every table of a plan, before training.

    Raises:
        ValueError: naming codec, direction, table and sharding type, and what to use instead.
    """
    for direction in ("forward", "backward"):
        name: CodecName = getattr(codec, direction)
        for held in plan:
            why = refusal(name, direction, held.sharding_type, device.type)
            if why:
                raise ValueError(
                    f"codec.{direction}={name} cannot run with table {held.table} sharded "
                    f"{held.sharding_type} on {device.type}: {why}. Use codec.{direction}=none or fp16, or "
                    "shard it table_wise."
                )
        if name == "int8":
            _require_whole_groups(direction, plan, batch_size)


def _require_whole_groups(direction: str, plan: Sequence[Held], batch_size: int) -> None:
    """torchrec asserts that what int8 sends from one rank to another is whole groups of 32 values."""
    columns: Counter[tuple[str, int]] = Counter()
    for held in plan:
        if held.sharding_type != "data_parallel":
            columns[held.sharding_type, held.rank] += held.columns
    for (kind, rank), width in columns.items():
        if batch_size * width % _INT8_GROUP:
            raise ValueError(
                f"codec.{direction}=int8 quantises groups of {_INT8_GROUP} values, but the {kind} tables of "
                f"rank {rank} send {batch_size} rows of {width} columns, which do not fill whole groups. "
                f"Make data.loader.batch_size a multiple of {_INT8_GROUP}."
            )


def codec_registry(codec: CodecConfig, dim: int) -> dict[str, QuantizedCommCodecs] | None:
    """The sharder's ``qcomm_codecs_registry``; None where both directions are plain float32.

    Args:
        dim: embedding dim, the row over which fp8 shares a scale.
    """
    if codec.forward == codec.backward == "none":
        return None
    groups: dict[str, int] = {}
    if "fp8" in (codec.forward, codec.backward):
        groups |= {"fp8_quantize_dim": dim, "fp8_quantize_dim_bwd": dim}
    if "mx4" in (codec.forward, codec.backward):
        groups |= {"mx4_quantize_dim": _MX4_GROUP, "mx4_quantize_dim_bwd": _MX4_GROUP}
    config = QCommsConfig(
        forward_precision=_COMM_TYPES[codec.forward], backward_precision=_COMM_TYPES[codec.backward], **groups
    )
    return {
        op.name: get_qcomm_codecs(config)
        for op in (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER)
    }
