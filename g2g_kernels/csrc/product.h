// Matrix products over the tiles of a plan: dense left sides (dense inputs, gradients of currents).
//
//   forward    Y[m][i] = Σ_j X[m][j]·W[i][j]      output strips are lanes of a row block
//   backward   X[m][j] = Σ_i Y[m][i]·W[i][j]      output strips are lanes of a column block
//   outer      G[j][i] += Σ_m X[m][j]·Y[m][i]     one 64 × 64 tile
//
// The register tile is R rows × L lanes, accumulators staying in registers over all active tiles of a block (K is 64 for
// each tile). AVX-512: 6 × 64, 24 of 32 registers; per k 24 multiply-adds, 4 loads of weights and 6 broadcasts, so the
// multiply-add units are the limit; weights stream from L2 at 256 B per 24 multiply-adds (11 B per cycle).
#pragma once

#include "layout.h"
#include "plan.h"
#include "vec.h"

namespace g2g::G2G_ISA {

#if defined(__AVX512F__)
constexpr int rows_at_once(int lanes) { return lanes == 64 ? 6 : 12; }
constexpr int kWidest = 64;
constexpr int kOuterRows = 4;
#elif defined(__AVX2__)
constexpr int rows_at_once(int) { return 6; }
constexpr int kWidest = 16;
constexpr int kOuterRows = 4;
#else
constexpr int rows_at_once(int) { return 3; }
constexpr int kWidest = 16;
constexpr int kOuterRows = 2;
#endif

constexpr int kHalf = kWidest == 64 ? 32 : 16;

// Currents feed thresholds and add up over time, so their sums are cut after every tile (48 more loads and stores per
// 1536 multiply-adds); gradients are summed in one go, as accurately as PyTorch's own products.
constexpr int kForwardPartial = 1;
constexpr int kBackwardPartial = 1 << 30;

// Weights of one direction of a plan: float32 [tile][k][64], or bfloat16 pairs [tile][k / 2][64][2] (one of them null).
struct Weights {
    const Segments* segments;
    int strip;
    const float* tiles;
    const uint16_t* pairs;
    int partial;  // segments of a partial sum, which stays in registers: rounding errors grow with its length
};

// Prefetches the left rows of the next segment: they lie elsewhere, which no hardware prefetcher predicts.
template <int R, class T>
inline void fetch_next(const Segment* s, const Segment* end, Panel<const T> left, int64_t row) {
    if (s + 1 == end) return;
    const char* next = reinterpret_cast<const char*>(left.at(s[1].block, row));
    for (size_t byte = 0; byte < R * kLanes * sizeof(T); byte += 64) __builtin_prefetch(next + byte);
}

// What is added to a product: rows of 64 floats, `stride` apart (0: the same for every row).
struct Start {
    const float* lanes;
    int64_t stride;
    Start from(int64_t row, int64_t lane) const { return {lanes + row * stride + lane, stride}; }
};

// Factors are float32, one k at a time, or bfloat16 pairs: dot products of two k, added in float32. Twice the rate, half the bytes.
template <int R, int L, class T>
inline void product_rows(const Segment* s, const Segment* end, Panel<const T> left, int64_t row, const T* tiles, int lane,
                         Start start, float* out) {
    constexpr int N = L / W, K = sizeof(float) / sizeof(T);
    Vec sum[R][N] = {};
    for (; s < end; ++s) {
        fetch_next<R>(s, end, left, row);
        const int first = s->lane & ~(K - 1);  // zeros are stored beside a run, and runs lie more than two lanes apart
        const T* a = left.at(s->block, row) + first;
        const T* b = tiles + static_cast<int64_t>(s->place) * kTile + first * kLanes + lane * K;
        const T* const stop = a + (s->lane - first + s->count);
        do {  // a segment is never empty; a loop that might not run makes the compiler spill the sums around it
            decltype(load_factors(b)) weight[N];
            for (int v = 0; v < N; ++v) weight[v] = load_factors(b + v * K * W);
            for (int r = 0; r < R; ++r) {
                const auto x = all_factors(a + r * kLanes);
                for (int v = 0; v < N; ++v) sum[r][v] = add_product(x, weight[v], sum[r][v]);
            }
            a += K, b += K * kLanes;
        } while (a < stop);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v)
            store(out + r * kLanes + v * W, load(start.lanes + r * start.stride + v * W) + sum[r][v]);
}

// One register tile of `rows` rows, at most R.
template <int L, int R = rows_at_once(L), class T>
void product_tile(const Segment* s, const Segment* end, Panel<const T> left, int64_t row, int64_t rows, const T* tiles,
                  int lane, Start start, float* out) {
    if (rows == R) return product_rows<R, L>(s, end, left, row, tiles, lane, start, out);
    if constexpr (R > 1) product_tile<L, R - 1>(s, end, left, row, rows, tiles, lane, start, out);
}

// Cuts `rows` rows into register tiles of nearly equal height (50 rows: 9 tiles of 5 or 6).
template <int L, class T>
void product_strip(const Segment* s, const Segment* end, Panel<const T> left, int64_t row, int64_t rows, const T* tiles,
                   int lane, Start start, float* out) {
    const int64_t count = divide_up(rows, rows_at_once(L));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = rows * i / count, stop = rows * (i + 1) / count;
        product_tile<L>(s, end, left, row + begin, stop - begin, tiles, lane, start.from(begin, 0), out + begin * kLanes);
    }
}

template <class T>
void product_block(const Weights& weights, const T* tiles, int64_t block, Panel<const T> left, int64_t row,
                   int64_t rows, Start start, float* out) {
    const int strips = kLanes / weights.strip;
    const int width = weights.strip < kWidest ? weights.strip : kWidest;
    for (int s = 0; s < strips; ++s) {
        const int32_t* first = weights.segments->first.data() + block * strips + s;
        const Segment* end = weights.segments->list.data() + first[1];
        for (int lane = s * weights.strip; lane < (s + 1) * weights.strip; lane += width) {
            const Segment* begin = weights.segments->list.data() + first[0];
            Start before = start.from(0, lane);
            do {
                const Segment* stop = end - begin > weights.partial ? begin + weights.partial : end;
                if (width == kWidest)
                    product_strip<kWidest>(begin, stop, left, row, rows, tiles, lane, before, out + lane);
                else if (width == kHalf)
                    product_strip<kHalf>(begin, stop, left, row, rows, tiles, lane, before, out + lane);
                else
                    product_strip<16>(begin, stop, left, row, rows, tiles, lane, before, out + lane);
                before = {out + lane, kLanes};
                begin = stop;
            } while (begin < end);
        }
    }
}

// out[r][·] = start + Σ over the active tiles of output block `block`, for rows row … row + rows − 1 of the left side.
inline void product(const Weights& weights, int64_t block, Panel<const float> left,
                    [[maybe_unused]] Panel<const uint16_t> left_bf16, int64_t row, int64_t rows, Start start, float* out) {
#if defined(__AVX512BF16__)
    if (weights.pairs) return product_block(weights, weights.pairs, block, left_bf16, row, rows, start, out);
#endif
    product_block(weights, weights.tiles, block, left, row, rows, start, out);
}

// grad[j][i] += Σ_m x[m][j]·y[m][i] over `rows` rows of two panel blocks; grad is one tile [64][64]. Partial
// sums are of 128 rows: their 64 KB stay in L2, and rounding errors grow with their length, not that of the whole sum.
inline void outer(const float* x, const float* y, int64_t rows, float* grad) {
    constexpr int R = kOuterRows, L = kWidest, N = L / W;
    constexpr int64_t partial = 128;
    for (int64_t begin = 0; begin < rows; begin += partial) {
        const int64_t end = least(rows, begin + partial);
        for (int j = 0; j < kLanes; j += R) {
            for (int i = 0; i < kLanes; i += L) {
                Vec sum[R][N] = {};
                for (int64_t m = begin; m < end; ++m) {
                    Vec right[N];
                    for (int v = 0; v < N; ++v) right[v] = load(y + m * kLanes + i + v * W);
                    for (int r = 0; r < R; ++r) {
                        const Vec left = all(x[m * kLanes + j + r]);
                        for (int v = 0; v < N; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
                    }
                }
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < N; ++v) {
                        float* target = grad + (j + r) * kLanes + i + v * W;
                        store(target, load(target) + sum[r][v]);
                    }
            }
        }
    }
}

}  // namespace g2g::G2G_ISA
