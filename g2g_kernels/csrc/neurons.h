// LIF neurons alone: currents [T][L] → spikes [T][L], where a lane is one neuron of one sample and L = samples · N.
//
// Memory-bound, so what counts is how often memory is passed over and in what order. Forward reads the currents, writes
// the spikes and keeps the membranes of every few steps. Backward computes the membranes of those few steps again from
// the currents and the kept ones, reads ∂L/∂S and writes ∂L/∂I. Five passes over [T, L] in all, the two written ones past
// the caches.
//
// A task is a span of lanes over all T. It visits `every` steps of one piece of the span before it goes on to the next
// piece: what runs on from step to step stays in registers meanwhile, and the rows of those steps, often a power of two
// apart, are no more than the ways of one set of the L1 cache.
#pragma once

#include "layout.h"
#include "lif.h"

namespace g2g::G2G_ISA {

constexpr int64_t kSpan = 4096;   // at most; what a span adds up stays in L2
constexpr int kTogether = 4;      // vectors of a piece
constexpr int64_t kPiece = kTogether * W;
constexpr int64_t kAhead = 512;   // lanes: a row is fetched into L2 this far ahead

// How the lanes of a call are divided into tasks.
struct Spans {
    int64_t lanes, span, count;
    explicit Spans(const LIF& a) : lanes(a.samples * a.neurons) {
        const int64_t share = lanes / (4 * a.threads);  // four tasks a thread, unless lanes are few
        span = most(least(share, kSpan) / kPiece, int64_t{4}) * kPiece;
        count = (lanes + span - 1) / span;
    }
    int64_t padded() const { return count * span; }
};

// β and θ of lanes that follow each other.
struct Parameters {
    const float *decay, *theta;
    Parameters operator+(int64_t i) const { return {decay + i, theta + i}; }
};

// The parameters of the neurons, and once more of the first ones, for spans that begin with any neuron.
struct NeuronParameters {
    int64_t neurons;
    float *decay, *theta;
    NeuronParameters(const LIF& a, int64_t span, Arena& arena) : neurons(a.neurons) {
        const int64_t count = neurons + span;
        decay = arena.take<float>(count), theta = arena.take<float>(count);
        if (!arena.base) return;
        for (int64_t i = 0; i < count; ++i) {
            decay[i] = clamp_decay(a.beta[a.beta_per_neuron ? i % neurons : 0]);
            theta[i] = a.theta[a.theta_per_neuron ? i % neurons : 0];
        }
    }
    Parameters of(int64_t lane) const { return {decay + lane % neurons, theta + lane % neurons}; }
};

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

// Calls f(first lane, lanes, worker) for every span.
template <class F>
void for_each_span(const LIF& a, const Spans& spans, const F& f) {
    parallel(a.threads, spans.count, 1, [&](int64_t task, int worker) {
        const int64_t first = task * spans.span;
        f(first, least(spans.span, spans.lanes - first), worker);
        stream_fence();  // streamed stores are visible before the task counts as done
    });
}

// Calls f(i, Lanes<…>) over a span in pieces.
template <class F>
inline void for_each_piece(int64_t width, const F& f) {
    int64_t i = 0;
    for (; i + kPiece <= width; i += kPiece) f(i, Lanes<kTogether>{});
    for (; i < width; i += W) f(i, Lanes<0>{least(W, width - i)});
}

// The steps that are visited together: how many, and how far apart their rows lie.
struct Steps {
    int64_t count, current_stride, stride;  // stride: of every row but those of a held current, which is one for all steps
};

template <int RESET, class L>
void forward_piece(const L& lanes, const Steps& steps, const Parameters& p, const float* current, float* membrane,
                   float* spikes, float* kept) {
    constexpr int V = L::vectors;
    Vec u[V], decay[V], theta[V];
    unrolled<V>([&](auto k) {
        constexpr int v = decltype(k)::value;
        u[v] = load(membrane + v * W), decay[v] = load(p.decay + v * W), theta[v] = load(p.theta + v * W);
    });
    for (int64_t t = 0; t < steps.count; ++t, current += steps.current_stride, spikes += steps.stride)
        unrolled<V>([&](auto k) {
            constexpr int v = decltype(k)::value;
            fetch(current + kAhead + v * W);
            u[v] = charge<RESET>(u[v], lanes.load(current, v), decay[v], theta[v]);
            lanes.stream(spikes, v, step(u[v], theta[v]));
        });
    unrolled<V>([&](auto k) {
        constexpr int v = decltype(k)::value;
        store(membrane + v * W, u[v]);
        if (kept) lanes.stream(kept, v, u[v]);
    });
}

inline void lif_forward_alone(LIF& a, Arena& arena) {
    const Spans spans(a);
    const NeuronParameters neurons(a, spans.span, arena);
    float* scratch = arena.take<float>(spans.span * a.threads);
    if (!arena.base) return;
    const int64_t row = spans.lanes, current_row = a.held ? 0 : row;
    with_reset(a.reset, [&](auto reset) {
        for_each_span(a, spans, [&](int64_t place, int64_t width, int worker) {
            const Parameters p = neurons.of(place);
            float* membrane = scratch + worker * spans.span;
            zero(membrane, spans.span * 4);
            for (int64_t first = 0; first < a.steps; first += a.every) {
                const Steps steps{least(a.every, a.steps - first), current_row, row};
                const bool keep = a.kept && first + a.every < a.steps;
                for_each_piece(width, [&](int64_t i, auto lanes) {
                    forward_piece<decltype(reset)::value>(
                        lanes, steps, p + i, a.current + first * current_row + place + i, membrane + i,
                        a.spikes + first * row + place + i,
                        keep ? a.kept + first / a.every * row + place + i : nullptr);
                });
            }
        });
    });
}

// What lanes add up: what reaches U_t from later steps, ∂L/∂I of a held current, ∂L/∂β and ∂L/∂θ.
struct LaneSums {
    float *running, *current, *beta, *theta;
    LaneSums operator+(int64_t i) const { return {running + i, current + i, beta + i, theta + i}; }
};

// Where ∂L/∂I_t goes: nowhere, to a row of its own, to the sum over t.
enum Target { kNowhere, kRows, kSum };

// `membranes` has room for those before the first step and after each one, [steps + 1][kPiece].
template <int RESET, int SURROGATE, int TARGET, class L>
void backward_piece(const L& lanes, const Steps& steps, const Parameters& p, Derivative derivative,
                    const float* kept, const float* current, float* membranes, const float* upstream, float* target,
                    const LaneSums& sums) {
    constexpr int V = L::vectors;
    Vec u[V], g[V], to_beta[V], to_theta[V], to_current[V];
    unrolled<V>([&](auto k) {
        constexpr int v = decltype(k)::value;
        u[v] = Vec{};
        if (kept) {
            fetch(kept + kAhead + v * W);
            u[v] = lanes.load(kept, v);
        }
        store(membranes + v * W, u[v]);
        g[v] = load(sums.running + v * W);
        to_beta[v] = load(sums.beta + v * W);
        to_theta[v] = load(sums.theta + v * W);
        if (TARGET == kSum) to_current[v] = load(sums.current + v * W);
    });
    for (int64_t t = 1; t <= steps.count; ++t, current += steps.current_stride)
        unrolled<V>([&](auto k) {
            constexpr int v = decltype(k)::value;
            fetch(current + kAhead + v * W);
            u[v] = charge<RESET>(u[v], lanes.load(current, v), load(p.decay + v * W), load(p.theta + v * W));
            store(membranes + t * kPiece + v * W, u[v]);
        });
    for (int64_t t = steps.count - 1; t >= 0; --t)
        unrolled<V>([&](auto k) {
            constexpr int v = decltype(k)::value;
            const float* from = upstream + t * steps.stride;
            fetch(from + kAhead + v * W);
            const Vec theta = load(p.theta + v * W), before = load(membranes + t * kPiece + v * W);
            const Vec through = lanes.load(from, v) * derivative.at<SURROGATE>(u[v] - theta);
            const Vec now = charge_backward<RESET>(through, before, load(p.decay + v * W), theta, g[v], to_beta[v],
                                                   to_theta[v]);
            if (TARGET == kSum) to_current[v] += now;
            if (TARGET == kRows) lanes.stream(target + t * steps.stride, v, now);
            u[v] = before;
        });
    unrolled<V>([&](auto k) {
        constexpr int v = decltype(k)::value;
        store(sums.running + v * W, g[v]);
        store(sums.beta + v * W, to_beta[v]);
        store(sums.theta + v * W, to_theta[v]);
        if (TARGET == kSum) store(sums.current + v * W, to_current[v]);
    });
}

template <int RESET, int SURROGATE, int TARGET>
void backward_span(const LIF& a, int64_t row, const Parameters& p, int64_t place, int64_t width, float* membranes,
                   const LaneSums& sums) {
    const Derivative derivative(a.alpha);
    const int64_t current_row = a.held ? 0 : row;
    for (int64_t first = (a.steps - 1) / a.every * a.every; first >= 0; first -= a.every) {
        const Steps steps{least(a.every, a.steps - first), current_row, row};
        for_each_piece(width, [&](int64_t i, auto lanes) {
            const int64_t at = first * row + place + i;
            backward_piece<RESET, SURROGATE, TARGET>(
                lanes, steps, p + i, derivative, first ? a.kept + (first / a.every - 1) * row + place + i : nullptr,
                a.current + first * current_row + place + i, membranes, a.grad_spikes + at,
                TARGET == kRows ? a.grad_current + at : nullptr, sums + i);
        });
    }
    if (TARGET == kSum)
        for_each_piece(width, [&](int64_t i, auto lanes) {
            for (int v = 0; v < lanes.vectors; ++v)
                lanes.stream(a.grad_current + place + i, v, load(sums.current + i + v * W));
        });
}

// Turns where ∂L/∂I_t goes into a template argument, as with_reset() does.
template <class F>
inline void with_target(const LIF& a, const F& call) {
    if (!a.grad_current) return call(Constant<kNowhere>{});
    if (a.held) return call(Constant<kSum>{});
    call(Constant<kRows>{});
}

// The gradient of a parameter from what each lane adds to it.
inline void parameter_gradient(const LIF& a, const float* sums, bool per_neuron, double* totals, float* grad) {
    sum_over_samples(sums, a.samples, a.neurons, a.threads, totals);
    double total = 0;
    for (int64_t n = 0; n < a.neurons; ++n) {
        if (per_neuron) grad[n] = static_cast<float>(totals[n]);
        total += totals[n];
    }
    if (!per_neuron) grad[0] = static_cast<float>(total);
}

inline void lif_backward_alone(LIF& a, Arena& arena) {
    const Spans spans(a);
    const NeuronParameters neurons(a, spans.span, arena);
    float* beta_sums = arena.take<float>(spans.padded());
    float* theta_sums = arena.take<float>(spans.padded());
    double* totals = arena.take<double>(a.neurons);
    const int64_t scratch_size = 2 * spans.span + (a.every + 1) * kPiece;
    float* scratch = arena.take<float>(scratch_size * a.threads);
    if (!arena.base) return;
    with_target(a, [&](auto target) {
        with_reset(a.reset, [&](auto reset) {
            with_surrogate(a.surrogate, [&](auto surrogate) {
                for_each_span(a, spans, [&](int64_t place, int64_t width, int worker) {
                    float* mine = scratch + worker * scratch_size;
                    const LaneSums sums{mine, mine + spans.span, beta_sums + place, theta_sums + place};
                    for (float* lanes : {sums.running, sums.current, sums.beta, sums.theta})
                        zero(lanes, spans.span * 4);
                    backward_span<decltype(reset)::value, decltype(surrogate)::value, decltype(target)::value>(
                        a, spans.lanes, neurons.of(place), place, width, mine + 2 * spans.span, sums);
                });
            });
        });
    });
    if (a.grad_beta) {
        parameter_gradient(a, beta_sums, a.beta_per_neuron, totals, a.grad_beta);
        mask_clamped(a.beta, a.beta_per_neuron ? a.neurons : 1, a.grad_beta);
    }
    if (a.grad_theta) parameter_gradient(a, theta_sums, a.theta_per_neuron, totals, a.grad_theta);
}

}  // namespace g2g::G2G_ISA
