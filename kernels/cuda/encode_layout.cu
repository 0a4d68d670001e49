// Picks each block's mode (FORMAT.md, section 5), places payloads and frames, and writes the headers.
#include "encode_common.cuh"

namespace encode_layout_ {

struct Choice {
    u32 chosen;
    i64 bytes;
};

// Sum of a block's strips, by a warp; `starts`, where given, gets the sums before each.
DEVICE u32 sum_strips(const u32* words, u32* starts, i64 first, u32 strips) {
    u32 total = 0;
    for (u32 at = 0; at < strips; at += 32) {
        const u32 strip = at + lane_index();
        const u32 own = strip < strips ? words[first + strip] : 0u, through = warp_scan(own);
        if (starts && strip < strips) starts[first + strip] = total + through - own;
        total += shuffle(FULL_WARP, through, 31);
    }
    return total;
}

DEVICE i64 packed_bytes(const Slots& slots, bool place, i64 first_strip, u32 values) {
    const u32 tiles = (values + TILE_VALUES - 1) / TILE_VALUES;
    const u32 strips = (values + STRIP_VALUES - 1) / STRIP_VALUES;
    const u32 words = sum_strips(slots.words, place ? slots.starts : nullptr, first_strip, strips);
    return 4 * ((i64)(tiles + SEGMENT_TILES - 1) / SEGMENT_TILES - 1 + tiles + words);
}

// The smaller of packed and dedup, of those that the table's request allows.
DEVICE Choice choose_rows(const EncodeJob& job, i64 block, const Block& b, u32 request, bool place) {
    Choice best = {CHOSEN_NONE, 0};
    if (needs_packed(request)) {
        best = {CHOSEN_PACKED, packed_bytes(job.packed, place, b.first_strip, b.values)};
    }
    if (needs_rows(request)) {
        const u32 distinct = job.distinct_count[block];
        const i64 bytes = index_bytes(b.rows, distinct) +
                          packed_bytes(job.distinct, place, b.first_strip, distinct * b.dim);
        if (best.chosen == CHOSEN_NONE || bytes < best.bytes) best = {CHOSEN_DISTINCT, bytes};
    }
    return best;
}

// A warp decides whose values a block's entropy coder takes.
DEVICE void choose(const EncodeJob& job) {
    const i64 block = (i64)blockIdx.x * ENCODE_WARPS + warp_index();
    if (block < job.block_count) {
        const Block b = load_block(job.blocks, block);
        const u32 request = job.request[block % job.tables];
        u32 chosen = CHOSEN_NONE;
        if (b.values && needs_codes(request)) chosen = choose_rows(job, block, b, request, false).chosen;
        if (lane_index() == 0) job.chosen[block] = chosen;
    }
}

// The 16-bit mode that keeps every value's bound, or MODE_RAW.
DEVICE u32 half_mode(const EncodeJob& job, const Block& b) {
    u32 broken = 0;
    for (u32 at = lane_index(); at < b.strips; at += 32) broken |= job.strip_halves[b.first_strip + at];
    broken = reduce_or(FULL_WARP, broken);
    return !(broken & 1u) ? MODE_FLOAT16 : !(broken & 2u) ? MODE_BFLOAT16 : MODE_RAW;
}

// A warp settles the mode and payload size of a block that holds values.
DEVICE void settle(const EncodeJob& job, i64 block, const Block& b) {
    const i64 table = block % job.tables, value_bytes = job.dtype == Float32::DTYPE ? 4 : 2;
    const i64 raw = align_up(b.values * value_bytes, 4);
    const u32 request = job.request[table];
    const Choice rows = choose_rows(job, block, b, request, true);
    u32 mode = MODE_RAW;
    i64 bytes = raw;
    if (rows.chosen != CHOSEN_NONE) {
        mode = rows.chosen == CHOSEN_PACKED ? MODE_PACKED : MODE_DEDUP;
        bytes = rows.bytes;
    }
    if (needs_codes(request) && (job.stages & STAGE_ENTROPY) && job.book_ids[table]) {
        const bool dedup = rows.chosen == CHOSEN_DISTINCT;
        const u32 distinct = dedup ? job.distinct_count[block] : 0u;
        const u32 strips = dedup ? (distinct * b.dim + STRIP_VALUES - 1) / STRIP_VALUES : b.strips;
        const i64 words = sum_strips(job.coded_words, job.coded_starts, b.first_strip, strips);
        const i64 coded = (dedup ? index_bytes(b.rows, distinct) : 0) + 8 * (i64)strips + 4 * words;
        const bool sends_book = job.book_sent[block] != job.book_ids[table];
        const i64 whole = coded + (sends_book ? CODEBOOK_BYTES : 0);
        if (coded < bytes && whole < raw) {
            mode = (dedup ? MODE_DEDUP_ENTROPY : MODE_ENTROPY) | (sends_book ? MODE_SENDS_BOOK : 0u);
            bytes = whole;
        }
    }
    if (job.dtype == Float32::DTYPE && needs_half(request)) {
        const u32 half = half_mode(job, b);
        const i64 half_bytes = align_up(2 * (i64)b.values, 4);
        // Compared without the codebook, which is paid once: or a book that is due would never be sent.
        const i64 each_time = bytes - (mode & MODE_SENDS_BOOK ? CODEBOOK_BYTES : 0);
        if (half != MODE_RAW && half_bytes < each_time) {
            mode = half;
            bytes = half_bytes;
        }
    }
    if (bytes >= raw) {
        mode = MODE_RAW;
        bytes = raw;
    }
    if (lane_index() == 0) {
        job.modes[block] = mode;
        job.payload_bytes[block] = bytes;
    }
}

// A warp places the payloads of a peer's frame, counted from the frame's start.
DEVICE void place_payloads(const EncodeJob& job, i64 peer) {
    i64 at = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * job.tables;
    for (i64 first = 0; first < job.tables; first += 32) {
        const i64 table = first + lane_index(), block = peer * job.tables + table;
        const i64 own = table < job.tables ? *(volatile i64*)(job.payload_bytes + block) : 0;
        const i64 through = warp_scan(own);
        if (table < job.tables) job.payload_starts[block] = at + through - own;
        at += shuffle(FULL_WARP, through, 31);
    }
    if (lane_index() == 0) job.sizes[peer] = align_up(at, FRAME_ALIGNMENT);
}

DEVICE void write_block_header(const EncodeJob& job, i64 block) {
    const i64 peer = block / job.tables, table = block % job.tables;
    const Block b = load_block(job.blocks, block);
    const u32 mode = *(volatile u32*)(job.modes + block);
    const bool sends_book = mode & MODE_SENDS_BOOK, coded = (mode & 255u) >= MODE_ENTROPY;
    const bool exact = !b.values || job.request[table] == REQUEST_RAW;
    const u32 bound = exact ? 0u : __float_as_uint(block_bound(job, block));
    const u32 book = coded ? (u32)job.book_ids[table] : 0u;
    u64* header = (u64*)(job.out + job.offsets[peer] + FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * table);
    const u32 flags = sends_book ? BLOCK_FLAG_CODEBOOK : 0u;
    header[0] = (mode & 255u) | flags << 8 | b.dim << 16 | (u64)b.rows << 32;
    header[1] = bound | (u64)book << 32;
    header[2] = (u64)*(volatile i64*)(job.payload_bytes + block);
    if (sends_book) job.book_sent[block] = (int)book;
    job.payload_starts[block] += job.offsets[peer];
}

DEVICE void write_frame(const EncodeJob& job, i64 peer) {
    const i64 size = job.sizes[peer];
    u64* header = (u64*)(job.out + job.offsets[peer]);
    header[0] = MAGIC | (u64)VERSION << 32 | (u64)job.dtype << 40;
    header[1] = (u64)job.tables;
    header[2] = (u64)size;
    // Payloads end at a multiple of 4, up to three words before the frame does.
    i64 used = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * job.tables;
    if (job.tables) {
        const i64 last = (peer + 1) * job.tables - 1;
        used = job.payload_starts[last] + *(volatile i64*)(job.payload_bytes + last) - job.offsets[peer];
    }
    for (i64 at = used; at < size; at += 4) *(u32*)(job.out + job.offsets[peer] + at) = 0;
}

// Thread blocks settle eight blocks each; the last one to end places them all.
DEVICE void layout(const EncodeJob& job) {
    SHARED(u32, last, 1);
    const i64 block = (i64)blockIdx.x * ENCODE_WARPS + warp_index();
    if (block < job.block_count) {
        const Block b = load_block(job.blocks, block);
        if (b.values) {
            settle(job, block, b);
        } else if (lane_index() == 0) {
            job.modes[block] = MODE_RAW;
            job.payload_bytes[block] = 0;
        }
    }
    __threadfence();
    barrier();
    if (threadIdx.x == 0) last[0] = atomicAdd(job.ticket, 1u) + 1 == gridDim.x;
    barrier();
    if (last[0]) {
        __threadfence();
        for (i64 peer = warp_index(); peer < job.peers; peer += ENCODE_WARPS) place_payloads(job, peer);
        barrier();
        if (warp_index() == 0) {
            i64 before = 0;
            for (i64 first = 0; first < job.peers; first += 32) {
                const i64 peer = first + lane_index();
                const i64 own = peer < job.peers ? job.sizes[peer] : 0, through = warp_scan(own);
                if (peer < job.peers) job.offsets[peer] = before + through - own;
                before += shuffle(FULL_WARP, through, 31);
            }
        }
        barrier();
        for (i64 i = threadIdx.x; i < job.block_count; i += ENCODE_THREADS) write_block_header(job, i);
        barrier();
        for (i64 peer = threadIdx.x; peer < job.peers; peer += ENCODE_THREADS) write_frame(job, peer);
    }
}

}  // namespace encode_layout_

ENCODE_KERNEL(2, encode_choose, encode_layout_::choose)
ENCODE_KERNEL(2, encode_layout, encode_layout_::layout)
