// What the C interface (api.cpp) and the kernels (kernels.cpp, compiled once per instruction set) agree on, beside the
// structures that Python fills (structures.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"
#include "structures.h"

// A function or a variable that other programs find by its name.
#if defined(_WIN32)
#define G2G_EXPORT extern "C" __declspec(dllexport)
#else
#define G2G_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace g2g {

enum Reset : int32_t { kSubtract, kZero, kNone };
constexpr const char* kResetNames[] = {"subtract", "zero", "none"};

constexpr int kMostStates = 3;

// The description of a model.
struct ModelInfo {
    const char* name;
    int32_t states, parameters;
    const char* state_names[kMostStates];          // the last one is the membrane, which is compared with the threshold
    const char* parameter_names[kMostParameters];  // the last one is the threshold
    bool decays[kMostParameters];                  // clamped to 0 … 1
    bool hidden = false;                           // its states do not show the spikes of the last step
    bool at_once = false;                          // reset in the step of a spike: what arrives in it acts later
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

// The options of neurons, each numbered by its place.
struct Options {
    const ModelInfo* models;
    int32_t model_count;
    const char* const* surrogate_names;
    int32_t surrogate_count;
};

// One instruction set. Every function with an Arena returns early, after taking what it needs, if `base` is null.
struct Kernels {
    const char* name;
    bool bf16;
    Options options;
    // Of each, the forward and the backward pass.
    void (*stack[2])(Stack&, Arena&);
    void (*graph[2])(Graph&, Arena&);
    void (*linear[2])(Linear&, Arena&);
    void (*convolution[2])(Convolution&, Arena&);
    void (*image_layer[2])(ImageLayer&, Arena&);
    void (*list_loop[2])(ListLoop&, Arena&);
    void (*neurons[2])(NeuronLoop&, Arena&);
    void (*list_network[2])(ListNetwork&, Arena&);
    void (*list_network_of_doubles[2])(ListNetwork&, Arena&);
    void (*unpack)(const Plan&, const uint64_t* words, int64_t stride, int32_t batch, int32_t steps, int32_t threads, float* spikes);
    // images in words: [count][pixels][channels, or the other way round]
    void (*unpack_images)(const uint64_t* words, int64_t count, int32_t pixels, int32_t channels, int32_t last, int32_t threads, float* spikes);
};

}  // namespace g2g
