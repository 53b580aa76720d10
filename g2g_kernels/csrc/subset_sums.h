// Products of spikes by sums of subsets ("the method of four Russians"), for units of 16 and 32: of four rows of numbers all
// sixteen sums are formed once, and four spikes choose one of them.
//
//   forward    I_t[·] = b + Σ over quads q of source lanes:  (sums of the weights of q)[S_t of q][·]
//   gradient   G[j][·] += Σ over quads q of rows (b, t):     (sums of the ∂I of q)[S of lane j at q][·]
//
// Tables of 16 × L floats stay in L1: those of a strip's inputs for some samples, or those of 32 or 64 rows for all units of a
// strip. Forming one takes 11 additions and 16 stores per vector, 30 cycles, so it must serve many.
#pragma once

#include "batch.h"

namespace g2g::G2G_ISA {

constexpr int kQuad = 4, kSums = 1 << kQuad;  // rows whose subsets are summed; the sums
constexpr int kQuads = kGranule / kQuad;
constexpr int kTableFloats = 7 * 1024;  // 28 KB
constexpr int64_t kSubsetRows = 480;    // that a table serves, forward: 120 KB of currents

// Samples of a task that a table serves, forward.
inline int64_t subset_samples(int64_t batch, int64_t steps) { return least(batch, most(1, kSubsetRows / steps)); }

// table[16][L]: row i is the sum of those of four rows, `stride` floats apart, whose bits are set in i. Of the rows `count`
// exist, the others are 0.
template <int L>
inline void subset_sums(const float* rows, int64_t stride, int64_t count, float* table) {
    for (int v = 0; v < L / W; ++v) {
        Vec sum[kSums] = {};
        unrolled<kQuad>([&](auto i) {
            const Vec row = i < count ? load(rows + i * stride + v * W) : Vec{};
            unrolled<(1 << i)>([&](auto j) { sum[(1 << i) + j] = sum[j] + row; });
        });
        unrolled<kSums>([&](auto i) { store(table + i * L + v * W, sum[i]); });
    }
}

// f(q, sums [L]) for the four quads of `bits`, from their tables.
template <int L, class F>
G2G_INLINE void each_chosen(const float* tables, uint64_t bits, const F& f) {
    unrolled<kQuads>([&](auto q) { f(q, tables + (q * kSums + (bits >> (q * kQuad) & (kSums - 1))) * L); });
}

// Currents of row block `row` for some samples, out[samples][T][64], from the words of the first one.
template <int L>
void subset_currents(const Plan& plan, int64_t row, const float* tiles, const float* bias, const uint64_t* words,
                     int64_t samples, int64_t steps, float* out) {
    constexpr int strips = kLanes / L, N = L / W, at_once = kTableFloats / (kQuads * kSums * L);
    alignas(64) float tables[kTableFloats];
    for (int s = 0; s < strips; ++s) {
        const int32_t* first = plan.granules.first.data() + row * strips + s;
        int32_t begin = first[0];
        do {
            const int count = static_cast<int>(least(at_once, first[1] - begin));
            int64_t word[at_once];
            int shift[at_once];
            for (int i = 0; i < count; ++i) {
                const Granule& granule = plan.granules.list[begin + i];
                const float* weights = tiles + (int64_t{granule.tile} * kLanes + granule.part * kGranule) * kLanes + s * L;
                for (int q = 0; q < kQuads; ++q)
                    subset_sums<L>(weights + q * kQuad * kLanes, kLanes, kQuad, tables + (i * kQuads + q) * kSums * L);
                word[i] = plan.tile_col[granule.tile] * steps;
                shift[i] = granule.part * kGranule;
            }
            const bool begins = begin == first[0];
            for (int64_t b = 0; b < samples; ++b)
                for (int64_t t = 0; t < steps; ++t) {
                    const uint64_t* own = words + b * plan.cols.blocks * steps + t;
                    float* const to = out + (b * steps + t) * kLanes + s * L;
                    Vec sum[kQuads][N] = {};
                    for (int i = 0; i < count; ++i)
                        each_chosen<L>(tables + i * kQuads * kSums * L, own[word[i]] >> shift[i], [&](auto q, const float* x) {
                            unrolled<N>([&](auto v) { sum[q][v] += load(x + v * W); });
                        });
                    unrolled<N>([&](auto v) {
                        const Vec before = load((begins ? bias + s * L : to) + v * W);
                        store(to + v * W, before + ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])));
                    });
                }
            begin += at_once;
        } while (begin < first[1]);
    }
}

// Adds the gradient of the weights of strip `strip` of the rows to tiles [tile][source lane][output lane], from ∂I[rows][64]
// of its block and the spikes of the same rows.
template <int L>
void subset_gradient(const Plan& plan, int64_t strip, const RowBits& spikes, const float* grad, int64_t rows, float* tiles) {
    constexpr int N = L / W, strips = kLanes / L;
    constexpr int lanes_at_once = W == 16 ? 16 / N : W == 8 ? 8 / N : 1;  // whose sums fit into registers
    constexpr int rows_at_once = 1024 / L;
    static_assert(rows_at_once % kGranule == 0);
    alignas(64) float tables[rows_at_once / kQuad * kSums * L];
    const int64_t lane_row = strip % strips * L;
    for (int64_t begin = 0; begin < rows; begin += rows_at_once) {
        const int64_t exist = least(rows_at_once, rows - begin);
        const int used = static_cast<int>(divide_up(exist, kGranule));
        for (int q = 0; q < used * kQuads; ++q)
            subset_sums<L>(grad + (begin + q * kQuad) * kLanes + lane_row, kLanes, exist - q * kQuad, tables + q * kSums * L);
        for (int32_t g = plan.granules.first[strip]; g < plan.granules.first[strip + 1]; ++g) {
            const Granule& granule = plan.granules.list[g];
            const int64_t source = int64_t{plan.tile_col[granule.tile]} * kLanes + granule.part * kGranule;
            float* const target = tiles + (int64_t{granule.tile} * kLanes + granule.part * kGranule) * kLanes + lane_row;
            for (int lane = 0; lane < kGranule; lane += lanes_at_once) {
                const uint16_t* bits = spikes.of(source + lane) + begin / kGranule;
                Vec sum[lanes_at_once][N] = {};
                for (int quarter = 0; quarter < used; ++quarter)
                    unrolled<lanes_at_once>([&](auto j) {
                        each_chosen<L>(tables + quarter * kQuads * kSums * L, bits[j * spikes.bands * 4 + quarter],
                                       [&](auto, const float* x) {
                                           unrolled<N>([&](auto v) { sum[j][v] += load(x + v * W); });
                                       });
                    });
                unrolled<lanes_at_once>([&](auto j) {
                    float* const to = target + (lane + j) * kLanes;
                    unrolled<N>([&](auto v) { store(to + v * W, load(to + v * W) + sum[j][v]); });
                });
            }
        }
    }
}

}  // namespace g2g::G2G_ISA
