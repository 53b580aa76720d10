// Recurrent connections V inside a layer, I_t = (W·x_t + b) + V·S_{t−1}: what a step needs of all neurons of the step before.
//
// Feed-forward layers run one block over all T. Here the steps are the outer loop, and the tasks of a step are the blocks of
// some samples: a block's weights (134 KB by default) are read once for all of them. Forward, the currents W·x_t + b of all
// steps are there already, in the place of the membranes; V·S_{t−1} comes by events. Backward, the steps go downwards:
//
//   ∂L/∂S_t = (from the layer above) + Vᵀ·∂I_{t+1}
//
// by the product, or by events (gradient_events.h: the same recursion X_t = Vᵀ·e_t + β·X_{t+1}), one step at a time.
#pragma once

#include "events.h"
#include "input_gradient.h"
#include "stack.h"
#include "sweep.h"

namespace g2g::G2G_ISA {

constexpr int64_t kStepSamples = 16;      // of a task of one step, forward
constexpr int64_t kGradientSamples = 32;  // the same, backward: rows of its product

// One step of a block of one sample. `now` [states][64] holds the current in the place of the membrane, then the states.
template <class M, int R>
void step_forward(const float* recurrent, float* now, const float* before, const BlockParameters& parameters,
                  uint64_t* word, float* count) {
    constexpr int S = M::info.states, P = M::info.parameters;
    uint64_t bits = 0;
    each_vec([&](auto v) {
        Vec p[P], state[S];
        for (int k = 0; k < P; ++k) p[k] = load(parameters.lanes[k] + v * W);
        for (int s = 0; s < S; ++s) state[s] = load(before + s * kLanes + v * W);
        Vec current = load(now + (S - 1) * kLanes + v * W);
        if (recurrent) current += load(recurrent + v * W);
        M::template charge<R>(state, current, p);
        bits |= greater_bits(state[S - 1], p[P - 1]) << (v * W);
        store(count + v * W, load(count + v * W) + heaviside(state[S - 1], p[P - 1]));
        for (int s = 0; s < S; ++s) store(now + s * kLanes + v * W, state[s]);
    });
    *word = bits;
}

using ForwardStep = void (*)(const float*, float*, const float*, const BlockParameters&, uint64_t*, float*);

inline ForwardStep forward_step(const Neurons& neurons) {
    return with_model(neurons, [&](auto model) {
        return with_reset(neurons, [](auto reset) -> ForwardStep { return step_forward<decltype(model), decltype(reset)::value>; });
    });
}

// What a step backwards of a block of one sample reads and writes.
struct StepGradient {
    const float *tile, *constant;  // ∂L/∂S_t from above, [64]: that of this step (or null), and the part without t
    const float* recurrent;        // [64], Vᵀ·∂I_{t+1}
    const float *now, *before;     // [states][64]
    float* states;                 // [states][64]: what reaches the states after this step, then those before it
    float* sum;                    // [64] += ∂L/∂I_t
    float* parameters[kMostParameters];  // [64] each, += their gradients
    float* current;                // out: ∂L/∂I_t, [64]
    float* row;                    // out: the same, may be null
    uint16_t *half, *half_row;     // out: the same in bfloat16, may be null
    uint64_t* word;                // out, may be null: bit i: lane i has σ'(U_t − θ)·∂L/∂S_t other than 0
    float* value;                  // out: those, one after the other
};

template <class M, int R, class Surrogate>
void step_backward(const BlockParameters& parameters, float alpha, const StepGradient& step) {
    constexpr int S = M::info.states, P = M::info.parameters;
    uint64_t word = 0;
    float* value = step.value;
    each_vec([&](auto v) {
        Vec p[P], before[S], g[S], grad[P];
        for (int k = 0; k < P; ++k) {
            p[k] = load(parameters.lanes[k] + v * W);
            grad[k] = load(step.parameters[k] + v * W);
        }
        for (int s = 0; s < S; ++s) {
            before[s] = load(step.before + s * kLanes + v * W);
            g[s] = load(step.states + s * kLanes + v * W);
        }
        Vec spike_grad = load(step.constant + v * W) + load(step.recurrent + v * W);
        if (step.tile) spike_grad += load(step.tile + v * W);
        const Vec through = spike_grad * Surrogate::derivative(load(step.now + (S - 1) * kLanes + v * W) - p[P - 1], alpha);
        const Vec to_current = M::template charge_backward<R>(through, before, p, g, grad);
        for (int k = 0; k < P; ++k) store(step.parameters[k] + v * W, grad[k]);
        for (int s = 0; s < S; ++s) store(step.states + s * kLanes + v * W, g[s]);
        store(step.sum + v * W, load(step.sum + v * W) + to_current);
        store(step.current + v * W, to_current);
        if (step.row) store(step.row + v * W, to_current);
        if (kBf16 && step.half) store(step.half + v * W, to_current);
        if (kBf16 && step.half_row) store(step.half_row + v * W, to_current);
        if (step.word) {
            const uint64_t bits = nonzero_bits(through);
            store_chosen(value, through, bits);
            value += __builtin_popcountll(bits);
            word |= bits << (v * W);
        }
    });
    if (step.word) *step.word = word;
}

// What reaches the state before the first step through its spikes: σ'(U − θ)·∂L/∂S of the membranes U, [64].
template <class M, class Surrogate>
void spikes_backward(const BlockParameters& parameters, float alpha, const float* membrane, const float* spike_grad,
                     float* grad_membrane, float* grad_threshold) {
    for (int v = 0; v < kVecs; ++v) {
        const Vec theta = load(parameters.lanes[M::info.parameters - 1] + v * W);
        const Vec through = load(spike_grad + v * W) * Surrogate::derivative(load(membrane + v * W) - theta, alpha);
        store(grad_membrane + v * W, load(grad_membrane + v * W) + through);
        store(grad_threshold + v * W, load(grad_threshold + v * W) - through);
    }
}

struct BackwardSteps {
    void (*step)(const BlockParameters&, float, const StepGradient&);
    void (*first)(const BlockParameters&, float, const float*, const float*, float*, float*);
};

inline BackwardSteps backward_steps(const Neurons& neurons) {
    return with_model(neurons, [&](auto model) {
        return with_reset(neurons, [&](auto reset) {
            return with_surrogate(neurons, [](auto surrogate) -> BackwardSteps {
                using M = decltype(model);
                return {step_backward<M, decltype(reset)::value, decltype(surrogate)>,
                        spikes_backward<M, decltype(surrogate)>};
            });
        });
    });
}

// The spikes of the state before the first step, one word of a block; 0 if the run begins without one.
inline uint64_t first_word(const Stack& s, const Layer& layer, const BlockParameters& parameters, int64_t b, int64_t r) {
    if (!layer.first) return 0;
    alignas(64) float states[kMostStates * kLanes];
    load_states(s, layer, layer.first, b, r, states);
    const ModelInfo& model = model_info(layer.neurons);
    const float *membrane = states + (model.states - 1) * kLanes, *theta = parameters.lanes[model.parameters - 1];
    uint64_t word = 0;
    for (int v = 0; v < kVecs; ++v) word |= greater_bits(load(membrane + v * W), load(theta + v * W)) << (v * W);
    return word;
}

// The steps of a layer, whose currents lie in the place of its membranes, `states` [B][row blocks][T][states][64].
struct ForwardSteps {
    const Stack& stack;
    const Layer& layer;
    const LayerParameters& parameters;
    const float* tiles;   // of V, as forward_tiles() gives them
    float* states;
    float* counts;        // [B][row blocks][64]
    uint64_t* begin;      // [B][row blocks]: the spikes before the first step

    void run() const {
        const Plan& plan = *layer.recurrent;
        const int64_t count = static_cast<int64_t>(stack.batch) * plan.rows.blocks;
        zero(counts, count * kLanes * sizeof(float));
        for (int64_t i = 0; i < count; ++i)
            begin[i] = first_word(stack, layer, parameters.block(i % plan.rows.blocks), i / plan.rows.blocks, i % plan.rows.blocks);
        // strips cost fewer additions and more lists: at the rates of hidden layers they win wherever they exist
        if (plan.rows.strip == kLanes) return steps<EventCurrent>();
        if (plan.rows.strip == 16) return steps<StripCurrent<16>>();
        steps<StripCurrent<32>>();
    }

    template <class Current>
    void steps() const {
        const Plan& plan = *layer.recurrent;
        const ForwardStep step = forward_step(layer.neurons);
        const int64_t R = plan.rows.blocks, T = stack.steps, B = stack.batch, groups = divide_up(B, kStepSamples);
        const int64_t size = model_info(layer.neurons).states * kLanes;
        for (int64_t t = 0; t < T; ++t)
            parallel(stack.threads, R * groups, 1, [&](int64_t task, int) {
                const int64_t r = task / groups, end = least(B, (task % groups + 1) * kStepSamples);
                for (int64_t b = task % groups * kStepSamples; b < end; ++b) {
                    const int64_t block = b * R + r;
                    Vec sum[kVecs];
                    alignas(64) float recurrent[kLanes], first[kMostStates * kLanes];
                    float* now = states + (block * T + t) * size;
                    if (t) {
                        Current{&plan, r, layer.spikes + b * R * T, T, tiles, kZeros}(t - 1, sum);
                    } else {
                        load_states(stack, layer, layer.first, b, r, first);
                        if (layer.first) Current{&plan, r, begin + b * R, 1, tiles, kZeros}(0, sum);
                    }
                    const bool sent = t || layer.first;
                    if (sent)
                        for (int v = 0; v < kVecs; ++v) store(recurrent + v * W, sum[v]);
                    step(sent ? recurrent : nullptr, now, t ? now - size : first, parameters.block(r), layer.spikes + block * T + t,
                         counts + block * kLanes);
                    if (t + 1 == T && layer.last) store_states(stack, layer, now, b, r, layer.last);
                }
            });
    }
};

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
            const float* source = values + at * kLanes;
            const int count = append_bits(row + size, words[at], number * 64);
            for (int i = 0; i < count; i += W) {
                store(factor + size + i, load(source + i));
                asm("");  // keeps this from becoming a call of memcpy, which takes longer than most of these loops
            }
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

// A recurrent connection in the backward pass: what a step hands to the step before it, for the samples of a chunk.
struct RecurrentBackward {
    const Plan& plan;
    InputGradient gradient;       // Vᵀ·∂I by the product
    BackwardSteps steps;
    float event_limit;            // share of neurons with events up to which it is computed by events
    int64_t samples;              // of a chunk
    DualPanel current[2];         // ∂I of this step and of the one after it, one row per sample
    Bands bands;                  // the latter, where there are sparse tiles
    Panel<float> x;               // Vᵀ·∂I_{t+1}
    float* states;                // [row blocks][samples][states][64]
    uint64_t* words[2];           // the events of those two steps, [row blocks][samples]
    float* values[2];             // [row blocks][samples][64]
    int64_t* listed;              // [row blocks][samples]: events that were listed for the connection from below
    uint64_t* inputs;             // [B][row blocks][T] the spikes of the step before
    Panel<float> rows;            // ∂I of all steps, if the layer does not keep them

    RecurrentBackward(const Stack& s, const Layer& layer, int64_t chunk_samples, bool keeps_rows, Arena& arena)
        : plan(*layer.recurrent),
          gradient(plan, s.bf16, true, arena),
          steps(backward_steps(layer.neurons)),
          event_limit(static_cast<float>(layer.gradient_event_limit * plan.event_runs.ratio)),
          samples(chunk_samples) {
        const int64_t blocks = plan.rows.blocks, count = blocks * samples;
        for (int i = 0; i < 2; ++i) {
            current[i] = DualPanel(blocks, samples, s.bf16, arena);
            words[i] = arena.take<uint64_t>(count);
            values[i] = arena.take<float>(count * kLanes + W);
        }
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

    // The spikes of each step at the place of the next one, which they reach.
    void shift(const Stack& s, const Layer& layer, const LayerParameters& parameters) const {
        const int64_t R = plan.rows.blocks, T = s.steps;
        parallel(s.threads, s.batch * R, 16, [&](int64_t block, int) {
            uint64_t* out = inputs + block * T;
            out[0] = first_word(s, layer, parameters.block(block % R), block / R, block % R);
            for (int64_t t = 1; t < T; ++t) out[t] = layer.spikes[block * T + t - 1];
        });
    }

    // Whether the step after this one reaches it by events; `count` samples, of which `after` are the words.
    bool by_events(const uint64_t* after, int64_t count) const {
        if (!(event_limit > 0)) return false;
        int64_t events = 0;
        for (int64_t r = 0; r < plan.rows.blocks; ++r)
            for (int64_t b = 0; b < count; ++b) events += __builtin_popcountll(after[r * samples + b]);
        return static_cast<double>(events) <= static_cast<double>(event_limit) * static_cast<double>(count * plan.rows.size);
    }
};

}  // namespace g2g::G2G_ISA
