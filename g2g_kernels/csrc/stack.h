// What both passes over a stack of layers share: the inputs of its layers, and their parameters in lane order.
#pragma once

#include "batch.h"
#include "interface.h"
#include "layout.h"
#include "parallel.h"
#include "parameters.h"
#include "subset_sums.h"
#include "scan.h"

namespace g2g::G2G_ISA {

// The parameters of a layer's neurons and its bias, one float per lane.
struct LayerParameters : LaneParameters {
    float* bias;

    LayerParameters(const Layer& layer, Arena& arena) {
        const Axis& axis = layer.plan->rows;
        const int64_t count = static_cast<int64_t>(axis.blocks) * kLanes;
        const auto neuron = [&](int64_t i) { return axis.neuron[i]; };
        static_cast<LaneParameters&>(*this) = lane_parameters(layer.neurons, count, neuron, arena);
        bias = arena.take<float>(count);
        if (!arena.base) return;
        zero(bias, count * sizeof(float));
        if (layer.bias) spread({layer.bias, nullptr, true}, false, 0.0f, count, neuron, bias);
    }
};

// The parameters of block r of sample b. A dropped neuron never fires: its threshold is infinite, as that of padding.
struct SampleParameters {
    LaneParameters block;
    alignas(64) float threshold[kLanes];

    SampleParameters(const LayerParameters& parameters, const Layer& layer, int64_t b, int64_t r)
        : block(parameters.from(r * kLanes)) {
        if (!layer.dropped) return;
        const Axis& axis = layer.plan->rows;
        const float*& lanes = block.lanes[model_info(layer.neurons).parameters - 1];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int32_t neuron = axis.neuron[r * kLanes + lane];
            const bool dropped = neuron >= 0 && layer.dropped[b * axis.size + neuron];
            threshold[lane] = dropped ? __builtin_inff() : lanes[lane];
        }
        lanes = threshold;
    }
    SampleParameters(const SampleParameters&) = delete;
};

// step(parameters, begin, end) for samples first + begin … of block r: for all at once, unless each has dropped neurons of its own.
template <class F>
void each_sample(const LayerParameters& parameters, const Layer& layer, int64_t first, int64_t samples, int64_t r, const F& step) {
    if (!layer.dropped) return step(parameters.from(r * kLanes), int64_t{0}, samples);
    for (int64_t i = 0; i < samples; ++i) step(SampleParameters(parameters, layer, first + i, r).block, i, i + 1);
}

// The gradient of a parameter from what parts give to each lane, data[blocks][parts][64].
inline void lane_gradient(const Parameter& parameter, bool decay, const Axis& axis, const float* data, int64_t parts, int threads,
                          double* totals) {
    parameter_gradient(parameter, decay, {data, parts, kLanes, static_cast<int64_t>(axis.blocks) * kLanes, parts * kLanes},
                       [&](int64_t i) { return axis.neuron[i]; }, axis.size, threads, totals);
}

// What every layer has in a backward pass.
struct LayerBackward {
    Layer& layer;
    const Plan& plan;
    const ModelInfo& model;
    LayerParameters parameters;
    BackwardScan scan;
    bool last;         // of the stack
    int64_t parts = 0;  // of the sums over t: one of each sample, or of the samples of a task
    float* current = nullptr;  // [row blocks][parts][64] Σ ∂L/∂I_t, as are those of the parameters
    float* sums[kMostParameters] = {};

    LayerBackward(const Stack& s, int64_t l, Arena& arena)
        : layer(s.layers[l]),
          plan(*layer.plan),
          model(model_info(layer.neurons)),
          parameters(layer, arena),
          scan(backward_scan(layer.neurons)),
          last(l + 1 == s.count) {}

    int64_t lanes() const { return static_cast<int64_t>(plan.rows.blocks) * kLanes; }

    void take_sums(int64_t count, Arena& arena) {
        parts = count;
        current = arena.take<float>(lanes() * parts);
        for (int k = 0; k < model.parameters; ++k) sums[k] = arena.take<float>(lanes() * parts);
    }

    // Of block r and a part: where its sums lie; zeros.
    BlockGradient block_gradient(int64_t part, int64_t r) const {
        const int64_t at = (r * parts + part) * kLanes;
        BlockGradient result{nullptr, nullptr, {}, current + at, {}, nullptr, nullptr, nullptr};
        for (int k = 0; k < model.parameters; ++k) result.parameters[k] = sums[k] + at;
        return result;
    }
    void clear(int64_t part, int64_t r) const {
        const BlockGradient block = block_gradient(part, r);
        zero(block.current, kLanes * sizeof(float));
        for (int k = 0; k < model.parameters; ++k) zero(block.parameters[k], kLanes * sizeof(float));
    }

    // The part of ∂L/∂S of block r of sample b that is the same at every step: rates[n] is the mean over T·B spikes, counts[b][n]
    // the sum over T.
    void constant_part(const Stack& s, int64_t b, int64_t r, float* out) const {
        const float share = 1.0f / (static_cast<float>(s.batch) * s.steps);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int32_t n = plan.rows.neuron[r * kLanes + lane];
            out[lane] = n >= 0 && layer.grad_rates ? layer.grad_rates[n] * share : 0.0f;
            if (last && n >= 0 && s.grad_counts) out[lane] += s.grad_counts[b * plan.rows.size + n];
        }
    }

    void finish(const Stack& s, double* totals) const {
        lane_gradient({layer.bias, layer.grad_bias, true}, false, plan.rows, current, parts, s.threads, totals);
        for (int k = 0; k < model.parameters; ++k)
            lane_gradient(layer.neurons.parameters[k], model.decays[k], plan.rows, sums[k], parts, s.threads, totals);
    }
};

enum class Input { kHeld, kDense, kEvents, kDenseSpikes };

// The samples of a slice at least.
inline int64_t least_slice(const Stack& s) {
    for (int l = 0; l < s.count; ++l)
        if (s.layers[l].recurrent) return kStepSlice;
    return 1;
}

inline bool are_spikes(Input kind) { return kind == Input::kEvents || kind == Input::kDenseSpikes; }

// Cycles of each way to form a product, of one row (a sample at a step) unless a comment says otherwise: fitted to passes by
// each way, of the points of benchmarks/cpu_choices.py and of 90 others (PERFORMANCE.md).
#if defined(__AVX512F__)
constexpr double kProductCycles = 0.06;       // a weight of a dense product
constexpr double kExpandCycles = 60;          // a block of spikes that is written as floats for it
constexpr double kEventCycles = 8;            // an event, which visits 64 weights or a row of 64 ∂I, from L2
constexpr double kStripEventCycles = 1.8;     // forward: an event that visits 16; one that visits 32 twice as many
constexpr double kStripGradientCycles = 2.3;  // gradient: the same
constexpr double kListCycles = 90;            // forward: a list of events, of a block or of a strip, with its mispredicted end
constexpr double kWordCycles = 4;             // forward: a tile or a segment whose events are listed
constexpr double kSumCycles = 1.7;            // a sum of a subset, of 16 lanes
constexpr double kSpikeWeightCycles = 0.052;  // a weight by batch.h, its input being spikes
constexpr double kDenseWeightCycles = 0.15;   // the same for a dense input
constexpr double kTotalCycles = 13;           // gradient: the lanes of a weight's sum that are added up, once a slice
constexpr double kBandCycles = 60;            // gradient: a block of ∂I that is brought into bands
#elif defined(__AVX2__)
constexpr double kProductCycles = 0.078, kExpandCycles = 130, kEventCycles = 10, kStripEventCycles = 5, kStripGradientCycles = 3.4;
constexpr double kListCycles = 30, kWordCycles = 27, kSumCycles = 2.4, kSpikeWeightCycles = 0.105, kDenseWeightCycles = 0.2;
constexpr double kTotalCycles = 17, kBandCycles = 170;
#else
constexpr double kProductCycles = 0.23, kExpandCycles = 130, kEventCycles = 17, kStripEventCycles = 3.8, kStripGradientCycles = 7.4;
constexpr double kListCycles = 35, kWordCycles = 34, kSumCycles = 4, kSpikeWeightCycles = 0.26, kDenseWeightCycles = 0.57;
constexpr double kTotalCycles = 17, kBandCycles = 170;
#endif
constexpr double kSortCycles = 1500;  // gradient: up to 64 words of a block, whose events are sorted by source
constexpr double kTableCycles = 20;   // the sixteen sums of 16 lanes
constexpr double kBitsCycles = 60;    // a block of spikes that is brought into bits of rows or of samples
constexpr double kStoreCycles = 45;   // forward: a block of currents that its neurons do not take from registers
constexpr double kPieceCycles = 13;   // a piece of a unit that is brought into a tile, once a pass

// The rows of a pass over a layer: all; those that fill vectors of spikes or floats, of which some do not exist; and the slices
// that a weight gradient is summed in.
struct PassRows {
    double all, filled, slices;
    PassRows(const Stack& s, Input kind, bool forward) {
        const auto fill = [](int64_t count, int64_t size) { return divide_up(count, size) * size; };
        const int64_t steps = kind == Input::kHeld ? 1 : s.steps;
        const int64_t samples = kind == Input::kHeld ? s.batch : Slices{s.batch, s.steps, least_slice(s)}.samples;
        all = static_cast<double>(s.batch * steps);
        slices = static_cast<double>(divide_up(s.batch, samples));
        filled = forward ? static_cast<double>(fill(s.batch, are_spikes(kind) ? kSamples : kLanes) * steps)
                         : slices * static_cast<double>(fill(samples * steps, kLanes));
    }
};

// Cycles of a row by events, of all lanes of a tile or of those of the strips that their units have.
inline double event_cycles(const Stack& s, const Layer& layer, bool forward, bool strips) {
    const Plan& plan = *layer.plan;
    if (strips && plan.rows.strip == kLanes) return __builtin_inf();
    const double each = strips ? plan.product_weights / 16 * (forward ? kStripEventCycles : kStripGradientCycles)
                               : static_cast<double>(plan.sources) * kEventCycles;
    const double lists = plan.rows.blocks * (strips ? kLanes / plan.rows.strip : 1);
    const double words = strips ? static_cast<double>(plan.forward.list.size()) : plan.tiles;
    const double sorted = plan.cols.blocks * static_cast<double>(divide_up(s.steps, 64)) / s.steps;
    return layer.input_rate * each + (forward ? lists * kListCycles + words * kWordCycles : sorted * kSortCycles);
}

inline bool events_by_strip(const Stack& s, const Layer& layer, bool forward) {
    return event_cycles(s, layer, forward, true) < event_cycles(s, layer, forward, false);
}

inline double event_cycles(const Stack& s, const Layer& layer, bool forward) {
    return event_cycles(s, layer, forward, events_by_strip(s, layer, forward));
}

// Cycles of a row by the product.
inline double product_cycles(const Stack& s, const Layer& layer, Input kind, bool forward) {
    const Plan& plan = *layer.plan;
    const double weights = forward ? plan.product_weights : static_cast<double>(plan.tiles) * kTile;
    return weights * kProductCycles / (forward && s.bf16 ? 2 : 1) + (are_spikes(kind) ? plan.cols.blocks * kExpandCycles : 0) +
           (forward ? plan.rows.blocks * kStoreCycles : 0);
}

// How spikes that are multiplied neither over the batch nor by sums of subsets are.
inline Input spike_kind(const Stack& s, const Layer& layer, bool forward) {
    const double product = product_cycles(s, layer, Input::kDenseSpikes, forward);
    return s.event_cost * event_cycles(s, layer, forward) <= product ? Input::kEvents : Input::kDenseSpikes;
}

// The same for all inputs, of layer l.
inline Input input_kind(const Stack& s, int l, bool forward) {
    if (l == 0 && s.held) return Input::kHeld;
    if (l == 0 && !s.x_spikes) return Input::kDense;
    return spike_kind(s, s.layers[l], forward);
}

// Cycles of a pass without vectors over the batch and without sums of subsets.
inline double plain_cycles(const Stack& s, const Layer& layer, Input kind, bool forward) {
    const double row = kind == Input::kEvents ? event_cycles(s, layer, forward) : product_cycles(s, layer, kind, forward);
    return PassRows(s, kind, forward).all * row + kPieceCycles * static_cast<double>(layer.plan->pieces.size());
}

// Whether the forward product or the weight gradient of a layer with that input goes by sums of subsets (subset_sums.h).
inline bool by_subsets(const Stack& s, const Layer& layer, Input kind, bool forward) {
    const Plan& plan = *layer.plan;
    if (plan.granules.list.empty() || !are_spikes(kind)) return false;
    const PassRows rows(s, kind, forward);
    const double vectors = plan.rows.strip / 16.0;
    const double sums = 4 * vectors * static_cast<double>(plan.granules.list.size());  // of four quads of lanes; or of rows
    double cycles = rows.all * sums * kSumCycles + kPieceCycles * static_cast<double>(plan.pieces.size());
    if (forward)
        cycles += sums * kTableCycles * static_cast<double>(divide_up(s.batch, subset_samples(s.batch, s.steps))) +
                  rows.all * plan.rows.blocks * kStoreCycles;
    else
        cycles += rows.all / 4 * plan.rows.blocks * (kLanes / 16.0) * kTableCycles + rows.filled * plan.cols.blocks * kBitsCycles;
    return s.subset_cost * cycles < plain_cycles(s, layer, kind, forward);
}

// Whether the forward product or the weight gradient of a layer with that input goes weight by weight, with vectors over
// the batch: if its units are too small to fill a vector, the batch fills one, and it is the cheapest way.
inline bool by_batch(const Stack& s, const Layer& layer, Input kind, bool forward) {
    const Plan& plan = *layer.plan;
    if (plan.by_row.empty() || s.batch < kSamples || (forward && kind == Input::kDense)) return false;
    const bool spikes = are_spikes(kind);
    if (!spikes && s.bf16) return false;  // the product has twice the rate
    const PassRows rows(s, kind, forward);
    const double weights = static_cast<double>(plan.by_row.source.size());
    double cycles = rows.filled * weights * (spikes ? kSpikeWeightCycles : kDenseWeightCycles);
    if (spikes) cycles += rows.filled * plan.cols.blocks * kBitsCycles;
    cycles += forward ? rows.all * plan.rows.blocks * kStoreCycles
                      : rows.slices * weights * kTotalCycles + rows.filled * plan.rows.blocks * kBandCycles;
    return s.batch_cost * cycles < plain_cycles(s, layer, kind, forward);
}

// The same for input gradients, by the product (`gradient_rows` of a plan) and where they are needed.
#if defined(__AVX512F__)
constexpr double kRowCycles = 4.5;       // a row of 64 weights of the product
constexpr double kPatchCycles = 2.5;     // a dot product's patch
constexpr double kFarPatchCycles = 2.4;  // a patch whose weights come from L3
#else
constexpr double kRowCycles = 7, kPatchCycles = 4.2, kFarPatchCycles = 2.6;
#endif
constexpr double kNearPatches = 1024;  // whose weights fit into L2
constexpr double kFindCycles = 40;     // to find what is needed of a block
constexpr double kLoadCycles = 300;    // to write the weights of a patch, once a pass

// The patches of layer l whose rows a gradient can reach: neurons that feed no other get none.
inline double fed_patches(const Stack& s, int l) {
    const Layer& layer = s.layers[l];
    const Patches& patches = layer.plan->patches;
    const bool all = l + 1 == s.count || layer.grad_rates || layer.grad_last || layer.recurrent ||
                     !same_order(layer.plan->rows, s.layers[l + 1].plan->cols);
    if (all) return static_cast<double>(patches.row.size());
    const std::vector<int32_t>& first = s.layers[l + 1].plan->patches.first;
    double fed = 0;
    for (const int32_t row : patches.row) fed += first[row] < first[row + 1];
    return fed;
}

// Whether the input gradient of layer l is computed where the layer below needs it alone, a share of its neurons and steps
// (needed_gradient.h): if that is cheaper than the product, and than events, at most a share `listed` of the layer's own. All
// weights are written once, and read again every 64 rows.
inline bool by_need(const Stack& s, int l, double share, double listed) {
    const Layer& layer = s.layers[l];
    const Plan& plan = *layer.plan;
    const double fed = fed_patches(s, l);
    const double far = fed > kNearPatches ? (fed - kNearPatches) * kFarPatchCycles : 0;
    const double load = kLoadCycles * static_cast<double>(plan.patches.row.size()) / (static_cast<double>(s.batch) * s.steps);
    const double needed = share * kGranule * fed * kPatchCycles + plan.cols.blocks * kFindCycles + far + load;
    double rows = plan.gradient_rows;
    if (layer.gradient_event_limit > 0) {
        const double events = listed * fed / most(1, static_cast<int64_t>(plan.patches.row.size()));
        const double more = (events / layer.gradient_event_limit - plan.event_runs.ratio) * plan.event_runs.rows;
        if (more < 0) rows += more;
    }
    return s.needed_cost * needed < rows * kRowCycles / (s.bf16 ? 2 : 1);
}

// Fills the input panel of a slice: held rows, dense rows, or spikes as floats.
inline void fill_panel(const Stack& s, const Layer& layer, Input kind, int64_t first, int64_t samples,
                       const Panel<float>& panel) {
    const Axis& axis = layer.plan->cols;
    const int64_t steps = kind == Input::kHeld ? 1 : s.steps;
    parallel_pairs(s.threads, axis.blocks, samples, 4, [&](int64_t block, int64_t b, int) {
        const int64_t row = b * steps;
        if (kind == Input::kDenseSpikes)
            for (int64_t t = 0; t < steps; ++t)
                expand_bits(layer.inputs[((first + b) * axis.blocks + block) * steps + t], panel.at(block, row + t));
        else
            load_block(axis, block, s.x, Rows{first + b, steps, s.batch, axis.size}, steps, panel.at(block, row));
    });
}

// The states before the first step or after the last, [states][B][N] in the user's order (null: zeros), of one block of one
// sample, [states][64]; and back.
inline void load_states(const Stack& s, const Layer& layer, const float* states, int64_t b, int64_t r, float* block) {
    const Axis& axis = layer.plan->rows;
    const int64_t count = model_info(layer.neurons).states;
    if (!states) return zero(block, count * kLanes * sizeof(float));
    for (int64_t i = 0; i < count; ++i)
        load_block(axis, r, states + i * s.batch * axis.size, Rows{b, 1, s.batch, axis.size}, 1, block + i * kLanes);
}

inline void store_states(const Stack& s, const Layer& layer, const float* block, int64_t b, int64_t r, float* states) {
    const Axis& axis = layer.plan->rows;
    for (int64_t i = 0; i < model_info(layer.neurons).states; ++i)
        store_block(axis, r, block + i * kLanes, Rows{b, 1, s.batch, axis.size}, 1, states + i * s.batch * axis.size);
}

// The spikes of the state before the first step, one word of a block; 0 if the run begins without one, or if states do not
// show spikes.
inline uint64_t first_word(const Stack& s, const Layer& layer, const LayerParameters& parameters, int64_t b, int64_t r) {
    const ModelInfo& model = model_info(layer.neurons);
    if (!layer.state || model.hidden) return 0;
    alignas(64) float states[kMostStates * kLanes];
    load_states(s, layer, layer.state, b, r, states);
    const SampleParameters own(parameters, layer, b, r);
    const float *membrane = states + (model.states - 1) * kLanes, *theta = own.block.lanes[model.parameters - 1];
    uint64_t word = 0;
    for (int v = 0; v < kVecs; ++v) word |= greater_bits(load(membrane + v * W), load(theta + v * W)) << (v * W);
    return word;
}

// The kept states of one block of one sample, [T][states][64]; null if none are kept.
inline float* kept_states(const Stack& s, const Layer& layer, int64_t b, int64_t r) {
    const int64_t size = s.steps * model_info(layer.neurons).states * kLanes;
    return layer.states ? layer.states + (b * layer.plan->rows.blocks + r) * size : nullptr;
}

// The kept currents of one block of a sample whose input is held, [64]; null if none are kept.
inline float* kept_currents(const Stack& s, const Layer& layer, int64_t b, int64_t r) {
    return layer.currents ? layer.currents + (r * s.batch + b) * kLanes : nullptr;
}

// Firing rates per neuron from spike counts [B][lanes]; returns the number of spikes.
inline double sum_rates(const Stack& s, const Layer& layer, const float* counts, double* totals) {
    const Axis& axis = layer.plan->rows;
    const int64_t lanes = static_cast<int64_t>(axis.blocks) * kLanes;
    sum_over_samples({counts, s.batch, lanes, lanes, kLanes}, s.threads, totals);
    double spikes = 0;
    for (int64_t i = 0; i < lanes; ++i) {
        if (axis.neuron[i] < 0) continue;
        layer.rates[axis.neuron[i]] = static_cast<float>(totals[i] / (static_cast<double>(s.batch) * s.steps));
        spikes += totals[i];
    }
    return spikes;
}

}  // namespace g2g::G2G_ISA
