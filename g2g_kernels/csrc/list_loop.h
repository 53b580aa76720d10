// Neurons that are joined to one another by weights in lists (lists.h), for all steps: a network of the size of a brain.
//
//   I_t = (current)_t + V·S_{t−1},    ∂L/∂S_t = (from outside) + Vᵀ·∂I_{t+1},    ∂L/∂V = Σ_t ∂I_t ⊗ S_{t−1}
//
// Samples go in groups of G = 1, 2, 4, 8 or 16, and everything lies by neuron, [neurons][G], so that a weight joins two
// stretches of G floats. Targets go in ranges, whose currents and gradients stay in L2 while all sources' weights to them pass by
// in the order of memory. Forward, a weight is visited where its source has spiked in some sample of the group. Backward, it is
// visited once per step: for Vᵀ·∂I_t, and for its gradient in those samples in which its source has spiked. Memory: the weights,
// and the states of every step.
//
// Each sum has one order whatever the threads: of currents, by source; of Vᵀ·∂I, by target; of gradients of weights, by group, step
// downwards and sample.
#pragma once

#include "interface.h"
#include "lists.h"
#include "neurons.h"
#include "parallel.h"
#include "parameters.h"
#include "vec.h"

namespace g2g::G2G_ISA {

constexpr int kMostGroup = 16;
constexpr int64_t kSources = 1024;   // lists of a task

// G floats.
template <int G>
struct RowOf {
    typedef float type __attribute__((vector_size(4 * G), aligned(4), may_alias));
};
template <>
struct RowOf<1> {
    typedef float type;
};

// The widths of a group, each at the place of its logarithm.
using Widths = Types<Constant<1>, Constant<2>, Constant<4>, Constant<8>, Constant<kMostGroup>>;

// Where a group of a [B][N] matrix lies: rows of `samples` samples from `data` on, N floats apart. Lanes of other samples are 0.
template <class E>
struct SampleRows {
    E* data;
    int64_t size, samples, width;

    // f(sample, neuron, its lane) for neurons first … last − 1, the lanes from 0 on; a stretch of neurons for all samples.
    template <class F>
    void each(int64_t first, int64_t last, int64_t count, const F& f) const {
        constexpr int64_t kStretch = 128;
        for (int64_t n = first; n < last; n += kStretch)
            for (int64_t s = 0; s < count; ++s)
                for (int64_t i = n; i < least(last, n + kStretch); ++i) f(s, i, (i - first) * width + s);
    }
    // lanes[·] of neurons first … last − 1.
    void load(int64_t first, int64_t last, float* lanes) const {
        if (!data || samples < width) zero(lanes, (last - first) * width * sizeof(float));
        if (data) each(first, last, samples, [&](int64_t s, int64_t n, int64_t lane) { lanes[lane] = data[s * size + n]; });
    }
    void store(int64_t first, int64_t last, const float* lanes) const {
        each(first, last, samples, [&](int64_t s, int64_t n, int64_t lane) { data[s * size + n] = lanes[lane]; });
    }
};

// What both passes have: how a call is divided, the parameters by lane of a group, and the weights in the order of the lists.
struct LoopCall {
    const ListLoop& a;
    Arena& arena;
    const Lists& lists = *a.by_cols;
    const ModelInfo& model = model_info(a.neurons);
    int64_t width = a.width, groups = divide_up(a.samples, width);  // samples of a group
    int64_t padded = a.padded;                                      // its lanes
    int64_t matrix = int64_t{a.samples} * a.size;                   // floats of a [B][N] matrix
    int64_t rows = model.states * padded;                           // and of the states of a step of a group
    LaneParameters parameters = lane_parameters(
        a.neurons, padded, [&](int64_t i) { return i < a.size * width ? i / width : -1; }, arena);
    float* weights = arena.take<float>(lists.entries());
    float* keep = arena.take<float>(a.dropped ? padded : 0);

    // The weights in the order of the lists.
    void load() const {
        each_part(lists.entries(), kCopied, a.threads, [&](int64_t first, int64_t last) {
            for (int64_t e = first; e < last; ++e) weights[e] = a.values[lists.place[e]];
        });
    }

    // f(range, first neuron, the one after its last, first lane, the one after its last) for the ranges of targets, whose tasks of a
    // step they are: whole vectors, since a range has a multiple of 64 neurons.
    template <class F>
    void each_range(const F& f) const {
        parallel(a.threads, lists.ranges, 1, [&](int64_t range, int) {
            const int64_t first = range * lists.length, last = least(a.size, first + lists.length);
            f(range, first, last, first * width, range + 1 == lists.ranges ? padded : last * width);
        });
    }

    template <class E>
    SampleRows<E> of(int64_t group, E* data) const {
        const int64_t first = group * width;
        return {data ? data + first * a.size : nullptr, a.size, least(width, a.samples - first), width};
    }

    // States [states][B][N] of neurons first … last − 1 (null: zeros), and back.
    void load_states(int64_t group, const float* states, int64_t first, int64_t last, float* lanes) const {
        for (int64_t s = 0; s < model.states; ++s)
            of(group, states ? states + s * matrix : nullptr).load(first, last, lanes + s * padded + first * width);
    }
    void store_states(int64_t group, const float* lanes, int64_t first, int64_t last, float* states) const {
        for (int64_t s = 0; s < model.states; ++s)
            of(group, states + s * matrix).store(first, last, lanes + s * padded + first * width);
    }

    // 1 where a neuron's spikes are sent, by lane; null where all are.
    const float* kept_lanes(int64_t group) const {
        if (!a.dropped) return nullptr;
        for (int64_t i = 0; i < padded; ++i) keep[i] = 1.0f;
        of(group, a.dropped).each(0, a.size, least(width, a.samples - group * width), [&](int64_t s, int64_t n, int64_t lane) {
            if (a.dropped[(group * width + s) * a.size + n]) keep[lane] = 0.0f;
        });
        return keep;
    }
};

// --- forward ----------------------------------------------------------------------------------------------------

// One step of some stretches of lanes: `current` in, spikes out, which are 0 where `keep` is.
struct LoopStep {
    const float *current, *before, *keep;  // keep null: all are sent
    float *now, *spikes;
    int64_t stride;                        // of the states
};

template <class M, class R>
void loop_step(const LaneParameters& parameters, int64_t first, int64_t last, const LoopStep& step) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    for (int64_t i = first; i < last; i += W) {
        Vec state[S], p[P];
        for (int s = 0; s < S; ++s) state[s] = load(step.before + s * step.stride + i);
        for (int k = 0; k < P; ++k) p[k] = load(parameters.lanes[k] + i);
        Vec spikes = heaviside(G2G_ISA::step<M>(state, load(step.current + i), p, reset), p[P - 1]);
        if (step.keep) spikes *= load(step.keep + i);
        for (int s = 0; s < S; ++s) store(step.now + s * step.stride + i, state[s]);
        store(step.spikes + i, spikes);
    }
}

// Those of a range of neurons that have spiked in some sample of the group, ascending.
struct Active {
    int32_t* neurons;
    int64_t count;

    void note(const float* spikes, int64_t width, int64_t first, int64_t last) {
        count = 0;
        for (int64_t n = first; n < last; ++n) {
            bool any = false;
            for (int64_t s = 0; s < width; ++s) any |= spikes[n * width + s] != 0.0f;
            neurons[count] = static_cast<int32_t>(n);
            count += any;
        }
    }
};

// current += V·S for a range of targets, with the lists of which `first` begins.
template <int G>
void add_spikes(const Active& active, const int64_t* first, const int32_t* target, const float* weights, const float* spikes,
                float* current) {
    typedef typename RowOf<G>::type Row;
    for (int64_t i = 0; i < active.count; ++i) {
        const int32_t j = active.neurons[i];
        const Row s = *reinterpret_cast<const Row*>(spikes + int64_t{j} * G);
        for (int64_t e = first[j]; e < first[j + 1]; ++e) {
            Row* to = reinterpret_cast<Row*>(current + int64_t{target[e]} * G);
            *to = *to + s * weights[e];
        }
    }
}

inline void list_loop_forward(ListLoop& a, Arena& arena) {
    const LoopCall call{a, arena};
    const Lists& lists = call.lists;
    const int64_t rows = call.rows, padded = call.padded;
    float* current = arena.take<float>(padded);
    float* held = arena.take<float>(a.held ? padded : 0);
    float* spikes[2] = {arena.take<float>(padded), arena.take<float>(padded)};
    float* own = arena.take<float>(rows * (a.kept ? 1 : 2));
    int32_t* noted = arena.take<int32_t>(2 * a.size);
    Active* active[2] = {arena.take<Active>(lists.ranges), arena.take<Active>(lists.ranges)};
    if (!arena.base) return;

    call.load();
    const auto step = with_step(a.neurons, [](auto model, auto reset) { return &loop_step<decltype(model), decltype(reset)>; });
    for (int64_t range = 0; range < lists.ranges; ++range)
        for (Active* each : active) each[range].neurons = noted + (each == active[1]) * a.size + range * lists.length;
    zero(current, padded * sizeof(float));

    for (int64_t group = 0; group < call.groups; ++group) {
        const float* const sent = call.kept_lanes(group);
        float* const kept = a.kept ? a.kept + group * a.steps * rows : nullptr;
        zero(own, rows * (a.kept ? 1 : 2) * sizeof(float));  // the lanes of no neuron too, which are kept
        call.each_range([&](int64_t range, int64_t first, int64_t last, int64_t at, int64_t) {
            call.load_states(group, a.state, first, last, own);
            call.of(group, a.sent).load(first, last, spikes[1] + at);
            active[1][range].note(spikes[1], call.width, first, last);
            if (a.held) call.of(group, a.current).load(first, last, held + at);
        });
        for (int64_t t = 0; t < a.steps; ++t) {
            const float* const from = t == 0 ? own : kept ? kept + (t - 1) * rows : own + t % 2 * rows;
            float* const to = kept ? kept + t * rows : own + (t + 1) % 2 * rows;
            float *const now = spikes[t % 2], *const then = spikes[(t + 1) % 2];
            call.each_range([&](int64_t range, int64_t first, int64_t last, int64_t at, int64_t end) {
                if (a.held)
                    __builtin_memcpy(current + at, held + at, (last - first) * call.width * sizeof(float));
                else
                    call.of(group, a.current + t * call.matrix).load(first, last, current + at);
                choose(Widths{}, __builtin_ctzll(call.width), [&](auto g) {
                    for (int64_t source = 0; source < lists.ranges; ++source)
                        add_spikes<decltype(g)::value>(active[(t + 1) % 2][source], lists.first.data() + range * a.size,
                                                       lists.other.data(), call.weights, then, current);
                });
                (*step)(call.parameters, at, end, {current, from, sent, to, now, padded});
                active[t % 2][range].note(now, call.width, first, last);
                call.of(group, a.spikes + t * call.matrix).store(first, last, now + at);
                if (t + 1 == a.steps) call.store_states(group, to, first, last, a.last);
            });
        }
    }
}

// --- backward ---------------------------------------------------------------------------------------------------

// One step backwards of some stretches of lanes.
struct LoopStepBackward {
    const float *spike_grad, *now, *before, *keep;  // keep null: all are sent
    float *states;                                  // in and out: what reaches the states
    float *to_current;                              // out: ∂I
    float *held;                                    // += ∂I, null: not wanted
    float *parameters[kMostParameters];             // += their gradients
    int64_t stride;                                 // of the states
    bool begins;                                    // without a state the spike before the first step is a constant
};

template <class M, class R, class Surrogate>
void loop_step_backward(const LaneParameters& parameters, Steepness alpha, int64_t first, int64_t last, const LoopStepBackward& step) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    for (int64_t i = first; i < last; i += W) {
        Vec p[P], before[S], g[S], grad[P];
        for (int k = 0; k < P; ++k) p[k] = load(parameters.lanes[k] + i), grad[k] = load(step.parameters[k] + i);
        for (int s = 0; s < S; ++s) before[s] = load(step.before + s * step.stride + i), g[s] = load(step.states + s * step.stride + i);
        Vec spike_grad = load(step.spike_grad + i);
        if (step.keep) spike_grad *= load(step.keep + i);
        const auto slope = [&](Vec u) { return Surrogate::derivative(u - p[P - 1], alpha); };
        const auto slope_before = [&](Vec u) { return step.begins ? Vec{} : slope(u); };
        const Vec through = spike_grad * slope(compared<M>(before, load(step.now + (S - 1) * step.stride + i), p));
        const Vec to_current = M::charge_backward(through, slope_before, before, p, g, grad, reset);
        for (int s = 0; s < S; ++s) store(step.states + s * step.stride + i, g[s]);
        for (int k = 0; k < P; ++k) store(step.parameters[k] + i, grad[k]);
        store(step.to_current + i, to_current);
        if (step.held) store(step.held + i, load(step.held + i) + to_current);
    }
}

// The spikes of a step from the states `before` it and `now`, after it; 0 where `keep` is (null: all are sent).
template <class M>
void loop_spikes(const LaneParameters& parameters, int64_t first, int64_t last, const float* before, const float* now,
                 const float* keep, int64_t stride, float* spikes) {
    constexpr int S = M::info.states, P = M::info.parameters;
    for (int64_t i = first; i < last; i += W) {
        Vec p[P], from[S];
        for (int k = 0; k < P; ++k) p[k] = load(parameters.lanes[k] + i);
        for (int s = 0; s < S; ++s) from[s] = load(before + s * stride + i);
        const Vec sent = heaviside(compared<M>(from, load(now + (S - 1) * stride + i), p), p[P - 1]);
        store(spikes + i, keep ? sent * load(keep + i) : sent);
    }
}

// Of one source and a range of targets: Vᵀ·∂I on top of what those before gave, and what its spikes of the step before, a bit per
// lane, add to the gradients of its weights.
template <int G>
void gather(int64_t first, int64_t last, const int32_t* target, const float* weights, const float* to_current,
            uint32_t spikes, float* sum, float* grad) {
    typedef typename RowOf<G>::type Row;
    Row acc = *reinterpret_cast<const Row*>(sum);
    for (int64_t e = first; e < last; ++e)
        acc = acc + *reinterpret_cast<const Row*>(to_current + int64_t{target[e]} * G) * weights[e];
    *reinterpret_cast<Row*>(sum) = acc;
    for (; spikes; spikes &= spikes - 1) {
        const float* const lane = to_current + __builtin_ctz(spikes);
        for (int64_t e = first; e < last; ++e) grad[e] += lane[int64_t{target[e]} * G];
    }
}

inline void list_loop_backward(ListLoop& a, Arena& arena) {
    const LoopCall call{a, arena};
    const Lists& lists = call.lists;
    const ModelInfo& model = call.model;
    const int64_t rows = call.rows, padded = call.padded, width = call.width;
    float* grad = arena.take<float>(a.grad_values ? lists.entries() : 0);
    float* own = arena.take<float>(rows);      // the states before the first step
    float* states = arena.take<float>(rows);   // what reaches the states
    float* reaching = arena.take<float>(padded);    // Vᵀ·∂I of the step after, then ∂L/∂S
    float* to_current = arena.take<float>(padded);
    float* spikes = arena.take<float>(padded);      // of the step before
    uint32_t* bits = arena.take<uint32_t>(a.size);  // the same, by neuron
    float* held = a.held && a.grad_current ? arena.take<float>(padded) : nullptr;
    float* sums[kMostParameters] = {};
    double* totals[kMostParameters] = {};
    for (int k = 0; k < model.parameters; ++k) {
        sums[k] = arena.take<float>(padded);
        totals[k] = arena.take<double>(a.size);
    }
    if (!arena.base) return;

    call.load();
    if (a.grad_values) zero_floats(grad, lists.entries(), a.threads);
    for (int k = 0; k < model.parameters; ++k) zero(totals[k], a.size * sizeof(double));
    const auto step = with_gradient(a.neurons, [](auto m, auto reset, auto surrogate) {
        return &loop_step_backward<decltype(m), decltype(reset), decltype(surrogate)>;
    });

    const auto spikes_of = choose(Models{}, a.neurons.model, [](auto m) { return &loop_spikes<decltype(m)>; });

    for (int64_t group = 0; group < call.groups; ++group) {
        const float* const sent = call.kept_lanes(group);
        const float* const kept = a.kept + group * a.steps * rows;
        zero(reaching, padded * sizeof(float));
        if (held) zero(held, padded * sizeof(float));
        for (int k = 0; k < model.parameters; ++k) zero(sums[k], padded * sizeof(float));
        call.each_range([&](int64_t, int64_t first, int64_t last, int64_t, int64_t) {
            call.load_states(group, a.state, first, last, own);
            call.load_states(group, a.grad_last, first, last, states);
        });
        for (int64_t t = a.steps - 1; t >= 0; --t) {
            const float* const now = kept + t * rows;
            const float* const before = t ? now - rows : own;
            call.each_range([&](int64_t, int64_t first, int64_t last, int64_t at, int64_t end) {
                constexpr int64_t kBlock = 64;  // neurons
                alignas(64) float outside[kBlock * kMostGroup];
                for (int64_t n = first; a.grad_spikes && n < last; n += kBlock) {
                    const int64_t stop = least(last, n + kBlock);
                    call.of(group, a.grad_spikes + (a.grad_held ? 0 : t * call.matrix)).load(n, stop, outside);
                    float* const to = reaching + n * width;
                    for (int64_t i = 0; i < (stop - n) * width; ++i) to[i] += outside[i];
                }
                LoopStepBackward own_step{reaching, now, before, sent, states, to_current, held, {}, padded, t == 0 && !a.state};
                for (int k = 0; k < model.parameters; ++k) own_step.parameters[k] = sums[k];
                (*step)(call.parameters, steepness(a.neurons), at, end, own_step);
                if (a.grad_current && !a.held) call.of(group, a.grad_current + t * call.matrix).store(first, last, to_current + at);
                if (t)
                    (*spikes_of)(call.parameters, at, end, t > 1 ? before - rows : own, before, sent, padded, spikes);
                else
                    call.of(group, a.sent).load(first, last, spikes + at);
                for (int64_t n = first; a.grad_values && n < last; ++n) {
                    bits[n] = 0;
                    for (int64_t s = 0; s < width; ++s) bits[n] |= uint32_t{spikes[n * width + s] != 0.0f} << s;
                }
            });
            if (!t && !a.sent) break;
            zero_floats(reaching, padded, a.threads);
            for (int64_t range = 0; range < lists.ranges; ++range) {
                const int64_t* const list = lists.first.data() + range * a.size;
                each_part(a.size, kSources, a.threads, [&](int64_t first, int64_t last) {
                    choose(Widths{}, __builtin_ctzll(width), [&](auto g) {
                        for (int64_t j = first; j < last; ++j)
                            gather<decltype(g)::value>(list[j], list[j + 1], lists.other.data(), call.weights, to_current,
                                                       a.grad_values ? bits[j] : 0, reaching + j * width, grad);
                    });
                });
            }
        }
        call.each_range([&](int64_t, int64_t first, int64_t last, int64_t at, int64_t) {
            if (a.grad_sent) call.of(group, a.grad_sent).store(first, last, reaching + at);
            if (held) call.of(group, a.grad_current).store(first, last, held + at);
            if (a.grad_state) call.store_states(group, states, first, last, a.grad_state);
            for (int k = 0; k < model.parameters; ++k)
                for (int64_t n = first; n < last; ++n)
                    for (int64_t s = 0; s < width; ++s) totals[k][n] += sums[k][n * width + s];
        });
    }
    for (int k = 0; k < model.parameters; ++k)
        gradient_of_totals(a.neurons.parameters[k], model.decays[k], totals[k], a.size, [](int64_t n) { return n; }, a.size);
    if (!a.grad_values) return;
    zero_floats(a.grad_values, a.weights, a.threads);  // padding of units too
    each_part(lists.entries(), kCopied, a.threads, [&](int64_t first, int64_t last) {
        for (int64_t e = first; e < last; ++e) a.grad_values[lists.place[e]] = grad[e];
    });
}

}  // namespace g2g::G2G_ISA
