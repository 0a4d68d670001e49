"""Constants of the frame format: docs/FORMAT.md in names, shared by every backend."""

from enum import IntEnum

import torch

MAGIC = 0x43455254  # "TREC" as a little-endian word
VERSION = 1
FRAME_HEADER_BYTES = 24
BLOCK_HEADER_BYTES = 24
FRAME_ALIGNMENT = 16
FRAME_FLAG_CHECKSUM = 1
BLOCK_FLAG_CODEBOOK = 1

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The frame's dtype field is an index into this."""

MAX_DIM = 2048
MAX_BLOCK_VALUES = 2**31 - 1
MIN_BOUND = 2.0**-126
MAX_BOUND = 2.0**125
SAFE_CODE = float(2**22)
"""A value whose |x / (2 * bound)| reaches this is sent as an exception."""
MAX_CODE_PLANES = 24

GROUP_VALUES = 32
TILE_GROUPS = 32
TILE_VALUES = GROUP_VALUES * TILE_GROUPS
SEGMENT_TILES = 32
KIND_RAW = 25
KIND_MIXED = 24
"""A mixed group of s words has kind KIND_MIXED + s."""
MAX_KIND = 55
MAX_KIND_PLANES = 6
MAX_TILE_WORDS = MAX_KIND_PLANES + TILE_GROUPS * GROUP_VALUES

CHUNK_VALUES = 256
STRIP_CHUNKS = 32
STRIP_VALUES = CHUNK_VALUES * STRIP_CHUNKS
MAX_SIZE_PLANES = 11
MAX_CHUNK_BYTES = 1408
CODEBOOK_BYTES = 128
MAX_CODE_LENGTH = 12
SYMBOLS = 256
SYMBOL_ESCAPE_CODE = 254
SYMBOL_ESCAPE_RAW = 255
ESCAPED_CODE_BITS = 24


class Mode(IntEnum):
    """How a block's payload is written (block header, byte 0)."""

    RAW = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    PACKED = 3
    DEDUP = 4
    ENTROPY = 5
    DEDUP_ENTROPY = 6


class Request(IntEnum):
    """What the caller asks of a table; the encoder picks each block's Mode from it."""

    RAW = 0
    HALF = 1
    PACKED = 2
    DEDUP = 3
    ENTROPY = 4
    AUTO = 5


class BoundKind(IntEnum):
    """What a table's bound is measured against."""

    ABSOLUTE = 0
    RANGE = 1
    RMS = 2


class Fault(IntEnum):
    """Why a frame was rejected."""

    NONE = 0
    TRUNCATED = 1
    MAGIC = 2
    VERSION = 3
    DTYPE = 4
    RESERVED = 5
    BLOCKS = 6
    FRAME_SIZE = 7
    MODE = 8
    ROWS = 9
    DIM = 10
    BOUND = 11
    PAYLOAD_SIZE = 12
    DIRECTORY = 13
    GROUP_KIND = 14
    MIXED_GROUP = 15
    DISTINCT = 16
    INDEX = 17
    CODEBOOK = 18
    CODEBOOK_MISSING = 19
    STREAM = 20
    PADDING = 21
    CHECKSUM = 22


class Column(IntEnum):
    """Columns of the block table, int64 [blocks + 1, 8]; blocks in order of peer, then table.

    The last row holds the totals of the FIRST_ columns.
    """

    OFFSET = 0  # of the block's first value, in elements of the values tensor
    ROWS = 1
    STRIDE = 2  # elements from one row to the next
    DIM = 3
    FIRST_TILE = 4  # tiles (1,024 values) of the blocks before
    FIRST_STRIP = 5  # strips (8,192 values) of the blocks before
    FIRST_ROW = 6  # rows of the blocks before
    FIRST_VALUE = 7  # values of the blocks before
