// Recurrent connections V inside a layer, I_t = (W·x_t + b) + V·S_{t−1}: a step needs all neurons of the step before.
//
// Feed-forward layers run one block over all T. Here the steps are the outer loop, and the tasks of a step are the blocks of
// some samples: a block's weights (134 KB by default) are read once for all of them. States lie by block and step, [row
// blocks][T][B][states][64], so that a task reads and writes whole stretches. Forward, V·S_{t−1} comes by events on top of
// W·x_t + b. Backward, the steps go downwards:
//
//   ∂L/∂S_t = (from the layer above) + X_{t+1},   X_t = Vᵀ·∂I_t
//
// X comes by the product, or by events, X_t = Vᵀ·e_t + β·X_{t+1} as in gradient_events.h, whichever a step has few of.
#pragma once

#include "events.h"
#include "input_gradient.h"
#include "stack.h"
#include "scan.h"

namespace g2g::G2G_ISA {

constexpr int64_t kStepSamples = 16;      // of a task of one step, forward
constexpr int64_t kGradientSamples = 36;  // the same, backward: six register tiles of its product
constexpr int64_t kSamplesAhead = 2;             // samples: how far ahead of its use memory that no hardware predicts is fetched

inline void fetch_block(const float* lanes) {
    for (int i = 0; i < kLanes; i += 16) __builtin_prefetch(lanes + i);
}

// States of block r of a recurrent layer after step t, from sample b on: [B][states][64].
inline float* step_states(const Stack& s, const Layer& layer, float* states, int64_t r, int64_t t, int64_t b) {
    return states + ((r * s.steps + t) * s.batch + b) * model_info(layer.neurons).states * kLanes;
}

// --- forward ----------------------------------------------------------------------------------------------------

// One step of a block of some samples.
struct ForwardStep {
    const float* current;  // [samples][64]
    const float* before;   // [states][64] of a sample, `before_stride` floats apart
    int64_t before_stride;
    float* now;            // out: the same, `now_stride` apart
    int64_t now_stride;
    uint64_t* words;       // out, one per sample, `stride` apart
    int64_t stride;
};

template <class M, class R>
void step_forward(const LaneParameters& parameters, int64_t first, int64_t last, const ForwardStep& step) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    Vec p[kVecs][P];
    for (int v = 0; v < kVecs; ++v)
        for (int k = 0; k < P; ++k) p[v][k] = load(parameters.lanes[k] + v * W);
    for (int64_t b = first; b < last; ++b) {
        uint64_t word = 0;
        each_vec([&](auto v) {
            Vec state[S];
            for (int s = 0; s < S; ++s) state[s] = load(step.before + b * step.before_stride + s * kLanes + v * W);
            const Vec membrane = G2G_ISA::step<M>(state, load(step.current + b * kLanes + v * W), p[v], reset);
            word |= greater_bits(membrane, p[v][P - 1]) << (v * W);
            for (int s = 0; s < S; ++s) store(step.now + b * step.now_stride + s * kLanes + v * W, state[s]);
        });
        step.words[b * step.stride] = word;
    }
}

// Of block r of samples first ….
inline void run_forward(const LayerParameters& parameters, const Layer& layer, int64_t first, int64_t samples, int64_t r,
                        const ForwardStep& all) {
    const auto step = with_step(layer.neurons, [](auto model, auto reset) {
        return &step_forward<decltype(model), decltype(reset)>;
    });
    each_sample(parameters, layer, first, samples, r,
                [&](const LaneParameters& own, int64_t begin, int64_t end) { step(own, begin, end, all); });
}

// --- backward ---------------------------------------------------------------------------------------------------

// One step backwards of a block of some samples: pointers to the first one's [64], and the floats from one to the next.
struct BackwardStep {
    const float *tile, *constant;  // ∂L/∂S_t from above: that of this step (or null), and the part without t
    int64_t tile_stride, constant_stride;
    const float* later;            // [samples][64] Vᵀ·∂I_{t+1}
    const float *now, *before;     // [states][64] of a sample
    int64_t now_stride, before_stride;
    bool begins;                   // `before` are no states of a run
    float* states;                 // [samples][states][64] what reaches the states after this step, then those before it
    float* sum;                    // [64] += Σ ∂I_t over the samples
    float* parameters[kMostParameters];  // [64] each, += their gradients
    float* row;                    // out: ∂I_t
    uint16_t* half_row;            // out: the same in bfloat16, may be null
    int64_t row_stride;
    float* compact;                // out: [samples][64] the same, may be null
    uint16_t* half;                // out: the same in bfloat16, may be null
    float* held;                   // [samples][64] += ∂I_t, may be null
    uint64_t* words;               // out, may be null: bit i: lane i has σ'(U_t − θ)·∂L/∂S_t other than 0
    float* values;                 // out: [samples][64] those, one after the other
};

template <class M, class R, class Surrogate>
void step_backward(const LaneParameters& parameters, Steepness alpha, int64_t first, int64_t last, const BackwardStep& step) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    Vec sum[kVecs] = {}, grad[kVecs][P] = {};
    for (int64_t b = first; b < last; ++b) {
        const float* const tile = step.tile ? step.tile + b * step.tile_stride : nullptr;
        float* const row = step.row + b * step.row_stride;
        if (tile) fetch_block(tile + kSamplesAhead * step.tile_stride);
        fetch_block(row + kSamplesAhead * step.row_stride);
        float* value = step.values + b * kLanes;
        uint64_t word = 0;
        each_vec([&](auto v) {
            const int64_t at = b * kLanes + v * W;
            Vec p[P], before[S], g[S];
            for (int k = 0; k < P; ++k) p[k] = load(parameters.lanes[k] + v * W);
            for (int s = 0; s < S; ++s) {
                before[s] = load(step.before + b * step.before_stride + s * kLanes + v * W);
                g[s] = load(step.states + (b * S + s) * kLanes + v * W);
            }
            Vec spike_grad = load(step.constant + b * step.constant_stride + v * W) + load(step.later + at);
            if (tile) spike_grad += load(tile + v * W);
            const auto slope = [&](Vec u) { return Surrogate::derivative(u - p[P - 1], alpha); };
            const auto slope_before = [&](Vec u) { return step.begins ? Vec{} : slope(u); };
            const Vec membrane = load(step.now + b * step.now_stride + (S - 1) * kLanes + v * W);
            const Vec through = spike_grad * slope(compared<M>(before, membrane, p));
            const Vec to_current = M::charge_backward(through, slope_before, before, p, g, grad[v], reset);
            sum[v] += to_current;
            for (int s = 0; s < S; ++s) store(step.states + (b * S + s) * kLanes + v * W, g[s]);
            store(row + v * W, to_current);
            if (step.compact) store(step.compact + at, to_current);
            if (step.held) store(step.held + at, load(step.held + at) + to_current);
            if (kBf16 && step.half) store(step.half + at, to_current);
            if (kBf16 && step.half_row) store(step.half_row + b * step.row_stride + v * W, to_current);
            if (step.words) {
                const uint64_t bits = nonzero_bits(through);
                store_chosen(value, through, bits);
                value += __builtin_popcountll(bits);
                word |= bits << (v * W);
            }
        });
        if (step.words) step.words[b] = word;
    }
    for (int v = 0; v < kVecs; ++v) {
        store(step.sum + v * W, load(step.sum + v * W) + sum[v]);
        for (int k = 0; k < P; ++k) store(step.parameters[k] + v * W, load(step.parameters[k] + v * W) + grad[v][k]);
    }
}

// Of block r of samples first ….
inline void run_backward(const LayerParameters& parameters, const Layer& layer, int64_t first, int64_t samples, int64_t r,
                         const BackwardStep& all) {
    const auto step = with_gradient(layer.neurons, [](auto model, auto reset, auto surrogate) {
        return &step_backward<decltype(model), decltype(reset), decltype(surrogate)>;
    });
    each_sample(parameters, layer, first, samples, r, [&](const LaneParameters& own, int64_t begin, int64_t end) {
        step(own, steepness(layer.neurons), begin, end, all);
    });
}

// What reaches the membranes [64] of a run's first state through its spikes, σ'(U − θ)·∂L/∂S.
inline void spikes_backward(const Neurons& neurons, const float* theta, const float* membrane, const float* spike_grad,
                            float* grad_membrane, float* grad_threshold) {
    with_surrogate(neurons, [&](auto surrogate) {
        for (int i = 0; i < kLanes; i += W) {
            const Vec slope = decltype(surrogate)::derivative(load(membrane + i) - load(theta + i), neurons.alpha);
            const Vec through = load(spike_grad + i) * slope;
            store(grad_membrane + i, load(grad_membrane + i) + through);
            store(grad_threshold + i, load(grad_threshold + i) - through);
        }
    });
}

// X += Σ over the events of a step (rows of weights times factors) for one block of columns and one sample. `words` and
// `values` are those of the sample, `stride` samples apart from block to block.
inline void add_events(const Plan& plan, const float* tiles, int64_t block, const uint64_t* words, const float* values,
                       int64_t stride, Vec* x) {
    constexpr int kAtOnce = 32;  // tiles whose events make one list
    uint16_t row[kAtOnce * 64 + 64];
    float factor[kAtOnce * 64 + 64];
    Vec odd[kVecs] = {};  // two chains of sums: for speed, and for smaller rounding errors
    for (int32_t place = plan.col_first[block], end = plan.col_first[block + 1]; place < end;) {
        const float* weights = tiles + static_cast<int64_t>(place) * kTile;
        const int32_t stop = end - place > kAtOnce ? place + kAtOnce : end;
        int size = 0;
        for (int number = 0; place < stop; ++number, ++place) {
            const int64_t at = plan.tile_row[plan.col_tile[place]] * stride;
            const int count = append_bits(row + size, words[at], number * 64);
            copy_values(values + at * kLanes, count, factor + size);
            size += count;
        }
        int e = 0;
        for (; e + 1 < size; e += 2) {
            const float *w = weights + row[e] * kLanes, *z = weights + row[e + 1] * kLanes;
            const Vec a = all(factor[e]), b = all(factor[e + 1]);
            each_vec([&](auto v) {
                x[v] = fma(a, load(w + v * W), x[v]);
                odd[v] = fma(b, load(z + v * W), odd[v]);
            });
        }
        if (e < size) {
            const float* w = weights + row[e] * kLanes;
            each_vec([&](auto v) { x[v] = fma(all(factor[e]), load(w + v * W), x[v]); });
        }
    }
    each_vec([&](auto v) { x[v] += odd[v]; });
}

// A recurrent connection in the backward pass: what a step hands to the step before it, for the samples of a slice.
struct RecurrentBackward {
    const Plan& plan;
    float event_limit;       // share of neurons with events up to which X is computed by events, which visit all lanes of a tile
    InputGradient gradient;
    int64_t samples;         // of a slice
    Panel<float> x;          // X_{t+1}, one row per sample
    DualPanel current;       // ∂I_{t+1}, for the product, one row per sample
    bool has_current = false;
    Bands bands;             // the same, where there are sparse tiles
    float* states;           // [row blocks][samples][states][64]
    uint64_t* words[2];      // the events of this step and of the one after it, [row blocks][samples]
    float* values[2];        // [row blocks][samples][64]
    int64_t* listed;         // [row blocks][samples]: events that were listed for the connection from below
    uint64_t* inputs;        // [B][row blocks][T] the spikes of the step before
    Panel<float> rows;       // ∂I of all steps, if the layer does not keep them
    DualPanel next;          // ∂I_t, for the product of the step before

    RecurrentBackward(const Stack& s, const Layer& layer, int64_t slice_samples, bool keeps_rows, Arena& arena)
        : plan(*layer.recurrent),
          event_limit(static_cast<float>(layer.gradient_event_limit * plan.gradient_rows / most(1, plan.tiles * kLanes))),
          gradient(plan, layer.recurrent_values, s.bf16, event_limit > 0, arena),

          samples(slice_samples) {
        const int64_t blocks = plan.rows.blocks, count = blocks * samples;
        for (int i = 0; i < 2; ++i) {
            words[i] = arena.take<uint64_t>(count);
            values[i] = arena.take<float>(count * kLanes + W);
        }
        current = DualPanel(blocks, samples, s.bf16, arena);
        next = DualPanel(blocks, samples, s.bf16, arena);
        if (gradient.sparse()) bands.data = arena.take<float>(Bands::size(blocks * kLanes, samples));
        bands.lanes = blocks * kLanes;
        x = {arena.take<float>(count * kLanes), samples};
        states = arena.take<float>(count * model_info(layer.neurons).states * kLanes);
        listed = arena.take<int64_t>(count);
        inputs = arena.take<uint64_t>(static_cast<int64_t>(s.batch) * blocks * s.steps);
        if (!keeps_rows) rows = {arena.take<float>(count * s.steps * kLanes), samples * s.steps};
    }

    // Samples of a task.
    int64_t group() const { return gradient.sparse() ? kLanes : kGradientSamples; }

    // Sums over t and the samples of a task: which of them is that of sample b of the slice that begins with sample `first`;
    // and how many there are of `batch` samples.
    int64_t sum_of(int64_t first, int64_t b) const { return first / samples * divide_up(samples, group()) + b / group(); }
    int64_t sums(int64_t batch) const { return sum_of(batch, 0) + divide_up(batch % samples, group()); }

    // The spikes of each step at the place of the next one, which they reach.
    void shift(const Stack& s, const Layer& layer, const LayerParameters& parameters) const {
        const int64_t R = plan.rows.blocks, T = s.steps;
        parallel_pairs(s.threads, s.batch, R, 16, [&](int64_t b, int64_t r, int) {
            const int64_t at = (b * R + r) * T;
            inputs[at] = first_word(s, layer, parameters, b, r);
            for (int64_t t = 1; t < T; ++t) inputs[at + t] = layer.spikes[at + t - 1];
        });
    }

    // Whether the step after this one reaches it by events, of which `after` are the words of `count` samples.
    bool by_events(const uint64_t* after, int64_t count) const {
        if (!(event_limit > 0)) return false;
        int64_t events = 0;
        for (int64_t r = 0; r < plan.rows.blocks; ++r)
            for (int64_t b = 0; b < count; ++b) events += __builtin_popcountll(after[r * samples + b]);
        return static_cast<double>(events) <= static_cast<double>(event_limit) * static_cast<double>(count * plan.rows.size);
    }

    // What the product reads of ∂I_{t+1}, which lies in `grad` too, the steps of a sample one after the other.
    void load_product(const Panel<float>& grad, int64_t count, int64_t t, int64_t T, int threads) {
        if (!has_current) {
            parallel(threads, plan.rows.blocks, 1, [&](int64_t r, int) {
                for (int64_t b = 0; b < count; ++b)
                    __builtin_memcpy(current.floats.at(r, b), grad.at(r, b * T + t + 1), kLanes * sizeof(float));
            });
            current.convert(plan.rows.blocks, samples, threads);
        }
        if (gradient.sparse()) bands.fill(current.floats, count, threads);
        gradient.load_product(threads);
    }
};

}  // namespace g2g::G2G_ISA
