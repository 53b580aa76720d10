// The whole stack of layers: each layer over all T at once, forward, then backward in pieces of the batch that stay in
// cache. Every output element is summed by one task in a fixed order, so results do not depend on the threads.
#pragma once

#include "events.h"
#include "layout.h"
#include "lif.h"
#include "product.h"

#include <vector>

namespace g2g::G2G_ISA {

constexpr int64_t kChunkRows = 800;  // (sample, t) rows of a piece: 2048 neurons × 800 rows × 4 B = 6.5 MB, L3-sized
constexpr int64_t kGroupRows = 24;   // samples are grouped to at least so many rows: four full register tiles

struct LaneParameters {
    float *decay, *theta, *bias;
    LaneParameters(const Layer& layer, Arena& arena) {
        const Axis& axis = layer.plan->rows;
        const size_t lanes = static_cast<size_t>(axis.blocks) * kLanes;
        decay = arena.take<float>(lanes), theta = arena.take<float>(lanes), bias = arena.take<float>(lanes);
        if (!arena.base) return;
        spread(axis, layer.beta, layer.beta_per_neuron, 0.0f, decay);
        for (size_t i = 0; i < lanes; ++i) decay[i] = clamp_decay(decay[i]);
        spread(axis, layer.theta, layer.theta_per_neuron, __builtin_inff(), theta);
        spread(axis, layer.bias, true, 0.0f, bias);
    }
};

// Runs a chunk function over the batch; chunks and groups of samples depend on T alone, never on the threads.
struct Chunks {
    int64_t batch, steps, samples, group;
    Chunks(int64_t b, int64_t t)
        : batch(b), steps(t), samples(least(b, most(1, kChunkRows / t))), group((kGroupRows + t - 1) / t) {}
    int64_t rows() const { return samples * steps; }
    int64_t groups(int64_t count) const { return (count + group - 1) / group; }
};

// One current for all steps.
struct HeldCurrent {
    const float* lanes;
    void operator()(int64_t, Vec* current) const {
        for (int v = 0; v < kVecs; ++v) current[v] = load(lanes + v * W);
    }
};

// Currents [T][64].
struct TileCurrent {
    const float* tile;
    void operator()(int64_t t, Vec* current) const {
        for (int v = 0; v < kVecs; ++v) current[v] = load(tile + t * kLanes + v * W);
    }
};

// The weights of a layer's forward product in the form that its input asks for.
struct ForwardWeights {
    float* tiles = nullptr;
    uint16_t* pairs = nullptr;
    ForwardWeights(const Plan& plan, bool bf16, Arena& arena) {
        tiles = arena.take<float>(static_cast<size_t>(plan.tiles) * kTile);
        if (bf16) pairs = arena.take<uint16_t>(static_cast<size_t>(plan.tiles) * kTile);
    }
    Weights product(const Plan& plan) const { return {&plan.forward, plan.rows.strip, tiles, pairs, kForwardPiece}; }
};

// A panel of dense inputs in float32, and in bfloat16 beside it where products take that.
struct InputPanel {
    Panel<float> floats;
    Panel<uint16_t> halves{nullptr, 0};
    InputPanel(int64_t blocks, int64_t rows, bool bf16, Arena& arena)
        : floats{arena.take<float>(blocks * rows * kLanes), rows} {
        if (bf16) halves = {arena.take<uint16_t>(blocks * rows * kLanes), rows};
    }
    void convert(int64_t blocks, int64_t rows, int threads) const {
        if (!halves.data) return;
        parallel(threads, blocks, 1, [&](int64_t block, int) {
            convert_bf16(floats.at(block, 0), rows * kLanes, halves.at(block, 0));
        });
    }
    Panel<const float> f() const { return {floats.data, floats.rows}; }
    Panel<const uint16_t> h() const { return {halves.data, halves.rows}; }
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
                       Panel<float> panel) {
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

// x [T, B, in] as spike words of layer 0, if it holds nothing but 0 and 1; adds the number of ones.
inline bool pack_input(const Stack& s, int64_t* ones, int64_t* counts) {
    const Axis& axis = s.layers[0].plan->cols;
    bool spikes = true;
    for (int64_t begin = 0; spikes && begin < s.batch; begin += 16) {
        const int64_t samples = least(16, s.batch - begin);
        zero(counts, axis.blocks * samples * 8);
        parallel(s.threads, axis.blocks * samples, 4, [&](int64_t task, int) {
            const int64_t b = begin + task / axis.blocks, block = task % axis.blocks;
            uint64_t* words = s.layers[0].inputs + (b * axis.blocks + block) * s.steps;
            if (!pack_block(axis, block, s.x, Rows{b, s.steps, s.batch, axis.size}, s.steps, words, &counts[task]))
                counts[task] = -1;
        });
        for (int64_t task = 0; task < axis.blocks * samples; ++task) {
            spikes = spikes && counts[task] >= 0;
            *ones += counts[task];
        }
    }
    return spikes;
}

template <int RESET>
void forward_layer(const Stack& s, const Layer& layer, Input kind, const LaneParameters& lanes,
                   const ForwardWeights& weights, const InputPanel& panel, float* counts, float* scratch,
                   int64_t scratch_size) {
    const Plan& plan = *layer.plan;
    const int64_t R = plan.rows.blocks, C = plan.cols.blocks, T = s.steps;
    const auto spikes_of = [&](int64_t b, int64_t r) { return layer.spikes + (b * R + r) * T; };
    const auto membranes_of = [&](int64_t b, int64_t r) {
        return layer.state ? layer.state + (b * R + r) * T * kLanes : nullptr;
    };

    if (kind == Input::kEvents) {
        parallel(s.threads, R * s.batch, least(32, s.batch), [&](int64_t task, int) {
            const int64_t r = task / s.batch, b = task % s.batch, lane = r * kLanes;
            const EventCurrent current{&plan, r, layer.inputs + b * C * T, T, weights.tiles, lanes.bias + lane};
            lif_forward<RESET>(current, s.steps, lanes.decay + lane, lanes.theta + lane, spikes_of(b, r),
                               membranes_of(b, r), counts + (b * R + r) * kLanes);
        });
        return;
    }

    const Weights product_weights = weights.product(plan);
    if (kind == Input::kHeld) {
        fill_panel(s, layer, kind, 0, s.batch, panel.floats);
        panel.convert(C, s.batch, s.threads);
        constexpr int64_t group = 2 * kGroupRows;
        const int64_t groups = (s.batch + group - 1) / group;
        parallel(s.threads, R * groups, 1, [&](int64_t task, int worker) {
            const int64_t r = task / groups, first = task % groups * group, lane = r * kLanes;
            const int64_t samples = least(group, s.batch - first);
            float* currents =
                layer.state ? layer.state + (r * s.batch + first) * kLanes : scratch + worker * scratch_size;
            product(product_weights, r, panel.f(), panel.h(), first, samples, {lanes.bias + lane, 0}, currents);
            for (int64_t i = 0; i < samples; ++i)
                lif_forward<RESET>(HeldCurrent{currents + i * kLanes}, s.steps, lanes.decay + lane, lanes.theta + lane,
                                   spikes_of(first + i, r), nullptr, counts + ((first + i) * R + r) * kLanes);
        });
        return;
    }

    const Chunks chunks(s.batch, T);
    for (int64_t begin = 0; begin < s.batch; begin += chunks.samples) {
        const int64_t samples = least(chunks.samples, s.batch - begin), groups = chunks.groups(samples);
        fill_panel(s, layer, kind, begin, samples, panel.floats);
        panel.convert(C, samples * T, s.threads);
        parallel(s.threads, R * groups, 4, [&](int64_t task, int worker) {
            const int64_t r = task / groups, first = task % groups * chunks.group, lane = r * kLanes;
            const int64_t count = least(chunks.group, samples - first);
            float* currents = scratch + worker * scratch_size;
            product(product_weights, r, panel.f(), panel.h(), first * T, count * T, {lanes.bias + lane, 0}, currents);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t b = begin + first + i;
                lif_forward<RESET>(TileCurrent{currents + i * T * kLanes}, s.steps, lanes.decay + lane,
                                   lanes.theta + lane, spikes_of(b, r), membranes_of(b, r),
                                   counts + (b * R + r) * kLanes);
            }
        });
    }
}

// Firing rates per neuron from spike counts [B][lanes]; returns the number of spikes.
inline double sum_rates(const Stack& s, const Layer& layer, const float* counts, double* totals) {
    const Axis& axis = layer.plan->rows;
    const int64_t lanes = static_cast<int64_t>(axis.blocks) * kLanes;
    sum_over_samples(counts, s.batch, lanes, s.threads, totals);
    double spikes = 0;
    for (int64_t i = 0; i < lanes; ++i) {
        if (axis.neuron[i] < 0) continue;
        layer.rates[axis.neuron[i]] = static_cast<float>(totals[i] / (static_cast<double>(s.batch) * s.steps));
        spikes += totals[i];
    }
    return spikes;
}

inline void stack_forward(Stack& s, Arena& arena) {
    const Chunks chunks(s.batch, s.steps);
    const size_t input_blocks = s.layers[0].plan->cols.blocks;
    int64_t* ones = arena.take<int64_t>(input_blocks * 16);
    size_t scratch_size = most(2 * kGroupRows, chunks.group * s.steps) * kLanes;
    float* scratch = arena.take<float>(scratch_size * s.threads);

    double rate = 0;
    if (arena.base && !s.held) {
        int64_t spikes = 0;
        s.x_spikes = pack_input(s, &spikes, ones);
        rate = static_cast<double>(spikes) / (static_cast<double>(s.batch) * s.steps * s.layers[0].plan->cols.size);
    }
    const size_t kept = arena.used;
    size_t needed = kept;
    for (int l = 0; l < s.count; ++l) {
        arena.used = kept;  // one layer after the other, in the same memory
        const Layer& layer = s.layers[l];
        const Plan& plan = *layer.plan;
        const LaneParameters lanes(layer, arena);
        float* counts = arena.take<float>(static_cast<size_t>(s.batch) * plan.rows.blocks * kLanes);
        double* totals = arena.take<double>(static_cast<size_t>(plan.rows.blocks) * kLanes);
        const ForwardWeights weights(plan, s.bf16, arena);
        const InputPanel panel(plan.cols.blocks, l == 0 && s.held ? s.batch : chunks.rows(), s.bf16, arena);
        needed = most(needed, arena.used);
        if (!arena.base) continue;

        if (l > 0 && layer.inputs != s.layers[l - 1].spikes)
            reorder_words(s.layers[l - 1].plan->rows, plan.cols, s.layers[l - 1].spikes, s.batch, s.steps, s.threads,
                          layer.inputs);
        s.layers[l].input_rate = rate;
        const Input kind = input_kind(s, l, rate);
        if (kind == Input::kEvents || !s.bf16)
            forward_tiles(plan, layer.values, s.threads, weights.tiles);
        else
            bf16_tiles(plan, layer.values, true, s.threads, weights.pairs);
        with_reset(s.reset, [&](auto reset) {
            forward_layer<decltype(reset)::value>(s, layer, kind, lanes, weights, panel, counts, scratch, scratch_size);
        });
        const double spikes = sum_rates(s, layer, counts, totals);
        rate = spikes / (static_cast<double>(s.batch) * s.steps * plan.rows.size);
        if (l + 1 == s.count)
            for (int64_t b = 0; b < s.batch; ++b)
                for (int64_t n = 0; n < plan.rows.size; ++n)
                    s.counts[b * plan.rows.size + n] =
                        counts[b * plan.rows.blocks * kLanes + plan.rows.lane[n]];
    }
    arena.used = needed;
}

// --- backward ---------------------------------------------------------------------------------------------------

// ∂L/∂(input) of one layer from ∂L/∂(current): the backward product, with tiles of few weights visited weight by weight.
struct InputGradient {
    const Plan* plan;
    float* tiles = nullptr;
    uint16_t* pairs = nullptr;
    float* weights = nullptr;     // of the sparse tiles
    float* transposed = nullptr;  // [row blocks][pieces of 64 rows][64 lanes][64 rows]
    int64_t pieces = 0;
    bool sparse() const { return !plan->sparse.tile.empty(); }

    explicit InputGradient(const Plan& p) : plan(&p) {}

    InputGradient(const Plan& p, int64_t rows, bool bf16, Arena& arena) : plan(&p) {
        if (bf16)
            pairs = arena.take<uint16_t>(static_cast<size_t>(p.tiles) * kTile);
        else
            tiles = arena.take<float>(static_cast<size_t>(p.tiles) * kTile);
        if (!sparse()) return;
        pieces = (rows + kLanes - 1) / kLanes;
        weights = arena.take<float>(p.sparse.source.size());
        transposed = arena.take<float>(p.rows.blocks * pieces * kTile);
    }

    void load(const float* values, int threads) const {
        if (pairs)
            bf16_tiles(*plan, values, false, threads, pairs);
        else
            backward_tiles(*plan, values, threads, tiles);
        if (!sparse()) return;
        const int64_t count = static_cast<int64_t>(plan->sparse.source.size());
        parallel(threads, (count + 4095) / 4096, 1, [&](int64_t part, int) {
            for (int64_t i = part * 4096; i < least(count, part * 4096 + 4096); ++i)
                weights[i] = values[plan->sparse.source[i]];
        });
    }

    // Call once a chunk, before `run`.
    void prepare(Panel<const float> grad, int64_t rows, int threads) const {
        if (!sparse()) return;
        const int64_t count = (rows + kLanes - 1) / kLanes;
        parallel(threads, plan->rows.blocks * count, 4, [&](int64_t task, int) {
            const int64_t block = task / count, piece = task % count;
            transpose(grad.at(block, piece * kLanes), least(kLanes, rows - piece * kLanes),
                      transposed + (block * pieces + piece) * kTile);
        });
    }

    // out[rows][64] for column block `block`; with sparse tiles, `row` must be a multiple of 64 and rows at most 64.
    void run(int64_t block, Panel<const float> grad, Panel<const uint16_t> halves, int64_t row, int64_t rows,
             float* out) const {
        product({&plan->backward, plan->cols.strip, tiles, pairs, kBackwardPiece}, block, grad, halves, row, rows, nothing(),
                out);
        const SparseTiles& list = plan->sparse;
        if (!sparse() || list.col_first[block] == list.col_first[block + 1]) return;
        alignas(64) float sum[kTile] = {};  // [source lane][row]
        for (int32_t s = list.col_first[block]; s < list.col_first[block + 1]; ++s) {
            const float* g = transposed + (plan->tile_row[list.tile[s]] * pieces + row / kLanes) * kTile;
            for (int lane = 0; lane < kLanes; ++lane) {
                const int32_t begin = list.lane_first[s * kLanes + lane], end = list.lane_first[s * kLanes + lane + 1];
                Vec acc[kVecs];
                for (int v = 0; v < kVecs; ++v) acc[v] = G2G_ISA::load(sum + lane * kLanes + v * W);
                for (int32_t e = begin; e < end; ++e) {
                    const Vec w = all(weights[e]);
                    const float* from = g + list.row[e] * kLanes;
                    for (int v = 0; v < kVecs; ++v) acc[v] = fma(w, G2G_ISA::load(from + v * W), acc[v]);
                }
                for (int v = 0; v < kVecs; ++v) store(sum + lane * kLanes + v * W, acc[v]);
            }
        }
        alignas(64) float turned[kTile];
        transpose(sum, kLanes, turned);
        for (int64_t i = 0; i < rows * kLanes; i += W) store(out + i, G2G_ISA::load(out + i) + G2G_ISA::load(turned + i));
    }

    // Rows of a task: whole samples, or pieces of 64 rows.
    int64_t task_rows(const Chunks& chunks) const { return sparse() ? kLanes : chunks.group * chunks.steps; }
};

// ∂L/∂S_t: a tile [T][64] (or none) plus what does not depend on t.
struct TileUpstream {
    const float *tile, *constant;
    void operator()(int64_t t, Vec* g) const {
        for (int v = 0; v < kVecs; ++v)
            g[v] = tile ? load(constant + v * W) + load(tile + t * kLanes + v * W) : load(constant + v * W);
    }
};

// Everything that the backward pass of one layer keeps while the chunks go by.
struct BackwardLayer {
    Layer* layer;
    const Plan* plan;
    LaneParameters lanes;
    Input kind;
    bool aligned = true;          // the next layer's columns are in this layer's order
    bool input_gradient = false;  // somebody below needs ∂L/∂(input)
    float* grad_tiles = nullptr;  // [tile][source lane][output lane]
    Panel<float> grad{nullptr, 0};  // ∂L/∂I: rows of the chunk, or for a held input one row a sample
    Panel<uint16_t> grad_halves{nullptr, 0};
    Panel<float> spike_grad{nullptr, 0};  // ∂L/∂S from above where the LIF sweep cannot follow the product directly
    int32_t* offset = nullptr;            // of each lane in spike_grad
    int32_t *lines = nullptr, *line_count = nullptr;  // [row blocks][64], [row blocks]: the cache lines these lie in
    float *current_sum = nullptr, *beta_sum = nullptr, *theta_sum = nullptr;  // [B][row blocks][64]
    float* constant = nullptr;  // ∂L/∂S that does not depend on t: [row blocks][64], in the last layer [B] of it
};

// A parameter's gradient from sums over the samples: per neuron, or their total for a scalar one.
inline void parameter_gradient(const Axis& axis, const double* totals, bool per_neuron, float* grad) {
    double total = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(axis.blocks) * kLanes; ++i) {
        if (axis.neuron[i] < 0) continue;
        if (per_neuron) grad[axis.neuron[i]] = static_cast<float>(totals[i]);
        total += totals[i];
    }
    if (!per_neuron) grad[0] = static_cast<float>(total);
}

// Where each lane of a layer lies in the panel of the columns above, and which cache lines that touches.
inline void find_offsets(const BackwardLayer& x, const Axis& above) {
    const Axis& axis = x.plan->rows;
    for (int64_t block = 0; block < axis.blocks; ++block) {
        int32_t* lines = x.lines + block * kLanes;
        int32_t& count = x.line_count[block];
        count = 0;
        for (int64_t i = block * kLanes; i < (block + 1) * kLanes; ++i) {
            const int32_t lane = axis.neuron[i] < 0 ? 0 : above.lane[axis.neuron[i]];  // any finite value does in padding
            x.offset[i] = static_cast<int32_t>(lane / kLanes * x.spike_grad.rows * kLanes + lane % kLanes);
            const int32_t line = x.offset[i] / 16 * 16;
            int32_t k = 0;
            while (k < count && lines[k] != line) ++k;
            if (k == count) lines[count++] = line;
        }
    }
}

// own[t][·] = the lanes of one block from wherever they lie in a panel. 64 plain copies beat 4 gather instructions; the
// lines of later steps are fetched ahead, since no hardware prefetcher follows so many short streams.
__attribute__((noinline, optimize("no-tree-vectorize", "no-tree-slp-vectorize")))
inline void bring_together(const float* panel, const int32_t* offset, const int32_t* lines, int32_t line_count,
                           int64_t steps, float* own) {
    constexpr int64_t ahead = 6;
    for (int64_t t = 0; t < steps; ++t) {
        if (t + ahead < steps)
            for (int32_t i = 0; i < line_count; ++i) __builtin_prefetch(panel + (t + ahead) * kLanes + lines[i]);
        for (int i = 0; i < kLanes; ++i) own[t * kLanes + i] = panel[t * kLanes + offset[i]];
    }
}

template <int RESET, int SURROGATE>
void sweep_block(const Stack& s, const BackwardLayer& x, int64_t b, int64_t r, int64_t row, const float* tile,
                 const float* panel, float* membranes) {
    const int64_t R = x.plan->rows.blocks, T = s.steps, lane = r * kLanes;
    const bool held = x.kind == Input::kHeld;
    const float* u = membranes;
    if (held)
        lif_forward<RESET>(HeldCurrent{x.layer->state + (r * s.batch + b) * kLanes}, s.steps, x.lanes.decay + lane,
                           x.lanes.theta + lane, nullptr, membranes, nullptr);
    else
        u = x.layer->state + (b * R + r) * T * kLanes;
    const int64_t at = (b * R + r) * kLanes;
    const Sums sums{x.current_sum + at, x.beta_sum + at, x.theta_sum + at};
    const bool last = x.layer == s.layers + s.count - 1;
    const float* constant = x.constant + (last ? at : lane);
    const Derivative derivative(s.alpha);
    float* grad = held ? nullptr : x.grad.at(r, row);
    uint16_t* halves = x.grad_halves.data && !held ? x.grad_halves.at(r, row) : nullptr;
    if (panel) {
        float* own = membranes + T * kLanes;
        bring_together(panel, x.offset + lane, x.lines + lane, x.line_count[r], T, own);
        tile = own;
    }
    const auto emit = [&](int64_t t, int v, Vec g) {
        if (grad) store(grad + t * kLanes + v * W, g);
        if (halves) store(halves + t * kLanes + v * W, g);
    };
    lif_backward<RESET, SURROGATE>(TileUpstream{tile, constant}, u, s.steps, x.lanes.decay + lane,
                                   x.lanes.theta + lane, derivative, sums, emit);
    if (held) {
        for (int v = 0; v < kVecs; ++v) {
            store(x.grad.at(r, b) + v * W, load(sums.current + v * W));
            if (x.grad_halves.data) store(x.grad_halves.at(r, b) + v * W, load(sums.current + v * W));
        }
    }
}

// ∂L/∂W of one layer for the samples of a chunk (for a held input: of the whole batch).
inline void weight_gradient(const Stack& s, const BackwardLayer& x, int64_t begin, int64_t samples, Panel<float> panel,
                            EventsByLane& events, uint64_t* scratch) {
    const Plan& plan = *x.plan;
    const int64_t C = plan.cols.blocks, T = s.steps;
    const bool by_events = x.kind == Input::kEvents;
    if (by_events)
        parallel(s.threads, C, 1, [&](int64_t c, int worker) {
            events.load(c, x.layer->inputs + (begin * C + c) * T, samples, T, C * T,
                        scratch + worker * EventsByLane::scratch_words(samples, T));
        });
    else
        fill_panel(s, *x.layer, x.kind, begin, samples, panel);
    parallel(s.threads, plan.tiles, 2, [&](int64_t tile, int) {
        float* grad = x.grad_tiles + tile * kTile;
        const int64_t row = plan.tile_row[tile], col = plan.tile_col[tile];
        if (by_events)
            event_gradient(events, col, x.grad.at(row, 0), grad);
        else
            outer(panel.at(col, 0), x.grad.at(row, 0), x.kind == Input::kHeld ? samples : samples * T, grad);
    });
}

// ∂L/∂x of rows of the first layer, to the user's matrix.
inline void input_gradient(const Stack& s, const InputGradient& product, const BackwardLayer& x, int64_t begin,
                           int64_t samples, int64_t steps, float* scratch, int64_t scratch_size) {
    const Axis& axis = x.plan->cols;
    const int64_t rows = samples * steps, count = (rows + kLanes - 1) / kLanes;
    const Panel<const float> grad{x.grad.data, x.grad.rows};
    product.prepare(grad, rows, s.threads);
    parallel(s.threads, axis.blocks * count, 1, [&](int64_t task, int worker) {
        const int64_t block = task / count, row = task % count * kLanes, height = least(kLanes, rows - row);
        float* out = scratch + worker * scratch_size;
        product.run(block, grad, {x.grad_halves.data, x.grad_halves.rows}, row, height, out);
        for (int64_t r = 0; r < height; ++r) {
            const int64_t b = begin + (row + r) / steps, t = (row + r) % steps;
            store_block(axis, block, out + r * kLanes, Rows{0, 1, 1, axis.size}, 1,
                        s.grad_x + (t * s.batch + b) * axis.size);
        }
    });
}

// ∂L/∂S of layer l, its LIF sweep, and with it ∂L/∂I, for the samples of a chunk.
template <int RESET, int SURROGATE>
void sweep_layer(const Stack& s, const BackwardLayer& x, const BackwardLayer* above, const InputGradient* from_above,
                 int64_t begin, int64_t samples, const Chunks& chunks, float* scratch, int64_t scratch_size) {
    const int64_t R = x.plan->rows.blocks, T = s.steps, rows = samples * T;
    const int64_t row_of = x.kind == Input::kHeld ? 0 : T;  // held: sweep_block finds its own row
    if (!above) {
        parallel(s.threads, R * samples, 4, [&](int64_t task, int worker) {
            const int64_t r = task / samples, b = task % samples;
            sweep_block<RESET, SURROGATE>(s, x, begin + b, r, b * row_of, nullptr, nullptr,
                                          scratch + worker * scratch_size);
        });
        return;
    }
    const Panel<const float> grad{above->grad.data, above->grad.rows};
    const Panel<const uint16_t> halves{above->grad_halves.data, above->grad_halves.rows};
    const int64_t C = above->plan->cols.blocks, task_rows = from_above->task_rows(chunks);
    const int64_t tasks = (rows + task_rows - 1) / task_rows;
    from_above->prepare(grad, rows, s.threads);
    parallel(s.threads, C * tasks, 2, [&](int64_t task, int worker) {
        const int64_t c = task / tasks, row = task % tasks * task_rows, height = least(task_rows, rows - row);
        float* membranes = scratch + worker * scratch_size;
        float* tile = x.spike_grad.data ? x.spike_grad.at(c, row) : membranes + T * kLanes;
        from_above->run(c, grad, halves, row, height, tile);
        if (x.spike_grad.data) return;
        for (int64_t i = 0; i < height; i += T)
            sweep_block<RESET, SURROGATE>(s, x, begin + (row + i) / T, c, (row + i) / T * row_of, tile + i * kLanes,
                                          nullptr, membranes);
    });
    if (!x.spike_grad.data) return;
    parallel(s.threads, samples * R, R, [&](int64_t task, int worker) {  // one sample's panel (400 KB) stays in L2
        const int64_t r = task % R, b = task / R;
        float* membranes = scratch + worker * scratch_size;
        const float* tile = x.aligned ? x.spike_grad.at(r, b * T) : nullptr;
        const float* panel = x.aligned ? nullptr : x.spike_grad.at(0, b * T);
        sweep_block<RESET, SURROGATE>(s, x, begin + b, r, b * row_of, tile, panel, membranes);
    });
}

inline void stack_backward(Stack& s, Arena& arena) {
    const Chunks chunks(s.batch, s.steps);
    const int64_t T = s.steps;
    std::vector<BackwardLayer> layers;
    std::vector<InputGradient> products;
    for (int l = 0; l < s.count; ++l) {
        Layer& layer = s.layers[l];
        const Plan& plan = *layer.plan;
        BackwardLayer x{&layer, &plan, LaneParameters(layer, arena), input_kind(s, l, layer.input_rate)};
        const bool held = x.kind == Input::kHeld, last = l + 1 == s.count;
        const int64_t lanes = static_cast<int64_t>(plan.rows.blocks) * kLanes, rows = held ? s.batch : chunks.rows();
        x.input_gradient = l > 0 || s.grad_x;
        x.grad_tiles = arena.take<float>(static_cast<size_t>(plan.tiles) * kTile);
        x.grad = {arena.take<float>(lanes * rows), rows};
        if (s.bf16 && x.input_gradient) x.grad_halves = {arena.take<uint16_t>(lanes * rows), rows};
        x.current_sum = arena.take<float>(lanes * s.batch);
        x.beta_sum = arena.take<float>(lanes * s.batch);
        x.theta_sum = arena.take<float>(lanes * s.batch);
        x.constant = arena.take<float>(last ? lanes * s.batch : lanes);
        x.aligned = last || same_order(plan.rows, s.layers[l + 1].plan->cols);
        if (!last) {
            const Plan& next = *s.layers[l + 1].plan;
            if (!x.aligned || !next.sparse.tile.empty())
                // one row more than is used: blocks a multiple of 4 KiB apart would share few sets of the cache
                x.spike_grad = {arena.take<float>(next.cols.blocks * (chunks.rows() + 1) * kLanes), chunks.rows() + 1};
            if (!x.aligned) {
                x.offset = arena.take<int32_t>(lanes), x.lines = arena.take<int32_t>(lanes);
                x.line_count = arena.take<int32_t>(plan.rows.blocks);
            }
        }
        layers.push_back(x);
        products.push_back(x.input_gradient ? InputGradient(plan, rows, s.bf16, arena) : InputGradient(plan));
    }
    int64_t panel_size = 0;
    for (int l = 0; l < s.count; ++l)
        if (layers[l].kind != Input::kEvents)
            panel_size = most(panel_size, layers[l].plan->cols.blocks *
                                              (layers[l].kind == Input::kHeld ? s.batch : chunks.rows()));
    int64_t most_lanes = 0;
    for (const BackwardLayer& x : layers) most_lanes = most(most_lanes, x.plan->rows.blocks * kLanes);
    double* totals = arena.take<double>(most_lanes);
    float* panel_memory = arena.take<float>(panel_size * kLanes);
    int64_t event_blocks = 0;
    for (const BackwardLayer& x : layers)
        if (x.kind == Input::kEvents) event_blocks = most(event_blocks, x.plan->cols.blocks);
    EventsByLane events(event_blocks, chunks.rows(), arena);
    uint64_t* bits = arena.take<uint64_t>(EventsByLane::scratch_words(chunks.samples, T) * s.threads);
    const int64_t scratch_size = (T + most(kLanes, chunks.group * T)) * kLanes;
    float* scratch = arena.take<float>(scratch_size * s.threads);
    if (!arena.base) return;

    for (int l = 0; l < s.count; ++l) {
        const BackwardLayer& x = layers[l];
        const Axis& axis = x.plan->rows;
        const int64_t lanes = static_cast<int64_t>(axis.blocks) * kLanes;
        if (x.input_gradient) products[l].load(x.layer->values, s.threads);
        parallel(s.threads, x.plan->tiles, 8, [&](int64_t tile, int) { zero(x.grad_tiles + tile * kTile, kTile * 4); });
        // rates[n] is the mean over T·B spikes, counts[b][n] the sum over T
        const float share = 1.0f / (static_cast<float>(s.batch) * s.steps);
        const bool last = l + 1 == s.count;
        for (int64_t b = 0; b < (last ? s.batch : 1); ++b)
            for (int64_t i = 0; i < lanes; ++i) {
                const int32_t n = axis.neuron[i];
                float g = n >= 0 && x.layer->grad_rates ? x.layer->grad_rates[n] * share : 0.0f;
                if (last && n >= 0 && s.grad_counts) g += s.grad_counts[b * axis.size + n];
                x.constant[b * lanes + i] = g;
            }
        if (x.offset) find_offsets(x, layers[l + 1].plan->cols);
    }

    for (int64_t begin = 0; begin < s.batch; begin += chunks.samples) {
        const int64_t samples = least(chunks.samples, s.batch - begin);
        for (int l = s.count - 1; l >= 0; --l) {
            const BackwardLayer& x = layers[l];
            const bool last = l + 1 == s.count;
            with_reset(s.reset, [&](auto reset) {
                with_surrogate(s.surrogate, [&](auto surrogate) {
                    sweep_layer<decltype(reset)::value, decltype(surrogate)::value>(
                        s, x, last ? nullptr : &layers[l + 1], last ? nullptr : &products[l + 1], begin, samples, chunks,
                        scratch, scratch_size);
                });
            });
            if (x.kind == Input::kHeld) continue;
            weight_gradient(s, x, begin, samples, {panel_memory, chunks.rows()}, events, bits);
            if (l == 0 && s.grad_x)
                input_gradient(s, products[0], x, begin, samples, T, scratch, scratch_size);
        }
    }
    if (layers[0].kind == Input::kHeld) {
        weight_gradient(s, layers[0], 0, s.batch, {panel_memory, s.batch}, events, bits);
        if (s.grad_x) input_gradient(s, products[0], layers[0], 0, s.batch, 1, scratch, scratch_size);
    }

    for (const BackwardLayer& x : layers) {
        const Layer& layer = *x.layer;
        const Axis& axis = x.plan->rows;
        if (layer.grad_values) unpack_gradient(*x.plan, x.grad_tiles, s.threads, layer.grad_values);
        const int64_t lanes = static_cast<int64_t>(axis.blocks) * kLanes;
        if (layer.grad_bias) {
            sum_over_samples(x.current_sum, s.batch, lanes, s.threads, totals);
            parameter_gradient(axis, totals, true, layer.grad_bias);
        }
        if (layer.grad_beta) {
            sum_over_samples(x.beta_sum, s.batch, lanes, s.threads, totals);
            parameter_gradient(axis, totals, layer.beta_per_neuron, layer.grad_beta);
            mask_clamped(layer.beta, layer.beta_per_neuron ? axis.size : 1, layer.grad_beta);
        }
        if (layer.grad_theta) {
            sum_over_samples(x.theta_sum, s.batch, lanes, s.threads, totals);
            parameter_gradient(axis, totals, layer.theta_per_neuron, layer.grad_theta);
        }
    }
}

}  // namespace g2g::G2G_ISA
