// Looks at all values first: bounds relative to a block, and whether 16-bit types keep the bound.
#include "encode_common.cuh"

namespace encode_bounds_ {

// The one order of sums: lanes are added as a tree; lane 0 has the result.
DEVICE double tree_sum(double value) {
    for (u32 by = 16; by > 0; by /= 2) value = __dadd_rn(value, shuffle_down(FULL_WARP, value, by));
    return value;
}

DEVICE float warp_low(float value) {
    for (u32 by = 16; by > 0; by /= 2) {
        float other = shuffle_xor(FULL_WARP, value, by);
        value = other < value ? other : value;
    }
    return value;
}

// Sum of squares, range and number of the finite values of each tile.
template <class T> DEVICE void stats(const EncodeJob& job) {
    const u32 lane = lane_index();
    const i64 strip = blockIdx.x, block = find_block(job.blocks, job.block_count, COLUMN_FIRST_STRIP, strip);
    const Block b = load_block(job.blocks, block);
    const u32 tile = (u32)(strip - b.first_strip) * STRIP_TILES + warp_index();
    if (tile < b.tiles && job.bound_kind[block % job.tables] != BOUND_ABSOLUTE) {
        const u32 first = tile * TILE_VALUES;
        DirectWalk<T> walk = DirectWalk<T>::start(job, b, first + lane);
        const float infinity = __uint_as_float(0x7F800000u);
        float low = infinity, high = -infinity;
        double sum = 0.0;
        u32 count = 0;
#pragma unroll 4
        for (u32 e = lane; e < TILE_VALUES; e += 32) {
            const bool there = e < b.values - first;
            const float x = T::to_float(walk.next(there));
            if (there && fabsf(x) < infinity) {
                sum = __dadd_rn(sum, __dmul_rn((double)x, (double)x));
                low = x < low ? x : low;
                high = x > high ? x : high;
                ++count;
            }
        }
        sum = tree_sum(sum);
        low = warp_low(low);
        high = -warp_low(-high);
        count = reduce_add(FULL_WARP, count);
        if (lane == 0) {
            job.tile_sums[b.first_tile + tile] = sum;
            job.tile_lows[b.first_tile + tile] = low;
            job.tile_highs[b.first_tile + tile] = high;
            job.tile_counts[b.first_tile + tile] = count;
        }
    }
}

DEVICE float resolved(float share, u32 kind, double sum, float low, float high, u32 count) {
    if (kind == BOUND_ABSOLUTE || count == 0) return kind == BOUND_ABSOLUTE ? share : 0.0f;
    if (kind == BOUND_RANGE) return __fsub_rn(__fmul_rn(share, high), __fmul_rn(share, low));
    return __fmul_rn(share, __double2float_rn(__dsqrt_rn(__ddiv_rn(sum, (double)count))));
}

// A warp finds the bound of a block.
DEVICE void bounds(const EncodeJob& job) {
    const u32 lane = lane_index();
    const i64 block = (i64)blockIdx.x * ENCODE_WARPS + warp_index();
    if (block < job.block_count) {
        const i64 table = block % job.tables;
        const u32 kind = job.bound_kind[table];
        const Block b = load_block(job.blocks, block);
        const float infinity = __uint_as_float(0x7F800000u);
        float low = infinity, high = -infinity;
        double sum = 0.0;
        u32 count = 0;
        for (u32 tile = lane; kind != BOUND_ABSOLUTE && tile < b.tiles; tile += 32) {
            const i64 at = b.first_tile + tile;
            sum = __dadd_rn(sum, job.tile_sums[at]);
            low = job.tile_lows[at] < low ? job.tile_lows[at] : low;
            high = job.tile_highs[at] > high ? job.tile_highs[at] : high;
            count += job.tile_counts[at];
        }
        sum = tree_sum(sum);
        low = warp_low(low);
        high = -warp_low(-high);
        count = reduce_add(FULL_WARP, count);
        if (lane == 0) {
            job.bounds[block] = clamp_bound(resolved(job.bound[table], kind, sum, low, high, count));
        }
    }
}

// Whether float16 and bfloat16 keep the bound of each value of a strip of float32.
DEVICE void halves(const EncodeJob& job) {
    SHARED(u32, parts, ENCODE_WARPS);
    const u32 lane = lane_index();
    const i64 strip = blockIdx.x, block = find_block(job.blocks, job.block_count, COLUMN_FIRST_STRIP, strip);
    const Block b = load_block(job.blocks, block);
    const u32 tile = (u32)(strip - b.first_strip) * STRIP_TILES + warp_index();
    u32 broken = 0;
    if (tile < b.tiles && needs_half(job.request[block % job.tables])) {
        const u32 first = tile * TILE_VALUES;
        const float bound = block_bound(job, block);
        DirectWalk<Float32> walk = DirectWalk<Float32>::start(job, b, first + lane);
#pragma unroll 4
        for (u32 e = lane; e < TILE_VALUES; e += 32) {
            const float x = __uint_as_float(walk.next(e < b.values - first));
            const float half = half_bits_to_float(float_to_half_bits(x));
            const float bfloat = bfloat_bits_to_float(float_to_bfloat_bits(x));
            broken |= fabsf(__fsub_rn(x, half)) <= bound || x == half ? 0u : 1u;
            broken |= fabsf(__fsub_rn(x, bfloat)) <= bound || x == bfloat ? 0u : 2u;
        }
        broken = reduce_or(FULL_WARP, broken);
    }
    if (lane == 0) parts[warp_index()] = broken;
    barrier();
    if (threadIdx.x == 0) {
        for (int w = 1; w < ENCODE_WARPS; ++w) broken |= parts[w];
        job.strip_halves[strip] = broken;
    }
}

}  // namespace encode_bounds_

ENCODE_KERNELS(4, encode_stats, encode_bounds_::stats)
ENCODE_KERNEL(4, encode_bounds, encode_bounds_::bounds)
ENCODE_KERNEL(4, encode_halves, encode_bounds_::halves)
