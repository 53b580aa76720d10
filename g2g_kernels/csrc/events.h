// Products whose left side is spikes: only the set bits of the spike words are visited.
//
//   forward    I[·] = b + Σ over active tiles, Σ over set bits j:  Wᵀ[tile][j][·]
//   gradient   G[tile][j][·] += dI_t[·]  for every set bit j of the tile's word at t
//
// Per event 64 additions: a load-and-add of 256 B of weights into registers (forward), or a read-add-write of one 256 B
// row of a 16 KB tile that stays in L1 beside the 64·T·4 B of dI (gradient).
#pragma once

#include "kernels.h"
#include "lif.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// Currents of row block `row` from spikes; `words` are one sample's [column blocks][stride].
struct EventCurrent {
    const Plan* plan;
    int64_t row;
    const uint64_t* words;
    int64_t stride;
    const float *tiles, *bias;

    void operator()(int64_t t, Vec* current) const {
        for (int v = 0; v < kVecs; ++v) current[v] = load(bias + v * W);
        for (int32_t tile = plan->row_first[row]; tile < plan->row_first[row + 1]; ++tile) {
            uint64_t word = words[plan->tile_col[tile] * stride + t];
            const float* weights = tiles + static_cast<int64_t>(tile) * kTile;
            for (; word; word &= word - 1) {
                const float* w = weights + __builtin_ctzll(word) * kLanes;
                for (int v = 0; v < kVecs; ++v) current[v] += load(w + v * W);
            }
        }
    }
};

inline void event_gradient(const uint64_t* words, const float* grad_current, int64_t steps, float* grad) {
    for (int64_t t = 0; t < steps; ++t) {
        uint64_t word = words[t];
        if (!word) continue;
        Vec g[kVecs];
        for (int v = 0; v < kVecs; ++v) g[v] = load(grad_current + t * kLanes + v * W);
        for (; word; word &= word - 1) {
            float* target = grad + __builtin_ctzll(word) * kLanes;
            for (int v = 0; v < kVecs; ++v) store(target + v * W, load(target + v * W) + g[v]);
        }
    }
}

}  // namespace g2g::G2G_ISA
