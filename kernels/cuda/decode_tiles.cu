// decode_tiles: values of the modes that are laid out in tiles (raw, float16, bfloat16, packed, dedup).
//
// A warp takes a tile of 1,024 values. It copies the tile's words to shared memory, then eight lanes decode a
// group of 32 values, four neighbours each, so that a warp writes four groups at a time in wide stores. Rows
// that are sent once are written to the row that owns them; decode_finish copies them to the others.
#include "decode_common.cuh"

constexpr int TILES_THREADS = 256;
constexpr int TILES_WARPS = TILES_THREADS / 32;
constexpr int STAGE_WORDS = 1032;  // MAX_TILE_WORDS, rounded up
constexpr u32 PASS_VALUES = 128;

// Where a group's parts stand among the tile's words.
struct Group {
    u32 places;  // bits 0-10 first code plane, 11-15 number of code planes, 16-26 first word of the own bits
    u32 mask;    // bit i: value i's own bits are sent
};

DEVICE Group group_of(u32 planes_at, u32 width, u32 own_at, u32 mask) {
    return Group{planes_at | width << 11 | own_at << 16, mask};
}

DEVICE void copy_words(const u8* from, u32* to, u32 words) {
    if (((u64)from & 3u) == 0) {
        const u32* source = (const u32*)from;
        UNROLL_BY(4)
        for (u32 i = lane_index(); i < words; i += 32) to[i] = source[i];
    } else {
        for (u32 i = lane_index(); i < words; i += 32) to[i] = load_word(from + 4 * i);
    }
    warp_sync(FULL_WARP);
}

// Spreads the low four bits of a word over the lowest bits of its four bytes.
DEVICE u32 spread(u32 word) { return (word & 15u) * 0x00204081u & 0x01010101u; }

// Code planes from to from + 3, of four values: their bits in the low or high half of each value's byte.
DEVICE u32 gather(const u32* planes, u32 width, u32 from, u32 shift) {
    u32 bytes = 0;
    UNROLL
    for (u32 j = 0; j < 4; ++j) {
        u32 word = from + j < width ? planes[from + j] : 0;
        bytes |= spread(word >> shift) << (from + j) % 8;
    }
    return bytes;
}

// Where a packed tile's data lies and how long it is; checks the directory around it.
DEVICE u32 locate_tile(const u8* data, const Payload& p, u32 tile, i64& start, u32& entry) {
    u32 tiles = (p.values + TILE_VALUES - 1) / TILE_VALUES, lane = lane_index();
    u32 segments = (tiles + SEGMENT_TILES - 1) / SEGMENT_TILES;
    u32 segment = tile / SEGMENT_TILES, mine = tile % SEGMENT_TILES, first = segment * SEGMENT_TILES;
    const u8* entries = data + 4 * (i64)(segments - 1);
    i64 data_words = p.bytes / 4 - (segments - 1) - tiles;
    u32 all = first + lane < tiles ? read_word(entries + 4 * (i64)(first + lane)) : 0;
    entry = shuffle(FULL_WARP, all, mine);
    start = reduce_add(FULL_WARP, lane < mine ? all & 0x7FFu : 0);
    if (segment) start += read_word(data + 4 * (i64)(segment - 1));
    i64 end = start + (entry & 0x7FFu);
    // Each segment's last tile proves the offset of the next, so that together all offsets are proved.
    bool last = tile + 1 == tiles;
    i64 expected = last ? data_words : end;
    if (!last && mine == SEGMENT_TILES - 1) expected = read_word(data + 4 * (i64)segment);
    bool good = end == expected && end <= data_words && (entry & 0x7FFu) <= MAX_TILE_WORDS;
    return good ? FAULT_NONE : FAULT_DIRECTORY;
}

// The lane's group of a packed tile whose words are in `stage`.
template <class T> DEVICE u32 read_kinds(const u32* stage, u32 entry, u32 count, Group& group) {
    u32 words = entry & 0x7FFu, base = entry >> 11 & 63u, planes = entry >> 17 & 7u, lane = lane_index();
    if (entry >> 20 || planes > MAX_KIND_PLANES) return FAULT_DIRECTORY;
    u32 kind = base;
    for (u32 j = 0; j < planes; ++j) kind += (stage[j] >> lane & 1u) << j;
    if (32 * lane >= count) kind = 0;
    u32 size = kind == KIND_RAW ? (u32)T::RAW_WORDS : kind > KIND_RAW ? kind - KIND_MIXED : kind;
    u32 end = planes + warp_scan(size), at = end - size;
    if (ballot(FULL_WARP, kind > MAX_KIND)) return FAULT_GROUP_KIND;
    if (shuffle(FULL_WARP, end, 31) != words) return FAULT_DIRECTORY;

    bool good = true;
    group = kind == KIND_RAW ? group_of(0, 0, at, FULL_WARP) : group_of(at, kind, 0, 0);
    if (kind > KIND_RAW) {
        u32 mask = stage[at], own_words = (u32)__popc(mask);
        if (T::BYTES == 2) own_words = (own_words + 1) / 2;
        u32 width = size - 1 - own_words;  // of too many exceptions a number far above the largest width
        good = mask != 0 && width <= MAX_CODE_PLANES;
        group = group_of(at + 1, width, at + 1 + width, mask);
    }
    return ballot(FULL_WARP, !good) ? FAULT_MIXED_GROUP : FAULT_NONE;
}

// The k-th of the values whose own bits stand from word `at` on.
template <class T> DEVICE u32 own_bits(const u32* stage, u32 at, u32 k, u32 mode) {
    if (T::BYTES == 4 && mode != MODE_FLOAT16 && mode != MODE_BFLOAT16) return stage[at + k];
    u32 bits = stage[at + k / 2] >> 16 * (k & 1u) & 0xFFFFu;
    if (T::BYTES == 2) return bits;
    return __float_as_uint(mode == MODE_FLOAT16 ? half_bits_to_float(bits) : bfloat_bits_to_float(bits));
}

// Bits of four neighbours of a group, the first at bit `shift` of its planes.
template <class T>
DEVICE void decode_four(const u32* stage, Group group, u32 shift, const Payload& p, u32 (&bits)[4]) {
    u32 width = group.places >> 11 & 31u;
    const u32* planes = stage + (group.places & 0x7FFu);
    u32 low = 0, middle = 0, high = 0;
    // Nearly all groups end here; written out so that no loop and no count is left.
    if (width > 0) low = gather(planes, width, 0, shift);
    if (width > 4) low |= gather(planes, width, 4, shift);
    if (width > 8) {
        middle = gather(planes, width, 8, shift);
        if (width > 12) middle |= gather(planes, width, 12, shift);
        if (width > 16) high = gather(planes, width, 16, shift);
        if (width > 20) high |= gather(planes, width, 20, shift);
    }
    UNROLL
    for (u32 k = 0; k < 4; ++k) {
        u32 code = low >> 8 * k & 255u;
        if (width > 8) code |= (middle >> 8 * k & 255u) << 8 | (high >> 8 * k & 255u) << 16;
        bits[k] = reconstruct<T>(code, p.step);
    }
    if (group.mask >> shift & 15u) {
        u32 at = group.places >> 16, rank = (u32)__popc(group.mask & lanes_below(shift));
        UNROLL
        for (u32 k = 0; k < 4; ++k) {
            if (group.mask >> (shift + k) & 1u) bits[k] = own_bits<T>(stage, at, rank++, p.mode);
        }
    }
}

// Decodes the tile in `stage`, `count` values from value `first` of the payload on.
template <class T>
DEVICE void write_tile(const u32* stage, Group mine, const Payload& p, const Block& b, const DecodeScratch& s,
                       typename T::Bits* out, u32 first, u32 count) {
    bool once = p.mode == MODE_DEDUP, wide = quads_fit<T>(b, out);
    Stride by = Stride::of(PASS_VALUES, b.dim);
    u32 row = (first + 4 * lane_index()) / b.dim, column = (first + 4 * lane_index()) % b.dim;
    for (u32 pass = 0; pass < count; pass += PASS_VALUES, advance(by, row, column)) {
        u32 source = (pass + 4 * lane_index()) / GROUP_VALUES, bits[4];
        Group group{shuffle(FULL_WARP, mine.places, source), shuffle(FULL_WARP, mine.mask, source)};
        decode_four<T>(stage, group, 4 * (lane_index() & 7u), p, bits);
        u32 left = count - pass, at = 4 * lane_index();
        if (at >= left) continue;
        typename T::Bits* target = out + b.offset + (i64)target_row(s, b, once, row) * b.stride + column;
        if (wide) {
            Quad<T::BYTES> quad;
            for (u32 k = 0; k < 4; ++k) quad.bits[k] = (typename T::Bits)bits[k];
            *(Quad<T::BYTES>*)target = quad;
            continue;
        }
        u32 at_row = row, at_column = column;
        UNROLL
        for (u32 k = 0; k < 4; ++k) {
            if (at + k < left) *target = (typename T::Bits)bits[k];
            target += 1;
            if (++at_column == b.dim && at + k + 1 < left) {
                at_column = 0;
                target = out + b.offset + (i64)target_row(s, b, once, ++at_row) * b.stride;
            }
        }
    }
}

template <class T>
DEVICE void decode_tiles(const u8* buffer, const i64* blocks, u8* scratch, typename T::Bits* out, i64 peers,
                         i64 tables, i64 slices, i64 rows, i64 tiles) {
    SHARED(u32, stages, TILES_WARPS * STAGE_WORDS);
    u32* stage = stages + warp_index() * STAGE_WORDS;
    i64 tile = (i64)blockIdx.x * TILES_WARPS + warp_index();
    if (tile >= tiles) return;
    DecodeScratch s = decode_scratch(scratch, peers, tables, slices, rows);
    i64 block = find_block(blocks, s.blocks, COLUMN_FIRST_TILE, tile);
    Block b = load_block(blocks, block);
    Payload p = s.payloads[block];
    u32 local = (u32)(tile - b.first_tile), first = local * TILE_VALUES;
    if (p.mode > MODE_DEDUP || first >= p.values) return;

    u32 count = p.values - first < TILE_VALUES ? p.values - first : TILE_VALUES, fault = FAULT_NONE;
    const u8* data = buffer + p.data;
    Group group{0, FULL_WARP};
    if (p.mode < MODE_PACKED) {
        u32 value_bytes = p.mode == MODE_RAW ? (u32)T::BYTES : 2u;
        copy_words(data + (i64)first * value_bytes, stage, (count * value_bytes + 3) / 4);
        group = group_of(0, 0, lane_index() * 8 * value_bytes, FULL_WARP);
    } else {
        i64 start = 0;
        u32 entry = 0, directory = (p.values + TILE_VALUES - 1) / TILE_VALUES;
        directory += (directory + SEGMENT_TILES - 1) / SEGMENT_TILES - 1;
        fault = locate_tile(data, p, local, start, entry);
        if (!fault) {
            copy_words(data + 4 * (directory + start), stage, entry & 0x7FFu);
            fault = read_kinds<T>(stage, entry, count, group);
        }
        if (!fault && p.mode == MODE_DEDUP && !owners_hold(s, b, first, count)) fault = FAULT_DISTINCT;
    }
    if (fault) {
        if (lane_index() == 0) report_fault(s, tables, block, fault);
        return;
    }
    write_tile<T>(stage, group, p, b, s, out, first, count);
}

#define DECODE_TILES(name, T)                                                                               \
    KERNEL(TILES_THREADS, 4)                                                                                \
    name(const u8* buffer, const i64* blocks, u8* scratch, T::Bits* out, i64 peers, i64 tables, i64 slices, \
         i64 rows, i64 tiles) {                                                                             \
        decode_tiles<T>(buffer, blocks, scratch, out, peers, tables, slices, rows, tiles);                  \
    }

DECODE_TILES(decode_tiles_f32, Float32)
DECODE_TILES(decode_tiles_f16, Float16)
DECODE_TILES(decode_tiles_bf16, Bfloat16)
