// What the C interface (api.cpp) and the kernels (kernels.cpp, compiled once per instruction set) agree on.
//
// Layouts, with lanes, blocks and tiles as in plan.h, b the sample and t the time step:
//   spike words  uint64 [samples][blocks][T]             bit i: lane i of the block spiked
//   states       float  [samples][blocks][T][states][64] of every step, in the order of the model
//   panels       float  [blocks][rows][64]               a dense matrix in lane order; rows are samples, or (sample, t)
//
// Python mirrors the structures in g2g_kernels/cpu/library.py. It compares them with the table that g2g_interface()
// returns when it loads the library, so a field added here must be added to that table (interface.cpp) too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace g2g {

enum Model : int32_t { kLif, kSynaptic };
enum Reset : int32_t { kSubtract, kZero, kNone };
enum Surrogate : int32_t { kAtan, kFastSigmoid, kSigmoid, kTriangle, kBoxcar };

constexpr int kMostStates = 2;
constexpr int kMostParameters = 3;

// One number for all neurons, or one per neuron.
struct Parameter {
    const float* value;
    float* grad;  // out, null: not wanted
    int32_t per_neuron;
};

// A population of neurons, without its size.
struct Neurons {
    int32_t model, reset, surrogate;
    float alpha;
    Parameter parameters[kMostParameters];  // in the order of the model
};

// The description of a model.
struct ModelInfo {
    const char* name;
    int32_t states, parameters;
    const char* state_names[kMostStates];          // the last one is the membrane, which is compared with the threshold
    const char* parameter_names[kMostParameters];  // the last one is the threshold
    bool decays[kMostParameters];                  // clamped to 0 … 1
};

// The current of a dropped neuron at every step: it never fires, every surrogate's derivative is 0 there, and sums over
// 2^16 steps of two states stay finite.
constexpr float kDropped = -1e25f;

// A layer of a stack. Pointers not needed by a call are null.
struct Layer {
    const Plan* plan;
    const float *values, *bias;  // bias null: none
    Neurons neurons;
    uint64_t* spikes;       // out: [B][row blocks][T]
    uint64_t* inputs;       // [B][column blocks][T]: its inputs, if they are spikes; may be the last layer's `spikes`
    float* kept;            // for the backward pass: states, or for a held input the currents [row blocks][B][64]
    float* rates;           // out: [N]
    const float* grad_rates;
    float *grad_values, *grad_bias;
    const uint8_t* dropped;  // [B][N], 1 where a neuron stays silent in a sample; null: none does
    double input_rate;      // share of ones among its input spikes: set by the forward pass, read by the backward pass
    float gradient_event_limit;  // 0: its input gradient takes the product; else see GradientEvents
    int32_t gradient_event_chunks;  // out: chunks of the batch whose input gradient was computed by events
    double gradient_event_rate;  // out: share of events where they were listed
};

struct Stack {
    Layer* layers;
    int32_t count, batch, steps, threads, bf16;
    int32_t held;           // x is [B, in], held for all steps
    float event_limit;      // inputs that spike more often than this go through the matrix kernels
    float batch_cost;       // of products with vectors over the batch, relative to what the kernels assume
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

// Neurons alone.
struct NeuronLoop {
    Neurons neurons;
    const float* current;   // [T][samples][N], or [samples][N], held for all steps
    int64_t samples;        // everything between T and N
    int32_t size, steps, threads, held;  // size = N
    int32_t every;          // `kept` has the states after every `every` steps, except the last
    float *spikes, *kept;   // kept: [(T − 1) / every][states][samples][N], null: not wanted
    const float* grad_spikes;
    float* grad_current;
};

// Divides a scratch buffer; with base null it only measures how large the buffer must be.
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

// What Python must agree with: one line per field ("Layer.values: offset 8, size 8"), structure, option and model.
const char* interface_table(const ModelInfo* models, int32_t count);

// One instruction set. Every function with an Arena returns early, after taking what it needs, if `base` is null.
struct Kernels {
    const char* name;
    bool bf16;
    const ModelInfo* models;
    int32_t model_count;
    void (*stack_forward)(Stack&, Arena&);
    void (*stack_backward)(Stack&, Arena&);
    void (*linear_forward)(Linear&, Arena&);
    void (*linear_backward)(Linear&, Arena&);
    void (*neurons_forward)(NeuronLoop&, Arena&);
    void (*neurons_backward)(NeuronLoop&, Arena&);
    void (*unpack)(const Plan&, const uint64_t* words, int32_t batch, int32_t steps, int32_t threads, float* spikes);
};

}  // namespace g2g
