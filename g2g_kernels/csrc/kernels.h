// What the C interface (api.cpp) and the kernels (kernels.cpp, compiled once per instruction set) agree on.
//
// Layouts, with lanes, blocks and tiles as in plan.h, b the sample and t the time step:
//   spike words  uint64 [samples][blocks][T]     bit i: lane i of the block spiked
//   membranes    float  [samples][blocks][T][64]
//   panels       float  [blocks][rows][64]       a dense matrix in lane order; rows are samples, or (sample, t)
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace g2g {

enum Reset : int32_t { kSubtract, kZero, kNone };
enum Surrogate : int32_t { kAtan, kFastSigmoid, kSigmoid, kTriangle };

// A layer of a stack. Pointers not needed by a call are null. Mirrored in g2g_kernels/cpu/library.py.
struct Layer {
    const Plan* plan;
    const float *values, *bias, *beta, *theta;  // bias null: none
    int32_t beta_per_neuron, theta_per_neuron;
    uint64_t* spikes;       // out: [B][row blocks][T]
    uint64_t* inputs;       // [B][column blocks][T]: what it receives, if that is spikes; may be the last layer's `spikes`
    float* state;           // kept for the backward pass: membranes, or for a held input the currents [row blocks][B][64]
    float* rates;           // out: [N]
    const float* grad_rates;
    float *grad_values, *grad_bias, *grad_beta, *grad_theta;
    double input_rate;      // share of ones among the spikes it receives: set by the forward pass, read by the backward
};

struct Stack {
    Layer* layers;
    int32_t count, batch, steps, threads, reset, surrogate, bf16;
    int32_t held;           // x is [B, in], held for all steps
    float alpha;
    float event_limit;      // inputs that spike more often than this go through the matrix kernels
    const float* x;         // [B, in] or [T, B, in]
    float* counts;          // out: [B, N] of the last layer
    const float* grad_counts;
    float* grad_x;
    int32_t x_spikes;       // in/out: x is spikes, packed in layers[0].inputs
};

struct Linear {
    const Plan* plan;
    const float *values, *bias;
    const void *x, *grad_y;
    void *y, *grad_x;
    float *grad_values, *grad_bias;
    int64_t rows;
    int32_t threads, bf16;  // bf16: factors of products are rounded to bfloat16
    int32_t x_half, y_half;  // x and grad_x, or y and grad_y, are bfloat16, not float
    float event_limit;
};

struct LIF {
    const float *current, *beta, *theta;
    int32_t beta_per_neuron, theta_per_neuron;
    int64_t samples;        // everything between T and N
    int32_t neurons, steps, threads, reset, surrogate, held;
    int32_t every;          // `kept` has the membranes after each `every` steps, but the last
    float alpha;
    float *spikes, *kept;   // kept: [(T − 1) / every][samples][N], null: not wanted
    const float* grad_spikes;
    float *grad_current, *grad_beta, *grad_theta;
};

// Hands out pieces of a scratch buffer; with base null it only measures how large the buffer must be.
struct Arena {
    char* base;
    size_t used = 0;
    template <class T>
    T* take(size_t count) {
        char* p = base + used;
        used += (count * sizeof(T) + 63) / 64 * 64;
        return base ? reinterpret_cast<T*>(p) : nullptr;
    }
};

// One instruction set. Every function with an Arena returns early, after taking what it needs, if `base` is null.
struct Kernels {
    const char* name;
    bool bf16;
    void (*stack_forward)(Stack&, Arena&);
    void (*stack_backward)(Stack&, Arena&);
    void (*linear_forward)(Linear&, Arena&);
    void (*linear_backward)(Linear&, Arena&);
    void (*lif_forward)(LIF&, Arena&);
    void (*lif_backward)(LIF&, Arena&);
    void (*unpack)(const Plan&, const uint64_t* words, int32_t batch, int32_t steps, int32_t threads, float* spikes);
};

}  // namespace g2g
