// decode_strips: values of entropy-coded blocks.
//
// A warp, which is a thread block of its own, takes a strip of 32 chunks: each lane decodes one chunk, 32
// values at a time into shared memory, from where the warp writes them chunk by chunk in whole rows of 32.
// One warp a block lets blocks with little to do leave room for others, and needs no barriers.
#include "decode_common.cuh"

constexpr int STRIP_THREADS = 32;
constexpr int ROUND_VALUES = 32;
constexpr int TABLE_ENTRIES = 1 << MAX_CODE_LENGTH;
constexpr int STAGE_PITCH = ROUND_VALUES + 1;  // lanes that write side by side hit different banks

// A lane's place in the words of a strip's data; words past the payload's end read as zero.
struct BitReader {
    const u8* words;
    i64 next, end;  // word to load next, and where the payload ends
    u32 current, following, bit;
};

DEVICE u32 next_word(BitReader& r) {
    u32 word = r.next < r.end ? read_word(r.words + 4 * r.next) : 0;
    r.next += 1;
    return word;
}

DEVICE BitReader open_bits(const u8* words, i64 byte, i64 end) {
    BitReader r{words, byte / 4, end, 0, 0, 8 * (u32)(byte % 4)};
    r.current = next_word(r);
    r.following = next_word(r);
    return r;
}

DEVICE u32 peek_bits(const BitReader& r) { return __funnelshift_r(r.current, r.following, r.bit); }

DEVICE void skip_bits(BitReader& r, u32 count) {
    r.bit += count;
    if (r.bit >= 32) {
        r.bit -= 32;
        r.current = r.following;
        r.following = next_word(r);
    }
}

// Bits from the data's start to the reader's place.
DEVICE i64 bits_read(const BitReader& r) { return 32 * (r.next - 2) + r.bit; }

// Fills the table that the next 12 bits of a stream, the first one highest, look up: symbol | length << 8.
//
// Codes of a length follow one another in order of their symbols, and so do the ranges of the table that they
// fill. Lengths that are no complete code leave entries zero, or leave codes out.
DEVICE void fill_table(const u8* lengths, u16* sorted, u16* table) {
    u32 mine[8], lane = lane_index(), from = 0, filled = 0;
    UNROLL
    for (u32 i = 0; i < 8; ++i) mine[i] = lengths[32 * i + lane];
    for (u32 length = 1; length <= MAX_CODE_LENGTH; ++length) {
        u32 first = from, begin = filled;
        UNROLL
        for (u32 i = 0; i < 8; ++i) {
            u32 same = ballot(FULL_WARP, mine[i] == length);
            u32 place = from + (u32)__popc(same & lanes_below(lane));
            if (mine[i] == length) sorted[place] = (u16)((32 * i + lane) | length << 8);
            from += (u32)__popc(same);
        }
        warp_sync(FULL_WARP);
        u32 step = MAX_CODE_LENGTH - length;
        filled += (from - first) << step;
        for (u32 at = begin + lane; at < filled && at < TABLE_ENTRIES; at += 32) {
            table[at] = sorted[first + ((at - begin) >> step)];
        }
    }
    for (u32 at = filled + lane; at < TABLE_ENTRIES; at += 32) table[at] = 0;
    warp_sync(FULL_WARP);
}

// Where the lane's chunk lies, in bytes from the first strip's data, after checks of the strip's directory.
DEVICE u32 locate_chunk(const u8* coded, const Payload& p, u32 strip, i64& start, u32& size) {
    u32 chunks = (p.values + CHUNK_VALUES - 1) / CHUNK_VALUES;
    u32 strips = (chunks + STRIP_CHUNKS - 1) / STRIP_CHUNKS;
    u32 lane = lane_index(), entry = read_word(coded + 8 * (i64)strip + 4);
    const u8* data = coded + 8 * (i64)strips;
    i64 data_bytes = p.bytes - 8 * (i64)strips, offset = 4 * (i64)read_word(coded + 8 * (i64)strip);
    u32 planes = entry >> 16 & 15u;
    if (entry >> 20 || planes > MAX_SIZE_PLANES || offset + 4 * planes > data_bytes) return FAULT_DIRECTORY;
    u32 plane = lane < planes ? read_word(data + offset + 4 * lane) : 0;
    size = entry & 0xFFFFu;
    for (u32 j = 0; j < planes; ++j) size += (shuffle(FULL_WARP, plane, j) >> lane & 1u) << j;
    if (strip * STRIP_CHUNKS + lane >= chunks) size = 0;
    u32 until = warp_scan(size), total = shuffle(FULL_WARP, until, 31);
    start = offset + 4 * planes + until - size;
    // Each strip proves the offset of the next, the first one its own, so that together all are proved.
    i64 end = offset + 4 * planes + (total + 3) / 4 * 4;
    i64 expected = strip + 1 == strips ? data_bytes : 4 * (i64)read_word(coded + 8 * (i64)(strip + 1));
    bool good = end == expected && (strip || offset == 0);
    // No chunk's symbols use more than MAX_CHUNK_BYTES: a larger one is found when they have been read.
    return good ? FAULT_NONE : FAULT_DIRECTORY;
}

template <class T> DEVICE u32 decode_symbol(BitReader& r, const u16* table, float step) {
    u32 entry = table[__brev(peek_bits(r)) >> (32 - MAX_CODE_LENGTH)], code = entry & 255u;
    skip_bits(r, entry >> 8);
    if (code >= SYMBOL_ESCAPE_CODE) {
        u32 after = peek_bits(r);
        if (code == SYMBOL_ESCAPE_RAW) {
            skip_bits(r, 8 * T::BYTES);
            return T::BYTES == 4 ? after : after & 0xFFFFu;
        }
        skip_bits(r, ESCAPED_CODE_BITS);
        code = after & ((1u << ESCAPED_CODE_BITS) - 1);
    }
    return reconstruct<T>(code, step);
}

// Writes 32 values of each of the strip's chunks, the first one's being value `first` of the payload.
template <class T>
DEVICE void write_round(const u32* stage, const Payload& p, const Block& b, const DecodeScratch& s,
                        typename T::Bits* out, u32 first) {
    bool once = p.mode == MODE_DEDUP_ENTROPY;
    Stride by = Stride::of(CHUNK_VALUES, b.dim);
    // A block's values end below 2^31, so that the places past its end do not wrap.
    u32 value = first + lane_index(), row = value / b.dim, column = value % b.dim;
    UNROLL_BY(4)
    for (u32 chunk = 0; chunk < STRIP_CHUNKS; ++chunk) {
        if (value < p.values) {
            i64 at = b.offset + (i64)target_row(s, b, once, row) * b.stride + column;
            out[at] = (typename T::Bits)stage[chunk * STAGE_PITCH + lane_index()];
        }
        value += CHUNK_VALUES;
        advance(by, row, column);
    }
}

template <class T>
DEVICE void decode_strips(const u8* buffer, const i64* blocks, const u8* book_lengths, u8* scratch,
                          typename T::Bits* out, i64 peers, i64 tables, i64 slices, i64 rows) {
    SHARED(u16, table, TABLE_ENTRIES);
    SHARED(u16, sorted, SYMBOLS);
    SHARED(u32, stage, STRIP_CHUNKS * STAGE_PITCH);
    DecodeScratch s = decode_scratch(scratch, peers, tables, slices, rows);
    i64 block = find_block(blocks, s.blocks, COLUMN_FIRST_STRIP, blockIdx.x);
    Payload p = s.payloads[block];
    if (p.mode != MODE_ENTROPY && p.mode != MODE_DEDUP_ENTROPY) return;
    Block b = load_block(blocks, block);
    u32 strip = (u32)((i64)blockIdx.x - b.first_strip), first = strip * STRIP_VALUES, lane = lane_index();
    if (first >= p.values) return;

    u32 left = p.values - first, here = left < STRIP_VALUES ? left : STRIP_VALUES, size = 0;
    i64 start = 0;
    u32 fault = locate_chunk(buffer + p.data, p, strip, start, size);
    if (!fault && p.mode == MODE_DEDUP_ENTROPY && !owners_hold(s, b, first, here)) fault = FAULT_DISTINCT;
    if (fault) {
        if (lane == 0) report_fault(s, tables, block, fault);
        return;
    }
    fill_table(book_lengths + block * SYMBOLS, sorted, table);

    i64 directory = 8 * (i64)((p.values + STRIP_VALUES - 1) / STRIP_VALUES);
    BitReader r = open_bits(buffer + p.data + directory, start, (p.bytes - directory) / 4);
    u32 before = lane * CHUNK_VALUES, chunk = here <= before ? 0 : here - before;
    if (chunk > CHUNK_VALUES) chunk = CHUNK_VALUES;
    // The first chunk is never the shorter one.
    for (u32 round = 0; round < CHUNK_VALUES && round < here; round += ROUND_VALUES) {
        for (u32 k = 0; k < ROUND_VALUES && round + k < chunk; ++k) {
            stage[lane * STAGE_PITCH + k] = decode_symbol<T>(r, table, p.step);
        }
        warp_sync(FULL_WARP);
        write_round<T>(stage, p, b, s, out, first + round);
        warp_sync(FULL_WARP);
    }
    bool good = (bits_read(r) - 8 * start + 7) / 8 == (i64)size;
    if (ballot(FULL_WARP, !good) && lane == 0) report_fault(s, tables, block, FAULT_STREAM);
}

#define DECODE_STRIPS(name, T)                                                                              \
    KERNEL(STRIP_THREADS, 16)                                                                               \
    name(const u8* buffer, const i64* blocks, const u8* book_lengths, u8* scratch, T::Bits* out, i64 peers, \
         i64 tables, i64 slices, i64 rows) {                                                                \
        decode_strips<T>(buffer, blocks, book_lengths, scratch, out, peers, tables, slices, rows);          \
    }

DECODE_STRIPS(decode_strips_f32, Float32)
DECODE_STRIPS(decode_strips_f16, Float16)
DECODE_STRIPS(decode_strips_bf16, Bfloat16)
