// What the decode kernels hand to one another, and how they read bytes that nobody vouches for.
//
// Chain: decode_check reads headers, codebooks and indices; decode_tiles and decode_strips write the values
// of packed and of coded blocks; decode_finish copies rows that were sent once, fills faulty blocks with NaN
// and writes the status. No kernel writes what another thread block of the same launch reads.
#pragma once

#include "common.cuh"

// Before a loop: g++, which compiles the sources in tests, does not know the pragma.
#ifdef TIGHTREC_SHIM
#define UNROLL
#define UNROLL_BY(times)
#else
#define UNROLL _Pragma("unroll")
#define UNROLL_TEXT(text) _Pragma(#text)
#define UNROLL_BY(times) UNROLL_TEXT(unroll times)
#endif

// kernels/format.py, same values; tests/unit/test_cuda_decode.py compares them.
enum Fault {
    FAULT_NONE, FAULT_TRUNCATED, FAULT_MAGIC, FAULT_VERSION, FAULT_DTYPE, FAULT_RESERVED, FAULT_BLOCKS,
    FAULT_FRAME_SIZE, FAULT_MODE, FAULT_ROWS, FAULT_DIM, FAULT_BOUND, FAULT_PAYLOAD_SIZE, FAULT_DIRECTORY,
    FAULT_GROUP_KIND, FAULT_MIXED_GROUP, FAULT_DISTINCT, FAULT_INDEX, FAULT_CODEBOOK, FAULT_CODEBOOK_MISSING,
    FAULT_STREAM, FAULT_PADDING, FAULT_CHECKSUM
};

constexpr i64 NO_FAULT = 0x7FFFFFFFFFFFFFFFll;

// Nothing of the block can be decoded: it is empty, or decode_check found it faulty.
constexpr u32 MODE_NOTHING = 7;

// Where a block's values lie in the buffer; written by decode_check for each block.
struct Payload {
    i64 data;    // bytes from the buffer's start to values (raw, half), segment offsets or strip entries
    i64 bytes;   // from there to the payload's end
    u32 mode;    // Mode, or MODE_NOTHING
    float step;  // twice the bound
    u32 values;  // that the payload holds: those of the distinct rows where rows are sent once
    u32 unused;
};

// The scratch of a call. Its content is not cleared: decode_check writes all that others read, but owners,
// which are proved by the index: row owner[d] must have index d.
struct DecodeScratch {
    Payload* payloads;  // [blocks]
    i64* peer_faults;   // [peers], status of a fault in the headers, or NO_FAULT
    i64* faults;        // [blocks][slices], status of a fault in a payload, or NO_FAULT
    u32* index;         // [rows], which distinct row of its block a row is
    u32* owner;         // [rows], a row that distinct row FIRST_ROW + d is written to, counted in its block
    i64 blocks, slices;
};

// decode.py's decode_scratch_bytes counts the same bytes.
DEVICE DecodeScratch decode_scratch(u8* base, i64 peers, i64 tables, i64 slices, i64 rows) {
    DecodeScratch s;
    s.blocks = peers * tables;
    s.slices = slices;
    s.payloads = (Payload*)base;
    s.peer_faults = (i64*)(s.payloads + s.blocks);
    s.faults = s.peer_faults + peers;
    s.index = (u32*)(s.faults + s.blocks * slices);
    s.owner = s.index + rows;
    return s;
}

DEVICE i64 fault_status(i64 peer, i64 table, u32 fault) { return peer << 40 | table << 8 | (i64)fault; }

// Notes a fault of a block's payload; one lane calls it.
DEVICE void report_fault(const DecodeScratch& s, i64 tables, i64 block, u32 fault) {
    i64 peer = block / tables;
    atomicMin(s.faults + block * s.slices, fault_status(peer, block - peer * tables, fault));
}

// A word at any address: frames may start anywhere.
DEVICE u32 read_word(const u8* p) { return ((u64)p & 3u) == 0 ? *(const u32*)p : load_word(p); }

// Which row of its block the block's decoded row `row` is written to.
DEVICE u32 target_row(const DecodeScratch& s, const Block& b, bool once, u32 row) {
    return once ? s.owner[b.first_row + row] : row;
}

// Whether each distinct row that the values [first, first + count) touch has an owner; for whole warps.
DEVICE bool owners_hold(const DecodeScratch& s, const Block& b, u32 first, u32 count) {
    u32 end = (first + count - 1) / b.dim;
    bool held = true;
    for (u32 row = first / b.dim + lane_index(); row <= end; row += 32) {
        u32 owner = s.owner[b.first_row + row];
        held = held && owner < b.rows && s.index[b.first_row + owner] == row;
    }
    return ballot(FULL_WARP, !held) == 0;
}

// Steps through rows and columns of a block by a fixed number of values.
struct Stride {
    u32 rows, columns, dim;

    MEMBER Stride of(u32 values, u32 dim) { return Stride{values / dim, values % dim, dim}; }
};

DEVICE void advance(const Stride& by, u32& row, u32& column) {
    row += by.rows;
    column += by.columns;
    if (column >= by.dim) {
        column -= by.dim;
        row += 1;
    }
}

// Four values side by side, stored or loaded at once.
template <int BYTES> struct Quad;
template <> struct alignas(16) Quad<4> {
    u32 bits[4];
};
template <> struct alignas(8) Quad<2> {
    u16 bits[4];
};

// Whether every fourth value of a block's rows may be accessed as a Quad.
template <class T> DEVICE bool quads_fit(const Block& b, const typename T::Bits* out) {
    u64 off = (u64)(b.offset | b.stride | (i64)b.dim) & 3u;
    return off == 0 && ((u64)out & (4 * sizeof(typename T::Bits) - 1)) == 0;
}
