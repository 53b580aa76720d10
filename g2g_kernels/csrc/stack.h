// What both passes over a stack of layers share: the inputs of its layers, and their parameters in lane order.
#pragma once

#include "interface.h"
#include "layout.h"
#include "panel.h"
#include "parameters.h"
#include "sweep.h"

namespace g2g::G2G_ISA {

// The parameters of a layer's neurons and its bias, one float per lane.
struct LayerParameters {
    float* lanes[kMostParameters] = {};
    float* bias;

    LayerParameters(const Layer& layer, Arena& arena) {
        const Axis& axis = layer.plan->rows;
        const ModelInfo& model = kModels[layer.neurons.model];
        const int64_t count = static_cast<int64_t>(axis.blocks) * kLanes;
        for (int k = 0; k < model.parameters; ++k) lanes[k] = arena.take<float>(count);
        bias = arena.take<float>(count);
        if (!arena.base) return;
        const auto neuron = [&](int64_t i) { return axis.neuron[i]; };
        for (int k = 0; k < model.parameters; ++k) {
            const bool threshold = k + 1 == model.parameters;
            spread(layer.neurons.parameters[k], model.decays[k], threshold ? __builtin_inff() : 0.0f, count, neuron,
                   lanes[k]);
        }
        if (layer.bias)
            spread({layer.bias, nullptr, true}, false, 0.0f, count, neuron, bias);
        else
            zero(bias, count * sizeof(float));
    }

    BlockParameters block(int64_t r) const {
        BlockParameters result{};
        for (int k = 0; k < kMostParameters; ++k) result.lanes[k] = lanes[k] ? lanes[k] + r * kLanes : nullptr;
        return result;
    }
};

enum class Input { kHeld, kDense, kEvents, kDenseSpikes };

// How layer l's input is multiplied; `rate` is its measured share of ones.
inline Input input_kind(const Stack& s, int l, double rate) {
    if (l == 0 && s.held) return Input::kHeld;
    if (l == 0 && !s.x_spikes) return Input::kDense;
    return rate <= s.event_limit ? Input::kEvents : Input::kDenseSpikes;
}

// Fills the input panel of a chunk: held rows, dense rows, or spikes as floats.
inline void fill_panel(const Stack& s, const Layer& layer, Input kind, int64_t first, int64_t samples,
                       const Panel<float>& panel) {
    const Axis& axis = layer.plan->cols;
    const int64_t steps = kind == Input::kHeld ? 1 : s.steps;
    parallel(s.threads, axis.blocks * samples, 4, [&](int64_t task, int) {
        const int64_t block = task / samples, b = task % samples, row = b * steps;
        if (kind == Input::kDenseSpikes)
            expand_words(layer.inputs + ((first + b) * axis.blocks + block) * steps, steps, panel.at(block, row));
        else
            load_block(axis, block, s.x, Rows{first + b, steps, s.batch, axis.size}, steps, panel.at(block, row));
    });
}

// The kept states of one block of one sample, [T][states][64].
inline float* kept_states(const Stack& s, const Layer& layer, int64_t b, int64_t r) {
    const int64_t size = s.steps * kModels[layer.neurons.model].states * kLanes;
    return layer.kept ? layer.kept + (b * layer.plan->rows.blocks + r) * size : nullptr;
}

// The kept currents of one block of a sample whose input is held, [64].
inline float* kept_currents(const Stack& s, const Layer& layer, int64_t b, int64_t r) {
    return layer.kept ? layer.kept + (r * s.batch + b) * kLanes : nullptr;
}

}  // namespace g2g::G2G_ISA
