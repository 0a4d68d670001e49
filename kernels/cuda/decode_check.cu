// decode_check: everything of a frame that has to be known before values can be decoded.
//
// A few thread blocks for each block of the table. Each checks all headers of its peer's frame, since a fault
// in any of them rejects the frame, then reads its own payload's head: codebook, number of distinct rows, and
// its share of the index of rows that are sent once.
#include "decode_common.cuh"

constexpr int CHECK_THREADS = 256;
constexpr int CHECK_WARPS = CHECK_THREADS / 32;

struct FrameView {
    const u8* bytes;
    i64 offset, size, dtype;
};

struct BlockHeader {
    u32 mode, flags, dim, rows, bound_bits, book;
    u64 size;
};

// What the block headers of a frame say together; each thread begins with its share.
struct HeaderSums {
    i64 before;  // bytes of the payloads before this block's
    i64 total;   // bytes of all payloads
    i64 worst;   // smallest status of a faulty header without the peer, or NO_FAULT
};

DEVICE BlockHeader read_block_header(const FrameView& frame, i64 table) {
    const u8* p = frame.bytes + FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * table;
    u32 word = read_word(p);
    BlockHeader h;
    h.mode = word & 0xFFu;
    h.flags = word >> 8 & 0xFFu;
    h.dim = word >> 16;
    h.rows = read_word(p + 4);
    h.bound_bits = read_word(p + 8);
    h.book = read_word(p + 12);
    h.size = (u64)read_word(p + 20) << 32 | read_word(p + 16);
    return h;
}

DEVICE bool is_coded(u32 mode) { return mode == MODE_ENTROPY || mode == MODE_DEDUP_ENTROPY; }
DEVICE bool is_once(u32 mode) { return mode == MODE_DEDUP || mode == MODE_DEDUP_ENTROPY; }

DEVICE u32 frame_fault(const FrameView& frame, i64 tables) {
    u32 fields = read_word(frame.bytes + 4), flags = fields >> 16 & 0xFFu;
    u64 size = (u64)read_word(frame.bytes + 20) << 32 | read_word(frame.bytes + 16);
    if (read_word(frame.bytes) != MAGIC) return FAULT_MAGIC;
    if ((fields & 0xFFu) != VERSION) return FAULT_VERSION;
    if ((fields >> 8 & 0xFFu) != (u32)frame.dtype) return FAULT_DTYPE;
    if ((flags & ~FRAME_FLAG_CHECKSUM) || fields >> 24) return FAULT_RESERVED;
    if (!(flags & FRAME_FLAG_CHECKSUM) && read_word(frame.bytes + 12)) return FAULT_RESERVED;
    if ((i64)read_word(frame.bytes + 8) != tables) return FAULT_BLOCKS;
    if (size != (u64)frame.size || size % FRAME_ALIGNMENT) return FAULT_FRAME_SIZE;
    return FAULT_NONE;
}

DEVICE u32 header_fault(const BlockHeader& h, const i64* place, i64 dtype) {
    bool half = h.mode == MODE_FLOAT16 || h.mode == MODE_BFLOAT16, coded = is_coded(h.mode);
    bool in_range = h.bound_bits >= MIN_BOUND_BITS && h.bound_bits <= MAX_BOUND_BITS;
    if (h.mode > MODE_DEDUP_ENTROPY || (half && dtype != Float32::DTYPE)) return FAULT_MODE;
    if ((h.flags & ~BLOCK_FLAG_CODEBOOK) || (h.flags && !coded)) return FAULT_RESERVED;
    if ((i64)h.dim != place[COLUMN_DIM]) return FAULT_DIM;
    if ((i64)h.rows != place[COLUMN_ROWS]) return FAULT_ROWS;
    // Shifted left, minus zero is zero.
    if (!in_range && (h.mode != MODE_RAW || h.bound_bits << 1)) return FAULT_BOUND;
    if ((h.book != 0) != coded) return FAULT_CODEBOOK;
    if (h.size % 4 || (h.rows == 0 && h.size)) return FAULT_PAYLOAD_SIZE;
    if (h.rows == 0 && h.mode != MODE_RAW) return FAULT_MODE;
    return FAULT_NONE;
}

DEVICE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// Sums over all threads, in all threads. `parts` holds CHECK_WARPS elements.
DEVICE HeaderSums combine(HeaderSums mine, HeaderSums* parts) {
    for (u32 by = 16; by; by /= 2) {
        mine.before += shuffle_xor(FULL_WARP, mine.before, by);
        mine.total += shuffle_xor(FULL_WARP, mine.total, by);
        mine.worst = smaller(mine.worst, shuffle_xor(FULL_WARP, mine.worst, by));
    }
    if (lane_index() == 0) parts[warp_index()] = mine;
    barrier();
    HeaderSums all = parts[0];
    for (int warp = 1; warp < CHECK_WARPS; ++warp) {
        all.before += parts[warp].before;
        all.total += parts[warp].total;
        all.worst = smaller(all.worst, parts[warp].worst);
    }
    return all;
}

// Whether the payloads and the padding after them fill the frame.
DEVICE u32 layout_fault(const FrameView& frame, i64 end) {
    if (end > frame.size) return FAULT_PAYLOAD_SIZE;
    if (frame.size - end >= FRAME_ALIGNMENT) return FAULT_FRAME_SIZE;
    for (i64 at = end; at < frame.size; ++at) {
        if (frame.bytes[at]) return FAULT_PADDING;
    }
    return FAULT_NONE;
}

// Whether 128 bytes are a codebook; kept in `lengths` if `keep`. Called by whole warps, which all agree.
DEVICE bool read_codebook(const u8* p, u8* lengths, bool keep) {
    u32 word = read_word(p + 4 * lane_index()), sum = 0;
    bool good = true;
    for (int i = 0; i < 8; ++i) {
        u32 length = word >> 4 * i & 15u, symbol = 8 * lane_index() + i;
        good = good && length <= MAX_CODE_LENGTH && (length || symbol < SYMBOL_ESCAPE_CODE);
        sum += length ? (1u << MAX_CODE_LENGTH) >> length : 0u;
    }
    good = reduce_add(FULL_WARP, sum) == 1u << MAX_CODE_LENGTH && ballot(FULL_WARP, !good) == 0;
    if (good && keep) {
        for (int i = 0; i < 8; ++i) lengths[8 * lane_index() + i] = (u8)(word >> 4 * i & 15u);
    }
    return good;
}

// Unpacks this thread block's share of the index; whether all of it is below `distinct`.
DEVICE bool read_index(const DecodeScratch& s, const Block& b, const u8* planes, u32 distinct, i64 slice) {
    u32 bits = distinct > 1 ? bit_length(distinct - 1) : 0, groups = (b.rows + 31) / 32, lane = lane_index();
    bool good = true;
    for (i64 group = slice * CHECK_WARPS + warp_index(); group < groups; group += s.slices * CHECK_WARPS) {
        u32 mine = lane < bits ? read_word(planes + 4 * (group * bits + lane)) : 0;
        u32 index = 0, row = (u32)group * 32 + lane;
        for (u32 j = 0; j < bits; ++j) index |= (shuffle(FULL_WARP, mine, j) >> lane & 1u) << j;
        if (row < b.rows) {
            s.index[b.first_row + row] = index;
            // Any row that shows the distinct row will do as its owner: the last to write stays.
            if (index < distinct) s.owner[b.first_row + index] = row;
            good = good && index < distinct;
        }
    }
    return good;
}

// Where a block's values lie, after what stands before them; `fault` where that cannot be right.
DEVICE Payload find_values(const BlockHeader& h, const Block& b, const FrameView& frame, i64 start,
                           const u8*& planes, u32& distinct, u32& fault) {
    i64 end = start + (i64)h.size, values = b.values, head = 0;
    if (is_coded(h.mode) && h.flags) start += CODEBOOK_BYTES;
    if (start > end) fault = FAULT_PAYLOAD_SIZE;
    if (!fault && is_once(h.mode)) {
        distinct = end - start < 4 ? 0 : read_word(frame.bytes + start);
        if (end - start < 4) {
            fault = FAULT_PAYLOAD_SIZE;
        } else if (distinct < 1 || distinct > b.rows) {
            fault = FAULT_DISTINCT;
        } else {
            planes = frame.bytes + start + 4;
            start += 4 + (i64)4 * ((b.rows + 31) / 32) * (distinct > 1 ? bit_length(distinct - 1) : 0);
            values = (i64)distinct * b.dim;
        }
    }
    if (h.mode == MODE_RAW || h.mode == MODE_FLOAT16 || h.mode == MODE_BFLOAT16) {
        bool narrow = h.mode != MODE_RAW || frame.dtype != Float32::DTYPE;
        if ((i64)h.size != align_up(values * (narrow ? 2 : 4), 4)) fault = FAULT_PAYLOAD_SIZE;
    } else if (is_coded(h.mode)) {
        head = 8 * div_up(values, STRIP_VALUES);
    } else {
        i64 tiles = div_up(values, TILE_VALUES);
        head = 4 * (div_up(tiles, SEGMENT_TILES) - 1 + tiles);
    }
    if (!fault && end - start < head) fault = FAULT_PAYLOAD_SIZE;
    float step = __fmul_rn(2.0f, __uint_as_float(h.bound_bits));
    return Payload{frame.offset + start, end - start, h.mode, step, (u32)values, 0};
}

// Reads the head of a block's payload, at `start` in a frame with good headers.
DEVICE void check_payload(const FrameView& frame, const Block& b, const DecodeScratch& s, i64 peer, i64 table,
                          i64 tables, i64 slice, i64 start, u8* book_lengths, int* book_ids, u32* wrong) {
    i64 block = peer * tables + table;
    BlockHeader h = read_block_header(frame, table);
    u32 fault = FAULT_NONE, distinct = 0;
    const u8* planes = nullptr;
    Payload payload = find_values(h, b, frame, start, planes, distinct, fault);
    bool first = slice == 0 && warp_index() == 0;
    if (is_coded(h.mode)) {
        if (!h.flags) {
            if ((u32)book_ids[block] != h.book) fault = FAULT_CODEBOOK_MISSING;
        } else if ((i64)h.size >= CODEBOOK_BYTES) {
            if (!read_codebook(frame.bytes + start, book_lengths + block * SYMBOLS, first)) {
                fault = FAULT_CODEBOOK;
            } else if (first && lane_index() == 0) {
                book_ids[block] = (int)h.book;
            }
        }
    }
    if (!fault && planes && !read_index(s, b, planes, distinct, slice)) *wrong = 1;
    barrier();
    if (!fault && *wrong) fault = FAULT_INDEX;
    if (threadIdx.x == 0) {
        s.faults[block * s.slices + slice] = fault ? fault_status(peer, table, fault) : NO_FAULT;
        if (fault || b.rows == 0) payload.mode = MODE_NOTHING;
        if (slice == 0) s.payloads[block] = payload;
    }
}

KERNEL(CHECK_THREADS, 1) decode_check(
    const u8* buffer, i64 buffer_bytes, const i64* offsets, const i64* sizes, const i64* blocks,
    u8* book_lengths, int* book_ids, u8* scratch, i64 peers, i64 tables, i64 slices, i64 rows, i64 dtype) {
    SHARED(HeaderSums, parts, CHECK_WARPS);
    SHARED(u32, wrong, 1);
    DecodeScratch s = decode_scratch(scratch, peers, tables, slices, rows);
    // A frame without tables has headers to check all the same.
    i64 unit = blockIdx.x, slice = unit % slices, columns = tables ? tables : 1;
    i64 peer = unit / slices / columns, table = unit / slices % columns;
    i64 offset = offsets[peer], size = sizes[peer], heads = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * tables;
    bool there = offset >= 0 && size >= heads && size <= buffer_bytes && offset <= buffer_bytes - size;
    FrameView frame{buffer + (there ? offset : 0), offset, size, dtype};

    if (threadIdx.x == 0) *wrong = 0;
    HeaderSums sums{0, 0, NO_FAULT};
    u32 fault = there ? frame_fault(frame, tables) : (u32)FAULT_TRUNCATED;
    if (fault) {
        sums.worst = fault_status(0, 0, fault);
    } else {
        for (i64 t = threadIdx.x; t < tables; t += CHECK_THREADS) {
            BlockHeader h = read_block_header(frame, t);
            u32 found = header_fault(h, blocks + (peer * tables + t) * COLUMNS, dtype);
            if (found) sums.worst = smaller(sums.worst, fault_status(0, t, found));
            // Cut to what is too much anyway, so that the sum cannot overflow.
            i64 bytes = h.size < (u64)size ? (i64)h.size : size;
            sums.total += bytes;
            sums.before += t < table ? bytes : 0;
        }
    }
    sums = combine(sums, parts);
    if (sums.worst == NO_FAULT) {
        fault = layout_fault(frame, heads + sums.total);
        if (fault) sums.worst = fault_status(0, 0, fault);
    }
    bool whole = sums.worst == NO_FAULT;
    if (threadIdx.x == 0 && table == 0 && slice == 0) {
        s.peer_faults[peer] = whole ? NO_FAULT : fault_status(peer, 0, 0) | sums.worst;
    }
    if (tables == 0) return;
    i64 block = peer * tables + table;
    if (whole) {
        Block b = load_block(blocks, block);
        i64 start = heads + sums.before;
        check_payload(frame, b, s, peer, table, tables, slice, start, book_lengths, book_ids, wrong);
    } else if (threadIdx.x == 0) {
        s.faults[block * slices + slice] = NO_FAULT;
        if (slice == 0) s.payloads[block].mode = MODE_NOTHING;
    }
}
