// Lets g++ compile the CUDA sources: force-included before a .cu file (g++ -x c++ -include shim.h).
//
// Every CUDA thread is a fiber. A collective or a barrier parks the fiber until the threads that it names
// have arrived; whoever never arrives ends the launch with a message. Blocks, warps and lanes are resumed in
// a seeded random order, and atomics now and then give way to another thread.
#pragma once
#define TIGHTREC_SHIM 1

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DEVICE static inline
#define MEMBER static inline
#define KERNEL(threads, blocks) extern "C" void
// One array per thread block and place in the source; filled with garbage at first.
#define SHARED(type, name, count)                     \
    static char name##_key;                             \
    type* const name = static_cast<type*>(shim::shared_array(&name##_key, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(shim::dynamic_shared())

#pragma GCC diagnostic ignored "-Wunused-function"

namespace shim {
struct Index {
    unsigned x, y, z;
};
struct Place {
    Index thread, block, block_size, grid_size;
};
extern Place* place;  // of the thread that runs

enum class Op {
    Sync, Ballot, Any, All, Shuffle, Up, Down, Xor, Or, And, Add, Min, Max, SignedMin, SignedMax, Match
};

void* shared_array(const void* key, std::size_t bytes);
void* dynamic_shared();
// What the calling lane gets of a warp collective over the lanes of mask.
std::uint64_t collective(Op op, unsigned mask, std::uint64_t value, unsigned lane);
// Number of the block's threads that brought a true value.
unsigned barrier(bool value);
void give_way();

template <class V>
V shuffled(Op op, unsigned mask, V value, unsigned lane) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = collective(op, mask, bits, lane);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
}  // namespace shim

#define threadIdx (shim::place->thread)
#define blockIdx (shim::place->block)
#define blockDim (shim::place->block_size)
#define gridDim (shim::place->grid_size)
#define warpSize 32

inline void __syncthreads() { shim::barrier(false); }
inline int __syncthreads_count(int value) { return (int)shim::barrier(value != 0); }
inline int __syncthreads_or(int value) { return shim::barrier(value != 0) != 0; }
inline int __syncthreads_and(int value) { return shim::barrier(value == 0) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __syncwarp(unsigned mask = ~0u) { shim::collective(shim::Op::Sync, mask, 0, 0); }
inline unsigned __ballot_sync(unsigned mask, int value) {
    return (unsigned)shim::collective(shim::Op::Ballot, mask, value != 0, 0);
}
inline int __any_sync(unsigned mask, int value) {
    return (int)shim::collective(shim::Op::Any, mask, value != 0, 0);
}
inline int __all_sync(unsigned mask, int value) {
    return (int)shim::collective(shim::Op::All, mask, value != 0, 0);
}
template <class V>
V __shfl_sync(unsigned mask, V v, int lane) {
    return shim::shuffled(shim::Op::Shuffle, mask, v, lane);
}
template <class V>
V __shfl_up_sync(unsigned mask, V v, unsigned by) {
    return shim::shuffled(shim::Op::Up, mask, v, by);
}
template <class V>
V __shfl_down_sync(unsigned mask, V v, unsigned by) {
    return shim::shuffled(shim::Op::Down, mask, v, by);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V v, int by) {
    return shim::shuffled(shim::Op::Xor, mask, v, by);
}
template <class V> unsigned __match_any_sync(unsigned mask, V v) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &v, sizeof v);
    return (unsigned)shim::collective(shim::Op::Match, mask, bits, 0);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
    return (unsigned)shim::collective(shim::Op::Or, mask, v, 0);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) {
    return (unsigned)shim::collective(shim::Op::And, mask, v, 0);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
    return (unsigned)shim::collective(shim::Op::Add, mask, v, 0);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
    return (unsigned)shim::collective(shim::Op::Min, mask, v, 0);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
    return (unsigned)shim::collective(shim::Op::Max, mask, v, 0);
}
inline int __reduce_min_sync(unsigned mask, int v) {
    return (int)shim::collective(shim::Op::SignedMin, mask, (std::int64_t)v, 0);
}
inline int __reduce_max_sync(unsigned mask, int v) {
    return (int)shim::collective(shim::Op::SignedMax, mask, (std::int64_t)v, 0);
}

// Fibers of one system thread: plain operations are atomic, giving way first lets others in between.
template <class V> V atomicAdd(V* p, V v) { shim::give_way(); V old = *p; *p = old + v; return old; }
template <class V> V atomicOr(V* p, V v) { shim::give_way(); V old = *p; *p = old | v; return old; }
template <class V> V atomicAnd(V* p, V v) { shim::give_way(); V old = *p; *p = old & v; return old; }
template <class V> V atomicExch(V* p, V v) { shim::give_way(); V old = *p; *p = v; return old; }
template <class V> V atomicMin(V* p, V v) { shim::give_way(); V old = *p; if (v < old) *p = v; return old; }
template <class V> V atomicMax(V* p, V v) { shim::give_way(); V old = *p; if (v > old) *p = v; return old; }
template <class V> V atomicCAS(V* p, V expected, V v) {
    shim::give_way();
    V old = *p;
    if (old == expected) *p = v;
    return old;
}

inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int i) { return __uint_as_float((unsigned)i); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __double2float_rn(double a) { return (float)a; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
    return r;
}
// Byte i of the result is the byte of b:a that nibble i of the selector names.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) r |= (unsigned)(both >> 8 * (selector >> 4 * i & 7u) & 255u) << 8 * i;
    return r;
}
// As on the device, only the low five bits of the distance count.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (by & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((unsigned long long)high << 32 | low) << (by & 31u) >> 32);
}
