// Neurons alone: currents [T][L] → spikes [T][L], where a lane is one neuron of one sample and L = samples · N.
//
// Bound by memory: forward keeps the states of every few steps, backward recomputes those between. Stores bypass the caches.
// A task is a span of lanes over all T. It visits `every` steps of one bundle of the span's vectors before it goes on to
// the next: meanwhile the states and sums stay in registers, and the rows of those steps, often a power of two apart,
// are no more than the ways of one set of the L1 cache.
#pragma once

#include "interface.h"
#include "neurons.h"
#include "parallel.h"
#include "parameters.h"
#include "vec.h"

namespace g2g::G2G_ISA {

constexpr int64_t kSpan = 4096;   // lanes at most; the sums of a span stay in L2
constexpr int kBundleVecs = 4;
constexpr int64_t kBundle = kBundleVecs * W;
constexpr int64_t kAhead = 512;   // lanes: a row is fetched into L2 this far ahead

// How the lanes of a call are divided into tasks.
struct Spans {
    int64_t lanes, span, count;
    explicit Spans(const NeuronLoop& a) : lanes(a.samples * a.size) {
        const int64_t share = lanes / (4 * a.threads);  // four tasks per thread, unless there are few lanes
        span = most(least(share, kSpan) / kBundle, int64_t{4}) * kBundle;
        count = divide_up(lanes, span);
    }
    int64_t padded() const { return count * span; }
};

// Calls f(first lane, lanes, worker) for every span.
template <class F>
void for_each_span(const NeuronLoop& a, const Spans& spans, const F& f) {
    parallel(a.threads, spans.count, 1, [&](int64_t task, int worker) {
        const int64_t first = task * spans.span;
        f(first, least(spans.span, spans.lanes - first), worker);
        stream_fence();  // streamed stores are visible before the task counts as done
    });
}

// The parameters of the neurons, then those of the first ones again, for spans that begin with any neuron.
inline LaneParameters loop_parameters(const NeuronLoop& a, const Spans& spans, Arena& arena) {
    return lane_parameters(a.neurons, a.size + spans.span, [&](int64_t i) { return i % a.size; }, arena);
}

inline void fetch(const float* p) {
    for (int i = 0; i < W; i += 16) __builtin_prefetch(p + i, 0, 2);
}

// V vectors of neighbouring lanes or, if V is 0, as many lanes as are left for a last vector.
template <int V>
struct Lanes {
    static constexpr int vectors = V ? V : 1;
    int64_t count = V * W;

    Vec load(const float* p, int v) const {
        if (V) return G2G_ISA::load(p + v * W);
        alignas(64) float lanes[W] = {};
        for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
        return G2G_ISA::load(lanes);
    }
    void stream(float* p, int v, Vec x) const {
        if (V) return G2G_ISA::stream(p + v * W, x);
        for (int64_t i = 0; i < count; ++i) p[i] = x[i];
    }
};

// Calls f(i, Lanes<…>) for every bundle of a span, and for every vector of what is left.
template <class F>
inline void for_each_bundle(int64_t width, const F& f) {
    int64_t i = 0;
    for (; i + kBundle <= width; i += kBundle) f(i, Lanes<kBundleVecs>{});
    for (; i < width; i += W) f(i, Lanes<0>{least(W, width - i)});
}

// The steps that are visited together: how many, and how far apart their rows lie.
struct Steps {
    int64_t count, current_stride, stride;  // stride: of every row except a held current, one row for all steps
};

// Lanes from the i-th of a span on. `states` [states][span] go in and out; `kept`, whose rows are steps.stride apart,
// receives them too, if not null.
template <class M, class R, class L>
void forward_bundle(const L& lanes, const Steps& steps, const LaneParameters& parameters, int64_t i, const float* current,
                    float* states, int64_t span, float* spikes, float* kept) {
    constexpr int V = L::vectors, S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    const int64_t count = steps.count, current_stride = steps.current_stride, stride = steps.stride;
    Vec state[V][S], p[V][P];
    unrolled<V>([&](auto v) {
        for (int s = 0; s < S; ++s) state[v][s] = load(states + s * span + i + v * W);
        for (int k = 0; k < P; ++k) p[v][k] = load(parameters.lanes[k] + i + v * W);
    });
    for (int64_t t = 0; t < count; ++t, current += current_stride, spikes += stride)
        unrolled<V>([&](auto v) {
            fetch(current + kAhead + v * W);
            lanes.stream(spikes, v, heaviside(step<M>(state[v], lanes.load(current, v), p[v], reset), p[v][P - 1]));
        });
    unrolled<V>([&](auto v) {
        for (int s = 0; s < S; ++s) {
            store(states + s * span + i + v * W, state[v][s]);
            if (kept) lanes.stream(kept + s * stride, v, state[v][s]);
        }
    });
}

// All steps of one span. `states` [states][span] is scratch.
template <class M, class R>
void forward_span(const NeuronLoop& a, const Spans& spans, const LaneParameters& parameters, int64_t place, int64_t width,
                  float* states) {
    constexpr int S = M::info.states;
    const int64_t row = spans.lanes, current_row = a.held ? 0 : row;
    zero(states, S * spans.span * sizeof(float));
    if (a.state)
        for (int s = 0; s < S; ++s)
            __builtin_memcpy(states + s * spans.span, a.state + s * row + place, width * sizeof(float));
    for (int64_t first = 0; first < a.steps; first += a.every) {
        const Steps steps{least(a.every, a.steps - first), current_row, row};
        const bool keep = a.kept && first + a.every < a.steps;
        float* kept = keep ? a.kept + first / a.every * S * row + place : nullptr;
        for_each_bundle(width, [&](int64_t i, auto lanes) {
            forward_bundle<M, R>(lanes, steps, parameters, i, a.current + first * current_row + place + i, states,
                                 spans.span, a.spikes + first * row + place + i, keep ? kept + i : nullptr);
        });
    }
    for (int s = 0; a.last && s < S; ++s)
        __builtin_memcpy(a.last + s * row + place, states + s * spans.span, width * sizeof(float));
}

inline void neurons_forward(NeuronLoop& a, Arena& arena) {
    const Spans spans(a);
    const LaneParameters parameters = loop_parameters(a, spans, arena);
    const int64_t scratch_size = model_info(a.neurons).states * spans.span;
    float* scratch = arena.take<float>(scratch_size * a.threads);
    if (!arena.base) return;
    const auto run = with_step(a.neurons, [](auto m, auto reset) { return &forward_span<decltype(m), decltype(reset)>; });
    for_each_span(a, spans, [&](int64_t place, int64_t width, int worker) {
        run(a, spans, parameters.from(place % a.size), place, width, scratch + worker * scratch_size);
    });
}

// The sums of the lanes of a span: for each state the gradient from later steps; Σ ∂L/∂I; the gradients of the
// parameters.
struct LaneSums {
    float* running;  // [states][span]
    int64_t span;
    float* current;
    float* parameters[kMostParameters];
};

// Lanes from the i-th of a span on. `states` has room for those before the first step and after each one,
// [steps + 1][states][kBundle]. ∂L/∂I_t goes to a row of `target` each or, if that is null, into sums.current.
template <class M, class R, class Surrogate, class L>
void backward_bundle(const L& lanes, const Steps& steps, const LaneParameters& parameters, int64_t i,
                     Steepness alpha, const float* kept, const float* current, float* states,
                     const float* upstream, float* target, const LaneSums& sums) {
    constexpr int V = L::vectors, S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    const int64_t count = steps.count, current_stride = steps.current_stride, stride = steps.stride;
    const float* rows[P];
    for (int k = 0; k < P; ++k) rows[k] = parameters.lanes[k] + i;
    Vec state[V][S], g[V][S], grad[V][P], to_current[V];
    unrolled<V>([&](auto v) {
        for (int s = 0; s < S; ++s) {
            state[v][s] = Vec{};
            if (kept) {
                fetch(kept + s * stride + kAhead + v * W);
                state[v][s] = lanes.load(kept + s * stride, v);
            }
            store(states + s * kBundle + v * W, state[v][s]);
            g[v][s] = load(sums.running + s * sums.span + i + v * W);
        }
        for (int k = 0; k < P; ++k) grad[v][k] = load(sums.parameters[k] + i + v * W);
        to_current[v] = target ? Vec{} : load(sums.current + i + v * W);
    });
    for (int64_t t = 1; t <= count; ++t, current += current_stride)
        unrolled<V>([&](auto v) {
            fetch(current + kAhead + v * W);
            Vec p[P];
            for (int k = 0; k < P; ++k) p[k] = load(rows[k] + v * W);
            M::charge(state[v], lanes.load(current, v), p, reset);
            for (int s = 0; s < S; ++s) store(states + (t * S + s) * kBundle + v * W, state[v][s]);
        });
    for (int64_t t = count - 1; t >= 0; --t)
        unrolled<V>([&](auto v) {
            const float* from = upstream + t * stride;
            fetch(from + kAhead + v * W);
            Vec p[P];
            for (int k = 0; k < P; ++k) p[k] = load(rows[k] + v * W);
            const auto slope = [&](Vec u) { return Surrogate::derivative(u - p[P - 1], alpha); };
            // without a state the spike before the first step is a constant
            const auto slope_before = [&](Vec u) { return t || kept ? slope(u) : Vec{}; };
            const Vec after = state[v][S - 1];
            for (int s = 0; s < S; ++s) state[v][s] = load(states + (t * S + s) * kBundle + v * W);
            const Vec through = lanes.load(from, v) * slope(compared<M>(state[v], after, p));
            const Vec now = M::charge_backward(through, slope_before, state[v], p, g[v], grad[v], reset);
            to_current[v] += now;
            if (target) lanes.stream(target + t * stride, v, now);
        });
    unrolled<V>([&](auto v) {
        for (int s = 0; s < S; ++s) store(sums.running + s * sums.span + i + v * W, g[v][s]);
        for (int k = 0; k < P; ++k) store(sums.parameters[k] + i + v * W, grad[v][k]);
        if (!target) store(sums.current + i + v * W, to_current[v]);
    });
}

// All steps of one span, from the last to the first. `states` is scratch for backward_bundle().
template <class M, class R, class Surrogate>
void backward_span(const NeuronLoop& a, const Spans& spans, const LaneParameters& parameters, int64_t place, int64_t width,
                   float* states, const LaneSums& sums) {
    constexpr int S = M::info.states;
    const int64_t row = spans.lanes, current_row = a.held ? 0 : row;
    float* rows = a.held ? nullptr : a.grad_current;
    for (int64_t first = (a.steps - 1) / a.every * a.every; first >= 0; first -= a.every) {
        const Steps steps{least(a.every, a.steps - first), current_row, row};
        for_each_bundle(width, [&](int64_t i, auto lanes) {
            const int64_t at = first * row + place + i;
            backward_bundle<M, R, Surrogate>(
                lanes, steps, parameters, i, steepness(a.neurons),
                first     ? a.kept + (first / a.every - 1) * S * row + place + i
                : a.state ? a.state + place + i
                          : nullptr,
                a.current + first * current_row + place + i, states, a.grad_spikes + at, rows ? rows + at : nullptr,
                sums);
        });
    }
    if (a.held && a.grad_current)
        for_each_bundle(width, [&](int64_t i, auto lanes) {
            for (int v = 0; v < lanes.vectors; ++v)
                lanes.stream(a.grad_current + place + i, v, load(sums.current + i + v * W));
        });
}

inline void neurons_backward(NeuronLoop& a, Arena& arena) {
    const Spans spans(a);
    const ModelInfo& model = model_info(a.neurons);
    const LaneParameters parameters = loop_parameters(a, spans, arena);
    float* parameter_sums[kMostParameters] = {};
    for (int k = 0; k < model.parameters; ++k) parameter_sums[k] = arena.take<float>(spans.padded());
    double* totals = arena.take<double>(a.size);
    const int64_t running_size = (model.states + 1) * spans.span;  // and Σ ∂L/∂I
    const int64_t scratch_size = running_size + (a.every + 1) * model.states * kBundle;
    float* scratch = arena.take<float>(scratch_size * a.threads);
    if (!arena.base) return;

    const auto run = with_gradient(a.neurons, [](auto m, auto reset, auto surrogate) {
        return &backward_span<decltype(m), decltype(reset), decltype(surrogate)>;
    });
    for_each_span(a, spans, [&](int64_t place, int64_t width, int worker) {
        float* mine = scratch + worker * scratch_size;
        LaneSums sums{mine, spans.span, mine + model.states * spans.span, {}};
        zero(mine, running_size * sizeof(float));
        if (a.grad_last)
            for (int s = 0; s < model.states; ++s)
                __builtin_memcpy(mine + s * spans.span, a.grad_last + s * spans.lanes + place, width * sizeof(float));
        for (int k = 0; k < model.parameters; ++k) {
            sums.parameters[k] = parameter_sums[k] + place;
            zero(sums.parameters[k], spans.span * sizeof(float));
        }
        run(a, spans, parameters.from(place % a.size), place, width, mine + running_size, sums);
        if (a.grad_state)
            for (int s = 0; s < model.states; ++s)
                __builtin_memcpy(a.grad_state + s * spans.lanes + place, mine + s * spans.span, width * sizeof(float));
    });
    for (int k = 0; k < model.parameters; ++k)
        parameter_gradient(a.neurons.parameters[k], model.decays[k], {parameter_sums[k], a.samples, a.size, a.size, kLanes},
                           [](int64_t i) { return i; }, a.size, a.threads, totals);
}

}  // namespace g2g::G2G_ISA
