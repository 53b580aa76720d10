// Delays in the backward pass: ∂L/∂S̃, where spikes arrive, becomes ∂L/∂S, where they were sent, S̃[t] = S[t − d]; and the
// gradients of learned delays.
#pragma once

#include "layout.h"
#include "stack.h"

namespace g2g::G2G_ISA {

// out[i] = Σ x[i − width + 1 … i] of rows x [steps][64] with zeros around them, [steps + width − 1][64]. Each sum is the end of one
// group of `width` rows and the begin of the next, so that the cost does not depend on the width, and nothing is subtracted.
inline void moving_sums(const float* x, int64_t steps, int64_t width, float* out) {
    const int64_t rows = steps + width - 1;
    for (int64_t first = 0; first < rows; first += width) {
        Vec sum[kVecs] = {};
        for (int64_t i = first; i < least(first + width, rows); ++i)
            for (int v = 0; v < kVecs; ++v) {
                if (i < steps) sum[v] += load(x + i * kLanes + v * W);
                store(out + i * kLanes + v * W, sum[v]);
            }
        for (Vec& each : sum) each = Vec{};
        for (int64_t ahead = width - 1; first && ahead-- > 0;)
            for (int v = 0; v < kVecs; ++v) {
                const int64_t i = first + ahead + 1 - width;
                if (i < steps) sum[v] += load(x + i * kLanes + v * W);
                if (first + ahead >= rows) continue;
                float* const own = out + (first + ahead) * kLanes + v * W;
                store(own, load(own) + sum[v]);
            }
    }
}

// The gradients of a connection's learned delays; lanes are those of the source.
struct DelayGradient {
    float* sums = nullptr;  // [row blocks][B][64], what each sample adds
    const Layer* source = nullptr;
    const int64_t* delays = nullptr;
    float* out = nullptr;   // null: not wanted
    int64_t width = 1;

    // `to` is the connection, or the layer above, which has its fields.
    template <class To>
    void take(const Stack& s, const Layer& of, const To& to, Arena& arena) {
        if (!to.grad_delays) return;
        source = &of, delays = to.delays, out = to.grad_delays, width = to.delay_width;
        sums = arena.take<float>(int64_t{of.plan->rows.blocks} * s.batch * kLanes);
    }

    int64_t room_rows(int64_t steps) const { return out && width > 1 ? steps + width - 1 : 0; }

    // −1/(σ(σ + 1)) Σ_t ∂L/∂S̃[t]·Σ_{k=1..σ} (S[t − d + k] − S[t − d − k]) of each lane of block r of sample b, spike by spike; those
    // before the first step count, too. A spike that arrives at a takes the sums of ∂L/∂S̃, the tile [T][64], over the σ steps before
    // and after a. `room` is for room_rows() rows.
    void add(const Stack& s, int64_t b, int64_t r, const float* tile, float* room) const {
        const Axis& axis = source->plan->rows;
        const int64_t T = s.steps, rows = T + width - 1;
        const int32_t* const neuron = axis.neuron.data() + r * kLanes;
        float* const sum = sums + (r * s.batch + b) * kLanes;
        zero(sum, kLanes * sizeof(float));
        if (width > 1) moving_sums(tile, T, width, room), tile = room;
        const float share = 1.0f / static_cast<float>(width * (width + 1));
        const auto add_spike = [&](int64_t lane, int64_t step) {
            const int64_t arrives = step + delays[neuron[lane]], after = arrives + width;
            if (0 < arrives && arrives <= rows) sum[lane] -= share * tile[(arrives - 1) * kLanes + lane];
            if (0 <= after && after < rows) sum[lane] += share * tile[after * kLanes + lane];
        };
        for (int64_t i = 0; source->sent && i < source->sent_steps; ++i)
            for (int64_t lane = 0; lane < kLanes; ++lane)
                if (neuron[lane] >= 0 && source->sent[(i * s.batch + b) * axis.size + neuron[lane]])
                    add_spike(lane, i - source->sent_steps);
        const uint64_t* const words = source->spikes + (b * axis.blocks + r) * T;
        for (int64_t t = 0; t < T; ++t)
            for (uint64_t word = words[t]; word; word &= word - 1) add_spike(__builtin_ctzll(word), t);
    }

    void finish(const Stack& s, double* totals) const {
        if (out) lane_gradient({nullptr, out, true}, false, source->plan->rows, sums, s.batch, s.threads, totals);
    }
};

// The lanes of a vector that have the same delay.
struct SameDelay {
    int32_t delay;
    uint32_t bits;
};

// Those of each vector of `count` lanes, [count / W][W], by ascending delay; last ones may be empty.
inline void by_delay(const int32_t* delay, int64_t count, SameDelay* out) {
    for (int64_t first = 0; first < count; first += W) {
        int32_t last = -1;
        for (SameDelay* of = out + first; of < out + first + W; ++of) {
            *of = {INT32_MAX, 0};
            for (int64_t i = first; i < first + W; ++i)
                if (delay[i] > last && delay[i] < of->delay) of->delay = delay[i];
            for (int i = 0; i < W; ++i) of->bits |= uint32_t{delay[first + i] == of->delay} << i;
            last = of->delay;
        }
    }
}

// The delays with which a layer's spikes reach the layer above, in the layer's order of lanes.
struct Late {
    SameDelay* lanes = nullptr;  // of its rows, delays at most T; null: no delays
    DelayGradient gradient;

    Late() = default;
    Late(const Stack& s, const Layer& of, const Layer& to, Arena& arena) {
        if (!to.delays) return;
        const Axis& axis = of.plan->rows;
        const int64_t count = int64_t{axis.blocks} * kLanes;
        lanes = arena.take<SameDelay>(count);
        gradient.take(s, of, to, arena);
        for (int64_t first = 0; arena.base && first < count; first += W) {
            int32_t delay[W];
            for (int i = 0; i < W; ++i) {
                const int32_t n = axis.neuron[first + i];
                delay[i] = n < 0 ? 0 : static_cast<int32_t>(most(0, least(to.delays[n], s.steps)));
            }
            by_delay(delay, W, lanes + first);
        }
    }

    // Makes ∂L/∂S[t] = ∂L/∂S̃[t + d] of ∂L/∂S̃, the tile [T][64] of block r of sample b; 0 where t + d is after the last step.
    // In place: d ≥ 0, so step t reads steps from t on, and they are written in ascending order. Those of one group are all
    // read before the first of them is written. `room` is that of the gradient.
    void shift(const Stack& s, int64_t b, int64_t r, float* tile, float* room) const {
        if (gradient.out) gradient.add(s, b, r, tile, room);
        for (int v = 0; v < kVecs; ++v) {
            const SameDelay *const begin = lanes + (r * kVecs + v) * W, *end = begin;
            while (end < begin + W && end->bits) ++end;
            const int64_t longest = end[-1].delay;
            const auto shift_group = [&](auto size, float* first, int64_t steps_left) {
                Vec arrived[decltype(size)::value] = {};
                for (const SameDelay* of = begin; of < end && of->delay < steps_left; ++of)
                    unrolled<decltype(size)::value>([&](auto i) {
                        arrived[i] = load_chosen(arrived[i], first + (of->delay + i) * kLanes, of->bits);
                    });
                unrolled<decltype(size)::value>([&](auto i) { store(first + i * kLanes, arrived[i]); });
            };
            constexpr int group = 4;
            float* first = tile + v * W;
            int64_t steps_left = s.steps;
            // while what the whole group reads is within the run
            for (; steps_left >= longest + group; steps_left -= group, first += group * kLanes)
                shift_group(Constant<group>{}, first, steps_left);
            for (; steps_left > 0; --steps_left, first += kLanes) shift_group(Constant<1>{}, first, steps_left);
        }
    }
};

}  // namespace g2g::G2G_ISA
