// Writes the payloads at their place: all but the strips of the entropy modes.
#include "encode_common.cuh"

namespace encode_write_ {

// Raw or 16-bit values of a tile.
template <class T>
DEVICE void write_values(const EncodeJob& job, const Block& b, u32 tile, u32 mode, u8* payload) {
    const u32 first = tile * TILE_VALUES, lane = lane_index();
    DirectWalk<T> walk = DirectWalk<T>::start(job, b, first + lane);
#pragma unroll 4
    for (u32 e = first + lane; e < first + TILE_VALUES; e += 32) {
        const bool there = e < b.values;
        const u32 bits = walk.next(there);
        if (there) {
            if (mode == MODE_RAW) {
                ((typename T::Bits*)payload)[e] = (typename T::Bits)bits;
            } else {
                const float x = T::to_float(bits);
                const u32 half = mode == MODE_FLOAT16 ? float_to_half_bits(x) : float_to_bfloat_bits(x);
                ((u16*)payload)[e] = (u16)half;
            }
        }
    }
    const bool two_bytes = mode != MODE_RAW || T::BYTES == 2;
    if (two_bytes && (b.values & 1u) && tile == b.tiles - 1 && lane == 0) ((u16*)payload)[b.values] = 0;
}

// A tile's entry and data, and the segment offset that stands before a segment's first tile.
DEVICE void write_tile(i64 slot_words, const Slots& slots, const Block& b, u32 tile, u32 tiles,
                       u32* payload) {
    const u32 lane = lane_index(), in_strip = tile % STRIP_TILES, first_in_strip = tile - in_strip;
    const u32 segments = (tiles + SEGMENT_TILES - 1) / SEGMENT_TILES;
    // Lanes 0 to 7 look at the strip's tiles, of which those before this one give its place.
    const u32 entry = lane <= in_strip ? slots.entries[b.first_tile + first_in_strip + lane] : 0u;
    const u32 before = slots.starts[b.first_strip + tile / STRIP_TILES];
    const u32 start = before + reduce_add(FULL_WARP, lane < in_strip ? entry & 0x7FFu : 0u);
    const u32 own = shuffle(FULL_WARP, entry, in_strip);
    if (lane == 0) {
        payload[segments - 1 + tile] = own;
        if (tile && tile % SEGMENT_TILES == 0) payload[tile / SEGMENT_TILES - 1] = start;
    }
    const u32 words = own & 0x7FFu, planes = own >> 17;
    const u32* from = slots.data + (b.first_tile + tile) * slot_words + (MAX_KIND_PLANES - planes);
    u32* to = payload + (i64)segments - 1 + tiles + start;
#pragma unroll 4
    for (u32 i = lane; i < words; i += 32) to[i] = from[i];
}

// The number of distinct rows, and a share of the index planes.
DEVICE void write_index(const EncodeJob& job, const Block& b, u32 distinct, u32 share, u32 shares,
                        u32* payload) {
    const u32 lane = lane_index(), planes = index_planes(distinct);
    if (share == 0 && lane == 0) payload[0] = distinct;
    for (u32 group = share; planes && group < (b.rows + 31) / 32; group += shares) {
        const u32 row = group * 32 + lane;
        const u32 index = row < b.rows ? job.row_index[b.first_row + row] : 0u;
        u32 word = 0;
        for (u32 j = 0; j < planes; ++j) {
            const u32 plane = ballot(FULL_WARP, index >> j & 1u);
            if (lane == j) word = plane;
        }
        if (lane < planes) payload[1 + (i64)group * planes + lane] = word;
    }
}

// The 256 code lengths, two to a byte.
DEVICE void write_book(const EncodeJob& job, i64 table, u8* payload) {
    const u8* lengths = job.book_lengths + table * SYMBOLS;
    for (u32 i = lane_index(); i < CODEBOOK_BYTES; i += 32) {
        payload[i] = (u8)(lengths[2 * i] | lengths[2 * i + 1] << 4);
    }
}

template <class T> DEVICE void write(const EncodeJob& job) {
    const i64 strip = blockIdx.x, block = find_block(job.blocks, job.block_count, COLUMN_FIRST_STRIP, strip);
    const Block b = load_block(job.blocks, block);
    const u32 mode = job.modes[block] & 255u, warp = warp_index();
    const u32 tile = (u32)(strip - b.first_strip) * STRIP_TILES + warp;
    u8* payload = job.out + job.payload_starts[block];
    if (mode <= MODE_BFLOAT16) {
        if (tile < b.tiles) write_values<T>(job, b, tile, mode, payload);
    } else {
        if (job.modes[block] & MODE_SENDS_BOOK) {
            if (tile == 0) write_book(job, block % job.tables, payload);
            payload += CODEBOOK_BYTES;
        }
        const bool dedup = mode == MODE_DEDUP || mode == MODE_DEDUP_ENTROPY;
        const u32 distinct = dedup ? job.distinct_count[block] : 0u;
        if (dedup) {
            write_index(job, b, distinct, tile, b.strips * STRIP_TILES, (u32*)payload);
            payload += index_bytes(b.rows, distinct);
        }
        const u32 tiles = dedup ? (distinct * b.dim + TILE_VALUES - 1) / TILE_VALUES : b.tiles;
        if (mode <= MODE_DEDUP && tile < tiles) {
            write_tile(job.slot_words, dedup ? job.distinct : job.packed, b, tile, tiles, (u32*)payload);
        }
    }
}

}  // namespace encode_write_

ENCODE_KERNELS(4, encode_write, encode_write_::write)
