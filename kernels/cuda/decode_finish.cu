// decode_finish: rows that were sent once are copied to where they are wanted, faulty blocks become NaN, and
// the status is told.
//
// Some thread blocks for each block of the table, most of which find nothing to do.
#include "decode_common.cuh"

constexpr int FINISH_THREADS = 256;
constexpr int FINISH_WARPS = FINISH_THREADS / 32;
constexpr u32 COPY_STEP = 128;  // values of a warp's wide access
constexpr u32 COPIES = 4;       // of which so many are loaded before the first is stored

DEVICE i64 least(i64 a, i64 b) { return a < b ? a : b; }

// The smallest fault of a block or of its peer's headers; the same in all lanes.
DEVICE i64 block_fault(const DecodeScratch& s, i64 tables, i64 block) {
    i64 fault = s.peer_faults[block / tables];
    for (i64 i = 0; i < s.slices; ++i) fault = least(fault, s.faults[block * s.slices + i]);
    return fault;
}

DEVICE void write_status(const DecodeScratch& s, i64 peers, i64* status, i64* parts) {
    i64 fault = NO_FAULT;
    for (i64 i = threadIdx.x; i < peers; i += FINISH_THREADS) fault = least(fault, s.peer_faults[i]);
    for (i64 i = threadIdx.x; i < s.blocks * s.slices; i += FINISH_THREADS) fault = least(fault, s.faults[i]);
    for (u32 by = 16; by; by /= 2) fault = least(fault, shuffle_xor(FULL_WARP, fault, by));
    if (lane_index() == 0) parts[warp_index()] = fault;
    barrier();
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < FINISH_WARPS; ++warp) fault = least(fault, parts[warp]);
        *status = fault == NO_FAULT ? 0 : fault;
    }
}

// Rows as a warp meets them, value by value or four at a time.
struct Rows {
    const u32* index;
    const u32* owner;
    i64 offset, stride;

    MEMBER Rows of(const DecodeScratch& s, const Block& b) {
        return Rows{s.index + b.first_row, s.owner + b.first_row, b.offset, b.stride};
    }
};

DEVICE u32 owner_of(const Rows& rows, u32 row) { return rows.owner[rows.index[row]]; }

// Copies what other rows of the block hold to this tile's; owners are left alone, so that none is read and
// written in one launch.
template <class T> DEVICE void copy_tile(const Rows& rows, const Block& b, typename T::Bits* out, u32 first) {
    typedef Quad<T::BYTES> Wide;
    bool wide = quads_fit<T>(b, out);
    u32 count = b.values - first < TILE_VALUES ? b.values - first : TILE_VALUES;
    u32 width = wide ? 4 : 1, lane = lane_index(), at = lane * width;
    u32 row = (first + at) / b.dim, column = (first + at) % b.dim;
    Stride by = Stride::of(32 * width, b.dim);
    if (!wide) {
        for (; at < count; at += 32, advance(by, row, column)) {
            u32 owner = owner_of(rows, row);
            i64 here = rows.offset + column;
            if (owner != row) out[here + (i64)row * rows.stride] = out[here + (i64)owner * rows.stride];
        }
        return;
    }
    for (; at < count; at += COPIES * COPY_STEP) {
        Wide held[COPIES];
        i64 to[COPIES];
        UNROLL
        for (u32 i = 0; i < COPIES; ++i, advance(by, row, column)) {
            to[i] = -1;
            if (at + i * COPY_STEP < count) {
                u32 owner = owner_of(rows, row);
                i64 here = rows.offset + column;
                if (owner != row) {
                    to[i] = here + (i64)row * rows.stride;
                    held[i] = *(const Wide*)(out + here + (i64)owner * rows.stride);
                }
            }
        }
        UNROLL
        for (u32 i = 0; i < COPIES; ++i) {
            if (to[i] >= 0) *(Wide*)(out + to[i]) = held[i];
        }
    }
}

template <class T> DEVICE void poison_tile(const Block& b, typename T::Bits* out, u32 first) {
    u32 count = b.values - first < TILE_VALUES ? b.values - first : TILE_VALUES, lane = lane_index();
    u32 row = (first + lane) / b.dim, column = (first + lane) % b.dim;
    Stride by = Stride::of(32, b.dim);
    for (u32 at = lane; at < count; at += 32, advance(by, row, column)) {
        out[b.offset + (i64)row * b.stride + column] = (typename T::Bits)T::NAN_BITS;
    }
}

template <class T>
DEVICE void decode_finish(const i64* blocks, u8* scratch, typename T::Bits* out, i64* status, i64 peers,
                          i64 tables, i64 slices, i64 rows, i64 shares) {
    SHARED(i64, parts, FINISH_WARPS);
    DecodeScratch s = decode_scratch(scratch, peers, tables, slices, rows);
    if (blockIdx.x == 0) write_status(s, peers, status, parts);
    i64 block = blockIdx.x / shares, share = blockIdx.x % shares;
    if (block >= s.blocks) return;
    bool faulty = block_fault(s, tables, block) != NO_FAULT;
    u32 mode = s.payloads[block].mode;
    if (!faulty && mode != MODE_DEDUP && mode != MODE_DEDUP_ENTROPY) return;
    Block b = load_block(blocks, block);
    for (i64 tile = share * FINISH_WARPS + warp_index(); tile < b.tiles; tile += shares * FINISH_WARPS) {
        if (faulty) {
            poison_tile<T>(b, out, (u32)tile * TILE_VALUES);
        } else {
            copy_tile<T>(Rows::of(s, b), b, out, (u32)tile * TILE_VALUES);
        }
    }
}

#define DECODE_FINISH(name, T)                                                                              \
    KERNEL(FINISH_THREADS, 4)                                                                               \
    name(const i64* blocks, u8* scratch, T::Bits* out, i64* status, i64 peers, i64 tables, i64 slices,      \
         i64 rows, i64 shares) {                                                                            \
        decode_finish<T>(blocks, scratch, out, status, peers, tables, slices, rows, shares);                \
    }

DECODE_FINISH(decode_finish_f32, Float32)
DECODE_FINISH(decode_finish_f16, Float16)
DECODE_FINISH(decode_finish_bf16, Bfloat16)
