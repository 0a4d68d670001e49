// What the encode kernels share: their one parameter list, the scratch, and walks over a block's values.
//
// Chain (encode.py leaves out what no table needs): encode_stats, encode_bounds; encode_pack; encode_hash,
// encode_rank, encode_pack_rows; encode_choose, encode_chunks; encode_layout; encode_write, encode_stream.
// Thread block s of 256 threads takes strip s of 8,192 values, a warp one of its eight tiles.
#pragma once

#include "common.cuh"

enum Stage { STAGE_RELATIVE = 1, STAGE_HALF = 2, STAGE_PACKED = 4, STAGE_DEDUP = 8, STAGE_ENTROPY = 16 };

constexpr int ENCODE_THREADS = 256;
constexpr int ENCODE_WARPS = ENCODE_THREADS / 32;
constexpr int RANK_THREADS = 512;
constexpr u64 EMPTY_ENTRY = ~0ull;

// Rows that E counts over.
enum Chosen { CHOSEN_NONE, CHOSEN_PACKED, CHOSEN_DISTINCT };

// A block's entry in `modes`: its Mode, and whether its payload starts with the codebook.
constexpr u32 MODE_SENDS_BOOK = 256;

#define ENCODE_PARAMETERS                                                                                   \
    const void *values, const i64 *blocks, const float *bound, const u8 *bound_kind, const u8 *request,     \
        const u8 *book_lengths, const int *book_ids, int *book_sent, u64 *histogram, u8 *out, i64 *offsets, \
        i64 *sizes, u8 *scratch, i64 peers, i64 tables, i64 tiles, i64 strips, i64 rows, i64 stages, i64 dtype
#define ENCODE_ARGUMENTS                                                                                 \
    values, blocks, bound, bound_kind, request, book_lengths, book_ids, book_sent, histogram, out, offsets, \
        sizes, scratch, peers, tables, tiles, strips, rows, stages, dtype

#define ENCODE_KERNEL(min_blocks, name, ...)                \
    KERNEL(ENCODE_THREADS, min_blocks) name(ENCODE_PARAMETERS) { \
        __VA_ARGS__(encode_job(ENCODE_ARGUMENTS));          \
    }
// One kernel for each dtype, name_f32 and so on, that calls body<dtype>.
#define ENCODE_KERNELS(min_blocks, name, body)                                                              \
    ENCODE_KERNEL(min_blocks, name##_f32, body<Float32>)                                                    \
    ENCODE_KERNEL(min_blocks, name##_f16, body<Float16>)                                                    \
    ENCODE_KERNEL(min_blocks, name##_bf16, body<Bfloat16>)

// Packed tiles before their place is known.
struct Slots {
    u32* entries;  // [tiles], tile entries as in the frame
    u32* words;    // [strips], words of a strip's tiles
    u32* starts;   // [strips], words of the block's strips before
    u32* data;     // [tiles, slot_words], a tile's data ends its first MAX_KIND_PLANES words with the planes
};

struct EncodeJob {
    const void* values;
    const i64* blocks;
    const float* bound;
    const u8 *bound_kind, *request, *book_lengths;
    const int* book_ids;
    int* book_sent;
    u64* histogram;
    u8* out;
    i64 *offsets, *sizes;
    i64 peers, tables, tiles, strips, rows, stages, dtype, block_count, slot_words;

    u32* ticket;          // [1], thread blocks of encode_layout that are done
    i64* payload_bytes;   // [blocks]
    i64* payload_starts;  // [blocks], in `out`
    u32* modes;           // [blocks]
    float* bounds;        // [blocks]
    double* tile_sums;    // [tiles], of squares
    float *tile_lows, *tile_highs;
    u32* tile_counts;     // [tiles], finite values
    u32* strip_halves;    // [strips], bit 0 (1): float16 (bfloat16) does not keep the bound
    Slots packed, distinct;
    u64* row_table;       // [4 rows], open addressing, a block's part starts at 4 * FIRST_ROW
    u32* row_index;       // [rows], the row's entry in the table; after encode_rank its index
    u32* distinct_rows;   // [rows], the block's distinct rows in order
    u32* distinct_count;  // [blocks]
    u32* chosen;          // [blocks], Chosen
    u16* chunk_bytes;     // [strips, 32]
    u32 *coded_words, *coded_starts;  // [strips], as in Slots
};

// encode.py's encode_scratch_bytes counts the same bytes. Small arrays are there whether or not a stage uses
// them, so that each place is one product away: registers are what the kernels are short of.
DEVICE EncodeJob encode_job(ENCODE_PARAMETERS) {
    const i64 slot_words = dtype == Float32::DTYPE ? 1032 : 520;
    const i64 b = align_up(peers * tables, 8), t = align_up(tiles, 8), s = align_up(strips, 8);
    EncodeJob job = {values, blocks, bound, bound_kind, request, book_lengths, book_ids, book_sent,
                     histogram, out, offsets, sizes, peers, tables, tiles, strips, rows, stages, dtype,
                     peers * tables, slot_words};
    job.ticket = (u32*)scratch;
    u8* per_block = scratch + 16;
    job.payload_bytes = (i64*)per_block;
    job.payload_starts = (i64*)(per_block + 8 * b);
    job.modes = (u32*)(per_block + 16 * b);
    job.bounds = (float*)(per_block + 20 * b);
    job.distinct_count = (u32*)(per_block + 24 * b);
    job.chosen = (u32*)(per_block + 28 * b);
    u8* per_tile = per_block + 32 * b;
    job.tile_sums = (double*)per_tile;
    job.tile_lows = (float*)(per_tile + 8 * t);
    job.tile_highs = (float*)(per_tile + 12 * t);
    job.tile_counts = (u32*)(per_tile + 16 * t);
    job.packed.entries = (u32*)(per_tile + 20 * t);
    job.distinct.entries = (u32*)(per_tile + 24 * t);
    u8* per_strip = per_tile + 28 * t;
    job.strip_halves = (u32*)per_strip;
    job.packed.words = (u32*)(per_strip + 4 * s);
    job.packed.starts = (u32*)(per_strip + 8 * s);
    job.distinct.words = (u32*)(per_strip + 12 * s);
    job.distinct.starts = (u32*)(per_strip + 16 * s);
    job.coded_words = (u32*)(per_strip + 20 * s);
    job.coded_starts = (u32*)(per_strip + 24 * s);
    job.chunk_bytes = (u16*)(per_strip + 28 * s);
    job.packed.data = (u32*)(per_strip + 92 * s);
    job.distinct.data = job.packed.data + (stages & STAGE_PACKED ? tiles * slot_words : 0);
    job.row_table = (u64*)(job.distinct.data + (stages & STAGE_DEDUP ? tiles * slot_words : 0));
    job.row_index = (u32*)(job.row_table + 4 * rows);
    job.distinct_rows = job.row_index + rows;
    return job;
}

DEVICE bool needs_half(u32 request) { return request == REQUEST_HALF || request == REQUEST_AUTO; }
DEVICE bool needs_codes(u32 request) { return request == REQUEST_ENTROPY || request == REQUEST_AUTO; }
DEVICE bool needs_packed(u32 request) { return request == REQUEST_PACKED || needs_codes(request); }
DEVICE bool needs_rows(u32 request) { return request == REQUEST_DEDUP || needs_codes(request); }

DEVICE float clamp_bound(float bound) {
    // A NaN, of an overflowing product on both ends of a range, becomes the smallest bound.
    if (!(bound >= __uint_as_float(MIN_BOUND_BITS))) return __uint_as_float(MIN_BOUND_BITS);
    return bound > __uint_as_float(MAX_BOUND_BITS) ? __uint_as_float(MAX_BOUND_BITS) : bound;
}

DEVICE float block_bound(const EncodeJob& job, i64 block) {
    if (job.stages & STAGE_RELATIVE) return job.bounds[block];
    return clamp_bound(job.bound[block % job.tables]);
}

// Bits of one index plane set, for 1 to 2^31 - 1 distinct rows.
DEVICE u32 index_planes(u32 distinct) { return bit_length(distinct - 1u); }

// Bytes before the packed or coded payload of a block that sends its distinct rows.
DEVICE i64 index_bytes(u32 rows, u32 distinct) {
    return 4 * (1 + (i64)((rows + 31u) / 32u) * index_planes(distinct));
}

// The values of a block from value e on, a warp's width at a time: next() loads one where there is one.
template <class T> struct DirectWalk {
    const u8* at;
    i64 jump, wrap;  // bytes
    u32 column, jump_columns, dim;

    MEMBER DirectWalk start(const EncodeJob& job, const Block& b, u32 e) {
        const u32 row = e / b.dim, column = e - row * b.dim, jump_rows = 32u / b.dim;
        const u32 jump_columns = 32u - jump_rows * b.dim;
        const u8* at = (const u8*)job.values + (b.offset + (i64)row * b.stride + column) * T::BYTES;
        const i64 jump = ((i64)jump_rows * b.stride + jump_columns) * T::BYTES;
        return DirectWalk{at, jump, (b.stride - b.dim) * T::BYTES, column, jump_columns, b.dim};
    }
    __device__ __forceinline__ u32 next(bool there) {
        const u32 bits = there ? *(const typename T::Bits*)at : 0u;
        column += jump_columns;
        at += jump;
        if (column >= dim) {
            column -= dim;
            at += wrap;
        }
        return bits;
    }
};

// The same over the block's distinct rows, in their order.
template <class T> struct DistinctWalk {
    const typename T::Bits* values;
    const u32* rows;
    i64 stride;
    u32 row, column, jump_rows, jump_columns, dim;

    MEMBER DistinctWalk start(const EncodeJob& job, const Block& b, u32 e) {
        const u32 row = e / b.dim, jump_rows = 32u / b.dim;
        return DistinctWalk{(const typename T::Bits*)job.values + b.offset, job.distinct_rows + b.first_row,
                            b.stride, row, e - row * b.dim, jump_rows, 32u - jump_rows * b.dim, b.dim};
    }
    __device__ __forceinline__ u32 next(bool there) {
        const u32 bits = there ? values[(i64)rows[row] * stride + column] : 0u;
        row += jump_rows;
        column += jump_columns;
        if (column >= dim) {
            column -= dim;
            ++row;
        }
        return bits;
    }
};
