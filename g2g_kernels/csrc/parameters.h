// Parameters of neurons, one float per lane, and their gradients, summed over samples.
#pragma once

#include <algorithm>
#include <vector>

#include "neurons.h"
#include "parallel.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// lanes[i] = the parameter of neuron(i), the neuron of lane i; `padding` if that is negative. Decays are clamped.
template <class Neuron>
void spread(const Parameter& parameter, bool decay, float padding, int64_t count, const Neuron& neuron, float* lanes) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = neuron(i);
        const float value = n < 0 ? padding : parameter.value[parameter.per_neuron ? n : 0];
        lanes[i] = decay ? std::clamp(value, 0.0f, 1.0f) : value;
    }
}

// A parameter of each of a population's neurons, decays clamped: one number that all have (step 0), or one each.
struct OfNeurons {
    std::vector<Real> numbers;
    int64_t step;

    OfNeurons(const Parameter& parameter, bool decay, int64_t size) {
        const Real* const given = reinterpret_cast<const Real*>(parameter.value);
        step = parameter.per_neuron && std::any_of(given, given + size, [&](Real each) { return each != given[0]; });
        numbers.assign(step ? divide_up(size, kLanes) * kLanes : W, given[0]);
        if (step) std::copy(given, given + size, numbers.begin());
        if (decay)
            for (Real& each : numbers) each = std::clamp(each, Real(0), Real(1));
    }
    Vec vector(int64_t i) const { return load(numbers.data() + i * step); }
    Real of(int64_t i) const { return numbers[i * step]; }
};

// The parameters of lanes that follow one another, in the order of the model; decays are clamped. And the number of the reset.
struct LaneParameters {
    int32_t reset;
    const float* lanes[kMostParameters];
    LaneParameters from(int64_t lane) const {
        LaneParameters result{reset, {}};
        for (int k = 0; k < kMostParameters; ++k) result.lanes[k] = lanes[k] ? lanes[k] + lane : nullptr;
        return result;
    }
};

// Those of `count` lanes of neurons, as spread() takes them; padding has an infinite threshold, so that it never spikes.
template <class Neuron>
LaneParameters lane_parameters(const Neurons& neurons, int64_t count, const Neuron& neuron, Arena& arena) {
    const ModelInfo& model = model_info(neurons);
    LaneParameters result{neurons.reset, {}};
    for (int k = 0; k < model.parameters; ++k) {
        float* const lanes = arena.take<float>(count);
        result.lanes[k] = lanes;
        if (!arena.base) continue;
        spread(neurons.parameters[k], model.decays[k], k + 1 == model.parameters ? __builtin_inff() : 0.0f, count, neuron, lanes);
    }
    return result;
}

// What each sample gives to each lane: from data[b · sample + block · place] on, of sample b to the lanes of a block.
struct LaneParts {
    const float* data;
    int64_t samples, sample, lanes, place;
};

// totals[lane] = what lane is given, over the samples in order.
inline void sum_over_samples(const LaneParts& parts, int threads, double* totals) {
    parallel(threads, divide_up(parts.lanes, kLanes), 1, [&](int64_t block, int) {
        const int64_t first = block * kLanes, width = least(kLanes, parts.lanes - first);
        const float* part = parts.data + block * parts.place;
        double total[kLanes] = {};
        for (int64_t b = 0; b < parts.samples; ++b, part += parts.sample)
            for (int64_t i = 0; i < width; ++i) total[i] += part[i];
        for (int64_t i = 0; i < width; ++i) totals[first + i] = total[i];
    });
}

// The gradient of a parameter of `size` neurons from the totals of its lanes.
// It is zero where clamp(decay, 0, 1) is flat, and at 0 and 1 themselves.
template <class Neuron>
void gradient_of_totals(const Parameter& parameter, bool decay, const double* totals, int64_t lanes, const Neuron& neuron,
                        int64_t size) {
    if (!parameter.grad) return;
    double total = 0;
    for (int64_t i = 0; i < lanes; ++i) {
        const int64_t n = neuron(i);
        if (n < 0) continue;
        if (parameter.per_neuron) parameter.grad[n] = static_cast<float>(totals[i]);
        total += totals[i];
    }
    if (!parameter.per_neuron) parameter.grad[0] = static_cast<float>(total);
    for (int64_t n = 0; decay && n < (parameter.per_neuron ? size : 1); ++n)
        if (parameter.value[n] <= 0.0f || parameter.value[n] >= 1.0f) parameter.grad[n] = 0.0f;
}

// The same from the parts of its lanes.
template <class Neuron>
void parameter_gradient(const Parameter& parameter, bool decay, const LaneParts& parts, const Neuron& neuron, int64_t size,
                        int threads, double* totals) {
    if (!parameter.grad) return;
    sum_over_samples(parts, threads, totals);
    gradient_of_totals(parameter, decay, totals, parts.lanes, neuron, size);
}

}  // namespace g2g::G2G_ISA
