// LIF neurons alone: currents [T][samples · N] → spikes of the same shape, in strips of lanes.
//
// Memory-bound: forward reads the currents and writes the spikes; backward reads the currents (it computes the membranes
// again, for one strip at a time, rather than keep them) and ∂L/∂S and writes ∂L/∂I. Five passes over [T, samples, N] in
// all, the two written ones past the caches. A strip is kStrip lanes of one row, so every access runs over whole cache
// lines and few pages are open at once.
#pragma once

#include "layout.h"
#include "lif.h"

namespace g2g::G2G_ISA {

constexpr int64_t kStrip = 2048;

struct NeuronParameters {
    float *decay, *theta;
    NeuronParameters(const LIF& a, Arena& arena) {
        const int64_t padded = (a.neurons + kStrip - 1) / kStrip * kStrip;
        decay = arena.take<float>(padded), theta = arena.take<float>(padded);
        if (!arena.base) return;
        for (int64_t n = 0; n < padded; ++n) {
            const bool real = n < a.neurons;
            decay[n] = real ? clamp_decay(a.beta[a.beta_per_neuron ? n : 0]) : 0.0f;
            theta[n] = real ? a.theta[a.theta_per_neuron ? n : 0] : __builtin_inff();
        }
    }
};

// Loads `width` floats, zeros behind them.
inline Vec load_part(const float* p, int64_t width) {
    if (width >= W) return load(p);
    alignas(64) float lanes[W] = {};
    for (int64_t i = 0; i < width; ++i) lanes[i] = p[i];
    return load(lanes);
}

inline void stream_part(float* p, Vec v, int64_t width) {
    if (width >= W) return stream(p, v);
    for (int64_t i = 0; i < width; ++i) p[i] = v[i];
}

// The row of the next step lies megabytes away, where no hardware prefetcher looks.
inline void fetch(const float* p) {
    for (int i = 0; i < W; i += 16) __builtin_prefetch(p + i);
}

template <class F>
void for_each_strip(const LIF& a, const F& f) {
    const int64_t strips = (a.neurons + kStrip - 1) / kStrip;
    parallel(a.threads, a.samples * strips, 1, [&](int64_t task, int worker) {
        const int64_t sample = task / strips, n = task % strips * kStrip;
        f(sample * a.neurons + n, n, least(kStrip, a.neurons - n), sample, worker);
        stream_fence();  // streamed stores are visible before the task counts as done
    });
}

inline void lif_forward_alone(LIF& a, Arena& arena) {
    const NeuronParameters p(a, arena);
    float* scratch = arena.take<float>(kStrip * a.threads);
    if (!arena.base) return;
    const int64_t stride = a.samples * a.neurons;
    with_reset(a.reset, [&](auto reset) {
        for_each_strip(a, [&](int64_t place, int64_t n, int64_t width, int64_t, int worker) {
            float* membrane = scratch + worker * kStrip;
            zero(membrane, kStrip * 4);
            for (int64_t t = 0; t < a.steps; ++t) {
                const float* current = a.current + place + (a.held ? 0 : t * stride);
                float* spikes = a.spikes + place + t * stride;
                for (int64_t i = 0; i < width; i += W) {
                    if (!a.held && t + 1 < a.steps) fetch(current + stride + i);
                    const Vec theta = load(p.theta + n + i);
                    const Vec u = charge<decltype(reset)::value>(load(membrane + i), load_part(current + i, width - i),
                                                                 load(p.decay + n + i), theta);
                    store(membrane + i, u);
                    stream_part(spikes + i, step(u, theta), width - i);
                }
            }
        });
    });
}

// Steps whose rows are visited together, and vectors of a row that stay in registers meanwhile. What runs on from step to
// step (40 KB a strip) is then loaded and stored once every kSteps steps, and few rows are open at once.
constexpr int64_t kSteps = 10;
constexpr int64_t kTogether = 4;
constexpr int64_t kPiece = kTogether * W;

// A strip's membranes [kStrip / kPiece][T][kPiece]. What is visited together lies together: rows 8 KB apart would meet in
// the same sets of the cache, where those of the currents, often a power of two apart as well, are already.
struct Membranes {
    float* base;
    int64_t steps;
    float* at(int64_t t, int64_t i) const { return base + (i / kPiece * steps + t) * kPiece + i % kPiece; }
};

// Calls f(i, lanes, Constant<V>) over a strip in pieces of V vectors; the last piece may be cut short.
template <class F>
inline void for_each_piece(int64_t width, const F& f) {
    int64_t i = 0;
    for (; i + kPiece <= width; i += kPiece) f(i, kPiece, Constant<kTogether>{});
    for (; i < width; i += W) f(i, width - i, Constant<1>{});
}

template <int RESET>
void membranes_of_strip(const LIF& a, const NeuronParameters& p, int64_t place, int64_t n, int64_t width,
                        Membranes membranes) {
    const int64_t stride = a.held ? 0 : a.samples * a.neurons;
    for (int64_t first = 0; first < a.steps; first += kSteps) {
        const int64_t last = least(first + kSteps, a.steps);
        for_each_piece(width, [&](int64_t i, int64_t lanes, auto vectors) {
            constexpr int V = decltype(vectors)::value;
            Vec u[V], decay[V], theta[V];
            for (int v = 0; v < V; ++v) {
                u[v] = first ? load(membranes.at(first - 1, i) + v * W) : Vec{};
                decay[v] = load(p.decay + n + i + v * W);
                theta[v] = load(p.theta + n + i + v * W);
            }
            for (int64_t t = first; t < last; ++t) {
                const float* current = a.current + place + t * stride + i;
                for (int v = 0; v < V; ++v) {
                    fetch(current + (V + v) * W);
                    u[v] = charge<RESET>(u[v], load_part(current + v * W, lanes - v * W), decay[v], theta[v]);
                    store(membranes.at(t, i) + v * W, u[v]);
                }
            }
        });
    }
}

template <int RESET, int SURROGATE>
void backward_strip(const LIF& a, const NeuronParameters& p, int64_t place, int64_t n, int64_t width, float* scratch,
                    float* beta_sum, float* theta_sum) {
    const int64_t stride = a.samples * a.neurons;
    const Derivative derivative(a.alpha);
    const Membranes membranes{scratch, a.steps};
    float* running = scratch + a.steps * kStrip;  // g_{t+1} and, for a held current, the sum of g over t
    float* current_sum = running + kStrip;
    membranes_of_strip<RESET>(a, p, place, n, width, membranes);
    zero(running, 2 * kStrip * 4);
    zero(beta_sum, kStrip * 4);
    zero(theta_sum, kStrip * 4);
    for (int64_t last = a.steps; last > 0; last -= kSteps) {
        const int64_t first = most(last - kSteps, int64_t{0});
        for_each_piece(width, [&](int64_t i, int64_t lanes, auto vectors) {
            constexpr int V = decltype(vectors)::value;
            Vec g[V], to_beta[V], to_theta[V], u[V];
            for (int v = 0; v < V; ++v) {
                g[v] = load(running + i + v * W);
                to_beta[v] = load(beta_sum + i + v * W);
                to_theta[v] = load(theta_sum + i + v * W);
                u[v] = load(membranes.at(last - 1, i) + v * W);
            }
            for (int64_t t = last - 1; t >= first; --t) {
                const float* upstream = a.grad_spikes + place + t * stride + i;
                for (int v = 0; v < V; ++v) {
                    fetch(upstream + (V + v) * W);
                    const Vec theta = load(p.theta + n + i + v * W);
                    const Vec before = t ? load(membranes.at(t - 1, i) + v * W) : Vec{};
                    const IntVec fired = before > theta;
                    const Vec through =
                        load_part(upstream + v * W, lanes - v * W) * derivative.at<SURROGATE>(u[v] - theta);
                    const Vec now = through + g[v];
                    if (a.held)
                        store(current_sum + i + v * W, load(current_sum + i + v * W) + now);
                    else if (a.grad_current)
                        stream_part(a.grad_current + place + t * stride + i + v * W, now, lanes - v * W);
                    to_theta[v] -= through;
                    if (RESET == kSubtract) to_theta[v] -= fired ? now : Vec{};
                    const Vec reaching = RESET == kZero ? (fired ? Vec{} : now) : now;
                    to_beta[v] += reaching * before;
                    g[v] = load(p.decay + n + i + v * W) * reaching;
                    u[v] = before;
                }
            }
            for (int v = 0; v < V; ++v) {
                store(running + i + v * W, g[v]);
                store(beta_sum + i + v * W, to_beta[v]);
                store(theta_sum + i + v * W, to_theta[v]);
            }
        });
    }
    if (a.held && a.grad_current)
        for (int64_t i = 0; i < width; i += W)
            stream_part(a.grad_current + place + i, load(current_sum + i), width - i);
}

// The gradient of a parameter from what each sample adds to it, [samples][padded neurons].
inline void parameter_gradient(const LIF& a, const float* sums, int64_t padded, bool per_neuron, double* totals,
                               float* grad) {
    sum_over_samples(sums, a.samples, padded, a.threads, totals);
    double total = 0;
    for (int64_t n = 0; n < a.neurons; ++n) {
        if (per_neuron) grad[n] = static_cast<float>(totals[n]);
        total += totals[n];
    }
    if (!per_neuron) grad[0] = static_cast<float>(total);
}

inline void lif_backward_alone(LIF& a, Arena& arena) {
    const NeuronParameters p(a, arena);
    const int64_t padded = (a.neurons + kStrip - 1) / kStrip * kStrip;
    float* beta_sums = arena.take<float>(padded * a.samples);
    float* theta_sums = arena.take<float>(padded * a.samples);
    double* totals = arena.take<double>(padded);
    const int64_t scratch_size = (a.steps + 2) * kStrip;
    float* scratch = arena.take<float>(scratch_size * a.threads);
    if (!arena.base) return;
    with_reset(a.reset, [&](auto reset) {
        with_surrogate(a.surrogate, [&](auto surrogate) {
            for_each_strip(a, [&](int64_t place, int64_t n, int64_t width, int64_t sample, int worker) {
                backward_strip<decltype(reset)::value, decltype(surrogate)::value>(
                    a, p, place, n, width, scratch + worker * scratch_size, beta_sums + sample * padded + n,
                    theta_sums + sample * padded + n);
            });
        });
    });
    if (a.grad_beta) {
        parameter_gradient(a, beta_sums, padded, a.beta_per_neuron, totals, a.grad_beta);
        mask_clamped(a.beta, a.beta_per_neuron ? a.neurons : 1, a.grad_beta);
    }
    if (a.grad_theta) parameter_gradient(a, theta_sums, padded, a.theta_per_neuron, totals, a.grad_theta);
}

}  // namespace g2g::G2G_ISA
