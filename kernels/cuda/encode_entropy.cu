// The entropy coder: sizes and symbols of chunks (encode_chunks), then their bit streams (encode_stream).
//
// A warp takes a chunk of 256 values at a time, a value a lane; a thread block a strip of 32 chunks.
#include "encode_common.cuh"

namespace encode_entropy_ {

constexpr u32 WARP_CHUNKS = STRIP_CHUNKS / ENCODE_WARPS;
constexpr u32 MAX_STRIP_WORDS = MAX_SIZE_PLANES + STRIP_CHUNKS * MAX_CHUNK_BYTES / 4;

DEVICE u32 symbol_of(Sent sent) {
    if (!sent.kept) return SYMBOL_ESCAPE_RAW;
    return sent.code < SYMBOL_ESCAPE_CODE ? sent.code : SYMBOL_ESCAPE_CODE;
}

DEVICE u32 length_of(const u8* lengths, u32 symbol) {
    const u32 length = lengths[symbol];
    return length < MAX_CODE_LENGTH ? length : MAX_CODE_LENGTH;
}

// Bits of the code after an escape.
template <class T> DEVICE u32 escaped_bits(u32 symbol) {
    if (symbol == SYMBOL_ESCAPE_RAW) return 8u * T::BYTES;
    return symbol == SYMBOL_ESCAPE_CODE ? ESCAPED_CODE_BITS : 0u;
}

// What follows from the sizes of a strip's chunks.
struct StripSizes {
    u32 entry;   // second word of the strip entry
    u32 words;   // size of the strip
    u32 planes;  // number of size planes
    u32 plane;   // the lane's
    u32 start;   // where the lane's chunk starts, in bytes from the planes' end

    // Called with the size of the lane's chunk, and the number of chunks.
    MEMBER StripSizes of(u32 bytes, u32 chunks) {
        StripSizes s;
        const u32 lane = lane_index(), own = lane < chunks ? bytes : 0u, through = warp_scan(own);
        const u32 base = reduce_min(FULL_WARP, lane < chunks ? bytes : 0xFFFFu);
        const u32 above = lane < chunks ? bytes - base : 0u;
        s.planes = bit_length(reduce_or(FULL_WARP, above));
        s.plane = 0;
        for (u32 j = 0; j < s.planes; ++j) {
            const u32 word = ballot(FULL_WARP, above >> j & 1u);
            if (lane == j) s.plane = word;
        }
        s.entry = base | s.planes << 16;
        s.words = s.planes + (shuffle(FULL_WARP, through, 31) + 3) / 4;
        s.start = through - own;
        return s;
    }
};

// The rows that a block's coder takes: values in them, 0 where it takes none.
DEVICE u32 coded_values(const EncodeJob& job, i64 block, const Block& b, u32 chosen) {
    if (chosen == CHOSEN_DISTINCT) return job.distinct_count[block] * b.dim;
    return chosen == CHOSEN_PACKED ? b.values : 0u;
}

template <class T, class Walk>
DEVICE u32 chunk_size(Walk walk, u32 count, Steps steps, const u8* lengths, u32* counts) {
    u32 bits_used = 0;
#pragma unroll 4
    for (u32 e = lane_index(); e < CHUNK_VALUES; e += 32) {
        const bool there = e < count;
        const Sent sent = quantise<T>(walk.next(there), steps);
        if (there) {
            u32 symbol = symbol_of(sent);
            if (counts) atomicAdd(counts + symbol, 1u);
            if (!lengths[symbol]) symbol = SYMBOL_ESCAPE_CODE;
            bits_used += lengths[symbol] + escaped_bits<T>(symbol);
        }
    }
    return (reduce_add(FULL_WARP, bits_used) + 7) / 8;
}

template <class T> DEVICE void chunks(const EncodeJob& job) {
    SHARED(u8, lengths, SYMBOLS);
    SHARED(u32, counts, SYMBOLS);
    SHARED(u32, sizes, STRIP_CHUNKS);
    const i64 strip = blockIdx.x, block = find_block(job.blocks, job.block_count, COLUMN_FIRST_STRIP, strip);
    const i64 table = block % job.tables;
    const Block b = load_block(job.blocks, block);
    const u32 chosen = job.chosen[block], values_sent = coded_values(job, block, b, chosen);
    const u32 first = (u32)(strip - b.first_strip) * STRIP_VALUES;
    lengths[threadIdx.x] = (u8)length_of(job.book_lengths + table * SYMBOLS, threadIdx.x);
    counts[threadIdx.x] = 0;
    barrier();
    if (first < values_sent) {
        const Steps steps = steps_of(block_bound(job, block));
#pragma unroll 1
        for (u32 c = warp_index() * WARP_CHUNKS; c < (warp_index() + 1) * WARP_CHUNKS; ++c) {
            const u32 from = first + c * CHUNK_VALUES, e = from + lane_index();
            if (from < values_sent) {
                const u32 left = values_sent - from, count = left < CHUNK_VALUES ? left : CHUNK_VALUES;
                u32 bytes;
                u32* counted = job.histogram ? counts : nullptr;
                if (chosen == CHOSEN_PACKED) {
                    bytes = chunk_size<T>(DirectWalk<T>::start(job, b, e), count, steps, lengths, counted);
                } else {
                    bytes = chunk_size<T>(DistinctWalk<T>::start(job, b, e), count, steps, lengths, counted);
                }
                if (lane_index() == 0) sizes[c] = bytes;
            }
        }
    }
    barrier();
    if (first < values_sent) {
        if (warp_index() == 0) {
            const u32 left = values_sent - first, all = (left + CHUNK_VALUES - 1) / CHUNK_VALUES;
            const u32 present = all < STRIP_CHUNKS ? all : STRIP_CHUNKS, lane = lane_index();
            const u32 bytes = lane < present ? sizes[lane] : 0u;
            const StripSizes s = StripSizes::of(bytes, present);
            job.chunk_bytes[strip * STRIP_CHUNKS + lane] = (u16)bytes;
            if (lane == 0) job.coded_words[strip] = s.words;
        }
        const u32 number = counts[threadIdx.x];
        if (job.histogram && number) atomicAdd(job.histogram + table * SYMBOLS + threadIdx.x, (u64)number);
    }
}

// Codes as in DEFLATE, each symbol's by its thread: its bits in the order of sending, and its length << 16.
DEVICE u32 assigned_code(const u8* lengths, u32* warp_counts) {
    const u32 symbol = threadIdx.x, length = length_of(lengths, symbol), warp = warp_index();
    u32 below = 0;
    for (u32 l = 1; l <= MAX_CODE_LENGTH; ++l) {
        const u32 mask = ballot(FULL_WARP, length == l);
        if (length == l) below = (u32)__popc(mask & lanes_below(lane_index()));
        if (lane_index() == 0) warp_counts[warp * 16 + l] = (u32)__popc(mask);
    }
    barrier();
    u32 code = 0, first = 0;
    for (u32 l = 1; l <= MAX_CODE_LENGTH; ++l) {
        u32 all = 0;
        first <<= 1;
        for (u32 w = 0; w < ENCODE_WARPS; ++w) {
            if (l == length && w < warp) below += warp_counts[w * 16 + l];
            all += warp_counts[w * 16 + l];
        }
        if (l == length) code = first + below;
        first += all;
    }
    return length ? __brev(code) >> (32 - length) | length << 16 : 0u;
}

// Puts up to 64 bits at a bit position of zeroed words.
DEVICE void put_bits(u32* words, u32 position, u64 bits) {
    const u32 shift = position & 31u;
    u32* to = words + (position >> 5);
    const u64 low = bits << shift;
    const u32 top = shift ? (u32)(bits >> (64 - shift)) : 0u;
    if ((u32)low) atomicOr(to, (u32)low);
    if ((u32)(low >> 32)) atomicOr(to + 1, (u32)(low >> 32));
    if (top) atomicOr(to + 2, top);
}

template <class T, class Walk>
DEVICE void write_chunk(Walk walk, u32 count, Steps steps, const u32* codes, u32* words, u32 position) {
#pragma unroll 1
    for (u32 e = lane_index(); e < CHUNK_VALUES; e += 32) {
        const bool there = e < count;
        const Sent sent = quantise<T>(walk.next(there), steps);
        u32 symbol = symbol_of(sent);
        u32 code = codes[symbol];
        if (!code) {
            symbol = SYMBOL_ESCAPE_CODE;
            code = codes[symbol];
        }
        u32 after = symbol == SYMBOL_ESCAPE_CODE ? sent.code : 0u;
        if (symbol == SYMBOL_ESCAPE_RAW) after = sent.decoded;
        const u32 length = code >> 16, used = there ? length + escaped_bits<T>(symbol) : 0u;
        const u32 through = warp_scan(used);
        if (there) put_bits(words, position + through - used, (code & 0xFFFFu) | (u64)after << length);
        position += shuffle(FULL_WARP, through, 31);
    }
}

template <class T> DEVICE void stream(const EncodeJob& job) {
    SHARED(u32, words, MAX_STRIP_WORDS);
    SHARED(u32, codes, SYMBOLS);
    SHARED(u32, starts, STRIP_CHUNKS);
    const i64 strip = blockIdx.x, block = find_block(job.blocks, job.block_count, COLUMN_FIRST_STRIP, strip);
    const Block b = load_block(job.blocks, block);
    const u32 lane = lane_index(), mode = job.modes[block], in_block = (u32)(strip - b.first_strip);
    const u32 first = in_block * STRIP_VALUES, chosen = job.chosen[block];
    const u32 values_sent = coded_values(job, block, b, chosen);
    if ((mode & 255u) >= MODE_ENTROPY && first < values_sent) {
        // The counts of `assigned_code` lie where words will.
        codes[threadIdx.x] = assigned_code(job.book_lengths + (block % job.tables) * SYMBOLS, words);
        barrier();
        const u32 left = (values_sent - first + CHUNK_VALUES - 1) / CHUNK_VALUES;
        const u32 present = left < STRIP_CHUNKS ? left : STRIP_CHUNKS;
        u8* payload = job.out + job.payload_starts[block] + (mode & MODE_SENDS_BOOK ? CODEBOOK_BYTES : 0);
        if (chosen == CHOSEN_DISTINCT) payload += index_bytes(b.rows, job.distinct_count[block]);
        for (u32 i = threadIdx.x; i < job.coded_words[strip]; i += ENCODE_THREADS) words[i] = 0;
        barrier();
        if (warp_index() == 0) {
            const StripSizes s = StripSizes::of(job.chunk_bytes[strip * STRIP_CHUNKS + lane], present);
            if (lane < s.planes) words[lane] = s.plane;
            starts[lane] = 4 * s.planes + s.start;
            if (lane == 0) {
                ((u32*)payload)[2 * (i64)in_block] = job.coded_starts[strip];
                ((u32*)payload)[2 * (i64)in_block + 1] = s.entry;
            }
        }
        barrier();
        const Steps steps = steps_of(block_bound(job, block));
#pragma unroll 1
        for (u32 c = warp_index(); c < present; c += ENCODE_WARPS) {
            const u32 from = first + c * CHUNK_VALUES, e = from + lane;
            const u32 count = values_sent - from < CHUNK_VALUES ? values_sent - from : CHUNK_VALUES;
            const u32 bit = 8 * starts[c];
            if (chosen == CHOSEN_PACKED) {
                write_chunk<T>(DirectWalk<T>::start(job, b, e), count, steps, codes, words, bit);
            } else {
                write_chunk<T>(DistinctWalk<T>::start(job, b, e), count, steps, codes, words, bit);
            }
        }
        barrier();
        const u32 strips = (values_sent + STRIP_VALUES - 1) / STRIP_VALUES;
        u32* to = (u32*)payload + 2 * (i64)strips + job.coded_starts[strip];
        for (u32 i = threadIdx.x; i < job.coded_words[strip]; i += ENCODE_THREADS) to[i] = words[i];
    }
}

}  // namespace encode_entropy_

ENCODE_KERNELS(4, encode_chunks, encode_entropy_::chunks)
// A multiprocessor's shared memory holds four of these thread blocks from sm_90 on, three before, where
// registers allow two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define STREAM_BLOCKS 2
#else
#define STREAM_BLOCKS 4
#endif
ENCODE_KERNELS(STREAM_BLOCKS, encode_stream, encode_entropy_::stream)
