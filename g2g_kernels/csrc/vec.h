// One native vector of floats, whatever the instruction set; kernels are written once against this header and
// compiled several times. Arithmetic uses GCC's vector extensions; intrinsics do only what they cannot express.
#pragma once

#include <cstdint>
#include <utility>

#include "plan.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if !defined(G2G_ISA)
#error "compile with -DG2G_ISA=<namespace of this instruction set>"
#endif

namespace g2g::G2G_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int kVecs = kLanes / W;  // vectors of a block

// Whether there are products of bfloat16 factors; without them nothing is rounded.
#if defined(__AVX512BF16__)
constexpr bool kBf16 = true;
#else
constexpr bool kBf16 = false;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef float UnalignedVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t UnalignedIntVec __attribute__((vector_size(4 * W), aligned(4), may_alias));

// A number known to the compiler.
template <int V>
struct Constant {
    static constexpr int value = V;
    constexpr operator int() const { return V; }
};

#define G2G_INLINE inline __attribute__((always_inline))

template <int... I, class F>
G2G_INLINE void unrolled(std::integer_sequence<int, I...>, const F& f) {
    (f(Constant<I>{}), ...);
}

// f(Constant<0>{}), …, f(Constant<N − 1>{}): a loop whose arrays, indexed by constants, stay in registers.
template <int N, class F>
G2G_INLINE void unrolled(const F& f) {
    unrolled(std::make_integer_sequence<int, N>{}, f);
}

// f(v) for the vectors of a block: unrolled where there are so few that registers hold what f keeps of them all.
template <class F>
G2G_INLINE void each_vec(const F& f) {
    if constexpr (kVecs <= 4)
        unrolled<kVecs>(f);
    else
        for (int v = 0; v < kVecs; ++v) f(v);
}

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Stores past the caches if p is aligned: a line that is written whole need not be read first. For results too large to
// be still in a cache when they are read; stream_fence() before another thread may read them.
inline void stream(float* p, Vec v) {
#if defined(__SSE2__)
    if (__builtin_expect(reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0, 1)) {
#if defined(__AVX512F__)
        return _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
        return _mm256_stream_ps(p, v);
#else
        return _mm_stream_ps(p, v);
#endif
    }
#endif
    store(p, v);
}

inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

inline Vec all(float x) { return x - Vec{}; }

// a·b + c rounded once where the machine can. Plain a * b + c is never contracted (-ffp-contract=off), so that
// membranes equal PyTorch's to the last bit.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// Bit i is set where a[i] > b[i].
inline uint64_t greater_bits(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps(a, b)));
#else
    const IntVec mask = a > b;
    uint64_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint64_t>(mask[i] & 1) << i;
    return bits;
#endif
}

// Bit i is set where x[i] is not 0.
inline uint64_t nonzero_bits(Vec x) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(x, Vec{}, _CMP_NEQ_UQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, Vec{}, _CMP_NEQ_UQ)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpneq_ps(x, Vec{})));
#else
    const IntVec mask = x != Vec{};
    uint64_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint64_t>(mask[i] & 1) << i;
    return bits;
#endif
}

// x[i] = p[index[i]].
inline Vec gather(const float* p, const int32_t* index) {
#if defined(__AVX512F__)
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
#else
    Vec x;
    for (int i = 0; i < W; ++i) x[i] = p[index[i]];
    return x;
#endif
}

// Stores the lanes of x selected by `bits` contiguously; may write up to W floats from p on.
inline void store_chosen(float* p, Vec x, uint64_t bits) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), x));
#else
    for (; bits; bits &= bits - 1) *p++ = x[__builtin_ctzll(bits)];
#endif
}

// 1 where a > b, else 0.
inline Vec heaviside(Vec a, Vec b) { return a > b ? all(1.0f) : Vec{}; }

inline Vec absolute(Vec x) { return x < Vec{} ? -x : x; }

// exp(x) for x ≤ 0, relative error about 1e-7; 0 below −87.
inline Vec exp_negative(Vec x) {
    const Vec clamped = x < all(-87.0f) ? all(-87.0f) : x;
    const Vec magic = all(12582912.0f);  // 1.5·2²³: adding it rounds to an integer, kept in the low mantissa bits
    const Vec shifted = clamped * all(1.44269504f) + magic;
    const Vec n = shifted - magic;
    const Vec r = (clamped - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
    Vec p = all(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + all(c);
    const IntVec exponent = reinterpret_cast<IntVec>(shifted) - 0x4B400000;
    return x < all(-87.0f) ? Vec{} : reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (exponent << 23));
}

// float → bfloat16, round to nearest even; a NaN stays one.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline void store(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh(v);
    __builtin_memcpy(p, &h, 32);
#else
    for (int i = 0; i < W; ++i) p[i] = to_bf16(v[i]);
#endif
}

inline Vec load(const uint16_t* p) {
    typedef uint16_t Halves __attribute__((vector_size(2 * W)));
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec>(__builtin_convertvector(h, IntVec) << 16);
}

// One number of either kind of matrix.
inline float get(const float* p) { return *p; }
inline float get(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) { *p = to_bf16(x); }

}  // namespace g2g::G2G_ISA
