// Populations that may reach one another, I_t = current_t + Σ W·S_{t−d}: in blocks of time steps, in an order in which all that a
// block reads is known (ops/g2g_stack/schedule.py).
//
// A block is some steps of one population. Forward, a task computes the currents of 64 lanes of some samples at these steps, by
// events, and runs their neurons, whose spikes go to where and when they arrive. Backward, in the reverse order and for some
// samples at a time: the neurons, then for each connection to them the input gradient, which is added to a line of ∂L/∂S of the
// source at the steps in which it was sent. Weight gradients follow, of all steps at once.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

#include "batch.h"
#include "delays.h"
#include "events.h"
#include "input_gradient.h"
#include "parallel.h"
#include "recurrent.h"
#include "stack.h"
#include "scan.h"

namespace g2g::G2G_ISA {

inline int64_t steps_of(const GraphBlock& block) { return block.last - block.first; }

// The steps of the longest block of each population.
inline std::vector<int64_t> longest_blocks(const Graph& g) {
    std::vector<int64_t> longest(g.stack.count);
    for (const GraphBlock* block = g.blocks; block < g.blocks + g.block_count; ++block)
        longest[block->population] = most(longest[block->population], steps_of(*block));
    return longest;
}

// The kept states of a population, [states][64] of a block of a sample at a step. The steps of a block of time lie beside one
// another, [row blocks][B][steps], in the order in which they are written and read.
struct KeptStates {
    const Stack& s;
    const Layer& layer;
    std::vector<const GraphBlock*> blocks;  // [T], the one that has a step

    KeptStates(const Graph& g, int64_t l) : s(g.stack), layer(s.layers[l]), blocks(s.steps) {
        for (const GraphBlock* block = g.blocks; block < g.blocks + g.block_count; ++block)
            for (int32_t t = block->first; block->population == l && t < block->last; ++t) blocks[t] = block;
    }

    // Floats from one sample to the next.
    int64_t stride(int64_t t) const { return steps_of(*blocks[t]) * model_info(layer.neurons).states * kLanes; }

    // Null if none are kept.
    float* at(int64_t b, int64_t r, int64_t t) const {
        if (!layer.states) return nullptr;
        const int64_t before = blocks[t]->first * int64_t{layer.plan->rows.blocks} * s.batch;
        const int64_t own = (r * s.batch + b) * steps_of(*blocks[t]) + t - blocks[t]->first;
        return layer.states + (before + own) * model_info(layer.neurons).states * kLanes;
    }
};

// A connection and its source.
struct ConnectionForward {
    const Connection& of;
    const Plan& plan;
    const Layer& source;
    bool aligned = false;  // both have the same order of lanes
    bool uniform = false;  // all delays are the same
    bool straight = false;  // what arrives are words of the source, some steps later
    int32_t* delays;       // [column blocks][64], at most as many steps as are known
    uint64_t* inputs;      // [B][column blocks][T], the words that arrive

    ConnectionForward(const Graph& g, const Connection& connection, Arena& arena)
        : of(connection), plan(*connection.plan), source(g.stack.layers[connection.source]) {
        const int64_t lanes = static_cast<int64_t>(plan.cols.blocks) * kLanes, T = g.stack.steps;
        delays = arena.take<int32_t>(lanes);
        inputs = arena.take<uint64_t>(int64_t{g.stack.batch} * plan.cols.blocks * T);
        if (!arena.base) return;
        aligned = same_order(source.plan->rows, plan.cols);
        const auto late = [&](int32_t n) {
            return static_cast<int32_t>(least(of.delays[n < 0 ? 0 : n], T + source.sent_steps));
        };
        uniform = true;
        for (int64_t i = 0; i < lanes; ++i) {
            delays[i] = late(plan.cols.neuron[i]);
            uniform = uniform && delays[i] == delays[0];
        }
        straight = aligned && uniform && !source.sent;
    }

    uint64_t* words(const Stack& s, int64_t b) const { return inputs + b * plan.cols.blocks * s.steps; }

    // The words of sample b that arrive, or that arrive so many steps later.
    const uint64_t* sent(const Stack& s, int64_t b) const {
        return straight ? source.spikes + b * plan.cols.blocks * s.steps : words(s, b);
    }
    int64_t late() const { return straight ? delays[0] : 0; }

    // The words of block r at some steps, where they arrive; of aligned connections. in[count], out[column blocks][T].
    void send(int64_t r, const uint64_t* in, int64_t first, int64_t count, int64_t total, uint64_t* out) const {
        const int32_t* const late = delays + r * kLanes;
        out += r * total;
        for (int64_t t = first; t < first + count; ++t, ++in) {
            if (uniform) {
                if (t + late[0] < total) out[t + late[0]] |= *in;
                continue;
            }
            for (uint64_t word = *in; word; word &= word - 1) {
                const int lane = __builtin_ctzll(word);
                if (t + late[lane] < total) out[t + late[lane]] |= uint64_t{1} << lane;
            }
        }
    }
};

// --- forward ----------------------------------------------------------------------------------------------------

struct GraphForward {
    Graph& g;
    const Stack& s;
    std::vector<LayerParameters> parameters;
    std::vector<int64_t> longest;
    std::vector<float*> edges;    // of each population its states after the last step so far, [row blocks][B][states][64]
    std::vector<KeptStates> kept_of;
    std::vector<float*> held;     // of each population its held current, [row blocks][B][64], may be null
    std::vector<ConnectionForward> connections;
    std::vector<float*> tiles;    // of each connection
    std::vector<SpikeCurrents> currents;
    float *counts, *scratch;
    double* totals;
    int64_t scratch_size;

    GraphForward(Graph& graph, Arena& arena)
        : g(graph), s(graph.stack), longest(longest_blocks(g)), scratch_size(kStepSamples * kLanes) {
        int64_t blocks = 0;
        for (int64_t l = 0; l < s.count; ++l) {
            const Layer& layer = s.layers[l];
            parameters.emplace_back(layer, arena);
            edges.push_back(arena.take<float>(s.batch * layer.plan->rows.blocks * model_info(layer.neurons).states * kLanes));
            kept_of.emplace_back(g, l);
            scratch_size = most(scratch_size, longest[l] * kLanes);
            held.push_back(g.outer[l].held ? arena.take<float>(s.batch * layer.plan->rows.blocks * kLanes) : nullptr);
            blocks = most(blocks, layer.plan->rows.blocks);
        }
        for (int64_t i = 0; i < g.connection_count; ++i) {
            connections.emplace_back(g, g.connections[i], arena);
            tiles.push_back(arena.take<float>(static_cast<size_t>(connections[i].plan.tiles) * kTile));
            currents.emplace_back(connections[i].plan, tiles[i]);
        }
        counts = arena.take<float>(s.batch * blocks * kLanes);
        totals = arena.take<double>(blocks * kLanes);
        scratch = arena.take<float>(scratch_size * s.threads);
    }

    void run() {
        for (int64_t l = 0; l < s.count; ++l) {
            const Axis& axis = s.layers[l].plan->rows;
            parallel(s.threads, held[l] ? axis.blocks : 0, 1, [&](int64_t r, int) {
                load_block(axis, r, g.outer[l].current, Rows{0, 1, s.batch, axis.size}, s.batch, held[l] + r * s.batch * kLanes);
            });
        }
        for (size_t i = 0; i < connections.size(); ++i) {
            const ConnectionForward& x = connections[i];
            load_tiles<kByRow>(x.plan, x.of.values, s.threads, tiles[i]);
            if (x.straight) continue;
            parallel(s.threads, s.batch, 1, [&](int64_t b, int) {
                begin_words(s, x.source, x.plan.cols, b, x.of.delays, x.words(s, b));
            });
        }
        each_part_of_batch(s.batch, *std::min_element(longest.begin(), longest.end()), s.threads,
                           [&](auto... part) { run_blocks(part...); });
        for (int64_t l = 0; l < s.count; ++l) finish(l);
    }

    // All blocks of some samples; `first_worker` is the number of the first of these threads.
    void run_blocks(int64_t begin, int64_t count, int threads, int first_worker) const {
        for (int64_t i = 0; i < g.block_count; ++i) {
            const GraphBlock& block = g.blocks[i];
            const int64_t R = s.layers[block.population].plan->rows.blocks, groups = divide_up(count, kStepSamples);
            const auto scan = forward_scan<StoredCurrent>(s.layers[block.population].neurons);
            parallel_pairs(threads, R, groups, 1, [&](int64_t r, int64_t part, int worker) {
                const int64_t first = begin + part * kStepSamples;
                const int64_t samples = least(kStepSamples, begin + count - first);
                float* const room = scratch + (first_worker + worker) * scratch_size;
                if (longest[block.population] == 1) return run_step(block, first, samples, r, room);
                for (int64_t b = first; b < first + samples; ++b) run_block(scan, block, b, r, room);
            });
            for (const ConnectionForward& x : connections) {
                if (x.of.source != block.population || x.aligned) continue;
                parallel(threads, count, 1, [&](int64_t b, int) {  // blocks of one order would write into the same words of another
                    move_words(s, x.source, x.plan.cols, begin + b, block.first, block.last, x.of.delays, x.words(s, begin + b));
                });
            }
        }
    }

    // Block r of sample b; `current` is room for its steps.
    void run_block(ForwardScan<StoredCurrent> scan, const GraphBlock& block, int64_t b, int64_t r, float* current) const {
        const Layer& layer = s.layers[block.population];
        float *const edge = edge_of(block.population, b, r), *const kept = kept_of[block.population].at(b, r, block.first);
        fill_current(block, b, r, current);
        if (!block.first) load_states(s, layer, layer.state, b, r, edge);
        const SampleParameters own(parameters[block.population], layer, b, r);
        scan({current, kLanes}, steps_of(block), own.block,
              {words_of(block, b, r), kept, nullptr, edge});
        finish_block(block, b, r, edge);
    }

    // The same where all blocks have one step, for some samples at once.
    void run_step(const GraphBlock& block, int64_t first, int64_t samples, int64_t r, float* current) const {
        const Layer& layer = s.layers[block.population];
        const int64_t size = model_info(layer.neurons).states * kLanes, stride = layer.plan->rows.blocks * int64_t{s.steps};
        const KeptStates& kept = kept_of[block.population];
        float* const edge = edge_of(block.population, first, r);
        ForwardStep all{current, edge, size, edge, size, words_of(block, first, r), stride};
        if (layer.states) all.now = kept.at(first, r, block.first), all.now_stride = kept.stride(block.first);
        if (layer.states && block.first)
            all.before = kept.at(first, r, block.first - 1), all.before_stride = kept.stride(block.first - 1);
        for (int64_t i = 0; i < samples; ++i) {
            fill_current(block, first + i, r, current + i * kLanes);
            if (!block.first) load_states(s, layer, layer.state, first + i, r, edge + i * size);
        }
        run_forward(parameters[block.population], layer, first, samples, r, all);
        for (int64_t i = 0; i < samples; ++i) finish_block(block, first + i, r, all.now + i * all.now_stride);
    }

    float* edge_of(int64_t l, int64_t b, int64_t r) const {
        return edges[l] + (r * s.batch + b) * model_info(s.layers[l].neurons).states * kLanes;
    }

    uint64_t* words_of(const GraphBlock& block, int64_t b, int64_t r) const {
        const Layer& layer = s.layers[block.population];
        return layer.spikes + (b * layer.plan->rows.blocks + r) * s.steps + block.first;
    }

    // The currents of the steps of a block, [steps][64].
    void fill_current(const GraphBlock& block, int64_t b, int64_t r, float* current) const {
        const Axis& axis = s.layers[block.population].plan->rows;
        const int64_t B = s.batch, count = steps_of(block);
        const float* const all_held = held[block.population];
        const float* start = all_held ? all_held + (r * B + b) * kLanes : nullptr;  // null: in their places
        if (!start)
            load_block(axis, r, g.outer[block.population].current + block.first * B * axis.size, Rows{b, count, B, axis.size}, count,
                       current);
        const auto copy = [&](int64_t end) {
            for (int64_t t = 0; start && t < end; ++t) __builtin_memcpy(current + t * kLanes, start, kLanes * sizeof(float));
        };
        for (size_t i = 0; i < connections.size(); ++i) {
            const ConnectionForward& x = connections[i];
            if (x.of.target != block.population) continue;
            const uint64_t* const words = x.sent(s, b);
            const int64_t late = x.late(), first = least(count, most(0, late - block.first));
            copy(first);  // nothing has arrived yet
            for (int64_t t = first; t < count; ++t) {
                float* const own = current + t * kLanes;
                currents[i].sum(currents[i], r, words, s.steps, block.first + t - late, start ? start : own, own);
            }
            start = nullptr;
        }
        copy(count);
    }

    // After a block: the last states, and its spikes on their way.
    void finish_block(const GraphBlock& block, int64_t b, int64_t r, const float* states) const {
        const Layer& layer = s.layers[block.population];
        if (block.last == s.steps) store_states(s, layer, states, b, r, layer.last);
        for (const ConnectionForward& x : connections)
            if (x.of.source == block.population && x.aligned && !x.straight)
                x.send(r, words_of(block, b, r), block.first, steps_of(block), s.steps, x.words(s, b));
    }

    // Rates, counts, and the last spikes.
    void finish(int64_t l) const {
        const Layer& layer = s.layers[l];
        const Outer& outer = g.outer[l];
        const Axis& axis = layer.plan->rows;
        const int64_t R = axis.blocks, B = s.batch, T = s.steps, tail = outer.tail_steps;
        parallel_pairs(s.threads, B, R, 16, [&](int64_t b, int64_t r, int) {
            float* const own = counts + (b * R + r) * kLanes;
            count_spikes(layer.spikes + (b * R + r) * T, T, own);
            if (l + 1 == s.count) store_block(axis, r, own, Rows{b, 1, B, axis.size}, 1, s.counts);
        });
        if (outer.tail) unpack(*layer.plan, layer.spikes + T - tail, T, s.batch, outer.tail_steps, s.threads, outer.tail);
        sum_rates(s, layer, counts, totals);
    }
};

inline void graph_forward(Graph& g, Arena& arena) {
    GraphForward pass(g, arena);
    if (arena.base) pass.run();
}

// --- backward ---------------------------------------------------------------------------------------------------

alignas(64) constexpr float kNothing[kGradientSamples * kLanes] = {};

// What a population needs for a slice of samples.
struct PopulationSlice {
    Panel<float> rows;      // ∂L/∂I at all steps, [row blocks][samples · T][64]
    float* constant;        // [row blocks][samples][64] the part of ∂L/∂S that no step changes
    float* edges;           // [row blocks][samples][states][64], what reaches the states before the last step so far
    int64_t samples;        // there is room for

    PopulationSlice(const Layer& layer, const Slices& slices, Arena& arena) : samples(slices.samples) {
        const int64_t R = layer.plan->rows.blocks;
        rows = {arena.take<float>(R * slices.rows() * kLanes), slices.rows()};
        constant = arena.take<float>(R * samples * kLanes);
        edges = arena.take<float>(R * samples * model_info(layer.neurons).states * kLanes);
    }

    float* constant_at(int64_t r, int64_t b) const { return constant + (r * samples + b) * kLanes; }
    float* edge_at(int64_t r, int64_t b, int64_t states) const { return edges + (r * samples + b) * states * kLanes; }
};

// A slice of samples, and memory for it: a thread has its own, or all threads work on the only one.
struct GraphSlice {
    int64_t first = 0, samples = 0;
    bool used = false;  // before
    std::vector<PopulationSlice> populations;
    Panel<float> arrived;  // ∂L/∂S of a block and some samples, [row blocks][samples · steps][64]
    DualPanel rows;        // ∂L/∂I at the same steps
    Panel<float> inputs;   // ∂L/∂S̃ of a connection at the same steps
    Bands bands{nullptr, 0};
    std::optional<EventsByLane> events;  // of a connection
    std::vector<float*> lines;         // of each connection
    std::vector<Panel<float>> late;    // of each connection with learned delays ∂L/∂S̃ at all steps, [row blocks][samples · T][64]
    float* room;                       // of each thread, for the gradients of delays
};

// A population in the backward pass.
struct PopulationBackward : LayerBackward {
    const Outer& outer;
    KeptStates kept;
    bool sends = false;  // ∂L/∂S depends on the step

    PopulationBackward(const Graph& g, int64_t l, Arena& arena)
        : LayerBackward(g.stack, l, arena), outer(g.outer[l]), kept(g, l), sends(outer.grad_tail) {
        take_sums(g.stack.batch, arena);
    }

    // Before the last step: what reaches the population from outside.
    void begin(const Stack& s, const GraphSlice& slice, const PopulationSlice& x, int threads) const {
        parallel_pairs(threads, plan.rows.blocks, slice.samples, 1, [&](int64_t r, int64_t b, int) {
            constant_part(s, slice.first + b, r, x.constant_at(r, b));
            load_states(s, layer, layer.grad_last, slice.first + b, r, x.edge_at(r, b, model.states));
            clear(slice.first + b, r);
        });
    }

    // The part of ∂L/∂S of a sample at step t that comes from outside, [64] of block r.
    void outside(const Stack& s, int64_t sample, int64_t r, int64_t t, float* out) const {
        const int64_t B = s.batch, size = plan.rows.size, at = t - (s.steps - outer.tail_steps);
        if (at >= 0) return load_block(plan.rows, r, outer.grad_tail + at * B * size, Rows{sample, 1, B, size}, 1, out);
        zero(out, kLanes * sizeof(float));
    }

    static void add(const float* part, float* total) {
        for (int v = 0; v < kVecs; ++v) store(total + v * W, load(total + v * W) + load(part + v * W));
    }

    // The neurons of block r of sample b of a slice, backwards over some steps; `tile` [steps][64] is ∂L/∂S (null: zeros), `out`
    // gets ∂L/∂I, too.
    void run(const Stack& s, const GraphSlice& slice, const PopulationSlice& x, int64_t b, int64_t r, const GraphBlock& block,
             const float* tile, float* out) const {
        const int64_t sample = slice.first + b, at = (r * s.batch + sample) * kLanes;
        const int64_t begin = block.first, count = steps_of(block);
        alignas(64) float first[kMostStates * kLanes], sum[(1 + kMostParameters) * kLanes];
        const float* const states = kept.at(sample, r, begin);
        uint64_t reached;
        BlockGradient grads{out, nullptr, {}, sum, {}, &reached, begin ? kept.at(sample, r, begin - 1) : nullptr,
                            x.edge_at(r, b, model.states)};
        for (int k = 0; k < model.parameters; ++k) grads.parameters[k] = sum + (1 + k) * kLanes;
        if (!begin && layer.state) load_states(s, layer, layer.state, sample, r, first), grads.first = first;
        const SampleParameters own(parameters, layer, sample, r);
        scan({tile, x.constant_at(r, b)}, states, count, own.block, steepness(layer.neurons), grads);
        __builtin_memcpy(x.rows.at(r, b * s.steps + begin), out, count * kLanes * sizeof(float));
        add(sum, current + at);
        for (int k = 0; k < model.parameters; ++k) add(grads.parameters[k], sums[k] + at);
        pass_on(s, sample, r, begin, count, out, grads.edge);
    }

    // After some steps of a block of a sample: ∂L/∂I and what reaches the first states go on.
    void pass_on(const Stack& s, int64_t sample, int64_t r, int64_t begin, int64_t count, const float* out, const float* edge) const {
        if (outer.grad_current && !outer.held)
            store_block(plan.rows, r, out, Rows{sample, count, s.batch, plan.rows.size}, count,
                        outer.grad_current + begin * s.batch * plan.rows.size);
        if (!begin && layer.grad_state) store_states(s, layer, edge, sample, r, layer.grad_state);
    }

    // The same of a block of one step, for some samples at once; `tile` and `out` [samples][64].
    void run_step(const Stack& s, const GraphSlice& slice, const PopulationSlice& x, int64_t b, int64_t samples, int64_t r, int64_t t,
                  const float* tile, float* out) const {
        const int64_t size = model.states * kLanes, first = slice.first + b, at = (r * s.batch + first) * kLanes;
        alignas(64) float begin[kGradientSamples * kMostStates * kLanes], unused[kLanes] = {};
        for (int64_t i = 0; !t && i < samples; ++i) load_states(s, layer, layer.state, first + i, r, begin + i * size);
        BackwardStep step{};
        step.tile = tile, step.tile_stride = kLanes;
        step.constant = x.constant_at(r, b), step.constant_stride = kLanes;
        step.later = kNothing;
        step.now = kept.at(first, r, t), step.now_stride = kept.stride(t);
        step.before = t ? kept.at(first, r, t - 1) : begin, step.before_stride = t ? kept.stride(t - 1) : size;
        step.begins = !t && !layer.state;
        step.states = x.edge_at(r, b, model.states);
        step.sum = step.values = unused;
        for (int k = 0; k < model.parameters; ++k) step.parameters[k] = sums[k] + at;
        step.row = x.rows.at(r, b * s.steps + t), step.row_stride = int64_t{s.steps} * kLanes;
        step.compact = out, step.held = current + at;
        run_backward(parameters, layer, first, samples, r, step);
        for (int64_t i = 0; i < samples; ++i)
            pass_on(s, first + i, r, t, 1, out + i * kLanes, step.states + i * size);
    }

    void finish(const Stack& s, double* totals) const {
        LayerBackward::finish(s, totals);
        for (int64_t r = 0; outer.grad_current && outer.held && r < plan.rows.blocks; ++r)
            store_block(plan.rows, r, current + r * s.batch * kLanes, Rows{0, 1, s.batch, plan.rows.size}, s.batch, outer.grad_current);
    }
};

constexpr int64_t kCachedLines = 1 << 17;  // numbers of the lines of a slice that stay in L2

// A connection in the backward pass. ∂L/∂S̃ goes from the steps of arrival to those of sending by a line for each sample, a ring of
// rows. Where lines do not stay in a near cache, lanes lie in the order of their delays: so nearly every vector has one delay and is
// added to one row; in the order of the columns it would be added to as many as its lanes have delays. Both ways fetch the line of
// the next sample.
struct ConnectionBackward : ConnectionForward {
    float* tiles;         // of the weight gradient
    InputGradient gradient;
    DelayGradient learned;
    int64_t lanes, before, rows;  // of the line; steps before the first that matter
    bool in_order;        // its lanes are those of the columns
    int32_t* from;        // [lanes] where each lies among ∂L/∂S̃ of the columns, from the row's place in block 0
    int32_t* place;       // [row lanes of the source] where each lies in the line; any place for padding, unless `aligned`
    int32_t* column;      // [row lanes of the source] the same among ∂L/∂S̃
    SameDelay* late_lanes;

    ConnectionBackward(const Graph& g, const Connection& connection, Arena& arena)
        : ConnectionForward(g, connection, arena),
          tiles(arena.take<float>(static_cast<size_t>(plan.tiles) * kTile)),
          gradient(plan, connection.values, false, false, arena),
          lanes(int64_t{plan.cols.blocks} * kLanes),
          before(g.outer[connection.source].grad_sent ? source.sent_steps : 0),
          rows(most_open(g)),
          from(arena.take<int32_t>(lanes)),
          place(arena.take<int32_t>(int64_t{source.plan->rows.blocks} * kLanes)),
          column(arena.take<int32_t>(int64_t{source.plan->rows.blocks} * kLanes)),
          late_lanes(arena.take<SameDelay>(lanes)) {
        learned.take(g.stack, source, connection, arena);
    }

    // The steps of the source that have a row at the same time, at most: those from the lowest that anything was added to up to those
    // that were used, and those that are used at once.
    int64_t most_open(const Graph& g) const {
        const int64_t latest = *std::max_element(of.delays, of.delays + plan.cols.size);
        int64_t used = g.stack.steps, lowest = used, open = most(1, before);
        for (const GraphBlock* block = g.blocks + g.block_count; block-- > g.blocks;) {
            if (block->population == of.source) used = block->first, open = most(open, steps_of(*block));
            if (block->population == of.target) lowest = least(lowest, most(block->first - latest, -before));
            open = most(open, used - lowest);
        }
        return open;
    }

    // For lines of so many samples; `column_rows` of a block of columns are those of ∂L/∂S̃.
    void begin(const Stack& s, int64_t samples, int64_t column_rows) {
        gradient.load_product(s.threads);
        if (!straight) reorder_words(s, source, plan.cols, of.delays, inputs);
        zero_floats(tiles, int64_t{plan.tiles} * kTile, s.threads);
        if (lanes * column_rows > INT32_MAX) throw std::length_error("offsets have 32 bits");
        const Axis& axis = source.plan->rows;
        for (int64_t i = 0; i < axis.blocks * kLanes; ++i) place[i] = column[i] = 0;
        std::vector<int32_t> order(lanes), late(lanes);
        std::iota(order.begin(), order.end(), 0);
        in_order = uniform || samples * line_size() <= kCachedLines;
        if (!in_order) std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return delays[a] < delays[b]; });
        for (int64_t i = 0; i < lanes; ++i) {
            const int32_t lane = order[i], n = plan.cols.neuron[lane];
            from[i] = static_cast<int32_t>(lane / kLanes * column_rows * kLanes + lane % kLanes);
            late[i] = delays[lane];
            const int32_t own = aligned ? lane : n < 0 ? -1 : axis.lane[n];  // of padding too, where it may begin a vector
            if (own >= 0) place[own] = static_cast<int32_t>(i), column[own] = from[i];
        }
        by_delay(late.data(), lanes, late_lanes);
    }

    int64_t line_size() const { return rows * lanes; }

    // x[index[i]], which is one vector of x where `straight`.
    static Vec chosen(bool straight, const float* x, const int32_t* index) { return straight ? load(x + *index) : gather(x, index); }

    // Adds ∂L/∂S̃ at step t, a row x of the columns, to the line of a sample.
    void arrive(const float* x, int64_t t, float* line) const {
        const int64_t here = (before + t) % rows;
        for (int64_t i = 0; i < lanes; i += W) {
            const Vec arrived = chosen(in_order, x, from + i);
            for (const SameDelay* of = late_lanes + i; of < late_lanes + i + W && of->bits && t - of->delay >= -before; ++of) {
                const int64_t row = here - of->delay;
                float* const target = line + (row < 0 ? row + rows : row) * lanes + i;
                __builtin_prefetch(target + line_size());
                store(target, add_chosen<0>(load(target), IntVec{} + static_cast<int32_t>(of->bits), arrived));
            }
        }
    }

    // What the line of a sample has for step t becomes a row of ∂L/∂S of the source, or is `added` to it.
    void leave(float* line, int64_t t, const Panel<float>& to, int64_t row, bool added) const {
        line += (before + t) % rows * lanes;
        for (int64_t r = 0; r < source.plan->rows.blocks; ++r)
            for (int v = 0; v < kVecs; ++v) {
                float* const own = to.at(r, row) + v * W;
                __builtin_prefetch(line + line_size() + r * kLanes + v * W);
                const Vec x = chosen(in_order && aligned, line, place + r * kLanes + v * W);
                store(own, added ? load(own) + x : x);
            }
        zero(line, lanes * sizeof(float));
    }

    // Keeps a row x of ∂L/∂S̃ in the order of the source.
    void keep(const float* x, const Panel<float>& to, int64_t row) const {
        for (int64_t r = 0; r < source.plan->rows.blocks; ++r)
            for (int v = 0; v < kVecs; ++v) store(to.at(r, row) + v * W, chosen(aligned, x, column + r * kLanes + v * W));
    }

    void finish(const Stack& s, double* totals) const {
        unpack_gradient(plan, tiles, s.threads, of.grad_values);
        learned.finish(s, totals);
    }
};

struct GraphBackward {
    const Graph& g;
    const Stack& s;
    Slices slices;
    std::vector<PopulationBackward> populations;
    std::vector<ConnectionBackward> connections;
    std::vector<GraphSlice> at_once;  // slices whose blocks run at the same time
    int64_t room_rows = 0;
    double* totals;

    GraphBackward(const Graph& graph, Arena& arena)
        : g(graph), s(graph.stack), slices{s.batch, s.steps, least_samples(graph)}, at_once(count_at_once()) {
        int64_t blocks = 0, most_rows = slices.samples;
        populations.reserve(s.count), connections.reserve(g.connection_count);
        for (int64_t l = 0; l < s.count; ++l) blocks = most(blocks, populations.emplace_back(g, l, arena).plan.rows.blocks);
        for (int64_t i = 0; i < g.connection_count; ++i) {
            const ConnectionBackward& x = connections.emplace_back(g, g.connections[i], arena);
            blocks = most(blocks, x.plan.cols.blocks), room_rows = most(room_rows, x.learned.room_rows(s.steps));
            populations[x.of.source].sends = true;
        }
        for (int64_t i = 0; i < g.block_count; ++i)
            most_rows = most(most_rows, samples_of(g.blocks[i], slices.samples) * steps_of(g.blocks[i]));
        const int64_t apart = most_rows | 1;  // so that a row of all blocks does not lie in a few sets of the cache
        for (GraphSlice& slice : at_once) {
            for (const PopulationBackward& x : populations) slice.populations.emplace_back(x.layer, slices, arena);
            slice.arrived = {arena.take<float>(blocks * apart * kLanes), apart};
            slice.rows = DualPanel(blocks, most_rows, false, arena);
            slice.inputs = {arena.take<float>(blocks * apart * kLanes), apart};
            slice.events.emplace(blocks, slices.samples, s.steps, s.threads, arena);
            slice.bands.data = arena.take<float>(Bands::size(blocks * kLanes, most_rows));
            for (const ConnectionBackward& x : connections) {
                const int64_t kept = x.learned.out ? slices.rows() : 0;
                slice.lines.push_back(arena.take<float>(slices.samples * x.line_size()));
                slice.late.push_back({arena.take<float>(x.source.plan->rows.blocks * kept * kLanes), kept});
            }
            slice.room = arena.take<float>(room_rows * kLanes * s.threads);
        }
        totals = arena.take<double>(blocks * kLanes);
    }

    // Samples of a slice at least, all of equally many: the fewest rows that read all weights at once are those of a block. While
    // weights stay in cache, reading them again costs little, and of few samples ∂L/∂S stays there, too.
    static int64_t least_samples(const Graph& graph) {
        const std::vector<int64_t> longest = longest_blocks(graph);
        const int64_t steps = *std::min_element(longest.begin(), longest.end()), batch = graph.stack.batch;
        int64_t tiles = 0;
        for (int64_t i = 0; i < graph.connection_count; ++i) tiles += graph.connections[i].plan->tiles;
        const int64_t rows = tiles <= kCachedTiles ? kCachedCycleSlice : kCycleSlice;
        const int64_t samples = divide_up(rows, most(1, least(rows, steps)));
        return divide_up(batch, divide_up(batch, samples));
    }

    // One for each thread, unless too many would wait for the last ones.
    int64_t count_at_once() const {
        const int64_t count = divide_up(s.batch, slices.samples), turns = divide_up(count, s.threads);
        return 8 * s.batch >= 7 * turns * s.threads * slices.samples ? divide_up(count, turns) : 1;
    }

    // Samples whose rows of a block stay in cache.
    static int64_t samples_of(const GraphBlock& block, int64_t samples) {
        return least(samples, most(1, kSliceRows / steps_of(block)));
    }

    void run() {
        for (ConnectionBackward& x : connections) x.begin(s, slices.samples, at_once[0].inputs.rows);
        const int64_t most_slices = at_once.size();
        for (int64_t first = 0; first < s.batch; first += most_slices * slices.samples) {
            const int64_t count = least(most_slices, divide_up(s.batch - first, slices.samples));
            parallel(most_slices > 1 ? s.threads : 1, count, 1, [&](int64_t i, int) {
                GraphSlice& slice = at_once[i];
                slice.first = first + i * slices.samples, slice.samples = least(slices.samples, s.batch - slice.first);
                run_slice(slice, most_slices > 1 ? 1 : s.threads);
            });
            for (const ConnectionBackward& x : connections) weight_gradient(x, count);
        }
        for (const PopulationBackward& x : populations) x.finish(s, totals);
        for (const ConnectionBackward& x : connections) x.finish(s, totals);
    }

    void run_slice(GraphSlice& slice, int threads) const {
        const int64_t samples = slice.samples;
        for (size_t l = 0; l < populations.size(); ++l) populations[l].begin(s, slice, slice.populations[l], threads);
        for (size_t i = 0; !slice.used && i < connections.size(); ++i)
            zero_floats(slice.lines[i], slices.samples * connections[i].line_size(), threads);
        slice.used = true;
        for (int64_t i = g.block_count; i-- > 0;) {
            const GraphBlock& block = g.blocks[i];
            const int64_t most_samples = samples_of(block, slice.samples);
            for (int64_t b = 0; b < slice.samples; b += most_samples)
                run_block(slice, block, b, least(most_samples, slice.samples - b), threads);
        }
        for (size_t l = 0; l < populations.size(); ++l)
            if (populations[l].outer.grad_sent)
                parallel(threads, samples, 1, [&](int64_t b, int) { store_sent(slice, l, b); });
        for (size_t i = 0; i < connections.size(); ++i) {
            const DelayGradient& learned = connections[i].learned;
            parallel_pairs(threads, learned.out ? learned.source->plan->rows.blocks : 0, samples, 1, [&](int64_t r, int64_t b, int worker) {
                learned.add(s, slice.first + b, r, slice.late[i].at(r, b * s.steps), slice.room + worker * room_rows * kLanes);
            });
        }
    }

    float* line_of(const GraphSlice& slice, size_t i, int64_t b) const { return slice.lines[i] + b * connections[i].line_size(); }

    // ∂L/∂S of population l in sample b of a slice at step t, as a row of all blocks.
    void collect(const GraphSlice& slice, size_t l, int64_t b, int64_t t, int64_t row) const {
        const PopulationBackward& x = populations[l];
        bool added = x.outer.grad_tail;
        for (int64_t r = 0; added && r < x.plan.rows.blocks; ++r) x.outside(s, slice.first + b, r, t, slice.arrived.at(r, row));
        for (size_t i = 0; i < connections.size(); ++i) {
            if (connections[i].of.source != static_cast<int64_t>(l)) continue;
            connections[i].leave(line_of(slice, i, b), t, slice.arrived, row, added);
            added = true;
        }
    }

    // What reaches the spikes of sample b that population l sent before the first step.
    void store_sent(const GraphSlice& slice, size_t l, int64_t b) const {
        const PopulationBackward& x = populations[l];
        const int64_t before = x.layer.sent_steps, size = x.plan.rows.size;
        for (int64_t t = -before; t < 0; ++t) {
            collect(slice, l, b, t, b);
            for (int64_t r = 0; r < x.plan.rows.blocks; ++r)
                store_block(x.plan.rows, r, slice.arrived.at(r, b), Rows{slice.first + b, 1, s.batch, size}, 1,
                            x.outer.grad_sent + (before + t) * s.batch * size);
        }
    }

    // Of some samples of a slice, from sample b on: the neurons, then what their sources get.
    void run_block(GraphSlice& slice, const GraphBlock& block, int64_t b, int64_t samples, int threads) const {
        const PopulationBackward& x = populations[block.population];
        const PopulationSlice& own = slice.populations[block.population];
        const int64_t steps = steps_of(block);
        const int64_t group = steps == 1 ? kGradientSamples : 1, groups = divide_up(samples, group);
        parallel(threads, x.sends ? samples : 0, 1, [&](int64_t i, int) {
            for (int64_t t = 0; t < steps; ++t) collect(slice, block.population, b + i, block.first + t, i * steps + t);
        });
        parallel_pairs(threads, x.plan.rows.blocks, groups, steps == 1 ? 1 : 4, [&](int64_t r, int64_t part, int) {
            const int64_t i = part * group;
            const float* const tile = x.sends ? slice.arrived.at(r, i * steps) : nullptr;
            float* const out = slice.rows.floats.at(r, i * steps);
            if (steps == 1)
                x.run_step(s, slice, own, b + i, least(group, samples - i), r, block.first, tile, out);
            else
                x.run(s, slice, own, b + i, r, block, tile, out);
        });
        for (const ConnectionBackward& each : connections)
            if (each.of.target == block.population) hand_down(each, slice, block, b, samples, threads);
    }

    void hand_down(const ConnectionBackward& x, GraphSlice& slice, const GraphBlock& block, int64_t b, int64_t samples,
                   int threads) const {
        const int64_t steps = steps_of(block), count = samples * steps, number = &x - connections.data();
        const bool banded = x.gradient.sparse();
        Bands& bands = slice.bands;
        bands.lanes = static_cast<int64_t>(x.plan.rows.blocks) * kLanes;
        if (banded) bands.fill(slice.rows.floats, count, threads);
        x.gradient.each_task(count, banded ? kLanes : kGradientSamples, banded, threads, 1,
                             [&](int64_t column, int64_t row, int64_t height, int) {
                                 x.gradient.run(column, slice.rows, bands, row, height, slice.inputs.at(column, row));
                             });
        parallel(threads, samples, 1, [&](int64_t i, int) {
            for (int64_t t = 0; t < steps; ++t) {
                const float* const arrived = slice.inputs.at(0, i * steps + t);
                x.arrive(arrived, block.first + t, line_of(slice, number, b + i));
                if (x.learned.out) x.keep(arrived, slice.late[number], (b + i) * s.steps + block.first + t);
            }
        });
    }

    // Adds what the samples of the first slices give.
    void weight_gradient(const ConnectionBackward& x, int64_t count) const {
        const Plan& plan = x.plan;
        const int64_t C = plan.cols.blocks, T = s.steps;
        parallel_pairs(s.threads, count, C, 1, [&](int64_t i, int64_t column, int worker) {
            const GraphSlice& slice = at_once[i];
            slice.events->load(column, x.sent(s, slice.first) + column * T, slice.samples, T, C * T, worker, x.late());
        });
        const auto add_gradient = gradient_by_events(plan, plan.rows.strip < kLanes);
        // a row block is one task, so that its ∂L/∂I come from other threads' caches once
        parallel(s.threads, plan.rows.blocks, 1, [&](int64_t r, int) {
            for (int64_t i = 0; i < count; ++i) {
                const float* const grad = at_once[i].populations[x.of.target].rows.at(r, 0);
                for (int32_t tile = plan.row_first[r]; tile < plan.row_first[r + 1]; ++tile)
                    add_gradient(*at_once[i].events, plan, tile, grad, x.tiles + tile * int64_t{kTile});
            }
        });
    }
};

inline void graph_backward(Graph& g, Arena& arena) {
    GraphBackward pass(g, arena);
    if (arena.base) pass.run();
}

}  // namespace g2g::G2G_ISA
