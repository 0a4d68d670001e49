// Device helpers that the encode and decode kernels share: docs/FORMAT.md in C++.
//
// The sources are compiled by NVRTC or nvcc for a GPU and, in tests, by g++ through tests/cuda/shim/shim.h,
// so they use no headers, no inline PTX, and warp operations only with explicit masks; no thread returns
// before a barrier. Kernel parameters are pointers and long long.
#pragma once

#ifndef TIGHTREC_SHIM
#define DEVICE static __device__ __forceinline__
#define MEMBER static __device__ __forceinline__
#define SHARED(type, name, count) __shared__ type name[count]
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define FULL_WARP 0xFFFFFFFFu

// kernels/format.py, same names; tests/unit/test_cuda_encode.py compares them.
constexpr u32 MAGIC = 0x43455254u;
constexpr u32 VERSION = 1;
constexpr int FRAME_HEADER_BYTES = 24;
constexpr int BLOCK_HEADER_BYTES = 24;
constexpr int FRAME_ALIGNMENT = 16;
constexpr u32 FRAME_FLAG_CHECKSUM = 1;
constexpr u32 BLOCK_FLAG_CODEBOOK = 1;
constexpr int MAX_DIM = 2048;
constexpr i64 MAX_BLOCK_VALUES = 2147483647;
constexpr u32 MIN_BOUND_BITS = 0x00800000u;  // 2^-126
constexpr u32 MAX_BOUND_BITS = 0x7E000000u;  // 2^125
constexpr float SAFE_CODE = 4194304.0f;
constexpr int MAX_CODE_PLANES = 24;
constexpr int GROUP_VALUES = 32;
constexpr int TILE_GROUPS = 32;
constexpr int TILE_VALUES = 1024;
constexpr int SEGMENT_TILES = 32;
constexpr u32 KIND_RAW = 25;
constexpr u32 KIND_MIXED = 24;
constexpr u32 MAX_KIND = 55;
constexpr int MAX_KIND_PLANES = 6;
constexpr int MAX_TILE_WORDS = 1030;
constexpr int CHUNK_VALUES = 256;
constexpr int STRIP_CHUNKS = 32;
constexpr int STRIP_VALUES = 8192;
constexpr int MAX_SIZE_PLANES = 11;
constexpr int MAX_CHUNK_BYTES = 1408;
constexpr int CODEBOOK_BYTES = 128;
constexpr int MAX_CODE_LENGTH = 12;
constexpr int SYMBOLS = 256;
constexpr u32 SYMBOL_ESCAPE_CODE = 254;
constexpr u32 SYMBOL_ESCAPE_RAW = 255;
constexpr int ESCAPED_CODE_BITS = 24;

// A strip of values is also eight tiles: a thread block of eight warps takes a strip, a warp a tile.
constexpr int STRIP_TILES = STRIP_VALUES / TILE_VALUES;
constexpr int SEGMENT_STRIPS = SEGMENT_TILES / STRIP_TILES;

enum Mode {
    MODE_RAW, MODE_FLOAT16, MODE_BFLOAT16, MODE_PACKED, MODE_DEDUP, MODE_ENTROPY, MODE_DEDUP_ENTROPY
};
enum Request {
    REQUEST_RAW, REQUEST_HALF, REQUEST_PACKED, REQUEST_DEDUP, REQUEST_ENTROPY, REQUEST_AUTO
};
enum BoundKind { BOUND_ABSOLUTE, BOUND_RANGE, BOUND_RMS };
enum Column {
    COLUMN_OFFSET, COLUMN_ROWS, COLUMN_STRIDE, COLUMN_DIM,
    COLUMN_FIRST_TILE, COLUMN_FIRST_STRIP, COLUMN_FIRST_ROW, COLUMN_FIRST_VALUE, COLUMNS
};

// Warps.

DEVICE u32 lane_index() { return threadIdx.x & 31u; }
DEVICE u32 warp_index() { return threadIdx.x >> 5; }
DEVICE u32 lanes_below(u32 lane) { return (1u << lane) - 1u; }
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_sync(u32 mask) { __syncwarp(mask); }
DEVICE u32 ballot(u32 mask, bool predicate) { return __ballot_sync(mask, predicate); }
DEVICE u32 reduce_or(u32 mask, u32 value) { return __reduce_or_sync(mask, value); }
DEVICE u32 reduce_add(u32 mask, u32 value) { return __reduce_add_sync(mask, value); }
DEVICE u32 reduce_min(u32 mask, u32 value) { return __reduce_min_sync(mask, value); }
DEVICE u32 reduce_max(u32 mask, u32 value) { return __reduce_max_sync(mask, value); }
template <class V>
DEVICE V shuffle(u32 mask, V value, u32 lane) {
    return __shfl_sync(mask, value, (int)lane);
}
template <class V>
DEVICE V shuffle_up(u32 mask, V value, u32 by) {
    return __shfl_up_sync(mask, value, by);
}
template <class V>
DEVICE V shuffle_down(u32 mask, V value, u32 by) {
    return __shfl_down_sync(mask, value, by);
}
template <class V>
DEVICE V shuffle_xor(u32 mask, V value, u32 by) {
    return __shfl_xor_sync(mask, value, (int)by);
}

// Inclusive prefix sum over the lanes of a whole warp.
template <class V> DEVICE V warp_scan(V value) {
    for (u32 by = 1; by < 32; by *= 2) {
        V other = shuffle_up(FULL_WARP, value, by);
        if (lane_index() >= by) value += other;
    }
    return value;
}

// Numbers.

DEVICE u32 bit_length(u32 number) { return 32u - (u32)__clz((int)number); }
DEVICE i64 div_up(i64 a, i64 b) { return (a + b - 1) / b; }
DEVICE i64 align_up(i64 a, i64 b) { return (a + b - 1) / b * b; }
DEVICE u32 load_word(const u8* p) { return p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24; }

DEVICE u32 float_to_half_bits(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, a = bits & 0x7FFFFFFFu;
    if (a >= 0x47800000u) return sign | (a > 0x7F800000u ? 0x7E00u : 0x7C00u);
    // Below the normal half numbers: adding 0.5 leaves a float32 with the last place of a denormal half.
    if (a < 0x38800000u) {
        return sign | (__float_as_uint(__fadd_rn(__uint_as_float(a), 0.5f)) - 0x3F000000u);
    }
    return sign | (a - 0x38000000u + 0xFFFu + (a >> 13 & 1u)) >> 13;
}

DEVICE float half_bits_to_float(u32 bits) {
    u32 sign = (bits & 0x8000u) << 16, a = bits & 0x7FFFu;
    if (a >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | (a & 0x3FFu) << 13);
    // The half's fields, read as a float32, are its value times 2^-112.
    float magnitude = __fmul_rn(__uint_as_float(a << 13), 5192296858534827628530496329220096.0f);
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

DEVICE u32 float_to_bfloat_bits(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
    return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

DEVICE float bfloat_bits_to_float(u32 bits) { return __uint_as_float(bits << 16); }

// The frame's dtypes: DTYPE is the header's field, Bits what a value is loaded and stored as.
struct Float32 {
    typedef u32 Bits;
    enum { DTYPE = 0, BYTES = 4, RAW_WORDS = 32, NAN_BITS = 0x7FC00000 };
    MEMBER float to_float(u32 bits) { return __uint_as_float(bits); }
    MEMBER u32 from_float(float x) { return __float_as_uint(x); }
};
struct Float16 {
    typedef u16 Bits;
    enum { DTYPE = 1, BYTES = 2, RAW_WORDS = 16, NAN_BITS = 0x7E00 };
    MEMBER float to_float(u32 bits) { return half_bits_to_float(bits); }
    MEMBER u32 from_float(float x) { return float_to_half_bits(x); }
};
struct Bfloat16 {
    typedef u16 Bits;
    enum { DTYPE = 2, BYTES = 2, RAW_WORDS = 16, NAN_BITS = 0x7FC0 };
    MEMBER float to_float(u32 bits) { return bfloat_bits_to_float(bits); }
    MEMBER u32 from_float(float x) { return float_to_bfloat_bits(x); }
};

// Quantiser (FORMAT.md, sections 3 and 5).

// Bits of the value that a code below 2^24 stands for; step is twice the bound.
template <class T> DEVICE u32 reconstruct(u32 code, float step) {
    int q = (int)(code >> 1) ^ -(int)(code & 1u);
    return T::from_float(__fmul_rn((float)q, step));
}

struct Steps {
    float bound, step, inverse;
};

DEVICE Steps steps_of(float bound) {
    float step = __fmul_rn(2.0f, bound);
    return Steps{bound, step, __fdiv_rn(1.0f, step)};
}

// What a value is sent as: a code and the bits it decodes to, or (not kept) its own bits and code 0.
struct Sent {
    bool kept;
    u32 code, decoded;
};

template <class T> DEVICE Sent quantise(u32 bits, Steps steps) {
    float x = T::to_float(bits);
    float scaled = __fmul_rn(x, steps.inverse);
    bool safe = fabsf(scaled) < SAFE_CODE;
    // Adding 1.5 * 2^23 rounds to an integer, half to even, wherever |scaled| < 2^22, and leaves it in the
    // low bits: conversions would run at a quarter of the speed.
    float shifted = __fadd_rn(scaled, 12582912.0f);
    int q = (int)(__float_as_uint(shifted) - 0x4B400000u);
    u32 decoded = T::from_float(__fmul_rn(__fsub_rn(shifted, 12582912.0f), steps.step));
    bool kept = safe && fabsf(__fsub_rn(x, T::to_float(decoded))) <= steps.bound;
    u32 code = ((u32)q << 1) ^ (u32)(q >> 31);
    return Sent{kept, kept ? code : 0u, kept ? decoded : bits};
}

// Blocks.

struct Block {
    i64 offset, stride, first_tile, first_strip, first_row;
    u32 rows, dim, values, tiles, strips;
};

DEVICE Block load_block(const i64* blocks, i64 index) {
    const i64* row = blocks + index * COLUMNS;
    Block b;
    b.offset = row[COLUMN_OFFSET];
    b.stride = row[COLUMN_STRIDE];
    b.first_tile = row[COLUMN_FIRST_TILE];
    b.first_strip = row[COLUMN_FIRST_STRIP];
    b.first_row = row[COLUMN_FIRST_ROW];
    b.rows = (u32)row[COLUMN_ROWS];
    b.dim = (u32)row[COLUMN_DIM];
    b.values = b.rows * b.dim;
    b.tiles = (b.values + TILE_VALUES - 1) / TILE_VALUES;
    b.strips = (b.values + STRIP_VALUES - 1) / STRIP_VALUES;
    return b;
}

// The block that holds tile, strip or row `position` (by its FIRST_ column); called by whole warps.
DEVICE i64 find_block(const i64* blocks, i64 count, Column column, i64 position) {
    i64 low = 0, high = count;
    while (high - low > 1) {
        i64 step = (high - low + 31) >> 5;
        i64 probe = low + (i64)lane_index() * step;
        bool before = probe < high && blocks[probe * COLUMNS + column] <= position;
        i64 last = (i64)__popc(ballot(FULL_WARP, before)) - 1;
        low += (last > 0 ? last : 0) * step;
        high = low + step < high ? low + step : high;
    }
    return low;
}
