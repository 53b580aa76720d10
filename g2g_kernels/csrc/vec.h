// One native vector of floats, whatever the instruction set; kernels are written once against this header and
// compiled several times. Arithmetic uses GCC's vector extensions; intrinsics do only what they cannot express, and
// are in this file alone: another instruction set is another branch of its functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "plan.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace g2g::G2G_ISA {

// The numbers of a compilation: floats, or with G2G_DOUBLE doubles, for which this header has what neurons.h needs.
#if defined(G2G_DOUBLE)
typedef double Real;
typedef int64_t Whole;
#else
typedef float Real;
typedef int32_t Whole;
#endif

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif
constexpr int W = kVecBytes / sizeof(Real);
constexpr int kVecs = kLanes / W;  // vectors of a block

// Whether there are products of bfloat16 factors; without them nothing is rounded.
#if defined(__AVX512BF16__)
constexpr bool kBf16 = true;
#else
constexpr bool kBf16 = false;
#endif

typedef Real Vec __attribute__((vector_size(kVecBytes)));
typedef Whole IntVec __attribute__((vector_size(kVecBytes)));
typedef Real UnalignedVec __attribute__((vector_size(kVecBytes), aligned(sizeof(Real)), may_alias));

// A number known to the compiler.
template <int V>
struct Constant {
    static constexpr int value = V;
    constexpr operator int() const { return V; }
};

#define G2G_INLINE inline __attribute__((always_inline))
#define G2G_OUT_OF_LINE inline __attribute__((noinline))

template <int... I, class F>
G2G_INLINE void unrolled(std::integer_sequence<int, I...>, const F& f) {
    (f(Constant<I>{}), ...);
}

// f(Constant<0>{}), …, f(Constant<N − 1>{}): a loop whose arrays, indexed by constants, stay in registers.
template <int N, class F>
G2G_INLINE void unrolled(const F& f) {
    unrolled(std::make_integer_sequence<int, N>{}, f);
}

// f(v) for N vectors: unrolled where there are so few that registers hold what f keeps of them all.
template <int N, class F>
G2G_INLINE void each(const F& f) {
    if constexpr (N <= 4)
        unrolled<N>(f);
    else
        for (int v = 0; v < N; ++v) f(v);
}

// The same for the vectors of a block.
template <class F>
G2G_INLINE void each_vec(const F& f) {
    each<kVecs>(f);
}

inline Vec load(const Real* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(Real* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec all(Real x) { return x - Vec{}; }

// Bit i is set where a[i] > b[i].
inline uint64_t greater_bits(Vec a, Vec b) {
#if defined(G2G_DOUBLE) && defined(__AVX512F__)
    return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif !defined(G2G_DOUBLE) && defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#elif !defined(G2G_DOUBLE) && defined(__SSE2__)
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
#if defined(G2G_DOUBLE) && defined(__AVX512F__)
    return _mm512_cmp_pd_mask(x, Vec{}, _CMP_NEQ_UQ);
#elif defined(__AVX512F__)
    return _mm512_cmp_ps_mask(x, Vec{}, _CMP_NEQ_UQ);
#elif !defined(G2G_DOUBLE) && defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, Vec{}, _CMP_NEQ_UQ)));
#elif !defined(G2G_DOUBLE) && defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpneq_ps(x, Vec{})));
#else
    const IntVec mask = x != Vec{};
    uint64_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint64_t>(mask[i] & 1) << i;
    return bits;
#endif
}

// 1 where a > b, else 0.
inline Vec heaviside(Vec a, Vec b) { return a > b ? all(1.0f) : Vec{}; }

inline Vec absolute(Vec x) { return x < Vec{} ? -x : x; }

#if defined(G2G_DOUBLE)

inline Vec exp_negative(Vec x) {
    for (int i = 0; i < W; ++i) x[i] = std::exp(x[i]);
    return x;
}

#else

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

// Writes base + i for every set bit i; returns how many. May write up to 64 entries from `out` on.
inline int append_bits(uint16_t* out, uint64_t word, int64_t base) {
    const int count = __builtin_popcountll(word);
#if defined(__AVX512VBMI2__)
    alignas(64) static constexpr uint8_t counting[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
        30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59,
        60, 61, 62, 63};
    const __m512i bits = _mm512_maskz_compress_epi8(word, _mm512_load_si512(counting));
    const __m512i bases = _mm512_set1_epi16(static_cast<short>(base));
    _mm512_storeu_si512(out, _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(bits)), bases));
    if (count > 32)
        _mm512_storeu_si512(out + 32,
                            _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(bits, 1)), bases));
#else
    for (; word; word &= word - 1) *out++ = static_cast<uint16_t>(base + __builtin_ctzll(word));
#endif
    return count;
}

// lanes[i] = bit i of a word of 64, as 0 or 1.
inline void expand_bits(uint64_t word, float* lanes) {
#if defined(__AVX512F__)
    for (int v = 0; v < kVecs; ++v)
        store(lanes + v * W, _mm512_maskz_mov_ps(static_cast<__mmask16>(word >> (v * W)), all(1.0f)));
#else
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>((word >> i) & 1);
#endif
}

// x, but p[i] where bit i is set.
G2G_INLINE Vec load_chosen(Vec x, const float* p, uint32_t bits) {
#if defined(__AVX512F__)
    return _mm512_mask_loadu_ps(x, static_cast<__mmask16>(bits), p);
#else
    IntVec place;
    for (int i = 0; i < W; ++i) place[i] = 1 << i;
    const IntVec chosen = ((IntVec{} + static_cast<int32_t>(bits)) & place) == place;
    return chosen ? load(p) : x;
#endif
}

// 32 bits, from which add_chosen() takes W at a time: compared with powers of two, faster than loading mask registers.
inline IntVec load_bits(const uint16_t* bits) {
    int32_t both;
    __builtin_memcpy(&both, bits, 4);
    return IntVec{} + both;
}

// acc + x in those lanes whose bits, from bit W·part on, are set.
template <int part>
G2G_INLINE Vec add_chosen(Vec acc, IntVec bits, Vec x) {
    IntVec place;
    for (int i = 0; i < W; ++i) place[i] = static_cast<int32_t>(1u << (part * W + i));
#if defined(__AVX512F__)
    const __mmask16 chosen = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(bits), reinterpret_cast<__m512i>(place));
    return _mm512_mask_add_ps(acc, chosen, acc, x);
#else
    const IntVec chosen = (bits & place) == place;
    return acc + reinterpret_cast<Vec>(chosen & reinterpret_cast<IntVec>(x));
#endif
}

// Σ x[i].
inline float sum_of(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
#endif
}

// sums[k] = Σ x[k][i] for each of four vectors.
inline void sums_of(const Vec (&x)[4], float* sums) {
#if defined(__AVX512F__)
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const __m512 e = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 f = _mm256_add_ps(_mm512_castps512_ps256(e), _mm512_extractf32x8_ps(e, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1)));
#else
    for (int k = 0; k < 4; ++k) sums[k] = sum_of(x[k]);
#endif
}

// to[c][r] = from[r][c] of 16 × 16 floats; rows are `step` and `to_step` apart.
inline void transpose_16(const float* from, int64_t step, float* to, int64_t to_step) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    unrolled<16>([&](auto i) { a[i] = _mm512_loadu_ps(from + i * step); });
    unrolled<8>([&](auto i) {
        b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    });
    unrolled<4>([&](auto i) {
        const auto low = [](__m512 x, __m512 y) {
            return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
        };
        const auto high = [](__m512 x, __m512 y) {
            return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
        };
        a[4 * i] = low(b[4 * i], b[4 * i + 2]), a[4 * i + 1] = high(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = low(b[4 * i + 1], b[4 * i + 3]), a[4 * i + 3] = high(b[4 * i + 1], b[4 * i + 3]);
    });
    unrolled<4>([&](auto i) {  // quarters: column 4q + i of rows 4g … in quarter q of a[4g + i]
        const __m512 x = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), y = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
        const __m512 z = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xDD), u = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xDD);
        _mm512_storeu_ps(to + i * to_step, _mm512_shuffle_f32x4(x, y, 0x88));
        _mm512_storeu_ps(to + (8 + i) * to_step, _mm512_shuffle_f32x4(x, y, 0xDD));
        _mm512_storeu_ps(to + (4 + i) * to_step, _mm512_shuffle_f32x4(z, u, 0x88));
        _mm512_storeu_ps(to + (12 + i) * to_step, _mm512_shuffle_f32x4(z, u, 0xDD));
    });
#else
    for (int c = 0; c < 16; ++c)
        for (int r = 0; r < 16; ++r) to[c * to_step + r] = from[r * step + c];
#endif
}

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

// Factors of products: W numbers, the same number W times, and a·b + c. Of bfloat16 two k at a time.
inline Vec load_factors(const float* p) { return load(p); }
inline Vec all_factors(const float* p) { return all(*p); }
inline Vec add_product(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#if defined(__AVX512BF16__)
inline __m512bh load_factors(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh all_factors(const uint16_t* p) {
    int pair;
    __builtin_memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}
inline Vec add_product(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
#endif

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

#endif

}  // namespace g2g::G2G_ISA
