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
INT8_GROUP = 32
MX4_GROUP = 32


def bytes_per_value(codec: CodecName, dim: int) -> float:
    """Wire bytes per float of a row of ``dim`` values, scales included; of frames the most, which is plain.

    int8 carries 8 B a group of 32 values, fp8 8 B a row, mx4 one shared exponent a group of 32 (fbgemm's
    layouts). mx4 pads a rank's columns to whole groups, which is not counted.
    """
    return {
        "none": 4.0,
        "fp16": 2.0,
        "bf16": 2.0,
        "int8": (INT8_GROUP + 8) / INT8_GROUP,
        "fp8": ((dim + 3) // 4 * 4 + 8) / dim,
        "mx4": 0.5 + 1 / MX4_GROUP,
        "lossy": 4.0,
        "auto": 4.0,
    }[codec]


def refusal(codec: CodecName, direction: str, sharding_type: str, device_type: str) -> str | None:
    """Why torchrec's own collectives cannot run ``codec`` for this type of sharding; None if they can.

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
    if codec.dedup or codec.framed:
        require_own(codec, device)
        return
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


def require_own(codec: CodecConfig, device: torch.device) -> None:
    """Check what the project's own exchange cannot run; it takes every type of sharding.

    Raises:
        ValueError: naming the setting and what to use instead.
    """
    for direction in ("forward", "backward"):
        if getattr(codec, direction) == "fp8" and device.type == "cpu":
            raise ValueError(
                f"codec.{direction}=fp8 cannot run on cpu: fbgemm has no fp8 quantiser on CPU. Use "
                f"codec.{direction}=int8, which has about the same size."
            )
    if codec.checksums and device.type != "cpu":
        raise ValueError(
            f"codec.checksums=true works on CPU ranks, not on {device.type}: it would copy every frame to "
            "the host. Leave it out; NVLink and InfiniBand check what they carry."
        )


def _require_whole_groups(direction: str, plan: Sequence[Held], batch_size: int) -> None:
    """torchrec asserts that what int8 sends from one rank to another is whole groups of 32 values."""
    columns: Counter[tuple[str, int]] = Counter()
    for held in plan:
        if held.sharding_type != "data_parallel":
            columns[held.sharding_type, held.rank] += held.columns
    for (kind, rank), width in columns.items():
        if batch_size * width % INT8_GROUP:
            raise ValueError(
                f"codec.{direction}=int8 quantises groups of {INT8_GROUP} values, but the {kind} tables of "
                f"rank {rank} send {batch_size} rows of {width} columns, which do not fill whole groups. "
                f"Make data.loader.batch_size a multiple of {INT8_GROUP}."
            )


def codec_registry(codec: CodecConfig, dim: int) -> dict[str, QuantizedCommCodecs] | None:
    """The sharder's ``qcomm_codecs_registry``; None where both directions are plain float32.

    Args:
        dim: embedding dim, the row over which fp8 shares a scale.
    """
    if codec.forward == codec.backward == "none":
        return None
    return {
        op.name: quantisers(codec.forward, codec.backward, dim)
        for op in (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER)
    }


def quantisers(forward: CodecName, backward: CodecName, dim: int) -> QuantizedCommCodecs:
    """torchrec's quantisers of both directions, new objects at each call.

    Args:
        forward: format of the pooled embeddings.
        backward: format of their gradients.
        dim: values over which fp8 shares a scale.
    """
    groups: dict[str, int] = {}
    if "fp8" in (forward, backward):
        groups |= {"fp8_quantize_dim": dim, "fp8_quantize_dim_bwd": dim}
    if "mx4" in (forward, backward):
        groups |= {"mx4_quantize_dim": MX4_GROUP, "mx4_quantize_dim_bwd": MX4_GROUP}
    return get_qcomm_codecs(
        QCommsConfig(
            forward_precision=_COMM_TYPES[forward], backward_precision=_COMM_TYPES[backward], **groups
        )
    )
