// ∂L/∂(input) of one layer from ∂L/∂(current) by the backward product; tiles with few weights go weight by weight.
#pragma once

#include "panel.h"
#include "product.h"

namespace g2g::G2G_ISA {

struct InputGradient {
    const Plan* plan;
    float* tiles = nullptr;
    uint16_t* pairs = nullptr;
    bool tiles_loaded = false, product_loaded = false;
    float* weights = nullptr;     // of the sparse tiles
    float* transposed = nullptr;  // [row blocks][bands][64 lanes][64 rows], a band being 64 rows
    int64_t bands = 0;

    // `events`: it may also be computed by events (gradient_events.h), which need float32 tiles.
    InputGradient(const Plan& p, int64_t rows, bool bf16, bool events, Arena& arena) : plan(&p) {
        if (bf16) pairs = arena.take<uint16_t>(static_cast<size_t>(p.tiles) * kTile);
        if (!bf16 || events) tiles = arena.take<float>(static_cast<size_t>(p.tiles) * kTile);
        if (!sparse()) return;
        bands = divide_up(rows, kLanes);
        weights = arena.take<float>(p.sparse.source.size());
        transposed = arena.take<float>(p.rows.blocks * bands * kTile);
    }

    bool sparse() const { return !plan->sparse.tile.empty(); }

    // Rows of a task: a band where there are sparse tiles, else as many as asked for.
    int64_t task_rows(int64_t rows) const { return sparse() ? kLanes : rows; }

    void load_tiles(const float* values, int threads) {
        if (!tiles_loaded) backward_tiles(*plan, values, threads, tiles);
        tiles_loaded = true;
    }

    // Call before `prepare`; weights are loaded once.
    void load(const float* values, int threads) {
        if (product_loaded) return;
        product_loaded = true;
        if (pairs)
            bf16_tiles(*plan, values, false, threads, pairs);
        else
            load_tiles(values, threads);
        if (!sparse()) return;
        const int64_t count = static_cast<int64_t>(plan->sparse.source.size());
        parallel(threads, divide_up(count, 4096), 1, [&](int64_t part, int) {
            for (int64_t i = part * 4096; i < least(count, part * 4096 + 4096); ++i)
                weights[i] = values[plan->sparse.source[i]];
        });
    }

    // Call once per chunk, before `run`.
    void prepare(const DualPanel& grad, int64_t rows, int threads) const {
        if (!sparse()) return;
        const int64_t count = divide_up(rows, kLanes);
        parallel(threads, plan->rows.blocks * count, 4, [&](int64_t task, int) {
            const int64_t block = task / count, band = task % count;
            transpose(grad.floats.at(block, band * kLanes), least(kLanes, rows - band * kLanes),
                      transposed + (block * bands + band) * kTile);
        });
    }

    // out[rows][64] for column block `block`; with sparse tiles, `row` must begin a band and rows be at most 64.
    void run(int64_t block, const DualPanel& grad, int64_t row, int64_t rows, float* out) const {
        product({&plan->backward, plan->cols.strip, tiles, pairs, kBackwardPartial}, block, grad.floats, grad.halves, row,
                rows, nothing(), out);
        const SparseTiles& list = plan->sparse;
        if (!sparse() || list.col_first[block] == list.col_first[block + 1]) return;
        alignas(64) float sum[kTile] = {};  // [source lane][row]
        for (int32_t s = list.col_first[block]; s < list.col_first[block + 1]; ++s) {
            const float* g = transposed + (plan->tile_row[list.tile[s]] * bands + row / kLanes) * kTile;
            for (int lane = 0; lane < kLanes; ++lane) {
                const int32_t begin = list.lane_first[s * kLanes + lane], end = list.lane_first[s * kLanes + lane + 1];
                Vec acc[kVecs];
                for (int v = 0; v < kVecs; ++v) acc[v] = G2G_ISA::load(sum + lane * kLanes + v * W);
                for (int32_t e = begin; e < end; ++e) {
                    const Vec w = all(weights[e]);
                    const float* from = g + list.row[e] * kLanes;
                    for (int v = 0; v < kVecs; ++v) acc[v] = fma(w, G2G_ISA::load(from + v * W), acc[v]);
                }
                for (int v = 0; v < kVecs; ++v) store(sum + lane * kLanes + v * W, acc[v]);
            }
        }
        alignas(64) float turned[kTile];
        transpose(sum, kLanes, turned);
        for (int64_t i = 0; i < rows * kLanes; i += W) store(out + i, G2G_ISA::load(out + i) + G2G_ISA::load(turned + i));
    }
};

}  // namespace g2g::G2G_ISA
