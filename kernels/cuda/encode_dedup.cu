// Finds rows that decode to identical bits: a hash table for each block, then ranks of the rows that own.
#include "encode_common.cuh"

namespace encode_dedup_ {

DEVICE u32 mix(u32 bits, u32 column) {
    bits = (bits + column * 0x9E3779B9u) * 0x85EBCA6Bu;
    bits = (bits ^ bits >> 15) * 0xC2B2AE35u;
    return bits ^ bits >> 16;
}

template <class T> DEVICE u32 row_hash(const typename T::Bits* row, u32 dim, Steps steps) {
    u32 hash = 0;
#pragma unroll 4
    for (u32 column = lane_index(); column < dim; column += 32) {
        hash += mix(quantise<T>(row[column], steps).decoded, column);
    }
    return reduce_add(FULL_WARP, hash);
}

template <class T>
DEVICE bool same_rows(const typename T::Bits* a, const typename T::Bits* b, u32 dim, Steps steps) {
    u32 different = 0;
#pragma unroll 4
    for (u32 column = lane_index(); column < dim; column += 32) {
        different |= quantise<T>(a[column], steps).decoded ^ quantise<T>(b[column], steps).decoded;
    }
    return reduce_or(FULL_WARP, different) == 0;
}

// A warp enters a row in its block's table. An entry is hash << 32 | row; it is never taken out, and only
// ever lowered to an equal row, so that equal rows end at one entry, which holds the lowest of them.
template <class T> DEVICE void hash(const EncodeJob& job) {
    const u32 lane = lane_index();
    const i64 position = (i64)blockIdx.x * ENCODE_WARPS + warp_index();
    if (position < job.rows) {
        const i64 block = find_block(job.blocks, job.block_count, COLUMN_FIRST_ROW, position);
        const Block b = load_block(job.blocks, block);
        if (needs_rows(job.request[block % job.tables])) {
            const u32 row = (u32)(position - b.first_row);
            const auto* first = (const typename T::Bits*)job.values + b.offset;
            const auto* own = first + (i64)row * b.stride;
            const Steps steps = steps_of(block_bound(job, block));
            const u32 code = row_hash<T>(own, b.dim, steps);
            const u64 entry = (u64)code << 32 | row;
            u64* table = job.row_table + 4 * b.first_row;
            // The largest power of two up to four times the rows.
            const u32 last = (u32)((2ull << bit_length(b.rows)) - 1);
            u32 slot = (code ^ code >> 15) * 0x2C1B3C6Du & last;
            for (bool searching = true; searching;) {
                u64 seen = EMPTY_ENTRY;
                if (lane == 0) {
                    seen = *(volatile u64*)(table + slot);
                    if (seen == EMPTY_ENTRY) seen = atomicCAS(table + slot, EMPTY_ENTRY, entry);
                }
                seen = shuffle(FULL_WARP, seen, 0);
                if (seen == EMPTY_ENTRY) {
                    searching = false;
                } else if ((u32)(seen >> 32) == code &&
                           same_rows<T>(own, first + (i64)(u32)seen * b.stride, b.dim, steps)) {
                    if (lane == 0 && entry < seen) atomicMin(table + slot, entry);
                    searching = false;
                } else {
                    slot = (slot + 1) & last;
                }
            }
            if (lane == 0) job.row_index[position] = slot;
        }
    }
}

// A thread block numbers the distinct rows of a block in the order of their first use.
DEVICE void rank(const EncodeJob& job) {
    SHARED(u32, owners, RANK_THREADS / 32);
    const i64 block = blockIdx.x;
    const Block b = load_block(job.blocks, block);
    if (b.rows && needs_rows(job.request[block % job.tables])) {
        const u64* table = job.row_table + 4 * b.first_row;
        u32* index = job.row_index + b.first_row;
        u32* distinct_rows = job.distinct_rows + b.first_row;
        u32 before = 0;
        for (u32 first = 0; first < b.rows; first += RANK_THREADS) {
            const u32 row = first + threadIdx.x;
            const bool there = row < b.rows;
            const u32 owner = there ? (u32)table[index[row]] : 0u;
            const bool own = there && owner == row;
            const u32 mask = ballot(FULL_WARP, own);
            if (lane_index() == 0) owners[warp_index()] = (u32)__popc(mask);
            barrier();
            u32 number = before + (u32)__popc(mask & lanes_below(lane_index()));
            for (u32 w = 0; w < RANK_THREADS / 32; ++w) {
                if (w < warp_index()) number += owners[w];
                before += owners[w];
            }
            if (own) {
                index[row] = number;
                distinct_rows[number] = row;
            }
            barrier();
            // The owner stands before the row: its entry has become its number.
            if (there && !own) index[row] = index[owner];
        }
        if (threadIdx.x == 0) job.distinct_count[block] = before;
    }
}

}  // namespace encode_dedup_

ENCODE_KERNELS(4, encode_hash, encode_dedup_::hash)

KERNEL(RANK_THREADS, 2) encode_rank(ENCODE_PARAMETERS) { encode_dedup_::rank(encode_job(ENCODE_ARGUMENTS)); }
