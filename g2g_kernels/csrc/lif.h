// Leaky integrate-and-fire sweeps over time for one block of 64 lanes of one sample.
//
//   forward    U_t = β·U_{t−1} + I_t − θ·R_t,  R_t = 1[U_{t−1} > θ],  S_t = 1[U_t > θ]      (reset "subtract")
//   backward   g_t = σ'(U_t − θ)·∂L/∂S_t + β·g_{t+1};  ∂I_t = g_t;  ∂β += g_t·U_{t−1};
//              ∂θ −= σ'(U_t − θ)·∂L/∂S_t + R_t·g_t
//
// U, g and the running sums stay in registers over all T; per step the forward sweep writes 8 B of spike word (and 256 B
// of membranes if they are kept), the backward sweep reads 256 B of membranes and 256 B of ∂L/∂S and writes 256 B of ∂I.
// Padding lanes have θ = ∞: they never spike and every surrogate is 0 there.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace g2g::G2G_ISA {

constexpr int kVecs = kLanes / W;

// Adds what one step of reset R and decay does to the membrane u; the order of operations is snnTorch's.
template <int R>
inline Vec charge(Vec u, Vec current, Vec decay, Vec theta) {
    const IntVec fired = u > theta;
    if (R == kZero) u = fired ? Vec{} : u;
    u = decay * u + current;
    if (R == kSubtract) u = u - (fired ? theta : Vec{});
    return u;
}

// charge() backwards. What reaches the membrane that it gave: g from later steps, `through` from its own spike. Returns
// ∂L/∂I, moves g on to the membrane `before`, and adds to the gradients of β and θ.
template <int R>
inline Vec charge_backward(Vec through, Vec before, Vec decay, Vec threshold, Vec& g, Vec& beta, Vec& theta) {
    const IntVec fired = before > threshold;
    const Vec now = through + g;
    theta -= through;
    if (R == kSubtract) theta -= fired ? now : Vec{};
    const Vec reaching = R == kZero ? (fired ? Vec{} : now) : now;
    beta += reaching * before;
    g = decay * reaching;
    return now;
}

// current(t, I) fills I[kVecs]. `words`, `membranes` [T][64] and `count` [64] (spikes of each lane) may be null.
template <int R, class Current>
inline void lif_forward(const Current& current, int steps, const float* decays, const float* thetas, uint64_t* words,
                        float* membranes, float* count) {
    Vec u[kVecs], decay[kVecs], theta[kVecs], spikes[kVecs];
    for (int v = 0; v < kVecs; ++v) {
        u[v] = spikes[v] = Vec{};
        decay[v] = load(decays + v * W);
        theta[v] = load(thetas + v * W);
    }
    for (int t = 0; t < steps; ++t) {
        Vec input[kVecs];
        current(t, input);
        uint64_t word = 0;
        for (int v = 0; v < kVecs; ++v) {
            u[v] = charge<R>(u[v], input[v], decay[v], theta[v]);
            spikes[v] += step(u[v], theta[v]);
            word |= greater_bits(u[v], theta[v]) << (v * W);
        }
        if (words) words[t] = word;
        if (membranes)
            for (int v = 0; v < kVecs; ++v) store(membranes + t * kLanes + v * W, u[v]);
    }
    if (count)
        for (int v = 0; v < kVecs; ++v) store(count + v * W, spikes[v]);
}

// The surrogate's derivative at x = U − θ.
struct Derivative {
    float alpha, slope, half;  // slope = π/2·α, half = α/2
    explicit Derivative(float a) : alpha(a), slope(static_cast<float>(M_PI / 2 * a)), half(a / 2) {}

    template <int S>
    Vec at(Vec x) const {
        const Vec one = all(1.0f);
        if (S == kAtan) {
            const Vec z = all(slope) * x;
            return all(half) / (one + z * z);
        }
        const Vec z = all(alpha) * absolute(x);
        if (S == kFastSigmoid) return one / ((one + z) * (one + z));
        if (S == kSigmoid) {
            const Vec e = exp_negative(-z);
            return all(alpha) * e / ((one + e) * (one + e));
        }
        const Vec height = one - z;
        return height > Vec{} ? all(alpha) * height : Vec{};
    }
};

// What the sweep adds up over t for one block of lanes of one sample, float [64] each.
struct Sums {
    float *current, *beta, *theta;
};

// upstream(t, g) fills g[kVecs] with ∂L/∂S_t; emit(t, v, g) receives ∂L/∂I_t.
template <int R, int S, class Upstream, class Emit>
inline void lif_backward(const Upstream& upstream, const float* membranes, int steps, const float* decays,
                         const float* thetas, Derivative derivative, const Sums& sums, const Emit& emit) {
    Vec g[kVecs], sum[kVecs], beta[kVecs], theta[kVecs];
    for (int v = 0; v < kVecs; ++v) g[v] = sum[v] = beta[v] = theta[v] = Vec{};
    for (int t = steps - 1; t >= 0; --t) {
        Vec spike_grad[kVecs];
        upstream(t, spike_grad);
        for (int v = 0; v < kVecs; ++v) {
            const Vec threshold = load(thetas + v * W);
            const Vec u = load(membranes + t * kLanes + v * W);
            const Vec before = t ? load(membranes + (t - 1) * kLanes + v * W) : Vec{};
            const Vec through = spike_grad[v] * derivative.at<S>(u - threshold);
            const Vec now =
                charge_backward<R>(through, before, load(decays + v * W), threshold, g[v], beta[v], theta[v]);
            sum[v] += now;
            emit(t, v, now);
        }
    }
    for (int v = 0; v < kVecs; ++v) {
        store(sums.current + v * W, sum[v]);
        store(sums.beta + v * W, beta[v]);
        store(sums.theta + v * W, theta[v]);
    }
}

// Turns run-time options into template arguments: call(Constant<…>{}).
template <class F>
inline void with_reset(int reset, const F& call) {
    if (reset == kSubtract) return call(Constant<kSubtract>{});
    if (reset == kZero) return call(Constant<kZero>{});
    call(Constant<kNone>{});
}

template <class F>
inline void with_surrogate(int surrogate, const F& call) {
    if (surrogate == kAtan) return call(Constant<kAtan>{});
    if (surrogate == kFastSigmoid) return call(Constant<kFastSigmoid>{});
    if (surrogate == kSigmoid) return call(Constant<kSigmoid>{});
    call(Constant<kTriangle>{});
}

}  // namespace g2g::G2G_ISA
