// The forward pass of a stack: each layer over all T at once. A task computes the currents of one block of some samples
// and runs their neurons over time.
#pragma once

#include "batch.h"
#include "events.h"
#include "parallel.h"
#include "product.h"
#include "recurrent.h"
#include "stack.h"

namespace g2g::G2G_ISA {

// x [T, B, in] as spike words of layer 0, if it holds nothing but 0 and 1, which `x_spikes` then says; returns the share of ones.
inline double pack_input(Stack& s, int64_t* counts) {
    const Axis& axis = s.layers[0].plan->cols;
    int64_t ones = 0;
    s.x_spikes = true;
    for (int64_t begin = 0; s.x_spikes && begin < s.batch; begin += 16) {
        const int64_t samples = least(16, s.batch - begin);
        parallel(s.threads, axis.blocks * samples, 4, [&](int64_t task, int) {
            const int64_t b = begin + task / axis.blocks, block = task % axis.blocks;
            uint64_t* words = s.layers[0].inputs + (b * axis.blocks + block) * s.steps;
            counts[task] = pack_block(axis, block, s.x, Rows{b, s.steps, s.batch, axis.size}, s.steps, words);
        });
        for (int64_t task = 0; task < axis.blocks * samples; ++task) {
            s.x_spikes = s.x_spikes && counts[task] != kNoSpikes;
            ones += counts[task];
        }
    }
    return static_cast<double>(ones) / (static_cast<double>(s.batch) * s.steps * axis.size);
}

// The forward pass of one layer, and memory for it.
struct ForwardLayer {
    const Stack& stack;
    Layer& layer;
    const Plan& plan;
    Layer* lower;             // the layer below, or null
    bool held;                // its input is
    LayerParameters parameters;
    int64_t scratch_size;
    float* scratch;           // currents, `scratch_size` floats per worker
    float* counts;            // spikes over all steps, [B][row blocks][64]
    double* totals;
    float* tiles;             // the weights, in the form that the input needs
    uint16_t* pairs = nullptr;
    Tap* taps;                // one by one, if units are small
    DualPanel panel;
    Bands bands;              // of a held input, for products by batch
    SpikeGroups groups;       // of spikes, for the same
    float* states;            // of a recurrent layer, by step (recurrent.h)
    float *held_current = nullptr, *recurrent_tiles = nullptr;  // of the same: where its input is held, [row blocks][B][64]
    uint64_t* begin = nullptr;  // of the same, room for [B][row blocks]: the spikes before the first step
    Input kind{};
    bool by_batch = false, by_subsets = false;

    ForwardLayer(const Stack& s, int l, Arena& arena)
        : stack(s),
          layer(s.layers[l]),
          plan(*layer.plan),
          lower(l ? &s.layers[l - 1] : nullptr),
          held(!l && s.held),
          parameters(layer, arena),
          scratch_size(most(kTile, Slices{s.batch, s.steps}.group * s.steps * kLanes)),
          panel(plan.cols.blocks, held ? s.batch : Slices{s.batch, s.steps}.rows(), s.bf16, arena),
          states(layer.states) {
        const int64_t blocks = static_cast<int64_t>(s.batch) * plan.rows.blocks, lanes = plan.cols.blocks * int64_t{kLanes};
        const bool small = !plan.by_row.empty() && s.batch >= kSamples;
        if (small) scratch_size = most(scratch_size, 2 * kSamples * s.steps * kLanes);
        if (!plan.granules.list.empty())
            scratch_size = most(scratch_size, subset_samples(s.batch, s.steps) * s.steps * kLanes);
        scratch = arena.take<float>(scratch_size * s.threads);
        counts = arena.take<float>(blocks * kLanes);
        totals = arena.take<double>(static_cast<size_t>(plan.rows.blocks) * kLanes);
        tiles = arena.take<float>(static_cast<size_t>(plan.tiles) * kTile);
        if (s.bf16) pairs = arena.take<uint16_t>(static_cast<size_t>(plan.tiles) * kTile);
        taps = arena.take<Tap>(plan.by_row.source.size());
        bands.lanes = groups.lanes = lanes, groups.steps = s.steps;
        if (small && held) bands.data = arena.take<float>(Bands::size(lanes, s.batch));
        if (small && !held) groups.bits = arena.take<uint16_t>(SpikeGroups::size(s.batch, lanes, s.steps));
        if (!layer.recurrent) return;
        if (!states) states = arena.take<float>(blocks * s.steps * model_info(layer.neurons).states * kLanes);
        if (held) held_current = arena.take<float>(blocks * kLanes);
        recurrent_tiles = arena.take<float>(static_cast<size_t>(layer.recurrent->tiles) * kTile);
        begin = arena.take<uint64_t>(blocks);
    }

    // Returns the share of ones among its spikes, from that among its inputs.
    double run(int l, double rate) {
        if (lower && layer.inputs != lower->spikes)
            reorder_words(stack, *lower, plan.cols, layer.delays, layer.inputs);
        layer.input_rate = rate;
        kind = input_kind(stack, l, true);
        by_batch = g2g::G2G_ISA::by_batch(stack, layer, kind, true);
        by_subsets = !by_batch && g2g::G2G_ISA::by_subsets(stack, layer, kind, true);
        if (by_batch)
            load_taps(plan.by_row, layer.values, stack.threads, taps);
        else if (kind == Input::kEvents || by_subsets || !stack.bf16)
            load_tiles<kByRow>(plan, layer.values, stack.threads, tiles);
        else
            load_tiles<kByRow>(plan, layer.values, stack.threads, pairs);
        const bool events = kind == Input::kEvents && !by_batch && !by_subsets;
        if (!layer.recurrent || !events) multiply();
        if (layer.recurrent) run_steps(events);
        const double spikes = sum_rates(stack, layer, counts, totals);
        return spikes / (static_cast<double>(stack.batch) * stack.steps * plan.rows.size);
    }

    // The neurons of block r of sample b over all steps; those of a recurrent layer wait for one another (recurrent.h), so
    // that only their currents are stored.
    template <class Current>
    void neurons(ForwardScan<Current> scan, const Current& current, int64_t b, int64_t r) const {
        const int64_t block = b * plan.rows.blocks + r;
        if (layer.recurrent) return store_currents(current, b, r);
        alignas(64) float edge[kMostStates * kLanes];
        load_states(stack, layer, layer.state, b, r, edge);
        const SampleParameters own(parameters, layer, b, r);
        scan(current, stack.steps, own.block,
              {layer.spikes + block * stack.steps, kept_states(stack, layer, b, r), counts + block * kLanes, edge});
        if (layer.last) store_states(stack, layer, edge, b, r, layer.last);
    }

    template <class Current>
    void store_currents(const Current& current, int64_t b, int64_t r) const {
        const int64_t membrane = (model_info(layer.neurons).states - 1) * kLanes;
        for (int64_t t = 0; t < (held ? 1 : stack.steps); ++t) {
            Vec input[kVecs];
            current(t, input);
            float* out = held ? held_current + (r * stack.batch + b) * kLanes : step_states(stack, layer, states, r, t, b) + membrane;
            for (int v = 0; v < kVecs; ++v) store(out + v * W, input[v]);
        }
    }

    void multiply() const {
        if (by_batch) return held ? run_held_by_batch() : run_spikes_by_batch();
        if (by_subsets) return run_subsets();
        if (kind != Input::kEvents) return run_product();
        if (!events_by_strip(stack, layer, true)) return run_events<EventCurrent>();
        if (plan.rows.strip == 16) return run_events<StripCurrent<16>>();
        run_events<StripCurrent<32>>();
    }

    template <class Current>
    void run_events() const {
        const auto scan = forward_scan<Current>(layer.neurons);
        const int64_t C = plan.cols.blocks, T = stack.steps, B = stack.batch;
        parallel_pairs(stack.threads, plan.rows.blocks, B, least(32, B), [&](int64_t r, int64_t b, int) {
            const uint64_t* words = layer.inputs + b * C * T;
            neurons(scan, Current{{&plan, r, words, T, tiles, parameters.bias + r * kLanes}}, b, r);
        });
    }

    // The neurons of `count` samples from `first` on, whose currents(r, sample, samples, room) gives for some of them at once, of
    // block r; `row_blocks`: one block of rows after the other, else one group of samples.
    template <class F>
    void each_group(int64_t first, int64_t count, int64_t group, bool row_blocks, int64_t grain, const F& currents) const {
        const auto scan = forward_scan<StoredCurrent>(layer.neurons);
        const int64_t R = plan.rows.blocks, parts = divide_up(count, group), stride = held ? 0 : kLanes;
        parallel(stack.threads, R * parts, grain, [&](int64_t task, int worker) {
            const int64_t r = row_blocks ? task / parts : task % R, b = (row_blocks ? task % parts : task / R) * group;
            const int64_t samples = least(group, count - b);
            const float* own = currents(r, b, samples, scratch + worker * scratch_size);
            for (int64_t i = 0; i < samples; ++i, own += held ? kLanes : stack.steps * kLanes)
                neurons(scan, StoredCurrent{own, stride}, first + b + i, r);
        });
    }

    void run_subsets() const {
        const int64_t C = plan.cols.blocks, T = stack.steps;
        const auto sum = plan.rows.strip == 16 ? subset_currents<16> : subset_currents<32>;
        each_group(0, stack.batch, subset_samples(stack.batch, T), true, 1, [&](int64_t r, int64_t b, int64_t samples, float* room) {
            sum(plan, r, tiles, parameters.bias + r * kLanes, layer.inputs + b * C * T, samples, T, room);
            return room;
        });
    }

    void run_spikes_by_batch() const {
        groups.load(layer.inputs, stack.batch, stack.threads);
        each_group(0, stack.batch, kSamples, false, 1, [&](int64_t r, int64_t b, int64_t, float* room) {
            spike_currents(plan.by_row, taps, r, groups.from(b / kSamples), parameters.bias + r * kLanes,
                           room + kSamples * stack.steps * kLanes, room);
            return room;
        });
    }

    // One product per sample, independent of T.
    void run_held_by_batch() const {
        fill_panel(stack, layer, kind, 0, stack.batch, panel.floats);
        bands.fill(panel.floats, stack.batch, stack.threads);
        each_group(0, stack.batch, kLanes, false, 1, [&](int64_t r, int64_t b, int64_t samples, float* room) {
            const int32_t* tap = plan.by_row.first.data() + r * kLanes;
            alignas(64) float sum[kTile];
            for (int lane = 0; lane < kLanes; ++lane)
                dense_sum(taps + tap[lane], taps + tap[lane + 1], bands.at(b / kLanes, 0), parameters.bias[r * kLanes + lane],
                          sum + lane * kLanes);
            transpose(sum, kLanes, room);
            if (layer.currents) __builtin_memcpy(kept_currents(stack, layer, b, r), room, samples * kLanes * sizeof(float));
            return room;
        });
    }

    // Of a held input once per sample.
    void run_product() const {
        const Weights weights{&plan.forward, plan.rows.strip, tiles, pairs, kForwardPartial};
        const int64_t B = stack.batch, steps = held ? 1 : stack.steps;
        const Slices slices{B, stack.steps};
        const int64_t most_samples = held ? B : slices.samples, group = held ? 2 * kGroupRows : slices.group;
        for (int64_t first = 0; first < B; first += most_samples) {
            const int64_t count = least(most_samples, B - first);
            fill_panel(stack, layer, kind, first, count, panel.floats);
            panel.convert(plan.cols.blocks, count * steps, stack.threads);
            each_group(first, count, group, true, held ? 1 : 4, [&](int64_t r, int64_t b, int64_t samples, float* room) {
                float* const own = layer.currents ? kept_currents(stack, layer, b, r) : room;
                product(weights, r, panel.floats, panel.halves, b * steps, samples * steps, {parameters.bias + r * kLanes, 0}, own);
                return own;
            });
        }
    }

    // All neurons of a recurrent layer, one step after the other; by `events`, each step visits the spikes from below, too.
    void run_steps(bool events) const {
        const int64_t R = plan.rows.blocks, B = stack.batch;

        load_tiles<kByRow>(*layer.recurrent, layer.recurrent_values, stack.threads, recurrent_tiles);
        const SpikeCurrents below(plan, tiles), own(*layer.recurrent, recurrent_tiles);
        for (int64_t block = 0; layer.state && block < B * R; ++block)
            begin[block] = first_word(stack, layer, parameters, block / R, block % R);
        each_part_of_batch(B, 1, stack.threads, [&](int64_t first, int64_t samples, int threads, int) {
            const int64_t parts = divide_up(samples, kStepSamples);
            for (int64_t t = 0; t < stack.steps; ++t)
                parallel_pairs(threads, R, parts, 1, [&](int64_t r, int64_t part, int) {
                    const int64_t b = part * kStepSamples;
                    run_step(events ? &below : nullptr, own, r, t, first + b, least(kStepSamples, samples - b));
                });
        });
        parallel(stack.threads, B * R, 16, [&](int64_t block, int) {
            count_spikes(layer.spikes + block * stack.steps, stack.steps, counts + block * kLanes);
        });
    }

    void run_step(const SpikeCurrents* below, const SpikeCurrents& recurrent, int64_t r, int64_t t, int64_t first,
                  int64_t samples) const {
        const int64_t R = plan.rows.blocks, C = plan.cols.blocks, T = stack.steps;
        const int64_t size = model_info(layer.neurons).states * kLanes;
        alignas(64) float current[kStepSamples * kLanes], initial[kStepSamples * kMostStates * kLanes];
        float* const now = step_states(stack, layer, states, r, t, first);
        for (int64_t i = 0; i < samples; ++i) {
            const int64_t b = first + i;
            float* const own = current + i * kLanes;
            const float* start = held ? held_current + (r * stack.batch + b) * kLanes : now + (i + 1) * size - kLanes;
            if (below) {
                below->sum(*below, r, layer.inputs + b * C * T, T, t, parameters.bias + r * kLanes, own);
                start = own;
            }
            if (t)
                recurrent.sum(recurrent, r, layer.spikes + b * R * T, T, t - 1, start, own);
            else if (layer.state)
                recurrent.sum(recurrent, r, begin + b * R, 1, 0, start, own);
            else if (start != own)
                __builtin_memcpy(own, start, kLanes * sizeof(float));
            if (!t) load_states(stack, layer, layer.state, b, r, initial + i * size);
        }
        const float* before = t ? now - stack.batch * size : initial;
        const ForwardStep all{current, before, size, now, size, layer.spikes + (first * R + r) * T + t, R * T};
        run_forward(parameters, layer, first, samples, r, all);
        for (int64_t i = 0; t + 1 == T && layer.last && i < samples; ++i)
            store_states(stack, layer, now + i * size, first + i, r, layer.last);
    }
};

inline void stack_forward(Stack& s, Arena& arena) {
    int64_t* ones = arena.take<int64_t>(s.layers[0].plan->cols.blocks * int64_t{16});
    double rate = arena.base && !s.held ? pack_input(s, ones) : 0;
    const size_t kept = arena.used;
    size_t needed = kept;
    for (int l = 0; l < s.count; ++l) {
        arena.used = kept;  // one layer after the other, in the same memory
        ForwardLayer layer(s, l, arena);
        needed = most(needed, arena.used);
        if (!arena.base) continue;
        rate = layer.run(l, rate);
        for (int64_t b = 0; l + 1 == s.count && b < s.batch; ++b)
            for (int64_t n = 0; n < layer.plan.rows.size; ++n)
                s.counts[b * layer.plan.rows.size + n] = layer.counts[b * layer.plan.rows.blocks * kLanes + layer.plan.rows.lane[n]];
    }
    arena.used = needed;
}

}  // namespace g2g::G2G_ISA
