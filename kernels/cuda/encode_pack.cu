// Packs tiles into slots: of all rows (encode_pack) and of the distinct rows (encode_pack_rows).
#include "encode_common.cuh"

namespace encode_pack_ {

// Marks an exception in a code: no code reaches this bit.
constexpr u32 EXCEPTION = 0x80000000u;

// What the lanes do in the five steps of a 32 x 32 bit transpose.
struct Transpose {
    u32 halves, bytes, keep[3], turn[3];

    MEMBER Transpose of(u32 lane) {
        const u32 low[3] = {0x0F0F0F0Fu, 0x33333333u, 0x55555555u};
        Transpose t;
        t.halves = lane & 16u ? 0x3276u : 0x5410u;
        t.bytes = lane & 8u ? 0x3715u : 0x6240u;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            u32 by = 4u >> i;
            t.keep[i] = lane & by ? ~low[i] : low[i];
            t.turn[i] = lane & by ? 32u - by : by;
        }
        return t;
    }
    // Lane k gets bit k of every lane's word, lane i's at bit i.
    __device__ __forceinline__ u32 operator()(u32 word) const {
        word = __byte_perm(word, shuffle_xor(FULL_WARP, word, 16), halves);
        word = __byte_perm(word, shuffle_xor(FULL_WARP, word, 8), bytes);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            u32 other = shuffle_xor(FULL_WARP, word, 4u >> i);
            // The bits that a rotation carries around the end fall where `keep` is set.
            word = (word & keep[i]) | (__funnelshift_l(other, other, turn[i]) & ~keep[i]);
        }
        return word;
    }
};

// Writes one group's data; returns its kind and adds its words to `at`.
template <class T> DEVICE u32 pack_group(u32 bits, u32 code, const Transpose& transpose, u32* slot, u32& at) {
    const u32 lane = lane_index();
    // Rotated, a code stands above a bit that tells an exception: lane 0 gets the mask of exceptions, lane
    // j + 1 code plane j.
    code = __funnelshift_l(code, code, 1);
    u32 all = reduce_or(FULL_WARP, code);
    u32 width = bit_length(all >> 1);
    u32 word = transpose(code);
    u32* to = slot + at;
    if (!(all & 1u) && width < T::RAW_WORDS) {
        if (lane > 0 && lane <= width) to[lane - 1] = word;
        at += width;
        return width;
    }
    u32 mask = shuffle(FULL_WARP, word, 0), count = (u32)__popc(mask);
    u32 size = 1 + width + (T::BYTES == 4 ? count : (count + 1) / 2);
    if (mask && size < T::RAW_WORDS) {
        if (lane <= width) to[lane] = word;
        auto* own = (typename T::Bits*)(to + 1 + width);
        if (code & 1u) own[__popc(mask & lanes_below(lane))] = (typename T::Bits)bits;
        if (T::BYTES == 2 && (count & 1u) && lane == 0) own[count] = 0;
        at += size;
        return KIND_MIXED + size;
    }
    ((typename T::Bits*)to)[lane] = (typename T::Bits)bits;
    at += T::RAW_WORDS;
    return KIND_RAW;
}

// Four groups at once; returns their kinds, a byte each. A raw group holds what its values decode to, since a
// row may stand for others that decode to the same.
template <class T>
DEVICE u32 pack_four(const u32* bits, Steps steps, const Transpose& transpose, u32* slot, u32& at) {
    const u32 lane = lane_index();
    u32 code[4], decoded[4];
#pragma unroll
    for (int a = 0; a < 4; ++a) {
        Sent sent = quantise<T>(bits[a], steps);
        code[a] = sent.kept ? sent.code : EXCEPTION;
        decoded[a] = sent.decoded;
    }
    u32 all = reduce_or(FULL_WARP, code[0] | code[1] | code[2] | code[3]), kinds = 0;
    if (all < 256u) {
        // No exception and at most eight planes: a byte of a word for each group, one transpose for all.
        u32 codes = code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24;
        u32 used = reduce_or(FULL_WARP, codes);
        u32 plane = transpose(codes);
#pragma unroll
        for (int a = 0; a < 4; ++a) kinds |= bit_length(used >> 8 * a & 255u) << 8 * a;
        // Byte a of the product is the sum of the widths before a.
        u32 starts = kinds * 0x01010100u, shift = lane & 24u;
        u32 to = at + (starts >> shift & 255u) + (lane & 7u);
        if ((lane & 7u) < (kinds >> shift & 255u)) slot[to] = plane;
        at += (starts >> 24) + (kinds >> 24);
    } else {
#pragma unroll
        for (int a = 0; a < 4; ++a) kinds |= pack_group<T>(decoded[a], code[a], transpose, slot, at) << 8 * a;
    }
    return kinds;
}

// Packs up to 1,024 values into a slot; returns the tile entry.
template <class T, class Walk>
DEVICE u32 pack_tile(Walk walk, u32 count, Steps steps, u32* slot) {
    const u32 lane = lane_index();
    const Transpose transpose = Transpose::of(lane);
    u32 at = MAX_KIND_PLANES, kinds = 0;
#pragma unroll 1
    for (u32 first = 0; first < count; first += 256) {
        u32 bits[8];
#pragma unroll
        for (u32 g = 0; g < 8; ++g) bits[g] = walk.next(first + 32u * g + lane < count);
#pragma unroll
        for (u32 g = 0; g < 8; g += 4) {
            u32 four = pack_four<T>(bits + g, steps, transpose, slot, at);
            if (lane == first / 128u + g / 4u) kinds = four;
        }
    }
    const u32 groups = (count + 31u) / 32u;
    u32 kind = shuffle(FULL_WARP, kinds, lane >> 2) >> 8u * (lane & 3u) & 255u;
    u32 base = reduce_min(FULL_WARP, lane < groups ? kind : 255u);
    u32 above = lane < groups ? kind - base : 0u;
    u32 planes = bit_length(reduce_or(FULL_WARP, above));
    u32 plane = transpose(above);
    if (lane < planes) slot[MAX_KIND_PLANES - planes + lane] = plane;
    return (at - MAX_KIND_PLANES + planes) | base << 11 | planes << 17;
}

DEVICE u32 tile_values(u32 values, u32 tile) {
    u32 left = values - tile * TILE_VALUES;
    return left < TILE_VALUES ? left : TILE_VALUES;
}

// Packs one tile of a block into its slot; returns its words.
template <class T, class Walk>
DEVICE u32 fill_slot(const EncodeJob& job, i64 block, const Block& b, u32 tile, u32 values_sent,
                     const Slots& slots) {
    const i64 slot = b.first_tile + tile;
    const Walk walk = Walk::start(job, b, tile * TILE_VALUES + lane_index());
    const Steps steps = steps_of(block_bound(job, block));
    const u32 count = tile_values(values_sent, tile);
    const u32 entry = pack_tile<T>(walk, count, steps, slots.data + slot * job.slot_words);
    if (lane_index() == 0) slots.entries[slot] = entry;
    return entry & 0x7FFu;
}

// Thread 0 writes the sum of what the warps bring.
DEVICE void write_sum(u32 words, u32* to) {
    SHARED(u32, parts, ENCODE_WARPS);
    if (lane_index() == 0) parts[warp_index()] = words;
    barrier();
    if (threadIdx.x == 0) {
        u32 sum = 0;
        for (int w = 0; w < ENCODE_WARPS; ++w) sum += parts[w];
        *to = sum;
    }
}

template <class T> DEVICE void pack(const EncodeJob& job) {
    const i64 strip = blockIdx.x;
    if (strip == 0 && threadIdx.x == 0) *job.ticket = 0;
    if (job.stages & STAGE_DEDUP) {
        const i64 all = (i64)gridDim.x * ENCODE_THREADS;
        const i64 first = strip * ENCODE_THREADS + threadIdx.x;
        for (i64 i = first; i < 4 * job.rows; i += all) job.row_table[i] = EMPTY_ENTRY;
    }
    // The grid has a thread block even where there is no strip.
    if (strip < job.strips && (job.stages & STAGE_PACKED)) {
        const i64 block = find_block(job.blocks, job.block_count, COLUMN_FIRST_STRIP, strip);
        const Block b = load_block(job.blocks, block);
        const u32 tile = (u32)(strip - b.first_strip) * STRIP_TILES + warp_index();
        u32 words = 0;
        if (tile < b.tiles && needs_packed(job.request[block % job.tables])) {
            words = fill_slot<T, DirectWalk<T>>(job, block, b, tile, b.values, job.packed);
        }
        write_sum(words, job.packed.words + strip);
    }
}

template <class T> DEVICE void pack_rows(const EncodeJob& job) {
    const i64 strip = blockIdx.x, block = find_block(job.blocks, job.block_count, COLUMN_FIRST_STRIP, strip);
    const Block b = load_block(job.blocks, block);
    u32 words = 0;
    if (needs_rows(job.request[block % job.tables])) {
        const u32 values_sent = job.distinct_count[block] * b.dim;
        const u32 tile = (u32)(strip - b.first_strip) * STRIP_TILES + warp_index();
        if (tile < (values_sent + TILE_VALUES - 1) / TILE_VALUES) {
            words = fill_slot<T, DistinctWalk<T>>(job, block, b, tile, values_sent, job.distinct);
        }
    }
    write_sum(words, job.distinct.words + strip);
}

}  // namespace encode_pack_

ENCODE_KERNELS(4, encode_pack, encode_pack_::pack)
ENCODE_KERNELS(4, encode_pack_rows, encode_pack_::pack_rows)
