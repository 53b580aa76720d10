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

template <int RESET, int SURROGATE>
void backward_strip(const LIF& a, const NeuronParameters& p, int64_t place, int64_t n, int64_t width, float* membranes,
                    float* beta_sum, float* theta_sum) {
    const int64_t stride = a.samples * a.neurons;
    const Derivative derivative(a.alpha);
    float* running = membranes + a.steps * kStrip;  // g_{t+1} and the sum of g over t
    for (int64_t t = 0; t < a.steps; ++t) {
        const float* current = a.current + place + (a.held ? 0 : t * stride);
        for (int64_t i = 0; i < width; i += W) {
            const Vec before = t ? load(membranes + (t - 1) * kStrip + i) : Vec{};
            if (!a.held && t + 1 < a.steps) fetch(current + stride + i);
            store(membranes + t * kStrip + i, charge<RESET>(before, load_part(current + i, width - i),
                                                            load(p.decay + n + i), load(p.theta + n + i)));
        }
    }
    zero(running, 2 * kStrip * 4);
    zero(beta_sum, kStrip * 4);
    zero(theta_sum, kStrip * 4);
    for (int64_t t = a.steps - 1; t >= 0; --t) {
        for (int64_t i = 0; i < width; i += W) {
            if (t) fetch(a.grad_spikes + place + (t - 1) * stride + i);
            const Vec theta = load(p.theta + n + i);
            const Vec u = load(membranes + t * kStrip + i);
            const Vec before = t ? load(membranes + (t - 1) * kStrip + i) : Vec{};
            const IntVec fired = before > theta;
            const Vec upstream = load_part(a.grad_spikes + place + t * stride + i, width - i);
            const Vec through = upstream * derivative.at<SURROGATE>(u - theta);
            const Vec now = through + load(running + i);
            if (a.held)
                store(running + kStrip + i, load(running + kStrip + i) + now);
            else if (a.grad_current)
                stream_part(a.grad_current + place + t * stride + i, now, width - i);
            Vec to_theta = load(theta_sum + i) - through;
            if (RESET == kSubtract) to_theta -= fired ? now : Vec{};
            store(theta_sum + i, to_theta);
            const Vec reaching = RESET == kZero ? (fired ? Vec{} : now) : now;
            store(beta_sum + i, load(beta_sum + i) + reaching * before);
            store(running + i, load(p.decay + n + i) * reaching);
        }
    }
    if (a.held && a.grad_current)
        for (int64_t i = 0; i < width; i += W)
            stream_part(a.grad_current + place + i, load(running + kStrip + i), width - i);
}

// Per-neuron sums of the strips' sums, over the samples in order.
inline void reduce(const LIF& a, const float* sums, const float* parameter, bool per_neuron, bool clamped,
                   float* grad) {
    const int64_t padded = (a.neurons + kStrip - 1) / kStrip * kStrip;
    double total = 0;
    for (int64_t n = 0; n < a.neurons; ++n) {
        double sum = 0;
        for (int64_t sample = 0; sample < a.samples; ++sample) sum += sums[sample * padded + n];
        const float value = parameter[per_neuron ? n : 0];
        if (clamped && !(value >= 0.0f && value <= 1.0f)) sum = 0;
        if (per_neuron) grad[n] = static_cast<float>(sum);
        total += sum;
    }
    if (!per_neuron) grad[0] = static_cast<float>(total);
}

inline void lif_backward_alone(LIF& a, Arena& arena) {
    const NeuronParameters p(a, arena);
    const int64_t padded = (a.neurons + kStrip - 1) / kStrip * kStrip;
    float* beta_sums = arena.take<float>(padded * a.samples);
    float* theta_sums = arena.take<float>(padded * a.samples);
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
    if (a.grad_beta) reduce(a, beta_sums, a.beta, a.beta_per_neuron, true, a.grad_beta);
    if (a.grad_theta) reduce(a, theta_sums, a.theta, a.theta_per_neuron, false, a.grad_theta);
}

}  // namespace g2g::G2G_ISA
