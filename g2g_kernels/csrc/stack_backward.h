// The backward pass of a stack, in slices of the batch that stay in cache: for each slice the layers from the last to the
// first, for each layer its neurons backwards over time, then its weight gradient. Every output element is summed by one
// task in a fixed order, so results do not depend on the threads.
#pragma once

#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "batch.h"
#include "delays.h"
#include "events.h"
#include "gradient_events.h"
#include "input_gradient.h"
#include "needed_gradient.h"
#include "parallel.h"
#include "product.h"
#include "recurrent.h"
#include "stack.h"

namespace g2g::G2G_ISA {

// A panel of ∂L/∂S in the order of the columns above, which reorder() brings into a layer's own, in place.
struct ArrivalPanel {
    Panel<float> panel;
    bool aligned = true;          // the order above is the layer's own
    int64_t blocks = 0;           // of the layer's own rows
    int32_t* offset = nullptr;    // [row blocks][64] where each lane lies, from the row's place in block 0

    ArrivalPanel() = default;
    ArrivalPanel(const Axis& own, const Axis& above, int64_t rows, Arena& arena)
        : aligned(same_order(own, above)), blocks(own.blocks) {
        // one row more than is used: blocks a multiple of 4 KiB apart would share few sets of the cache
        panel = {arena.take<float>(most(own.blocks, above.blocks) * (rows + 1) * kLanes), rows + 1};
        if (aligned) return;
        if (above.blocks * (rows + 1) * kLanes > INT32_MAX) throw std::length_error("offsets have 32 bits");
        offset = arena.take<int32_t>(blocks * kLanes);
        for (int64_t i = 0; arena.base && i < blocks * kLanes; ++i) {
            const int32_t lane = own.neuron[i] < 0 ? 0 : above.lane[own.neuron[i]];  // any finite value does in padding
            offset[i] = static_cast<int32_t>(lane / kLanes * panel.rows * kLanes + lane % kLanes);
        }
    }

    // One row of all blocks; 8 KB for 2048 neurons, so that lanes are gathered from L1. `room` is for one row.
    void reorder(int64_t row, float* room) const {
        constexpr int64_t ahead = 4;
        const int64_t later = least(row + ahead, panel.rows - 1);
        for (int64_t r = 0; r < blocks; ++r) {
            fetch_block(panel.at(r, later));
            for (int v = 0; v < kVecs; ++v) {
                const int64_t lane = r * kLanes + v * W;
                store(room + lane, gather(panel.at(0, row), offset + lane));
            }
        }
        for (int64_t r = 0; r < blocks; ++r)
            for (int v = 0; v < kVecs; ++v) store(panel.at(r, row) + v * W, load(room + r * kLanes + v * W));
    }
};

// The gradient of the weights of one connection, as a layer's own: from its inputs, and from ∂L/∂I.
struct WeightGradient {
    Layer layer;             // whose plan, inputs and gradient are the connection's
    Input kind;
    bool by_batch;           // weight by weight
    bool by_subsets;         // by sums of subsets
    float* tiles = nullptr;  // unless by_batch: [tile][source lane][output lane]
    Panel<float> panel;      // of dense inputs
    Bands bands;             // the same, by_batch
    RowBits row_bits;        // of spikes, where they are read as bits
    std::optional<EventsByLane> events;  // of other spikes

    WeightGradient(const Stack& s, const Layer& of, Input input, Arena& arena)
        : layer(of),
          kind(input),
          by_batch(g2g::G2G_ISA::by_batch(s, of, input, false)),
          by_subsets(!by_batch && g2g::G2G_ISA::by_subsets(s, of, input, false)) {
        if (!by_batch) tiles = arena.take<float>(static_cast<size_t>(plan().tiles) * kTile);
    }

    const Plan& plan() const { return *layer.plan; }
    bool spikes() const { return are_spikes(kind); }

    // Memory for inputs, of at most so many rows of a slice.
    void take(const Slices& slices, int64_t rows, int threads, Arena& arena) {
        const int64_t C = plan().cols.blocks;
        if (by_subsets || (by_batch && spikes())) {
            row_bits.bits = arena.take<uint16_t>(RowBits::size(C * kLanes, rows));
        } else if (kind == Input::kEvents) {
            events.emplace(C, slices.samples, slices.steps, threads, arena);
        } else {
            panel = {arena.take<float>(C * rows * kLanes), rows};
            if (by_batch) bands = {arena.take<float>(Bands::size(C * kLanes, rows)), C * kLanes};
        }
    }

    void begin(int threads) const {
        if (by_batch) return zero_gradient(plan(), threads, layer.grad_values);
        zero_floats(tiles, int64_t{plan().tiles} * kTile, threads);
    }

    void finish(int threads) const {
        if (!by_batch) unpack_gradient(plan(), tiles, threads, layer.grad_values);
    }
};

// The share of ones among the spikes of layer l.
inline double spike_rate(const Stack& s, int l) {
    if (l + 1 < s.count) return s.layers[l + 1].input_rate;
    const Layer& layer = s.layers[l];
    const int64_t words = static_cast<int64_t>(s.batch) * layer.plan->rows.blocks * s.steps;
    int64_t spikes = 0;
    for (int64_t i = 0; i < words; ++i) spikes += __builtin_popcountll(layer.spikes[i]);
    return static_cast<double>(spikes) / (static_cast<double>(s.batch) * s.steps * layer.plan->rows.size);
}

// How ∂L/∂(input) of a layer is computed for the samples of a slice: by the product, by events, or where it is needed.
enum class Way { kProduct, kEvents, kNeeded };

// The state of one layer's backward pass across slices.
struct BackwardLayer : LayerBackward {
    WeightGradient weights;
    bool panel = false;  // ∂L/∂S is stored before the scan: it comes in bands of 64 rows, or in another order of lanes
    DualPanel grad;                               // ∂L/∂I: rows of the slice; for a held input, one row per sample
    std::optional<InputGradient> input_gradient;  // if the layer below or the input needs it
    float event_limit = 0;                        // share of events up to which it is computed by events
    std::optional<NeededGradient> needed;         // if the layer below may need only a part of it
    bool lists_events = false;                    // in the current slice
    Way way = Way::kProduct;                      // of the last slice, which its scan expects of the next one
    Bands bands;                                  // of ∂L/∂I, where the product reads them
    ArrivalPanel arrivals;
    Late late;                                    // what its spikes are
    std::optional<RecurrentBackward> recurrent;
    std::optional<WeightGradient> recurrent_weights;
    uint64_t* reached;                            // [B][row blocks] bit i: ∂I of lane i is not 0 at some step
    uint64_t* reached_in_slice;                   // [row blocks] the same of any sample of the slice
    float* constant;                              // ∂L/∂S for all t, [row blocks][64]; in the last layer one per sample

    BackwardLayer(const Stack& s, int l, const Slices& slices, Arena& arena)
        : LayerBackward(s, l, arena), weights(s, layer, input_kind(s, l, false), arena) {
        const bool below = l > 0 || s.grad_x;
        const bool held = weights.kind == Input::kHeld;
        const int64_t rows = held ? s.batch : slices.rows();
        grad = DualPanel(plan.rows.blocks, rows, s.bf16 && below, arena);
        if (below && !held && plan.rows.blocks <= kMostEventBlocks)
            event_limit = static_cast<float>(layer.gradient_event_limit * plan.event_runs.ratio);
        lists_events = event_limit > 0;
        const Layer* const lower = l > 0 && !layer.delays && !s.layers[l - 1].recurrent ? &s.layers[l - 1] : nullptr;
        if (lower && !model_info(lower->neurons).hidden && same_order(lower->plan->rows, plan.cols)) needed.emplace(plan, arena);
        if (below) input_gradient.emplace(plan, layer.values, s.bf16, lists_events, arena);
        if (layer.recurrent) {
            recurrent.emplace(s, layer, slices.samples, !held, arena);
            Layer joined = layer;  // the recurrent connection, whose inputs are the layer's own spikes one step later
            joined.plan = layer.recurrent;
            joined.values = layer.recurrent_values;
            joined.grad_values = layer.grad_recurrent;
            joined.inputs = recurrent->inputs;
            joined.input_rate = spike_rate(s, l);
            recurrent_weights.emplace(s, joined, spike_kind(s, joined, false), arena);
        }
        reached = arena.take<uint64_t>(static_cast<size_t>(plan.rows.blocks) * s.batch);
        reached_in_slice = arena.take<uint64_t>(plan.rows.blocks);
        constant = arena.take<float>(last ? lanes() * s.batch : lanes());
        take_sums(recurrent ? recurrent->sums(s.batch) : s.batch, arena);
        if (last) return;
        const Plan& above = *s.layers[l + 1].plan;
        panel = !same_order(plan.rows, above.cols) || !above.sparse.empty() || recurrent;
        late = Late(s, layer, s.layers[l + 1], arena);
        if (panel) arrivals = ArrivalPanel(plan.rows, above.cols, slices.rows(), arena);
    }

    float* constant_of(int64_t sample, int64_t r) const { return constant + (last ? sample * lanes() : 0) + r * kLanes; }

    const float* threshold(const LaneParameters& block) const { return block.lanes[model.parameters - 1]; }

    // β, where all neurons share it.
    float decay() const { return parameters.lanes[0][plan.rows.lane[0]]; }

    // The number of events in so many rows up to which the input gradient is computed by events.
    int64_t most_events(int64_t rows) const {
        return static_cast<int64_t>((event_limit < 1 ? event_limit : 1.0) * static_cast<double>(rows * plan.rows.size));
    }

    // Whether ∂L/∂I is read in bands.
    bool needs_bands() const {
        return weights.by_batch || (recurrent_weights && recurrent_weights->by_batch) ||
               (input_gradient && input_gradient->sparse());
    }

    // True if its scan should write ∂L/∂I in bfloat16 too.
    bool wants_halves() const { return grad.halves.data && way == Way::kProduct; }

    // The lanes of each block that a gradient reaches in some samples. Of a recurrent layer it is not known.
    const uint64_t* reached_in(int64_t first, int64_t samples) const {
        for (int64_t r = 0; r < plan.rows.blocks; ++r) {
            uint64_t lanes = recurrent ? ~uint64_t{0} : 0;
            for (int64_t b = first; !recurrent && b < first + samples; ++b) lanes |= reached[b * plan.rows.blocks + r];
            reached_in_slice[r] = lanes;
        }
        return reached_in_slice;
    }
};

// ∂L/∂I of a layer for the samples of a slice.
struct CurrentGradient {
    Panel<float> rows;
    Bands bands;              // the same, unless nothing reads them
    const uint64_t* reached;  // [row blocks] bit i: not all of lane i is 0
};

struct BackwardPass {
    const Stack& s;
    Slices slices;
    std::vector<BackwardLayer> layers;
    float* band_memory;                 // of ∂L/∂I of the layer that was swept last
    double* totals;
    EventLists event_lists;             // of the layer that is being swept
    MergedEvents merged_events;         // of the same, and then for the scan of the layer below
    int64_t states_size, tile_size, scratch_size;  // of a worker: states of a block of some samples (before them, sums of late
                                                   // rows), a tile, then events of a step, or what is needed of all rows
    int64_t event_list = 0;
    float* scratch;

    BackwardPass(const Stack& stack, Arena& arena) : s(stack), slices{s.batch, s.steps, least_slice(s)} {
        int64_t lanes = 0, states = 0, sums = 0, listed_blocks = 0, listed = 0, most_rows = 0, grad_bands = 0;
        layers.reserve(s.count);
        for (int l = 0; l < s.count; ++l) {
            const BackwardLayer& x = layers.emplace_back(s, l, slices, arena);
            const int64_t rows = x.recurrent ? most(x.grad.floats.rows, slices.rows()) : x.grad.floats.rows;
            if (x.needs_bands()) grad_bands = most(grad_bands, Bands::size(x.lanes(), rows));
            most_rows = most(most_rows, divide_up(rows, kLanes) * kLanes);
            lanes = most(lanes, x.lanes());
            states = most(states, x.model.states);
            sums = most(sums, x.late.gradient.room_rows(s.steps) * kLanes);
            if (!x.lists_events) continue;
            listed_blocks = most(listed_blocks, x.plan.rows.blocks);
            listed = most(listed, x.most_events(slices.rows()));
        }
        // Memory that is needed at different times: the weight gradient of a layer begins after its lists were merged, and is given
        // what choose() returns.
        const size_t shared = arena.used;
        if (listed_blocks) event_lists = EventLists(listed_blocks, slices.samples, s.steps, arena);
        size_t end = arena.used;
        const auto take = [&](WeightGradient& x, int64_t rows) {
            arena.used = shared;
            x.take(slices, rows, s.threads, arena);
            end = most(end, arena.used);
        };
        for (BackwardLayer& x : layers) {
            take(x.weights, x.grad.floats.rows);
            if (x.recurrent) take(*x.recurrent_weights, slices.rows());
        }
        arena.used = end;
        if (listed_blocks) {
            merged_events = MergedEvents(listed_blocks, slices.samples, s.steps, listed, arena);
            event_list = listed_blocks * kLanes + EventLists::kSlack;
        }
        band_memory = arena.take<float>(grad_bands);
        totals = arena.take<double>(lanes);
        states_size = most(most(kNeededRows, s.steps) * states * kLanes, sums);
        tile_size = most(kLanes, slices.group * s.steps) * kLanes;
        scratch_size = most(most(states_size + tile_size + 2 * most(event_list, most(kNeededRows, s.steps)), lanes), most_rows);
        scratch = arena.take<float>(scratch_size * s.threads);
    }

    void run() {
        for (const BackwardLayer& x : layers) begin(x);
        for (size_t l = 1; l < layers.size(); ++l) {
            BackwardLayer& x = layers[l];
            if (!x.needed) continue;
            const double listed = x.lists_events ? needed_share(x) : 1;
            if (!by_need(s, static_cast<int>(l), needed_share(layers[l - 1]), listed)) continue;
            x.way = Way::kNeeded, x.lists_events = false;
            x.needed->load(x.layer.values, s.threads);
        }
        for (int64_t first = 0; first < s.batch; first += slices.samples) {
            const int64_t samples = least(slices.samples, s.batch - first);
            for (size_t l = layers.size(); l-- > 0;) {
                scan(layers[l], layers[layers[l].last ? l : l + 1], first, samples);
                if (layers[l].weights.kind != Input::kHeld) hand_down(l, first, samples, s.steps);
            }
        }
        if (layers[0].weights.kind == Input::kHeld) hand_down(0, 0, s.batch, 1);  // one row per sample: all at once
        for (const BackwardLayer& x : layers) finish(x);
    }

    void begin(const BackwardLayer& x) const {
        x.weights.begin(s.threads);
        if (x.recurrent) {
            x.recurrent_weights->begin(s.threads);
            x.recurrent->shift(s, x.layer, x.parameters);
        }
        for (int64_t b = 0; b < (x.last ? s.batch : 1); ++b)
            for (int64_t r = 0; r < x.plan.rows.blocks; ++r) x.constant_part(s, b, r, x.constant_of(b, r));
    }

    // How to compute the input gradient of a layer in a slice, after its scan: by events or by the product. The scan
    // writes only what the choice in the slice before suggests.
    void choose(BackwardLayer& x, const uint64_t* reached, int64_t samples, int64_t steps) {
        const int64_t rows = samples * steps, R = x.plan.rows.blocks;
        const bool had_halves = x.wants_halves();
        if (x.way == Way::kNeeded) return x.needed->choose(reached, x.grad.floats.rows);
        x.way = Way::kProduct;
        if (x.lists_events) {
            const int64_t limit = x.most_events(rows);
            const int64_t events = merged_events.merge(event_lists, R, samples, limit, s.threads);
            if (events <= limit) x.way = Way::kEvents;
            x.lists_events = events <= 2 * limit;
        }
        if (x.way == Way::kEvents) return x.input_gradient->load_tiles(s.threads);
        x.input_gradient->load_product(s.threads, x.recurrent ? nullptr : reached);
        if (!had_halves) x.grad.convert(R, rows, s.threads);
    }

    // ∂L/∂I of a layer in bands.
    Bands fill_bands(const Panel<float>& grad, int64_t lanes, int64_t rows) const {
        const Bands bands{band_memory, lanes};
        bands.fill(grad, rows, s.threads);
        return bands;
    }

    // call(block, row, rows, worker) for all of an input gradient; see input_gradient().
    template <class F>
    void each_input_gradient(const BackwardLayer& x, int64_t rows, int64_t grain, const F& call) const {
        const bool banded = x.way == Way::kProduct && x.input_gradient->sparse();
        x.input_gradient->each_task(rows, banded ? kLanes : slices.group * s.steps, banded, s.threads, grain, call);
    }

    // Rows row … of an input gradient, for block c of its columns.
    void input_gradient(const BackwardLayer& x, int64_t c, int64_t row, int64_t rows, float* out, int worker) const {
        if (x.way == Way::kProduct) return x.input_gradient->run(c, x.grad, x.bands, row, rows, out);
        float* factor = scratch + worker * scratch_size + states_size + tile_size;
        for (int64_t i = 0; i < rows; i += s.steps)
            merged_events.input_gradient(x.plan, x.input_gradient->tiles, x.decay(), c, (row + i) / s.steps,
                                         reinterpret_cast<uint16_t*>(factor + event_list), factor, out + i * kLanes);
    }

    // ∂L/∂S of a layer, its neurons backwards, and with that ∂L/∂I, for the samples of a slice.
    void scan(BackwardLayer& x, const BackwardLayer& above, int64_t first, int64_t samples) {
        if (x.recurrent) {
            if (!x.last) fill_arrivals(x, above, first, samples);
            scan_steps(x, first, samples);
            if (x.weights.kind != Input::kHeld) return;
            const Panel<float>& rows = x.recurrent->rows;
            Bands bands;
            if (x.recurrent_weights->by_batch) bands = fill_bands(rows, x.lanes(), samples * s.steps);
            return weight_gradient(*x.recurrent_weights, {rows, bands, x.reached_in(first, samples)}, first, samples, s.steps);
        }
        const bool in_place = above.way == Way::kNeeded || (above.way == Way::kEvents && x.arrivals.aligned);
        if (x.panel && !in_place) return scan_panel(x, above, first, samples);
        scan_tiles(x, above, first, samples);
    }

    // Blocks of some samples at once; where ∂L/∂S is computed as needed, all blocks of a group, whose ∂L/∂I above stays in L2. The
    // last layer has no part of ∂L/∂S that depends on t.
    void scan_tiles(const BackwardLayer& x, const BackwardLayer& above, int64_t first, int64_t samples) const {
        const bool needed = !x.last && above.way == Way::kNeeded;
        const int64_t T = s.steps, R = x.plan.rows.blocks, group = needed ? most(1, kNeededRows / T) : x.last ? 1 : slices.group;
        const int64_t groups = divide_up(samples, group);
        parallel(s.threads, R * groups, x.last ? 4 : 2, [&](int64_t task, int worker) {
            const int64_t r = needed ? task % R : task / groups, b = (needed ? task / R : task % groups) * group;
            const int64_t count = least(group, samples - b);
            float *const room = scratch + worker * scratch_size, *const tile = room + states_size;
            const float* states[kNeededRows];
            if (needed)
                needed_tile(x, above, first, b, count, r, room, states);
            else if (!x.last)
                input_gradient(above, r, b * T, count * T, tile, worker);
            for (int64_t i = 0; i < count; ++i) {
                float* const arrived = x.last ? nullptr : tile + i * T * kLanes;
                if (x.late.lanes) x.late.shift(s, first + b + i, r, arrived, room);
                scan_block(x, first, b + i, r, arrived, room, needed ? states[i] : nullptr);
            }
        });
    }

    // ∂L/∂S of block r of some samples where their neurons need it, and the states that tell where.
    void needed_tile(const BackwardLayer& x, const BackwardLayer& above, int64_t first, int64_t b, int64_t count, int64_t r,
                     float* room, const float** states) const {
        const int64_t T = s.steps;
        float* const tile = room + states_size;
        auto* const words = reinterpret_cast<uint64_t*>(tile + tile_size);
        for (int64_t i = 0; i < count; ++i) {
            const SampleParameters own(x.parameters, x.layer, first + b + i, r);
            states[i] = states_of(x, first + b + i, r, own.block, room + i * T * x.model.states * kLanes);
            needed_words(x.layer.neurons, states[i], T, x.threshold(own.block), words + i * T);
        }
        above.needed->run(r, above.grad.floats.at(0, b * T), words, count * T, tile);
    }

    // The input gradient of the layer above in the panel of a layer, in the order of the columns above.
    void store_arrivals(const BackwardLayer& x, const BackwardLayer& above, int64_t samples) const {
        each_input_gradient(above, samples * s.steps, 2, [&](int64_t c, int64_t row, int64_t height, int worker) {
            input_gradient(above, c, row, height, x.arrivals.panel.at(c, row), worker);
        });
    }

    // The same, in the layer's own order.
    void fill_arrivals(const BackwardLayer& x, const BackwardLayer& above, int64_t first, int64_t samples) const {
        const int64_t T = s.steps;
        store_arrivals(x, above, samples);
        if (!x.arrivals.aligned)
            parallel(s.threads, samples * T, 8, [&](int64_t row, int worker) {
                x.arrivals.reorder(row, scratch + worker * scratch_size);
            });
        if (x.late.lanes)
            parallel_pairs(s.threads, x.plan.rows.blocks, samples, 4, [&](int64_t r, int64_t b, int worker) {
                x.late.shift(s, first + b, r, x.arrivals.panel.at(r, b * T), scratch + worker * scratch_size);
            });
    }

    void scan_panel(const BackwardLayer& x, const BackwardLayer& above, int64_t first, int64_t samples) const {
        const Panel<float>& panel = x.arrivals.panel;
        const int64_t R = x.plan.rows.blocks, T = s.steps;
        if (samples < s.threads) {
            fill_arrivals(x, above, first, samples);
            return parallel_pairs(s.threads, samples, R, 4, [&](int64_t b, int64_t r, int worker) {
                scan_block(x, first, b, r, panel.at(r, b * T), scratch + worker * scratch_size);
            });
        }
        store_arrivals(x, above, samples);
        parallel(s.threads, samples, 1, [&](int64_t b, int worker) {  // one sample's panel (400 KB) stays in L2
            float* const room = scratch + worker * scratch_size;
            for (int64_t t = 0; !x.arrivals.aligned && t < T; ++t) x.arrivals.reorder(b * T + t, room);
            for (int64_t r = 0; r < R; ++r) {
                if (x.late.lanes) x.late.shift(s, first + b, r, panel.at(r, b * T), room);
                scan_block(x, first, b, r, panel.at(r, b * T), room);
            }
        });
    }

    // All neurons of a recurrent layer, one step after the other (recurrent.h).
    void scan_steps(BackwardLayer& x, int64_t first, int64_t samples) const {
        RecurrentBackward& v = *x.recurrent;
        const int64_t R = x.plan.rows.blocks, group = v.group(), groups = divide_up(samples, group), T = s.steps;
        const Panel<float>& rows = x.weights.kind == Input::kHeld ? v.rows : x.grad.floats;
        parallel(s.threads, R, 1, [&](int64_t r, int) { begin_steps(x, first, samples, r); });
        bool by_events = v.event_limit > 0;
        v.has_current = false;
        for (int64_t t = T - 1; t >= (x.layer.state ? -1 : 0); --t) {
            const int after = (t + 1) & 1;
            const bool later = t + 1 < T;
            if (later) {
                by_events = v.by_events(v.words[after], samples);
                if (by_events)
                    v.gradient.load_tiles(s.threads);
                else
                    v.load_product(rows, samples, t, T, s.threads);
            }
            parallel_pairs(s.threads, R, groups, 1, [&](int64_t r, int64_t part, int) {
                const int64_t b = part * group, count = least(group, samples - b);
                if (later && !by_events) v.gradient.run(r, v.current, v.bands, b, count, v.x.at(r, b));
                for (int64_t i = b; later && by_events && i < b + count; ++i) {
                    Vec sum[kVecs];
                    float* const lanes = v.x.at(r, i);
                    for (int k = 0; k < kVecs; ++k) sum[k] = all(x.decay()) * load(lanes + k * W);
                    add_events(v.plan, v.gradient.tiles, r, v.words[after] + i, v.values[after] + i * kLanes, v.samples, sum);
                    for (int k = 0; k < kVecs; ++k) store(lanes + k * W, sum[k]);
                }
                if (t < 0)
                    for (int64_t i = b; i < b + count; ++i) end_steps(x, first, i, r);
                else
                    step_blocks(x, first, b, count, r, t, !by_events);
            });
            v.has_current = !by_events;
            std::swap(v.current, v.next);
        }
    }

    // Before the last step: nothing has reached the neurons of block r but what reaches their last states.
    void begin_steps(const BackwardLayer& x, int64_t first, int64_t samples, int64_t r) const {
        const RecurrentBackward& v = *x.recurrent;
        const int64_t size = x.model.states * kLanes;
        zero(v.x.at(r, 0), samples * kLanes * sizeof(float));
        zero(v.listed + r * v.samples, samples * sizeof(int64_t));
        for (int64_t b = 0; b < samples; ++b) {
            load_states(s, x.layer, x.layer.grad_last, first + b, r, v.states + (r * v.samples + b) * size);
            if (x.weights.kind == Input::kHeld) zero(x.grad.floats.at(r, first + b), kLanes * sizeof(float));
        }
        for (int64_t b = 0; b < samples; b += v.group()) x.clear(v.sum_of(first, b), r);
    }

    // One step of block r of `samples` samples of the slice, from sample b on.
    void step_blocks(const BackwardLayer& x, int64_t first, int64_t b, int64_t samples, int64_t r, int64_t t,
                     bool compact) const {
        const RecurrentBackward& v = *x.recurrent;
        const int64_t T = s.steps, size = x.model.states * kLanes, at = r * v.samples + b;
        const int i = t & 1;
        const bool held = x.weights.kind == Input::kHeld;
        alignas(64) float begin[kLanes * kMostStates * kLanes];
        for (int64_t j = 0; !t && j < samples; ++j) load_states(s, x.layer, x.layer.state, first + b + j, r, begin + j * size);
        const BlockGradient sums = x.block_gradient(v.sum_of(first, b), r);
        BackwardStep step{};
        if (!x.last) step.tile = x.arrivals.panel.at(r, b * T + t), step.tile_stride = T * kLanes;
        step.constant = x.constant_of(first + b, r), step.constant_stride = x.last ? x.lanes() : 0;
        step.later = v.x.at(r, b);
        step.now = step_states(s, x.layer, x.layer.states, r, t, first + b);
        step.before = t ? step.now - s.batch * size : begin;
        step.now_stride = step.before_stride = size;
        step.begins = !t && !x.layer.state;
        step.states = v.states + at * size;
        step.sum = sums.current;
        for (int k = 0; k < x.model.parameters; ++k) step.parameters[k] = sums.parameters[k];
        step.row = (held ? v.rows : x.grad.floats).at(r, b * T + t), step.row_stride = T * kLanes;
        if (!held && x.wants_halves()) step.half_row = x.grad.halves.at(r, b * T + t);
        if (compact) step.compact = v.next.floats.at(r, b);
        if (compact && v.next.halves.data) step.half = v.next.halves.at(r, b);
        if (held) step.held = x.grad.floats.at(r, first + b);
        step.values = v.values[i] + at * kLanes;
        if (x.lists_events || v.event_limit > 0) step.words = v.words[i] + at;
        run_backward(x.parameters, x.layer, first + b, samples, r, step);
        for (int64_t j = 0; x.lists_events && j < samples; ++j) {
            const BlockEvents list = event_lists.of(r, b + j);
            const int64_t count = __builtin_popcountll(step.words[j]);
            __builtin_memcpy(list.value + v.listed[at + j], step.values + j * kLanes, count * sizeof(float));
            v.listed[at + j] += count;
            list.words[t] = step.words[j];
        }
        if (t || !held || !x.grad.halves.data) return;
        convert_bf16(x.grad.floats.at(r, first + b), samples * kLanes, x.grad.halves.at(r, first + b));
    }

    // Before the first step: the spikes of the state that the run began with have reached it, too. Those that are given as
    // sent are data.
    void end_steps(const BackwardLayer& x, int64_t first, int64_t b, int64_t r) const {
        const RecurrentBackward& v = *x.recurrent;
        alignas(64) float begin[kMostStates * kLanes];
        load_states(s, x.layer, x.layer.state, first + b, r, begin);
        float* const grads = v.states + (r * v.samples + b) * x.model.states * kLanes;
        const int64_t membrane = (x.model.states - 1) * kLanes;
        const SampleParameters own(x.parameters, x.layer, first + b, r);
        if (!x.layer.sent && !x.model.hidden)
            spikes_backward(x.layer.neurons, x.threshold(own.block), begin + membrane, v.x.at(r, b), grads + membrane,
                            x.block_gradient(v.sum_of(first, b), r).parameters[x.model.parameters - 1]);
        if (x.layer.grad_state) store_states(s, x.layer, grads, first + b, r, x.layer.grad_state);
    }

    // The states of block r of a sample at all steps. Those of a layer whose input is held are computed anew, in `room`.
    const float* states_of(const BackwardLayer& x, int64_t sample, int64_t r, const LaneParameters& own, float* room) const {
        if (x.weights.kind != Input::kHeld) return kept_states(s, x.layer, sample, r);
        const StoredCurrent current{kept_currents(s, x.layer, sample, r), 0};
        alignas(64) float states[kMostStates * kLanes];
        load_states(s, x.layer, x.layer.state, sample, r, states);
        forward_scan<StoredCurrent>(x.layer.neurons)(current, s.steps, own, {nullptr, room, nullptr, states});
        return room;
    }

    // The share of lanes and steps at which the neurons of a layer need ∂L/∂S, of some blocks all over the batch. At the others
    // they list no events.
    double needed_share(const BackwardLayer& x) const {
        const int64_t R = x.plan.rows.blocks, blocks = s.batch * R;
        const int64_t apart = (blocks / 128) | 1;
        auto* const words = reinterpret_cast<uint64_t*>(scratch + states_size + tile_size);
        int64_t needed = 0, visited = 0;
        for (int64_t i = 0; i < blocks; i += apart, ++visited) {
            // a recurrent layer keeps [R][T][B]: as many rows, of other samples
            const int64_t sample = x.recurrent ? i % s.batch : i / R, r = x.recurrent ? i / s.batch : i % R;
            const SampleParameters own(x.parameters, x.layer, sample, r);
            const float* states = x.recurrent ? x.layer.states + i * s.steps * x.model.states * kLanes
                                              : states_of(x, sample, r, own.block, scratch);
            needed_words(x.layer.neurons, states, s.steps, x.threshold(own.block), words);
            for (int64_t t = 0; t < s.steps; ++t) needed += __builtin_popcountll(words[t]);
        }
        return static_cast<double>(needed) / static_cast<double>(visited * s.steps * kLanes);
    }

    // Block r of sample b of the slice that begins with sample `first`. `arrived` is the part of ∂L/∂S that depends on t,
    // [T][64], or null. `states` are those of states_of(); null: they are found in `room`.
    void scan_block(const BackwardLayer& x, int64_t first, int64_t b, int64_t r, const float* arrived, float* room,
                     const float* states = nullptr) const {
        const int64_t sample = first + b, T = s.steps;
        const bool held = x.weights.kind == Input::kHeld;
        BlockGradient out = x.block_gradient(sample, r);
        out.reached = x.reached + sample * x.plan.rows.blocks + r;
        alignas(64) float first_states[kMostStates * kLanes], edge[kMostStates * kLanes];
        if (x.layer.state) load_states(s, x.layer, x.layer.state, sample, r, first_states), out.first = first_states;
        if (x.layer.grad_last || x.layer.grad_state) load_states(s, x.layer, x.layer.grad_last, sample, r, edge), out.edge = edge;
        const SampleParameters own(x.parameters, x.layer, sample, r);
        if (!states) states = states_of(x, sample, r, own.block, room);
        if (!held) out.rows = x.grad.floats.at(r, b * T);
        if (!held && x.wants_halves()) out.halves = x.grad.halves.at(r, b * T);
        if (!held && x.lists_events) out.events = event_lists.of(r, b);
        x.scan({arrived, x.constant_of(sample, r)}, states, T, own.block, steepness(x.layer.neurons), out);
        for (int v = 0; held && v < kVecs; ++v) {
            const Vec g = load(out.current + v * W);
            store(x.grad.floats.at(r, sample) + v * W, g);
            if (x.grad.halves.data) store(x.grad.halves.at(r, sample) + v * W, g);
        }
        if (x.layer.grad_state) store_states(s, x.layer, edge, sample, r, x.layer.grad_state);
    }

    // From ∂L/∂I of layer l: ∂L/∂W, how to compute ∂L/∂(input) and, in the first layer, ∂L/∂x.
    void hand_down(size_t l, int64_t first, int64_t samples, int64_t steps) {
        BackwardLayer& x = layers[l];
        const bool recurrent = x.recurrent && x.weights.kind != Input::kHeld;
        CurrentGradient grad{x.grad.floats, {}, x.reached_in(first, samples)};
        if (x.input_gradient) choose(x, grad.reached, samples, steps);
        const bool banded = x.input_gradient && x.way == Way::kProduct && x.input_gradient->sparse();
        if (banded || x.weights.by_batch || (recurrent && x.recurrent_weights->by_batch))
            grad.bands = fill_bands(grad.rows, x.lanes(), samples * steps);
        x.bands = grad.bands;
        weight_gradient(x.weights, grad, first, samples, steps);
        if (recurrent) weight_gradient(*x.recurrent_weights, grad, first, samples, steps);
        if (l == 0 && s.grad_x) store_input_gradient(x, first, samples, steps);
    }

    // Adds what the samples of a slice give, of whose currents `of` is the gradient.
    void weight_gradient(WeightGradient& x, const CurrentGradient& of, int64_t first, int64_t samples, int64_t steps) const {
        const Panel<float>& grad = of.rows;
        if (x.by_batch) return weight_gradient_by_batch(x, of, first, samples, steps);
        const Plan& plan = x.plan();
        const int64_t C = plan.cols.blocks;
        if (x.by_subsets) {
            x.row_bits.load(x.layer.inputs + first * C * steps, C, samples, steps, s.threads);
            const int strips = kLanes / plan.rows.strip;
            return parallel(s.threads, plan.rows.blocks * strips, 1, [&](int64_t strip, int) {
                const uint64_t lanes = (uint64_t{1} << plan.rows.strip) - 1;
                if (!(of.reached[strip / strips] >> (strip % strips * plan.rows.strip) & lanes)) return;
                (plan.rows.strip == 16 ? subset_gradient<16> : subset_gradient<32>)(
                    plan, strip, x.row_bits, grad.at(strip / strips, 0), samples * steps, x.tiles);
            });
        }
        const bool by_events = x.kind == Input::kEvents;
        if (by_events)
            parallel(s.threads, C, 1, [&](int64_t c, int worker) {
                x.events->load(c, x.layer.inputs + (first * C + c) * steps, samples, steps, C * steps, worker);
            });
        else
            fill_panel(s, x.layer, x.kind, first, samples, x.panel);
        const auto add_gradient = gradient_by_events(plan, events_by_strip(s, x.layer, false));
        parallel(s.threads, plan.tiles, 2, [&](int64_t tile, int) {
            const int64_t row = plan.tile_row[tile];
            if (!of.reached[row]) return;
            float* const sum = x.tiles + tile * kTile;
            if (by_events)
                add_gradient(*x.events, plan, tile, grad.at(row, 0), sum);
            else
                outer(x.panel.at(plan.tile_col[tile], 0), grad.at(row, 0), samples * steps, sum);
        });
    }

    void weight_gradient_by_batch(WeightGradient& x, const CurrentGradient& grad, int64_t first, int64_t samples,
                                  int64_t steps) const {
        const int64_t C = x.plan().cols.blocks, rows = samples * steps, count = divide_up(rows, kLanes);
        const int64_t lanes = static_cast<int64_t>(x.plan().rows.blocks) * kLanes;
        const bool spikes = x.spikes();
        if (spikes) {
            x.row_bits.load(x.layer.inputs + first * C * steps, C, samples, steps, s.threads);
        } else {
            fill_panel(s, x.layer, x.kind, first, samples, x.panel);
            x.bands.fill(x.panel, rows, s.threads);
        }
        const WeightList& list = x.plan().by_row;
        parallel(s.threads, lanes, 16, [&](int64_t lane, int worker) {
            if (list.first[lane] == list.first[lane + 1] || !(grad.reached[lane / kLanes] >> (lane % kLanes) & 1)) return;
            float* e = scratch + worker * scratch_size;  // of this lane, in one piece: bands are a multiple of 4 KiB apart
            for (int64_t band = 0; band < count; ++band)
                __builtin_memcpy(e + band * kLanes, grad.bands.at(band, lane), kLanes * sizeof(float));
            if (spikes)
                spike_outer(list, lane, x.row_bits, e, x.layer.grad_values);
            else
                dense_outer(list, lane, x.bands, count, e, x.layer.grad_values);
        });
    }

    // ∂L/∂x of rows of the first layer, to the user's matrix.
    void store_input_gradient(const BackwardLayer& x, int64_t first, int64_t samples, int64_t steps) const {
        const Rows at{first, steps, s.batch, x.plan.cols.size};
        each_input_gradient(x, samples * steps, 1, [&](int64_t block, int64_t row, int64_t height, int worker) {
            float* out = scratch + worker * scratch_size + states_size;
            input_gradient(x, block, row, height, out, worker);
            store_block(x.plan.cols, block, out, [&](int64_t r) { return at(row + r); }, height, s.grad_x);
        });
    }

    // Turns the sums over all slices into the gradients of weights and parameters.
    void finish(const BackwardLayer& x) const {
        x.weights.finish(s.threads);
        if (x.recurrent) x.recurrent_weights->finish(s.threads);
        x.late.gradient.finish(s, totals);
        x.LayerBackward::finish(s, totals);
    }
};

inline void stack_backward(Stack& s, Arena& arena) {
    BackwardPass pass(s, arena);
    if (arena.base) pass.run();
}

}  // namespace g2g::G2G_ISA
