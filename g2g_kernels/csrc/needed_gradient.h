// The input gradient of a layer where the layer below needs it: its neurons multiply ∂L/∂S_t by σ'(U_t − θ), which under a
// surrogate of compact support is 0 for most of them. One dot product for each neuron and step where it is not:
//
//   X_t[j] = Σ over the patches of lane j's strip:  W[·][j]·∂I_t[·]
//
// A patch is the weights between 16 lanes of the columns and 16 of the rows, [column lane][row lane], so that a dot product
// costs two loads and a multiply-add of 16 lanes per patch. Patches whose rows no gradient reaches in a chunk are left out:
// neurons that never come near their threshold, or that feed nothing. There is no list of events, no condition on the
// neurons of the layer itself, and what is not needed is not computed. Patches of a block of columns stay in L1 over the samples of a task,
// ∂I of those samples in L2.
#pragma once

#include "events.h"
#include "neurons.h"
#include "panel.h"
#include "parallel.h"

namespace g2g::G2G_ISA {

constexpr int kPatch = kGranule * kGranule;  // weights

// words[t] bit i: σ'(U_t − θ) of lane i is not 0. `states` [T][states][64] of a block, `theta` [64].
using NeededWords = void (*)(const float* states, int64_t states_of_model, int64_t steps, const float* theta, float alpha,
                             uint64_t* words);

inline NeededWords needed_words(const Neurons& neurons) {
    return with_surrogate(neurons, [](auto surrogate) -> NeededWords {
        return [](const float* states, int64_t states_of_model, int64_t steps, const float* theta, float alpha, uint64_t* words) {
            const float* membrane = states + (states_of_model - 1) * kLanes;
            for (int64_t t = 0; t < steps; ++t, membrane += states_of_model * kLanes) {
                uint64_t word = 0;
                for (int v = 0; v < kVecs; ++v) {
                    const Vec x = load(membrane + v * W) - load(theta + v * W);
                    word |= nonzero_bits(decltype(surrogate)::derivative(x, alpha)) << (v * W);
                }
                words[t] = word;
            }
        };
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
            const int32_t* place = patches.place.data() + tile * kGranules * kGranules;
            for (int i = 0; i < kGranules * kGranules; ++i)
                if (place[i] >= 0) zero(weights + int64_t{place[i]} * kPatch, kPatch * sizeof(float));
            for_each_weight(*plan, tile, [&](int64_t i, int32_t row, int32_t col) {
                const int64_t patch = place[col / kGranule * kGranules + row / kGranule];
                weights[patch * kPatch + col % kGranule * kGranule + row % kGranule] = values[i];
            });
        });
    }

    // For a chunk whose ∂L/∂I is in a panel of so many rows. reached[row block] bit i: not all of lane i is 0.
    void choose(const uint64_t* reached, int64_t panel_rows) const {
        const Patches& patches = plan->patches;
        int32_t count = 0;
        for (size_t strip = 0; strip + 1 < patches.first.size(); ++strip) {
            first[strip] = count;
            for (int32_t i = patches.first[strip]; i < patches.first[strip + 1]; ++i) {
                const int64_t block = patches.row[i] / kGranules, part = patches.row[i] % kGranules;
                chosen[count] = {int64_t{i} * kPatch, block * panel_rows * kLanes + part * kGranule};
                count += (reached[block] >> (part * kGranule) & 0xFFFF) != 0;
            }
        }
        first[patches.first.size() - 1] = count;
    }

    // out[T][64] for column block `block` of one sample: X where `words` say that it is needed, else 0. `grad` is ∂L/∂I of the
    // first row block at the sample's first step.
    void run(int64_t block, const float* grad, const uint64_t* words, int64_t steps, float* out) const {
        constexpr int at_once = 4;
        constexpr int64_t steps_of_list = 64, steps_of_word = 64 / kGranule;
        zero(out, steps * kLanes * sizeof(float));
        for (int64_t strip = block * kGranules; strip < (block + 1) * kGranules; ++strip, out += kGranule) {
            const Chosen *const patches = chosen + first[strip], *const patches_end = chosen + first[strip + 1];
            if (patches == patches_end) continue;
            for (int64_t begin = 0; begin < steps; begin += steps_of_list) {
                const int64_t end = least(steps, begin + steps_of_list);
                uint16_t needed[steps_of_list * kGranule + 64];  // (t − begin) · 16 + lane
                int size = 0;
                for (int64_t t = begin; t < end; t += steps_of_word) {
                    uint64_t bits = 0;
                    for (int64_t i = 0; i < least(steps_of_word, end - t); ++i)
                        bits |= (words[t + i] >> (strip % kGranules * kGranule) & 0xFFFF) << (i * kGranule);
                    size += append_bits(needed + size, bits, (t - begin) * kGranule);
                }
                if (!size) continue;
                for (int i = 0; i < at_once; ++i) needed[size + i] = needed[size - 1];
                for (int i = 0; i < size; i += at_once) {
                    const float *w[at_once], *g[at_once];
                    float* to[at_once];
                    unrolled<at_once>([&](auto k) {
                        const int64_t t = begin + needed[i + k] / kGranule, lane = needed[i + k] % kGranule;
                        w[k] = weights + lane * kGranule;
                        g[k] = grad + t * kLanes;
                        to[k] = out + t * kLanes + lane;
                    });
                    Vec sum[at_once] = {};
                    for (const Chosen* patch = patches; patch < patches_end; ++patch)
                        unrolled<at_once>([&](auto k) {
                            const float *x = w[k] + patch->weights, *y = g[k] + patch->rows;
                            for (int v = 0; v < kGranule; v += W) sum[k] = fma(G2G_ISA::load(x + v), G2G_ISA::load(y + v), sum[k]);
                        });
                    const Sums<at_once> sums = sums_of(sum);
                    unrolled<at_once>([&](auto k) { *to[k] = sums.of[k]; });
                }
            }
        }
    }

  private:
    // A patch of the chunk: where its weights begin, and in a panel its row lanes.
    struct Chosen {
        int64_t weights, rows;
    };

    const Plan* plan;
    float* weights;  // [patches][16 column lanes][16 row lanes]
    int32_t* first;  // [column granules + 1] into the chosen ones
    Chosen* chosen;
};

}  // namespace g2g::G2G_ISA
