// The backward pass of a stack, in chunks of the batch that stay in cache: for each chunk the layers from the last to the
// first, for each layer its neurons backwards over time, then its weight gradient. Every output element is summed by one
// task in a fixed order, so results do not depend on the threads.
#pragma once

#include <optional>
#include <vector>

#include "chunks.h"
#include "events.h"
#include "input_gradient.h"
#include "product.h"
#include "stack.h"

namespace g2g::G2G_ISA {

// How ∂L/∂S of a layer reaches its sweep, but for what does not depend on t.
enum class Arrival {
    kConstant,  // the last layer: there is nothing else
    kTiles,     // the input gradient of the layer above, whole samples of one block at a time, each swept at once
    kPanel,     // the same, kept in a panel first: it comes in bands of 64 rows, or in another order of lanes
};

// A panel of ∂L/∂S in the order of the columns above, and the way from there to a layer's own lanes.
struct ArrivalPanel {
    Panel<float> panel;
    bool aligned = true;                // the order above is the layer's own
    int32_t* offset = nullptr;          // [row blocks][64] of each lane in the panel
    int32_t* lines = nullptr;           // [row blocks][64] the cache lines these lie in
    int32_t* line_count = nullptr;      // [row blocks]

    ArrivalPanel() = default;
    ArrivalPanel(const Axis& own, const Axis& above, int64_t rows, Arena& arena) : aligned(same_order(own, above)) {
        // one row more than is used: blocks a multiple of 4 KiB apart would share few sets of the cache
        panel = {arena.take<float>(above.blocks * (rows + 1) * kLanes), rows + 1};
        if (aligned) return;
        const int64_t lanes = static_cast<int64_t>(own.blocks) * kLanes;
        offset = arena.take<int32_t>(lanes), lines = arena.take<int32_t>(lanes);
        line_count = arena.take<int32_t>(own.blocks);
    }

    void find_offsets(const Axis& own, const Axis& above) const {
        for (int64_t block = 0; block < own.blocks; ++block) {
            int32_t& count = line_count[block];
            count = 0;
            for (int64_t i = block * kLanes; i < (block + 1) * kLanes; ++i) {
                const int32_t lane = own.neuron[i] < 0 ? 0 : above.lane[own.neuron[i]];  // any finite value does in padding
                offset[i] = static_cast<int32_t>(lane / kLanes * panel.rows * kLanes + lane % kLanes);
                const int32_t line = offset[i] / 16 * 16;
                int32_t* mine = lines + block * kLanes;
                int32_t k = 0;
                while (k < count && mine[k] != line) ++k;
                if (k == count) mine[count++] = line;
            }
        }
    }

    // out[t][·] = the lanes of one block from wherever they lie, for `steps` rows from `row` on. 64 plain copies beat 4
    // gather instructions, so the compiler must not vectorize them; the lines of later steps are fetched ahead, since no
    // hardware prefetcher follows so many short streams.
    __attribute__((noinline)) void bring_together(int64_t block, int64_t row, int64_t steps, float* out) const {
        constexpr int64_t ahead = 6;
        const float* from = panel.at(0, row);
        const int32_t *lane_offset = offset + block * kLanes, *line = lines + block * kLanes;
        const int32_t count = line_count[block];
        for (int64_t t = 0; t < steps; ++t, from += kLanes, out += kLanes) {
            if (t + ahead < steps)
                for (int32_t i = 0; i < count; ++i) __builtin_prefetch(from + ahead * kLanes + line[i]);
            for (int i = 0; i < kLanes; ++i) {
                uint32_t bits;
                __builtin_memcpy(&bits, from + lane_offset[i], sizeof bits);
                asm("" : "+r"(bits));
                __builtin_memcpy(out + i, &bits, sizeof bits);
            }
        }
    }
};

// Everything that the backward pass of one layer keeps while the chunks go by.
struct BackwardLayer {
    const Layer& layer;
    const Plan& plan;
    const ModelInfo& model;
    LayerParameters parameters;
    Input kind;
    Arrival arrival = Arrival::kConstant;
    BackwardSweep<Upstream> sweep;
    DualPanel grad;                               // ∂L/∂I: rows of the chunk, or for a held input one row a sample
    std::optional<InputGradient> input_gradient;  // if somebody below needs it
    ArrivalPanel arrivals;
    float* grad_tiles;                            // [tile][source lane][output lane]
    float* constant;                              // ∂L/∂S for all t: [row blocks][64], in the last layer [B] of it
    float* current_sum;                           // [B][row blocks][64], like those of the parameters
    float* parameter_sums[kMostParameters] = {};

    BackwardLayer(const Stack& s, int l, const Chunks& chunks, Arena& arena)
        : layer(s.layers[l]),
          plan(*layer.plan),
          model(kModels[layer.neurons.model]),
          parameters(layer, arena),
          kind(input_kind(s, l, layer.input_rate)),
          sweep(backward_sweep<Upstream>(layer.neurons)) {
        const bool last = l + 1 == s.count, below = l > 0 || s.grad_x;
        const int64_t rows = kind == Input::kHeld ? s.batch : chunks.rows();
        grad = DualPanel(plan.rows.blocks, rows, s.bf16 && below, arena);
        if (below) input_gradient.emplace(plan, rows, s.bf16, arena);
        grad_tiles = arena.take<float>(static_cast<size_t>(plan.tiles) * kTile);
        constant = arena.take<float>(last ? lanes() * s.batch : lanes());
        current_sum = arena.take<float>(lanes() * s.batch);
        for (int k = 0; k < model.parameters; ++k) parameter_sums[k] = arena.take<float>(lanes() * s.batch);
        if (last) return;
        const Plan& above = *s.layers[l + 1].plan;
        arrival = same_order(plan.rows, above.cols) && above.sparse.tile.empty() ? Arrival::kTiles : Arrival::kPanel;
        if (arrival == Arrival::kPanel) arrivals = ArrivalPanel(plan.rows, above.cols, chunks.rows(), arena);
    }

    int64_t lanes() const { return static_cast<int64_t>(plan.rows.blocks) * kLanes; }

    BlockGradient block_gradient(int64_t b, int64_t r) const {
        const int64_t at = (b * plan.rows.blocks + r) * kLanes;
        BlockGradient result{nullptr, nullptr, current_sum + at, {}};
        for (int k = 0; k < model.parameters; ++k) result.parameters[k] = parameter_sums[k] + at;
        return result;
    }
};

struct BackwardPass {
    const Stack& s;
    Chunks chunks;
    std::vector<BackwardLayer> layers;
    float* panel_memory;                // of dense inputs
    std::optional<EventsByLane> events; // of inputs that are spikes
    uint64_t* bits;
    double* totals;
    int64_t states_size, scratch_size;  // of a worker: states of one block, then a tile
    float* scratch;

    BackwardPass(const Stack& stack, Arena& arena) : s(stack), chunks(s.batch, s.steps) {
        int64_t panel_rows = 0, event_blocks = 0, lanes = 0, states = 0;
        layers.reserve(s.count);
        for (int l = 0; l < s.count; ++l) {
            const BackwardLayer& x = layers.emplace_back(s, l, chunks, arena);
            const int64_t blocks = x.plan.cols.blocks;
            if (x.kind == Input::kEvents)
                event_blocks = most(event_blocks, blocks);
            else
                panel_rows = most(panel_rows, blocks * (x.kind == Input::kHeld ? s.batch : chunks.rows()));
            lanes = most(lanes, x.lanes());
            states = most(states, x.model.states);
        }
        panel_memory = arena.take<float>(panel_rows * kLanes);
        events.emplace(event_blocks, chunks.rows(), arena);
        bits = arena.take<uint64_t>(EventsByLane::scratch_words(chunks.samples, s.steps) * s.threads);
        totals = arena.take<double>(lanes);
        states_size = s.steps * states * kLanes;
        scratch_size = states_size + most(kLanes, chunks.group * s.steps) * kLanes;
        scratch = arena.take<float>(scratch_size * s.threads);
    }

    void run() {
        for (size_t l = 0; l < layers.size(); ++l) begin(l);
        for (int64_t first = 0; first < s.batch; first += chunks.samples) {
            const int64_t samples = least(chunks.samples, s.batch - first);
            for (size_t l = layers.size(); l-- > 0;) {
                sweep(l, first, samples);
                if (layers[l].kind != Input::kHeld) hand_down(l, first, samples, s.steps);
            }
        }
        if (layers[0].kind == Input::kHeld) hand_down(0, 0, s.batch, 1);  // one row a sample: all at once
        for (const BackwardLayer& x : layers) finish(x);
    }

    // Weights, sums at zero, and what of ∂L/∂S is the same at every step: rates[n] is the mean over T·B spikes,
    // counts[b][n] the sum over T.
    void begin(size_t l) const {
        const BackwardLayer& x = layers[l];
        const Axis& axis = x.plan.rows;
        if (x.input_gradient) x.input_gradient->load(x.layer.values, s.threads);
        parallel(s.threads, x.plan.tiles, 8, [&](int64_t tile, int) { zero(x.grad_tiles + tile * kTile, kTile * 4); });
        const float share = 1.0f / (static_cast<float>(s.batch) * s.steps);
        const bool last = l + 1 == layers.size();
        for (int64_t b = 0; b < (last ? s.batch : 1); ++b)
            for (int64_t i = 0; i < x.lanes(); ++i) {
                const int32_t n = axis.neuron[i];
                float g = n >= 0 && x.layer.grad_rates ? x.layer.grad_rates[n] * share : 0.0f;
                if (last && n >= 0 && s.grad_counts) g += s.grad_counts[b * axis.size + n];
                x.constant[b * x.lanes() + i] = g;
            }
        if (!x.arrivals.aligned) x.arrivals.find_offsets(axis, layers[l + 1].plan.cols);
    }

    // ∂L/∂S of layer l, its neurons backwards, and with that ∂L/∂I, for the samples of a chunk.
    void sweep(size_t l, int64_t first, int64_t samples) const {
        switch (layers[l].arrival) {
            case Arrival::kConstant: return sweep_constant(layers[l], first, samples);
            case Arrival::kTiles: return sweep_tiles(layers[l], layers[l + 1], first, samples);
            case Arrival::kPanel: return sweep_panel(layers[l], layers[l + 1], first, samples);
        }
    }

    void sweep_constant(const BackwardLayer& x, int64_t first, int64_t samples) const {
        parallel(s.threads, x.plan.rows.blocks * samples, 4, [&](int64_t task, int worker) {
            const int64_t r = task / samples, b = task % samples;
            sweep_block(x, first, b, r, nullptr, scratch + worker * scratch_size);
        });
    }

    void sweep_tiles(const BackwardLayer& x, const BackwardLayer& above, int64_t first, int64_t samples) const {
        const int64_t T = s.steps, groups = divide_up(samples, chunks.group);
        parallel(s.threads, x.plan.rows.blocks * groups, 2, [&](int64_t task, int worker) {
            const int64_t r = task / groups, b = task % groups * chunks.group, count = least(chunks.group, samples - b);
            float* mine = scratch + worker * scratch_size;
            float* tile = mine + states_size;
            above.input_gradient->run(r, above.grad, b * T, count * T, tile);
            for (int64_t i = 0; i < count; ++i) sweep_block(x, first, b + i, r, tile + i * T * kLanes, mine);
        });
    }

    void sweep_panel(const BackwardLayer& x, const BackwardLayer& above, int64_t first, int64_t samples) const {
        const InputGradient& product = *above.input_gradient;
        const Panel<float>& panel = x.arrivals.panel;
        const int64_t R = x.plan.rows.blocks, T = s.steps, rows = samples * T;
        const int64_t task_rows = product.task_rows(chunks.group * T), tasks = divide_up(rows, task_rows);
        product.prepare(above.grad, rows, s.threads);
        parallel(s.threads, above.plan.cols.blocks * tasks, 2, [&](int64_t task, int) {
            const int64_t c = task / tasks, row = task % tasks * task_rows;
            product.run(c, above.grad, row, least(task_rows, rows - row), panel.at(c, row));
        });
        parallel(s.threads, samples * R, R, [&](int64_t task, int worker) {  // one sample's panel (400 KB) stays in L2
            const int64_t r = task % R, b = task / R;
            float* mine = scratch + worker * scratch_size;
            float* tile = x.arrivals.aligned ? panel.at(r, b * T) : mine + states_size;
            if (!x.arrivals.aligned) x.arrivals.bring_together(r, b * T, T, tile);
            sweep_block(x, first, b, r, tile, mine);
        });
    }

    // Block r of sample b of the chunk that begins with sample `first`.
    void sweep_block(const BackwardLayer& x, int64_t first, int64_t b, int64_t r, const float* tile, float* room) const {
        const int64_t sample = first + b, T = s.steps;
        const bool last = &x == &layers.back();
        const Upstream upstream{tile, x.constant + (last ? sample * x.lanes() : 0) + r * kLanes};
        BlockGradient out = x.block_gradient(sample, r);
        if (x.kind == Input::kHeld) {
            const StoredCurrent current{kept_currents(s, x.layer, sample, r), 0};
            forward_sweep<StoredCurrent>(x.layer.neurons)(current, T, x.parameters.block(r), {nullptr, room, nullptr});
            x.sweep(upstream, room, T, x.parameters.block(r), x.layer.neurons.alpha, out);
            for (int v = 0; v < kVecs; ++v) {
                const Vec g = load(out.current + v * W);
                store(x.grad.floats.at(r, sample) + v * W, g);
                if (x.grad.halves.data) store(x.grad.halves.at(r, sample) + v * W, g);
            }
            return;
        }
        out.rows = x.grad.floats.at(r, b * T);
        if (x.grad.halves.data) out.halves = x.grad.halves.at(r, b * T);
        x.sweep(upstream, kept_states(s, x.layer, sample, r), T, x.parameters.block(r), x.layer.neurons.alpha, out);
    }

    // From ∂L/∂I of layer l to ∂L/∂W and, in the first layer, to ∂L/∂x.
    void hand_down(size_t l, int64_t first, int64_t samples, int64_t steps) {
        weight_gradient(layers[l], first, samples, steps);
        if (l == 0 && s.grad_x) input_gradient(layers[0], first, samples, steps);
    }

    void weight_gradient(const BackwardLayer& x, int64_t first, int64_t samples, int64_t steps) {
        const int64_t C = x.plan.cols.blocks;
        const Panel<float> panel{panel_memory, x.grad.floats.rows};
        const bool by_events = x.kind == Input::kEvents;
        if (by_events)
            parallel(s.threads, C, 1, [&](int64_t c, int worker) {
                events->load(c, x.layer.inputs + (first * C + c) * steps, samples, steps, C * steps,
                             bits + worker * EventsByLane::scratch_words(chunks.samples, steps));
            });
        else
            fill_panel(s, x.layer, x.kind, first, samples, panel);
        parallel(s.threads, x.plan.tiles, 2, [&](int64_t tile, int) {
            const int64_t row = x.plan.tile_row[tile], col = x.plan.tile_col[tile];
            if (by_events)
                event_gradient(*events, col, x.grad.floats.at(row, 0), x.grad_tiles + tile * kTile);
            else
                outer(panel.at(col, 0), x.grad.floats.at(row, 0), samples * steps, x.grad_tiles + tile * kTile);
        });
    }

    // ∂L/∂x of rows of the first layer, to the user's matrix.
    void input_gradient(const BackwardLayer& x, int64_t first, int64_t samples, int64_t steps) const {
        const InputGradient& product = *x.input_gradient;
        const Axis& axis = x.plan.cols;
        const int64_t rows = samples * steps, bands = divide_up(rows, kLanes);
        product.prepare(x.grad, rows, s.threads);
        parallel(s.threads, axis.blocks * bands, 1, [&](int64_t task, int worker) {
            const int64_t block = task / bands, row = task % bands * kLanes, height = least(kLanes, rows - row);
            float* out = scratch + worker * scratch_size + states_size;
            product.run(block, x.grad, row, height, out);
            for (int64_t r = 0; r < height; ++r) {
                const int64_t b = first + (row + r) / steps, t = (row + r) % steps;
                store_block(axis, block, out + r * kLanes, Rows{0, 1, 1, axis.size}, 1,
                            s.grad_x + (t * s.batch + b) * axis.size);
            }
        });
    }

    // The sums of all chunks become the gradients of weights and parameters.
    void finish(const BackwardLayer& x) const {
        const Axis& axis = x.plan.rows;
        const auto neuron = [&](int64_t i) { return axis.neuron[i]; };
        const auto gradient = [&](const Parameter& parameter, bool decay, const float* sums) {
            parameter_gradient(parameter, decay, sums, s.batch, x.lanes(), neuron, axis.size, s.threads, totals);
        };
        if (x.layer.grad_values) unpack_gradient(x.plan, x.grad_tiles, s.threads, x.layer.grad_values);
        gradient({x.layer.bias, x.layer.grad_bias, true}, false, x.current_sum);
        for (int k = 0; k < x.model.parameters; ++k)
            gradient(x.layer.neurons.parameters[k], x.model.decays[k], x.parameter_sums[k]);
    }
};

inline void stack_backward(Stack& s, Arena& arena) {
    BackwardPass pass(s, arena);
    if (arena.base) pass.run();
}

}  // namespace g2g::G2G_ISA
