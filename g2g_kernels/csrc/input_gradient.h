// ∂L/∂(input) of one layer from ∂L/∂(current) by the backward product; tiles with few weights go weight by weight.
#pragma once

#include "batch.h"
#include "panel.h"
#include "product.h"

namespace g2g::G2G_ISA {

// ∂L/∂(input) by the product, its weights in their places.
struct InputProduct {
    const Plan* plan;
    const float* tiles;
    const uint16_t* pairs;
    const Tap* taps;  // the weights of sparse tiles

    // out[rows][64] for column block `block`. With sparse tiles `bands` are of `grad`, `row` begins one and rows are at most 64.
    void run(int64_t block, const DualPanel& grad, const Bands& bands, int64_t row, int64_t rows, float* out) const {
        product({&plan->backward, plan->cols.strip, tiles, pairs, kBackwardPartial}, block, grad.floats, grad.halves, row,
                rows, nothing(), out);
        const int32_t* first = plan->sparse.first.data() + block * kLanes;
        if (plan->sparse.empty() || first[0] == first[kLanes]) return;
        alignas(64) float sum[kTile], turned[kTile];
        for (int lane = 0; lane < kLanes; ++lane)
            dense_sum(taps + first[lane], taps + first[lane + 1], bands.at(row / kLanes, 0), 0.0f, sum + lane * kLanes);
        transpose(sum, kLanes, turned);
        for (int64_t i = 0; i < rows * kLanes; i += W) store(out + i, load(out + i) + load(turned + i));
    }
};

// The weights of a connection for its input gradient. They are brought into place once, when they are first asked for.
class InputGradient {
  public:
    // `events`: it may also be computed by events (gradient_events.h), which need float32 tiles.
    InputGradient(const Plan& p, const float* weights, bool bf16, bool events, Arena& arena) : plan(&p), values(weights) {
        if (bf16) pairs = arena.take<uint16_t>(static_cast<size_t>(p.tiles) * kTile);
        if (!bf16 || events) tiles = arena.take<float>(static_cast<size_t>(p.tiles) * kTile);
        taps = arena.take<Tap>(p.sparse.source.size());
    }

    // Whether there are sparse tiles; the product then needs ∂L/∂(current) in bands too.
    bool sparse() const { return !plan->sparse.empty(); }

    // Tiles for events, as backward_tiles() gives them.
    const float* event_tiles(int threads) {
        if (!tiles_loaded) backward_tiles(*plan, values, threads, tiles);
        tiles_loaded = true;
        return tiles;
    }

    InputProduct product(int threads) {
        if (!product_loaded) {
            if (pairs)
                bf16_tiles(*plan, values, false, threads, pairs);
            else
                event_tiles(threads);
            load_taps(plan->sparse, values, threads, taps);
        }
        product_loaded = true;
        return {plan, tiles, pairs, taps};
    }

    // call(block, row, rows, worker) for all column blocks and rows, `most_rows` at a time; if `banded`, all blocks of one
    // band after the other, while it is in L2, else all rows of one block, while its weights are.
    template <class F>
    void each_task(int64_t rows, int64_t most_rows, bool banded, int threads, int64_t grain, const F& call) const {
        const int64_t blocks = plan->cols.blocks, parts = divide_up(rows, most_rows);
        parallel(threads, blocks * parts, grain, [&](int64_t task, int worker) {
            const int64_t block = banded ? task % blocks : task / parts;
            const int64_t row = (banded ? task / blocks : task % parts) * most_rows;
            call(block, row, least(most_rows, rows - row), worker);
        });
    }

  private:
    const Plan* plan;
    const float* values;
    float* tiles = nullptr;
    uint16_t* pairs = nullptr;
    Tap* taps = nullptr;
    bool tiles_loaded = false, product_loaded = false;
};

}  // namespace g2g::G2G_ISA
