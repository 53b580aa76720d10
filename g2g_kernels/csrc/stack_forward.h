// The forward pass of a stack: each layer over all T at once. A task computes the currents of one block of some samples
// and runs their neurons over time.
#pragma once

#include "batch.h"
#include "chunks.h"
#include "events.h"
#include "product.h"
#include "recurrent.h"
#include "stack.h"

namespace g2g::G2G_ISA {

// The weights of a layer's forward product in the form that its input needs.
struct ForwardWeights {
    float* tiles = nullptr;
    uint16_t* pairs = nullptr;
    Tap* taps = nullptr;  // one by one, if units are small
    ForwardWeights(const Plan& plan, bool bf16, Arena& arena) {
        tiles = arena.take<float>(static_cast<size_t>(plan.tiles) * kTile);
        if (bf16) pairs = arena.take<uint16_t>(static_cast<size_t>(plan.tiles) * kTile);
        taps = arena.take<Tap>(plan.by_row.source.size());
    }
    Weights product(const Plan& plan) const { return {&plan.forward, plan.rows.strip, tiles, pairs, kForwardPartial}; }
};

// x [T, B, in] as spike words of layer 0, if it holds nothing but 0 and 1; adds the number of ones.
inline bool pack_input(const Stack& s, int64_t* ones, int64_t* counts) {
    const Axis& axis = s.layers[0].plan->cols;
    bool spikes = true;
    for (int64_t begin = 0; spikes && begin < s.batch; begin += 16) {
        const int64_t samples = least(16, s.batch - begin);
        parallel(s.threads, axis.blocks * samples, 4, [&](int64_t task, int) {
            const int64_t b = begin + task / axis.blocks, block = task % axis.blocks;
            uint64_t* words = s.layers[0].inputs + (b * axis.blocks + block) * s.steps;
            counts[task] = pack_block(axis, block, s.x, Rows{b, s.steps, s.batch, axis.size}, s.steps, words);
        });
        for (int64_t task = 0; task < axis.blocks * samples; ++task) {
            spikes = spikes && counts[task] != kNoSpikes;
            *ones += counts[task];
        }
    }
    return spikes;
}

// The forward pass of one layer.
struct ForwardLayer {
    const Stack& stack;
    const Layer& layer;
    Input kind;
    const LayerParameters& parameters;
    const ForwardWeights& weights;
    const DualPanel& panel;
    const Bands& bands;          // of a held input, for products by batch
    const SpikeGroups& groups;   // of spikes, for the same
    bool by_batch, by_subsets;
    float* counts;   // spikes over all steps, [B][row blocks][64]
    float* scratch;  // currents, `scratch_size` floats per worker
    int64_t scratch_size;
    float* states;   // of a recurrent layer, by step (recurrent.h)
    float* held;     // of a recurrent layer whose input is held: its currents, [row blocks][B][64]

    const Plan& plan() const { return *layer.plan; }

    // The neurons of block r of sample b over all steps; those of a recurrent layer wait for one another (recurrent.h), so
    // that only their currents are stored.
    template <class Current>
    void neurons(ForwardSweep<Current> sweep, const Current& current, int64_t b, int64_t r) const {
        const int64_t block = b * plan().rows.blocks + r;
        if (layer.recurrent) return store_currents(current, b, r);
        alignas(64) float edge[kMostStates * kLanes];
        load_states(stack, layer, layer.state, b, r, edge);
        const SampleParameters own(parameters, layer, b, r);
        sweep(current, stack.steps, own.block,
              {layer.spikes + block * stack.steps, kept_states(stack, layer, b, r), counts + block * kLanes, edge});
        if (layer.last) store_states(stack, layer, edge, b, r, layer.last);
    }

    template <class Current>
    void store_currents(const Current& current, int64_t b, int64_t r) const {
        const int64_t membrane = (model_info(layer.neurons).states - 1) * kLanes;
        for (int64_t t = 0; t < (held ? 1 : stack.steps); ++t) {
            Vec input[kVecs];
            current(t, input);
            float* out = held ? held + (r * stack.batch + b) * kLanes : step_states(stack, layer, states, r, t, b) + membrane;
            for (int v = 0; v < kVecs; ++v) store(out + v * W, input[v]);
        }
    }

    void run() const {
        if (by_batch) return kind == Input::kHeld ? run_held_by_batch() : run_spikes_by_batch();
        if (by_subsets) return plan().rows.strip == 16 ? run_subsets<16>() : run_subsets<32>();
        if (kind == Input::kEvents) return run_events();
        if (kind == Input::kHeld) return run_held();
        run_dense();
    }

    void run_events() const {
        if (!events_by_strip(stack, layer, true)) return run_events<EventCurrent>();
        if (plan().rows.strip == 16) return run_events<StripCurrent<16>>();
        run_events<StripCurrent<32>>();
    }

    template <class Current>
    void run_events() const {
        const auto sweep = forward_sweep<Current>(layer.neurons);
        const int64_t C = plan().cols.blocks, T = stack.steps, B = stack.batch;
        parallel(stack.threads, plan().rows.blocks * B, least(32, B), [&](int64_t task, int) {
            const int64_t r = task / B, b = task % B;
            const uint64_t* words = layer.inputs + b * C * T;
            neurons(sweep, Current{{&plan(), r, words, T, weights.tiles, parameters.bias + r * kLanes}}, b, r);
        });
    }

    // The currents of some samples of a block at once.
    template <int L>
    void run_subsets() const {
        const auto sweep = forward_sweep<StoredCurrent>(layer.neurons);
        const int64_t R = plan().rows.blocks, C = plan().cols.blocks, T = stack.steps;
        const int64_t most_samples = subset_samples(stack.batch, T), groups = divide_up(stack.batch, most_samples);
        parallel(stack.threads, R * groups, 1, [&](int64_t task, int worker) {
            const int64_t r = task / groups, first = task % groups * most_samples;
            const int64_t samples = least(most_samples, stack.batch - first);
            float* currents = scratch + worker * scratch_size;
            subset_currents<L>(plan(), r, weights.tiles, parameters.bias + r * kLanes, layer.inputs + first * C * T, samples, T,
                               currents);
            for (int64_t i = 0; i < samples; ++i)
                neurons(sweep, StoredCurrent{currents + i * T * kLanes, kLanes}, first + i, r);
        });
    }

    // The currents of 16 samples of a block at once; the neurons as by events.
    void run_spikes_by_batch() const {
        const auto sweep = forward_sweep<StoredCurrent>(layer.neurons);
        const int64_t R = plan().rows.blocks, T = stack.steps, size = kSamples * T * kLanes;
        groups.load(layer.inputs, stack.batch, stack.threads);
        parallel(stack.threads, R * divide_up(stack.batch, kSamples), 1, [&](int64_t task, int worker) {
            const int64_t r = task % R, first = task / R * kSamples;
            float* currents = scratch + worker * scratch_size;
            spike_currents(plan().by_row, weights.taps, r, groups.group(task / R), parameters.bias + r * kLanes,
                           currents + size, currents);
            for (int64_t i = 0; i < least(kSamples, stack.batch - first); ++i) {
                neurons(sweep, StoredCurrent{currents + i * T * kLanes, kLanes}, first + i, r);
            }
        });
    }

    // One product per sample, 64 samples of a block at once.
    void run_held_by_batch() const {
        const auto sweep = forward_sweep<StoredCurrent>(layer.neurons);
        const int64_t R = plan().rows.blocks;
        fill_panel(stack, layer, kind, 0, stack.batch, panel.floats);
        bands.fill(panel.floats, stack.batch, stack.threads);
        parallel(stack.threads, R * divide_up(stack.batch, kLanes), 1, [&](int64_t task, int) {
            const int64_t r = task % R, first = task / R * kLanes;
            const int32_t* tap = plan().by_row.first.data() + r * kLanes;
            alignas(64) float sum[kTile], currents[kTile];
            for (int lane = 0; lane < kLanes; ++lane)
                dense_sum(weights.taps + tap[lane], weights.taps + tap[lane + 1], bands.at(task / R, 0),
                          parameters.bias[r * kLanes + lane], sum + lane * kLanes);
            transpose(sum, kLanes, currents);
            for (int64_t i = 0; i < least(kLanes, stack.batch - first); ++i) {
                float* own = currents + i * kLanes;
                if (layer.currents) __builtin_memcpy(kept_currents(stack, layer, first + i, r), own, kLanes * sizeof(float));
                neurons(sweep, StoredCurrent{own, 0}, first + i, r);
            }
        });
    }

    // One product per sample, independent of T.
    void run_held() const {
        const auto sweep = forward_sweep<StoredCurrent>(layer.neurons);
        const Weights product_weights = weights.product(plan());
        fill_panel(stack, layer, kind, 0, stack.batch, panel.floats);
        panel.convert(plan().cols.blocks, stack.batch, stack.threads);
        constexpr int64_t group = 2 * kGroupRows;
        const int64_t groups = divide_up(stack.batch, group);
        parallel(stack.threads, plan().rows.blocks * groups, 1, [&](int64_t task, int worker) {
            const int64_t r = task / groups, first = task % groups * group;
            const int64_t samples = least(group, stack.batch - first);
            float* currents = layer.currents ? kept_currents(stack, layer, first, r) : scratch + worker * scratch_size;
            product(product_weights, r, panel.floats, panel.halves, first, samples, {parameters.bias + r * kLanes, 0},
                    currents);
            for (int64_t i = 0; i < samples; ++i)
                neurons(sweep, StoredCurrent{currents + i * kLanes, 0}, first + i, r);
        });
    }

    void run_dense() const {
        const auto sweep = forward_sweep<StoredCurrent>(layer.neurons);
        const Weights product_weights = weights.product(plan());
        const int64_t T = stack.steps;
        const Chunks chunks(stack.batch, T);
        for (int64_t begin = 0; begin < stack.batch; begin += chunks.samples) {
            const int64_t samples = least(chunks.samples, stack.batch - begin);
            const int64_t groups = divide_up(samples, chunks.group);
            fill_panel(stack, layer, kind, begin, samples, panel.floats);
            panel.convert(plan().cols.blocks, samples * T, stack.threads);
            parallel(stack.threads, plan().rows.blocks * groups, 4, [&](int64_t task, int worker) {
                const int64_t r = task / groups, first = task % groups * chunks.group;
                const int64_t count = least(chunks.group, samples - first);
                float* currents = scratch + worker * scratch_size;
                product(product_weights, r, panel.floats, panel.halves, first * T, count * T,
                        {parameters.bias + r * kLanes, 0}, currents);
                for (int64_t i = 0; i < count; ++i)
                    neurons(sweep, StoredCurrent{currents + i * T * kLanes, kLanes}, begin + first + i, r);
            });
        }
    }
};

inline void stack_forward(Stack& s, Arena& arena) {
    const Chunks chunks(s.batch, s.steps);
    const size_t input_blocks = s.layers[0].plan->cols.blocks;
    int64_t* ones = arena.take<int64_t>(input_blocks * 16);
    int64_t scratch_size = most(2 * kGroupRows, chunks.group * s.steps) * kLanes;
    for (int l = 0; l < s.count; ++l) {
        if (!s.layers[l].plan->by_row.empty() && s.batch >= kSamples)
            scratch_size = most(scratch_size, 2 * kSamples * s.steps * kLanes);
        if (!s.layers[l].plan->granules.list.empty())
            scratch_size = most(scratch_size, subset_samples(s.batch, s.steps) * s.steps * kLanes);
    }
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
        Layer& layer = s.layers[l];
        const Plan& plan = *layer.plan;
        const LayerParameters parameters(layer, arena);
        float* counts = arena.take<float>(static_cast<size_t>(s.batch) * plan.rows.blocks * kLanes);
        double* totals = arena.take<double>(static_cast<size_t>(plan.rows.blocks) * kLanes);
        const ForwardWeights weights(plan, s.bf16, arena);
        const DualPanel panel(plan.cols.blocks, l == 0 && s.held ? s.batch : chunks.rows(), s.bf16, arena);
        const bool held = l == 0 && s.held, small = !plan.by_row.empty() && s.batch >= kSamples;
        const int64_t lanes = static_cast<int64_t>(plan.cols.blocks) * kLanes;
        Bands bands{nullptr, lanes};
        SpikeGroups groups{nullptr, lanes, s.steps};
        if (small && held) bands.data = arena.take<float>(Bands::size(lanes, s.batch));
        if (small && !held) groups.bits = arena.take<uint16_t>(SpikeGroups::size(s.batch, lanes, s.steps));
        float *states = layer.states, *recurrent_tiles = nullptr, *currents = nullptr;
        uint64_t* begin = nullptr;
        if (layer.recurrent) {
            const int64_t blocks = static_cast<int64_t>(s.batch) * plan.rows.blocks;
            if (!states) states = arena.take<float>(blocks * s.steps * model_info(layer.neurons).states * kLanes);
            if (held) currents = arena.take<float>(blocks * kLanes);
            recurrent_tiles = arena.take<float>(static_cast<size_t>(layer.recurrent->tiles) * kTile);
            begin = arena.take<uint64_t>(blocks);
        }
        needed = most(needed, arena.used);
        if (!arena.base) continue;

        if (l > 0 && layer.inputs != s.layers[l - 1].spikes)
            reorder_words(s.layers[l - 1].plan->rows, plan.cols, s.layers[l - 1].spikes, s.batch, s.steps, s.threads,
                          layer.delays, {s.layers[l - 1].sent, s.layers[l - 1].sent_steps}, layer.inputs);
        layer.input_rate = rate;
        const Input kind = input_kind(s, l, true);
        const bool by_batch = forward_by_batch(s, layer, kind), subsets = !by_batch && by_subsets(s, layer, kind, true);
        if (by_batch)
            load_taps(plan.by_row, layer.values, s.threads, weights.taps);
        else if (kind == Input::kEvents || subsets || !s.bf16)
            load_tiles<kByRow>(plan, layer.values, s.threads, weights.tiles);
        else
            load_tiles<kByRow>(plan, layer.values, s.threads, weights.pairs);
        const ForwardLayer forward{s,     layer,  kind,     parameters, weights,      panel,  bands,
                                   groups, by_batch, subsets, counts, scratch, scratch_size, states, currents};
        if (layer.recurrent) {
            const bool events = kind == Input::kEvents && !by_batch && !subsets;  // which each step visits itself
            if (!events) forward.run();
            load_tiles<kByRow>(*layer.recurrent, layer.recurrent_values, s.threads, recurrent_tiles);
            const SpikeCurrents below(plan, weights.tiles);
            const FromBelow from{events ? &below : nullptr, currents};
            ForwardSteps{s, layer, parameters, {*layer.recurrent, recurrent_tiles}, from, states, counts, begin}.run();
        } else {
            forward.run();
        }
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

}  // namespace g2g::G2G_ISA
