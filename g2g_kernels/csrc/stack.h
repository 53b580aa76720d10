// What both passes over a stack of layers share: the inputs of its layers, and their parameters in lane order.
#pragma once

#include "batch.h"
#include "interface.h"
#include "layout.h"
#include "panel.h"
#include "parameters.h"
#include "subset_sums.h"
#include "sweep.h"

namespace g2g::G2G_ISA {

// The parameters of a layer's neurons and its bias, one float per lane.
struct LayerParameters {
    float* lanes[kMostParameters] = {};
    float* bias;

    LayerParameters(const Layer& layer, Arena& arena) {
        const Axis& axis = layer.plan->rows;
        const ModelInfo& model = model_info(layer.neurons);
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

// The parameters of block r of sample b. A dropped neuron never fires: its threshold is infinite, as that of padding.
struct SampleParameters {
    BlockParameters block;
    alignas(64) float threshold[kLanes];

    SampleParameters(const LayerParameters& parameters, const Layer& layer, int64_t b, int64_t r)
        : block(parameters.block(r)) {
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

enum class Input { kHeld, kDense, kEvents, kDenseSpikes };

inline bool any_recurrent(const Stack& s) {
    for (int l = 0; l < s.count; ++l)
        if (s.layers[l].recurrent) return true;
    return false;
}

// How layer l's input is multiplied; `rate` is its measured share of ones.
inline Input input_kind(const Stack& s, int l, double rate) {
    if (l == 0 && s.held) return Input::kHeld;
    if (l == 0 && !s.x_spikes) return Input::kDense;
    return rate <= s.event_limit ? Input::kEvents : Input::kDenseSpikes;
}

// Cycles of each way to form a product, of one row (a sample at a step), measured (benchmarks/cpu_choices.py).
#if defined(__AVX512F__)
constexpr double kEventCycles = 4.3;            // an event, which visits 64 weights
constexpr double kStripEventCycles = 1.2;       // an event that visits 16; one that visits 32 twice as many
constexpr double kProductCycles = 0.08;         // a weight of a dense product
constexpr double kSpikeWeightCycles = 0.046;    // a weight by batch.h, its input being spikes
constexpr double kDenseWeightCycles = 0.2;      // the same for a dense input
constexpr double kSumCycles = 1.1;              // a sum of a subset, of 16 lanes
constexpr double kPatchCycles = 3.6, kDotCycles = 4;  // a dot product of an input gradient: for each patch, and else, as many
                                                      // times overrated as the product that it is compared with
constexpr double kFarPatchCycles = 5;                 // a patch whose weights come from L3
#else
constexpr double kEventCycles = 14, kStripEventCycles = 4;
constexpr double kProductCycles = 0.16, kSpikeWeightCycles = 0.5, kDenseWeightCycles = 0.4, kSumCycles = 2.2;
constexpr double kPatchCycles = 6.5, kDotCycles = 4, kFarPatchCycles = 5;
#endif
constexpr double kListCycles = 6;     // forward: a tile or a segment whose events are listed
constexpr double kLaneCycles = 1;     // gradient: 16 source lanes of a strip
constexpr double kSortCycles = 750;   // gradient: up to 64 words of a block, whose events are sorted by source
constexpr double kBandCycles = 45;    // gradient: a block of ∂I that is brought into bands
constexpr double kTableCycles = 40;   // the sixteen sums of 16 lanes
constexpr double kPieceCycles = 18;   // a piece of a unit that is brought into a tile, once for all rows
constexpr double kNearPatches = 1024;  // whose weights fit into L2
constexpr double kLoadCycles = 150;    // to write the weights of a patch, once a pass

// Cycles by events, of all lanes of a tile or of those of the strips that their units have.
inline double event_cycles(const Layer& layer, bool forward, bool strips) {
    const Plan& plan = *layer.plan;
    if (strips && plan.rows.strip == kLanes) return __builtin_inf();
    const double events = strips ? plan.product_weights / 16 * kStripEventCycles : static_cast<double>(plan.sources) * kEventCycles;
    const double listed = strips ? static_cast<double>(plan.forward.list.size()) : plan.tiles;
    const double lanes = strips ? static_cast<double>(plan.granules.list.size()) : 0;
    return layer.input_rate * events + (forward ? listed * kListCycles : lanes * kLaneCycles);
}

inline bool events_by_strip(const Layer& layer, bool forward) {
    return event_cycles(layer, forward, true) < event_cycles(layer, forward, false);
}

// The cheapest way without vectors over the batch and without sums of subsets.
inline double plain_cycles(const Stack& s, const Layer& layer, Input kind, bool forward) {
    const Plan& plan = *layer.plan;
    const double rows = static_cast<double>(s.batch) * s.steps;
    const double pieces = kPieceCycles * static_cast<double>(plan.pieces.size()) / rows;
    if (kind != Input::kEvents)
        return pieces + kProductCycles * (forward ? plan.product_weights : static_cast<double>(plan.tiles) * kTile);
    const double sorted = kSortCycles * plan.cols.blocks * static_cast<double>(divide_up(s.steps, 64)) / s.steps;
    return pieces + (forward ? 0 : sorted) + event_cycles(layer, forward, events_by_strip(layer, forward));
}

inline bool are_spikes(Input kind) { return kind == Input::kEvents || kind == Input::kDenseSpikes; }

// Whether the forward product or the weight gradient of a layer with that input goes by sums of subsets (subset_sums.h).
inline bool by_subsets(const Stack& s, const Layer& layer, Input kind, bool forward) {
    const Plan& plan = *layer.plan;
    if (plan.granules.list.empty() || !are_spikes(kind)) return false;
    const double vectors = plan.rows.strip / 16.0, granules = static_cast<double>(plan.granules.list.size());
    const double rows = static_cast<double>(s.batch) * s.steps;
    double cycles = granules * 4 * kSumCycles * vectors;  // four quads of lanes, or four times four lanes for four rows
    if (forward)
        cycles += granules * 4 * kTableCycles * vectors / (rows < kSubsetRows ? rows : kSubsetRows);
    else
        cycles += plan.rows.blocks * (kLanes / 16.0) * kTableCycles / 4;
    return s.subset_cost * cycles < plain_cycles(s, layer, kind, forward);
}

// Whether the forward product or the weight gradient of a layer with that input goes weight by weight, with vectors over
// the batch: if its units are too small to fill a vector, the batch fills one, and it is the cheapest way.
inline bool by_batch(const Stack& s, const Layer& layer, Input kind, bool forward) {
    const Plan& plan = *layer.plan;
    if (plan.by_row.empty() || s.batch < kSamples) return false;
    const bool spikes = are_spikes(kind);
    if (!spikes && s.bf16) return false;  // the product has twice the rate
    const int64_t fill = spikes ? kSamples : kLanes;  // rows that vectors hold, of which some may not exist
    const double padded = static_cast<double>(divide_up(s.batch, fill) * fill) / s.batch;
    const double weights = static_cast<double>(plan.by_row.source.size());
    const double batch = weights * padded * (spikes ? kSpikeWeightCycles : kDenseWeightCycles) +
                         (forward ? 0 : kBandCycles * plan.rows.blocks);
    return s.batch_cost * batch < plain_cycles(s, layer, kind, forward);
}

inline bool forward_by_batch(const Stack& s, const Layer& layer, Input kind) {
    return kind != Input::kDense && by_batch(s, layer, kind, true);
}

inline bool outer_by_batch(const Stack& s, const Layer& layer, Input kind) {
    return layer.grad_values && by_batch(s, layer, kind, false);
}

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
    const double fed = fed_patches(s, l), strips = plan.cols.blocks * kGranules;
    const double far = fed > kNearPatches ? (fed - kNearPatches) * kFarPatchCycles : 0;
    const double load = kLoadCycles * static_cast<double>(plan.patches.row.size()) / (static_cast<double>(s.batch) * s.steps);
    const double needed = share * kGranule * (fed * kPatchCycles + strips * kDotCycles) + far + load;
    const double bands = plan.sparse.empty() ? 0 : kBandCycles * (plan.rows.blocks + plan.cols.blocks);
    double rows = plan.gradient_rows;
    if (layer.gradient_event_limit > 0) {
        const double events = listed * fed / most(1, static_cast<int64_t>(plan.patches.row.size()));
        const double more = (events / layer.gradient_event_limit - plan.event_runs.ratio) * plan.event_runs.rows;
        if (more < 0) rows += more;
    }
    return s.needed_cost * needed < rows * kLanes * kProductCycles / (s.bf16 ? 2 : 1) + bands;
}

// Samples of a task that a table serves.
inline int64_t subset_samples(int64_t batch, int64_t steps) { return least(batch, most(1, kSubsetRows / steps)); }

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

// The states before the first step or after the last, [states][B][N] in the user's order (null: zeros), of one block of one
// sample, [states][64]; and back.
inline void load_states(const Stack& s, const Layer& layer, const float* states, int64_t b, int64_t r, float* block) {
    const Axis& axis = layer.plan->rows;
    const int64_t count = model_info(layer.neurons).states;
    if (!states) return zero(block, count * kLanes * sizeof(float));
    for (int64_t i = 0; i < count * kLanes; ++i) {
        const int32_t neuron = axis.neuron[r * kLanes + i % kLanes];
        block[i] = neuron >= 0 ? states[(i / kLanes * s.batch + b) * axis.size + neuron] : 0.0f;
    }
}

inline void store_states(const Stack& s, const Layer& layer, const float* block, int64_t b, int64_t r, float* states) {
    const Axis& axis = layer.plan->rows;
    const int64_t count = model_info(layer.neurons).states;
    for (int64_t i = 0; i < count * kLanes; ++i) {
        const int32_t neuron = axis.neuron[r * kLanes + i % kLanes];
        if (neuron >= 0) states[(i / kLanes * s.batch + b) * axis.size + neuron] = block[i];
    }
}

// The spikes of the state before the first step, one word of a block; 0 if the run begins without one.
inline uint64_t first_word(const Stack& s, const Layer& layer, const LayerParameters& parameters, int64_t b, int64_t r) {
    if (!layer.first) return 0;
    alignas(64) float states[kMostStates * kLanes];
    load_states(s, layer, layer.first, b, r, states);
    const SampleParameters own(parameters, layer, b, r);
    const ModelInfo& model = model_info(layer.neurons);
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

}  // namespace g2g::G2G_ISA
