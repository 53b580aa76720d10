// Scans over time for one block of 64 lanes of one sample, forward and backward.
//
// States, their gradients and the running sums stay in registers over all T. For LIF neurons the forward scan writes
// 8 B of spike word per step (and 256 B of membranes if they are kept); the backward scan reads 256 B of membranes and
// 256 B of ∂L/∂S and writes 256 B of ∂I.
#pragma once

#include "neurons.h"
#include "parameters.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// What a forward scan writes for one block; all may be null. `edge` [states][64] holds the states before the first step
// (null: zeros), and then those after the last.
struct BlockActivity {
    uint64_t* words;  // [T]
    float* states;    // [T][states][64]
    float* count;     // [64], spikes of each lane
    float* edge;
};

// Currents [T][64], or for all steps the same [64] (stride 0).
struct StoredCurrent {
    const float* lanes;
    int64_t stride;
    void operator()(int64_t t, Vec* current) const {
        for (int v = 0; v < kVecs; ++v) current[v] = load(lanes + t * stride + v * W);
    }
};

// current(t, I) fills I[kVecs]. Small structures are passed by reference: a copy would be read in wider words than it
// was just written in, and such a read waits until all earlier stores have left for memory.
template <class M, class R, class Current>
void scan_forward(const Current& current, int64_t steps, const LaneParameters& parameters, const BlockActivity& out) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    uint64_t* const words = out.words;
    float* const states = out.states;
    Vec state[kVecs][S] = {}, p[kVecs][P], spikes[kVecs] = {};
    for (int v = 0; v < kVecs; ++v)
        for (int k = 0; k < P; ++k) p[v][k] = load(parameters.lanes[k] + v * W);
    if (out.edge)
        for (int v = 0; v < kVecs; ++v)
            for (int s = 0; s < S; ++s) state[v][s] = load(out.edge + s * kLanes + v * W);
    for (int64_t t = 0; t < steps; ++t) {
        Vec input[kVecs];
        current(t, input);
        uint64_t word = 0;
        each_vec([&](auto v) {
            const Vec membrane = step<M>(state[v], input[v], p[v], reset);
            spikes[v] += heaviside(membrane, p[v][P - 1]);
            word |= greater_bits(membrane, p[v][P - 1]) << (v * W);
        });
        if (words) words[t] = word;
        if (states)
            for (int s = 0; s < S; ++s)
                for (int v = 0; v < kVecs; ++v) store(states + (t * S + s) * kLanes + v * W, state[v][s]);
    }
    if (out.count)
        for (int v = 0; v < kVecs; ++v) store(out.count + v * W, spikes[v]);
    if (out.edge)
        for (int v = 0; v < kVecs; ++v)
            for (int s = 0; s < S; ++s) store(out.edge + s * kLanes + v * W, state[v][s]);
}

template <class Current>
using ForwardScan = void (*)(const Current&, int64_t, const LaneParameters&, const BlockActivity&);

template <class Current>
ForwardScan<Current> forward_scan(const Neurons& neurons) {
    return with_step(neurons, [](auto model, auto reset) -> ForwardScan<Current> {
        return scan_forward<decltype(model), decltype(reset), Current>;
    });
}

// ∂L/∂S_t: a tile [T][64] (or none) plus what does not depend on t.
struct Upstream {
    const float *tile, *constant;
    void operator()(int64_t t, Vec* g) const {
        for (int v = 0; v < kVecs; ++v)
            g[v] = tile ? load(constant + v * W) + load(tile + t * kLanes + v * W) : load(constant + v * W);
    }
};

// Where a backward scan lists what reaches membranes through their own spikes, σ'(U_t − θ)·∂L/∂S_t, wherever that is not
// zero; in the last step with what reaches the last states. Null: not wanted.
struct BlockEvents {
    float* value;     // [T · 64] at most, the steps downwards
    uint64_t* words;  // [T] bit i: lane i is listed
};

// What a backward scan writes for one block, float [64] for sums over t.
struct BlockGradient {
    float* rows;       // ∂L/∂I_t, [T][64], may be null
    uint16_t* halves;  // the same in bfloat16, may be null
    BlockEvents events;
    float* current;    // Σ ∂L/∂I_t
    float* parameters[kMostParameters];
    uint64_t* reached;   // bit i: ∂L/∂I_t of lane i is not 0 at some step
    const float* first;  // [states][64], the states before the first step; null: zeros
    float* edge;         // [states][64]: ∂L/∂(states after the last step), and then ∂L/∂first; null: zeros, not wanted
};

// upstream(t, g) fills g[kVecs] with ∂L/∂S_t; `states` [T][states][64] as the forward scan left them.
template <class M, class R, class Surrogate>
void scan_backward(const Upstream& upstream, const float* states, int64_t steps, const LaneParameters& parameters,
                    Steepness alpha, const BlockGradient& out) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{parameters.reset};
    float* const rows = out.rows;
    uint16_t* const halves = out.halves;
    const float* lanes[P];
    for (int k = 0; k < P; ++k) lanes[k] = parameters.lanes[k];
    Vec g[kVecs][S] = {}, sum[kVecs] = {}, grad[kVecs][P] = {};
    IntVec seen[kVecs] = {};  // the bits of all ∂L/∂I_t
    const float* const first = out.first;
    if (out.edge)
        for (int v = 0; v < kVecs; ++v)
            for (int s = 0; s < S; ++s) g[v][s] = load(out.edge + s * kLanes + v * W);
    uint64_t* const words = out.events.words;
    float* event = out.events.value;
    for (int64_t t = steps - 1; t >= 0; --t) {
        Vec spike_grad[kVecs];
        upstream(t, spike_grad);
        uint64_t word = 0;
        each_vec([&](auto v) {
            Vec p[P], before[S];
            for (int k = 0; k < P; ++k) p[k] = load(lanes[k] + v * W);
            const float* now = states + t * S * kLanes + v * W;
            for (int s = 0; s < S; ++s)
                before[s] = t       ? load(now + (s - S) * kLanes)
                            : first ? load(first + s * kLanes + v * W)
                                    : Vec{};
            const auto slope = [&](Vec u) { return Surrogate::derivative(u - p[P - 1], alpha); };
            // without a state the spike before the first step is a constant
            const auto slope_before = [&](Vec u) { return t || first ? slope(u) : Vec{}; };
            const Vec through = spike_grad[v] * slope(compared<M>(before, load(now + (S - 1) * kLanes), p));
            const Vec to_current = M::charge_backward(through, slope_before, before, p, g[v], grad[v], reset);
            sum[v] += to_current;
            seen[v] |= reinterpret_cast<IntVec>(to_current);
            if (rows) store(rows + t * kLanes + v * W, to_current);
            if (kBf16 && halves) store(halves + t * kLanes + v * W, to_current);
            if (words) {
                const Vec added = out.edge && t + 1 == steps ? to_current : through;
                const uint64_t bits = nonzero_bits(added);
                store_chosen(event, added, bits);
                event += __builtin_popcountll(bits);
                word |= bits << (v * W);
            }
        });
        if (words) words[t] = word;
    }
    *out.reached = 0;
    for (int v = 0; v < kVecs; ++v) {
        *out.reached |= nonzero_bits(reinterpret_cast<Vec>(seen[v])) << (v * W);
        store(out.current + v * W, sum[v]);
        for (int k = 0; k < P; ++k) store(out.parameters[k] + v * W, grad[v][k]);
        if (out.edge)
            for (int s = 0; s < S; ++s) store(out.edge + s * kLanes + v * W, g[v][s]);
    }
}

using BackwardScan = void (*)(const Upstream&, const float*, int64_t, const LaneParameters&, Steepness, const BlockGradient&);

inline BackwardScan backward_scan(const Neurons& neurons) {
    return with_gradient(neurons, [](auto model, auto reset, auto surrogate) -> BackwardScan {
        return scan_backward<decltype(model), decltype(reset), decltype(surrogate)>;
    });
}

}  // namespace g2g::G2G_ISA
