// The input gradient of a layer where the layer below needs it: its neurons multiply ∂L/∂S_t by σ'(U_t − θ), which under a
// surrogate of compact support is 0 for most of them. One dot product for each neuron and step where it is not:
//
//   X_t[j] = Σ over the patches of lane j's strip:  W[·][j]·∂I_t[·]
//
// A patch is the weights between 16 lanes of the columns and 16 of the rows. The dot products of a lane over up to 64 rows
// (samples and steps) follow one another, and four share a load of weights, which lie in that order:
// [strip of 16 lanes][lane][patch][16 rows]. Patches whose rows no gradient reaches in a slice are left out.
#pragma once

#include "events.h"
#include "layout.h"
#include "neurons.h"
#include "parallel.h"

namespace g2g::G2G_ISA {

constexpr int kPatch = kGranule * kGranule;  // weights
constexpr int64_t kNeededRows = kLanes;      // at once: bits of a word

// words[t] bit i: σ'(U_t − θ) of lane i is not 0. `states` [T][states][64] of a block, `theta` [64].
inline void needed_words(const Neurons& neurons, const float* states, int64_t steps, const float* theta, uint64_t* words) {
    const int64_t size = model_info(neurons).states * kLanes;
    with_surrogate(neurons, [&](auto surrogate) {
        for (int64_t t = 0; t < steps; ++t) {
            const float* membrane = states + (t + 1) * size - kLanes;
            uint64_t word = 0;
            for (int v = 0; v < kVecs; ++v) {
                const Vec x = load(membrane + v * W) - load(theta + v * W);
                word |= nonzero_bits(decltype(surrogate)::derivative(x, neurons.alpha)) << (v * W);
            }
            words[t] = word;
        }
    });
}

// The weights of a connection in patches.
class NeededGradient {
  public:
    NeededGradient(const Plan& p, Arena& arena) : plan(&p) {
        weights = arena.take<float>(plan->patches.row.size() * kPatch);
        first = arena.take<int32_t>(plan->patches.first.size());
        chosen = arena.take<Chosen>(plan->patches.row.size());
    }

    void load(const float* values, int threads) const {
        const Patches& patches = plan->patches;
        parallel(threads, plan->tiles, 4, [&](int64_t tile, int) {
            alignas(64) float by_row[kTile];
            zero(by_row, sizeof by_row);
            for_each_weight(*plan, tile, [&](int64_t i, int32_t row, int32_t col) { by_row[row * kLanes + col] = values[i]; });
            const int32_t* place = patches.place.data() + tile * kGranules * kGranules;
            for (int i = 0; i < kGranules * kGranules; ++i) {
                if (place[i] < 0) continue;
                const int col = i / kGranules, row = i % kGranules;
                const int64_t strip = int64_t{plan->tile_col[tile]} * kGranules + col;
                float* const first_lane = lane_weights(strip * kGranule) + (place[i] - patches.first[strip]) * kGranule;
                transpose_16(by_row + (row * kLanes + col) * kGranule, kLanes, first_lane, lane_length(strip));
            }
        });
    }

    // For a slice whose ∂L/∂I is in a panel of so many rows. reached[row block] bit i: not all of lane i is 0.
    void choose(const uint64_t* reached, int64_t panel_rows) const {
        const Patches& patches = plan->patches;
        int32_t count = 0;
        for (size_t strip = 0; strip + 1 < patches.first.size(); ++strip) {
            first[strip] = count;
            for (int32_t i = patches.first[strip]; i < patches.first[strip + 1]; ++i) {
                const int64_t block = patches.row[i] / kGranules, part = patches.row[i] % kGranules;
                chosen[count] = {int64_t{i - patches.first[strip]} * kGranule, block * panel_rows * kLanes + part * kGranule};
                count += (reached[block] >> (part * kGranule) & 0xFFFF) != 0;
            }
        }
        first[patches.first.size() - 1] = count;
    }

    // out[rows][64] for column block `block`: X where `words` say that it is needed, else 0. `grad` is ∂L/∂I of the first row
    // block at the first row.
    void run(int64_t block, const float* grad, const uint64_t* words, int64_t rows, float* out) const {
        zero(out, rows * kLanes * sizeof(float));
        for (int64_t begin = 0; begin < rows; begin += kNeededRows) {
            const int64_t count = least(kNeededRows, rows - begin), at = begin * kLanes;
            uint64_t needed[kLanes] = {};  // [lane] bit i: at row begin + i
            __builtin_memcpy(needed, words + begin, count * sizeof(uint64_t));
            transpose_bits(needed);
            for (int lane = 0; lane < kLanes; ++lane)
                if (needed[lane]) dot_products(block * kLanes + lane, needed[lane], grad + at, out + at + lane);
        }
    }

  private:
    // A patch of the slice: where its weights are among those of a lane, and in a panel its row lanes.
    struct Chosen {
        int64_t weights, rows;
    };

    // The weights of a column lane, and how many there are: 16 of each patch of its strip.
    float* lane_weights(int64_t lane) const {
        const int64_t strip = lane / kGranule;
        return weights + int64_t{plan->patches.first[strip]} * kPatch + lane % kGranule * lane_length(strip);
    }
    int64_t lane_length(int64_t strip) const {
        return int64_t{plan->patches.first[strip + 1] - plan->patches.first[strip]} * kGranule;
    }

    // Those of a column lane at the rows of `needed`, out[row · 64].
    void dot_products(int64_t lane, uint64_t needed, const float* grad, float* out) const {
        constexpr int at_once = 4;  // which share a load of weights
        const Chosen *const patches = chosen + first[lane / kGranule], *const patches_end = chosen + first[lane / kGranule + 1];
        if (patches == patches_end) return;
        const float* const w = lane_weights(lane);
        uint16_t row[kNeededRows + 64];
        const int size = append_bits(row, needed, 0);
        for (int i = 0; i < at_once; ++i) row[size + i] = row[size - 1];
        for (int i = 0; i < size; i += at_once) {
            const float* g[at_once];
            unrolled<at_once>([&](auto k) { g[k] = grad + row[i + k] * kLanes; });
            Vec sum[at_once] = {};
            for (const Chosen* patch = patches; patch < patches_end; ++patch)
                for (int v = 0; v < kGranule; v += W) {
                    const Vec x = G2G_ISA::load(w + patch->weights + v);
                    unrolled<at_once>([&](auto k) { sum[k] = fma(x, G2G_ISA::load(g[k] + patch->rows + v), sum[k]); });
                }
            float sums[at_once];
            sums_of(sum, sums);
            unrolled<at_once>([&](auto k) { out[row[i + k] * kLanes] = sums[k]; });
        }
    }

    const Plan* plan;
    float* weights;  // as above
    int32_t* first;  // [column granules + 1] into the chosen ones
    Chosen* chosen;
};

}  // namespace g2g::G2G_ISA
