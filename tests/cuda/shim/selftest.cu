// Kernels that are right or wrong on purpose: what the shim must run, and what it must find.
#include "common.cuh"

// out[i] = sum over the block's values below i: scans within warps, then over warps.
KERNEL(256, 1) selftest_scan(const u32* values, u32* out) {
    SHARED(u32, totals, 8);
    u32 at = blockIdx.x * blockDim.x + threadIdx.x, value = values[at];
    u32 sum = warp_scan(value);
    if (lane_index() == 31) totals[warp_index()] = sum;
    barrier();
    for (u32 w = 0; w < warp_index(); ++w) sum += totals[w];
    out[at] = sum - value;
}

// Half a warp at a time: out[i] = ballot of the odd values among the 16 lanes of i's half.
KERNEL(256, 1) selftest_halves(const u32* values, u32* out) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (lane_index() < 16) {
        out[at] = ballot(0x0000FFFFu, values[at] & 1u);
    } else {
        out[at] = ballot(0xFFFF0000u, values[at] & 1u);
    }
}

// Adds up without an atomic across the blocks of a launch: right only if nothing interleaves.
KERNEL(256, 1) selftest_race(u32* total, u32* turns) {
    u32 seen = *total;
    atomicAdd(turns, 1u);
    *total = seen + 1;
}

KERNEL(256, 1) selftest_missing_lane(u32* out) {
    if (lane_index() != 7) out[0] = ballot(FULL_WARP, true);
}

KERNEL(256, 1) selftest_outside_mask(u32* out) { out[0] = ballot(0x0000FFFFu, true); }

KERNEL(256, 1) selftest_missing_thread(u32* out) {
    if (threadIdx.x) barrier();
    out[0] = 1;
}

KERNEL(256, 1) selftest_divergent_warps(u32* out) {
    if (lane_index() & 1u) {
        barrier();
    } else {
        out[0] = reduce_add(FULL_WARP, 1u);
    }
}

KERNEL(256, 1) selftest_past_the_end(u32* out, i64 count) { out[count] = 1; }

KERNEL(256, 1) selftest_past_shared(u32* out) {
    SHARED(u32, words, 8);
    words[threadIdx.x] = threadIdx.x;
    barrier();
    out[0] = words[0];
}

KERNEL(256, 1) selftest_wide_shift(u32* out, i64 by) { out[0] = (u32)(1 << by); }
