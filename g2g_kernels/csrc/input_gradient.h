// ∂L/∂(input) of one layer from ∂L/∂(current) by the backward product; tiles with few weights go weight by weight.
#pragma once

#include "batch.h"
#include "layout.h"
#include "product.h"

namespace g2g::G2G_ISA {

// ∂L/∂(input) of a connection by the product, and the weights for it, which are brought into place when they are first needed.
class InputGradient {
  public:
    // `events`: it may also be computed by events (gradient_events.h), which need float32 tiles.
    InputGradient(const Plan& p, const float* weights, bool bf16, bool events, Arena& arena) : plan(&p), values(weights) {
        if (bf16) pairs = arena.take<uint16_t>(static_cast<size_t>(p.tiles) * kTile);
        if (!bf16 || events) tiles = arena.take<float>(static_cast<size_t>(p.tiles) * kTile);
        taps = arena.take<Tap>(p.sparse.source.size());
        chosen_taps = arena.take<Tap>(p.sparse.source.size());
        taps_end = arena.take<int32_t>(p.sparse.first.size());
    }

    // Whether there are sparse tiles; the product then needs ∂L/∂(current) in bands too.
    bool sparse() const { return !plan->sparse.empty(); }

    float* tiles = nullptr;  // for events: of load_tiles<kByCol>(), as load_tiles() has written them

    void load_tiles(int threads) {
        if (!tiles_loaded) G2G_ISA::load_tiles<kByCol>(*plan, values, threads, tiles);
        tiles_loaded = true;
    }

    // What run() reads. Single weights of rows that no gradient reaches are left out: reached[row block] bit i, of lane i (null: it
    // is unknown).
    void load_product(int threads, const uint64_t* reached = nullptr) {
        if (!product_loaded) {
            const bool dense = !plan->backward.list.empty();  // else single weights are all that there is
            if (dense && pairs) G2G_ISA::load_tiles<kByCol>(*plan, values, threads, pairs);
            if (dense && !pairs) load_tiles(threads);
            load_taps(plan->sparse, values, threads, taps);
        }
        product_loaded = true;
        used = reached ? chosen_taps : taps, used_end = reached ? taps_end : plan->sparse.first.data() + 1;
        if (reached) choose_taps(reached, threads);
    }

    // out[rows][64] for column block `block`. With sparse tiles `bands` are of `grad`, `row` begins one and rows are at most 64.
    void run(int64_t block, const DualPanel& grad, const Bands& bands, int64_t row, int64_t rows, float* out) const {
        const int strips = kLanes / plan->cols.strip;
        const int32_t* segments = plan->backward.first.data() + block * strips;
        const int32_t* first = plan->sparse.first.data() + block * kLanes;
        const bool dense = segments[0] < segments[strips], single = !plan->sparse.empty() && first[0] < first[kLanes];
        if (dense || !single)
            product({&plan->backward, plan->cols.strip, tiles, pairs, kBackwardPartial}, block, grad.floats, grad.halves, row,
                    rows, {kZeros, 0}, out);
        if (!single) return;
        alignas(64) float sum[kTile], turned[kTile];
        for (int lane = 0; lane < kLanes; ++lane)
            dense_sum(used + first[lane], used + used_end[block * kLanes + lane], bands.at(row / kLanes, 0), 0.0f, sum + lane * kLanes);
        transpose(sum, kLanes, turned);
        for (int64_t i = 0; i < rows * kLanes; i += W) store(out + i, dense ? load(out + i) + load(turned + i) : load(turned + i));
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
    void choose_taps(const uint64_t* reached, int threads) const {
        const WeightList& list = plan->sparse;
        if (list.empty()) return;
        parallel(threads, plan->cols.blocks, 1, [&](int64_t block, int) {
            for (int64_t col = block * kLanes; col < (block + 1) * kLanes; ++col) {
                int32_t count = list.first[col];
                for (int32_t i = list.first[col]; i < list.first[col + 1]; ++i) {
                    chosen_taps[count] = taps[i];
                    count += static_cast<int32_t>(reached[taps[i].lane / kLanes] >> (taps[i].lane % kLanes) & 1);
                }
                taps_end[col] = count;
            }
        });
    }

    const Plan* plan;
    const float* values;
    uint16_t* pairs = nullptr;
    Tap* taps = nullptr;
    Tap* chosen_taps = nullptr;  // those of a slice, in the places of all of them
    int32_t* taps_end = nullptr;
    const Tap* used = nullptr;           // the weights of sparse tiles, and
    const int32_t* used_end = nullptr;   // [column lanes] where those of a lane end; they begin as in the plan
    bool tiles_loaded = false, product_loaded = false;
};

}  // namespace g2g::G2G_ISA
