// Products whose left side is spikes: only the set bits of the spike words are visited.
//
//   forward    I[·] = b + Σ over active tiles, Σ over set bits j:  Wᵀ[tile][j][·]
//   gradient   G[tile][j][·] += dI_t[·]  for every set bit j of the tile's word at t
//
// (StripCurrent and strip_gradient: the same on the strips of 16 or 32 lanes that a unit really has.)
//
// First the set bits of several words become one list of events. Then each event costs 64 additions: forward of weights, into
// sums that stay in registers over a whole block row; for the gradient of dI, from L2, into one row of the gradient tile that
// stays in registers over all events of its source neuron.
#pragma once

#include "interface.h"
#include "plan.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// Row block `row` of a plan and the spikes of one sample, words [column blocks][stride].
struct BlockSpikes {
    const Plan* plan;
    int64_t row;
    const uint64_t* words;
    int64_t stride;
    const float *tiles, *bias;
};

// Copies the values of events; may write up to W more.
inline void copy_values(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += W) {
        store(to + i, load(from + i));
        asm("");  // keeps this from becoming a call of memcpy, which takes longer than most of these loops
    }
}

// The currents of the row block.
struct EventCurrent : BlockSpikes {
    static constexpr int kAtOnce = 64;  // tiles whose events make one list

    void operator()(int64_t t, Vec* current) const {
        Vec odd[kVecs] = {};  // two chains of sums, for smaller rounding errors
        for (int v = 0; v < kVecs; ++v) current[v] = load(bias + v * W);
        const int32_t* col = plan->tile_col.data();
        const uint64_t* sources = plan->tile_sources.data();
        for (int32_t tile = plan->row_first[row], end = plan->row_first[row + 1]; tile < end;) {
            uint16_t events[kAtOnce * 64 + 64];  // tile · 64 + bit
            int size = 0;
            const float* weights = tiles + static_cast<int64_t>(tile) * kTile;
            const int32_t stop = end - tile > kAtOnce ? tile + kAtOnce : end;
            for (int number = 0; tile < stop; ++number, ++tile)
                size += append_bits(events + size, words[col[tile] * stride + t] & sources[tile], number * 64);
            int e = 0;
            for (; e + 1 < size; e += 2) {
                const float *w = weights + events[e] * kLanes, *x = weights + events[e + 1] * kLanes;
                for (int v = 0; v < kVecs; ++v) current[v] += load(w + v * W), odd[v] += load(x + v * W);
            }
            if (e < size)
                for (int v = 0; v < kVecs; ++v) current[v] += load(weights + events[e] * kLanes + v * W);
        }
        for (int v = 0; v < kVecs; ++v) current[v] += odd[v];
    }
};

alignas(64) constexpr float kZeros[kLanes] = {};

// The same strip by strip of L lanes: an event costs L additions, for units of L rows that leave much of a tile empty.
template <int L>
struct StripCurrent : BlockSpikes {
    static constexpr int kAtOnce = 64;         // segments whose events make one list
    static constexpr int kTilesOfList = 1000;  // numbers of events have 16 bits

    void operator()(int64_t t, Vec* current) const {
        constexpr int strips = kLanes / L, N = L / W, chains = 4;
        const Segment* const list = plan->forward.list.data();
        const int32_t* const first = plan->forward.first.data() + row * strips;
        for (int s = 0; s < strips; ++s) {
            Vec sum[chains][N] = {};
            for (int32_t at = first[s], end = first[s + 1]; at < end;) {
                uint16_t events[kAtOnce * 64 + 64];  // (place from the first one on) · 64 + bit
                int size = 0;
                const int32_t place = list[at].place, stop = end - at > kAtOnce ? at + kAtOnce : end;
                for (; at < stop && list[at].place - place < kTilesOfList; ++at) {
                    const uint64_t own = ~uint64_t{0} >> (64 - list[at].count) << list[at].lane;
                    size += append_bits(events + size, words[list[at].block * stride + t] & own, (list[at].place - place) * 64);
                }
                const float* weights = tiles + static_cast<int64_t>(place) * kTile + s * L;
                int e = 0;
                for (; e + chains <= size; e += chains)
                    unrolled<chains>([&](auto c) {
                        const float* w = weights + int64_t{events[e + c]} * kLanes;
                        unrolled<N>([&](auto v) { sum[c][v] += load(w + v * W); });
                    });
                if (e < size)  // zeros in place of those that do not exist: a loop over the rest would be mispredicted
                    unrolled<chains>([&](auto c) {
                        const float* w = e + c < size ? weights + int64_t{events[e + c]} * kLanes : kZeros;
                        unrolled<N>([&](auto v) { sum[c][v] += load(w + v * W); });
                    });
            }
            unrolled<N>([&](auto v) {
                current[s * N + v] = load(bias + s * L + v * W) + ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]));
            });
        }
    }
};

// The currents of a block from the spikes of a step, on top of `start`.
struct SpikeCurrents {
    const Plan* plan;
    const float* tiles;
    void (*sum)(const SpikeCurrents&, int64_t r, const uint64_t* words, int64_t stride, int64_t t, const float* start, float* out);

    template <class Current>
    static void add(const SpikeCurrents& of, int64_t r, const uint64_t* words, int64_t stride, int64_t t, const float* start,
                    float* out) {
        Vec sum[kVecs];
        Current{{of.plan, r, words, stride, of.tiles, start}}(t, sum);
        for (int v = 0; v < kVecs; ++v) store(out + v * W, sum[v]);
    }

    SpikeCurrents(const Plan& p, const float* weights) : plan(&p), tiles(weights) {
        sum = p.rows.strip == kLanes ? add<EventCurrent> : p.rows.strip == 16 ? add<StripCurrent<16>> : add<StripCurrent<32>>;
    }
};

// w[i] bit j ↔ w[j] bit i of a 64 × 64 bit matrix.
inline void transpose_bits(uint64_t* w) {
    uint64_t mask = 0x00000000FFFFFFFF;
    for (int size = 32; size; size >>= 1, mask ^= mask << size)
        for (int i = 0; i < 64; i += 2 * size)
            for (int k = i; k < i + size; ++k) {
                const uint64_t swapped = ((w[k] >> size) ^ w[k + size]) & mask;
                w[k] ^= swapped << size;
                w[k + size] ^= swapped;
            }
}

// The events of a slice of rows sorted by source lane: rows of lane j of block c are rows[c][first[c][j] … ].
struct EventsByLane {
    uint16_t* rows;   // [column blocks][capacity]
    int32_t* first;   // [column blocks][65]
    uint64_t* scratch;  // [threads][transposed], words
    int64_t capacity, transposed;

    EventsByLane(int64_t blocks, int64_t samples, int64_t steps, int threads, Arena& arena)
        : capacity(samples * steps * kLanes + 64), transposed(samples * ((steps + 63) / 64) * 64) {
        rows = arena.take<uint16_t>(blocks * capacity);
        first = arena.take<int32_t>(blocks * (kLanes + 1));
        scratch = arena.take<uint64_t>(transposed * threads);
    }

    // Block c from `samples` runs of `steps` words; run b starts at words + b · stride and is rows b·steps …. Each word is that
    // of an event `late` steps later.
    void load(int64_t c, const uint64_t* words, int64_t samples, int64_t steps, int64_t stride, int worker, int64_t late = 0) const {
        uint64_t* const of_worker = scratch + worker * transposed;
        const int64_t stretches = (steps + 63) / 64;  // 64 steps at once: their bits transposed give a word per lane
        for (int64_t p = 0; p < samples * stretches; ++p) {
            const int64_t b = p / stretches, t = p % stretches * 64, count = steps - t < 64 ? steps - t : 64;
            uint64_t* bits = of_worker + p * 64;
            const uint64_t* const own = words + b * stride + t - late;
            for (int64_t i = 0; i < 64; ++i) bits[i] = i < count && t + i >= late ? own[i] : 0;
            transpose_bits(bits);
        }
        uint16_t* out = rows + c * capacity;
        int32_t* starts = first + c * (kLanes + 1);
        int32_t size = 0;
        for (int lane = 0; lane < kLanes; ++lane) {
            starts[lane] = size;
            for (int64_t p = 0; p < samples * stretches; ++p)
                size += append_bits(out + size, of_worker[p * 64 + lane], p / stretches * steps + p % stretches * 64);
        }
        starts[kLanes] = size;
    }
};

// One tile: grad[j][·] += Σ over the events of lane j of dI[row][·]; meanwhile the row of the tile stays in registers.
inline void event_gradient(const EventsByLane& events, const Plan& plan, int64_t tile, const float* grad_current, float* grad) {
    const int64_t c = plan.tile_col[tile];
    const uint16_t* rows = events.rows + c * events.capacity;
    const int32_t* first = events.first + c * (kLanes + 1);
    constexpr int32_t kPartial = 64;  // events of a partial sum: rounding errors grow with its length
    for (int lane = 0; lane < kLanes; ++lane) {
        if (first[lane] == first[lane + 1] || !(plan.tile_sources[tile] >> lane & 1)) continue;
        Vec sum[kVecs] = {};
        for (int32_t begin = first[lane], end = first[lane + 1]; begin < end; begin += kPartial) {
            Vec even[kVecs] = {}, odd[kVecs] = {};
            const int32_t stop = end - begin < kPartial ? end : begin + kPartial;
            int32_t e = begin;
            for (; e + 1 < stop; e += 2) {
                const float *g = grad_current + rows[e] * kLanes, *h = grad_current + rows[e + 1] * kLanes;
                for (int v = 0; v < kVecs; ++v) even[v] += load(g + v * W), odd[v] += load(h + v * W);
            }
            if (e < stop)
                for (int v = 0; v < kVecs; ++v) even[v] += load(grad_current + rows[e] * kLanes + v * W);
            for (int v = 0; v < kVecs; ++v) sum[v] += even[v] + odd[v];
        }
        float* target = grad + lane * kLanes;
        for (int v = 0; v < kVecs; ++v) store(target + v * W, load(target + v * W) + sum[v]);
    }
}

// The same on the strips of L lanes that its units have.
template <int L>
void strip_gradient(const EventsByLane& events, const Plan& plan, int64_t tile, const float* grad_current, float* grad) {
    constexpr int N = L / W, chains = 4;
    constexpr int32_t kPartial = 128;  // events of a partial sum
    const int64_t c = plan.tile_col[tile];
    const uint16_t* rows = events.rows + c * events.capacity;
    const int32_t* first = events.first + c * (kLanes + 1);
    for (int64_t p = plan.piece_first[tile]; p < plan.piece_first[tile + 1]; ++p) {
        const Piece& piece = plan.pieces[p];
        const float* from = grad_current + piece.lane_row;
        for (int lane = piece.lane_col; lane < piece.lane_col + piece.cols; ++lane) {
            Vec total[N] = {};
            for (int32_t e = first[lane], end = first[lane + 1]; e < end;) {
                Vec sum[chains][N] = {};
                const int32_t stop = end - e < kPartial ? end : e + kPartial;
                for (; e + chains <= stop; e += chains)
                    unrolled<chains>([&](auto k) {
                        const float* g = from + rows[e + k] * kLanes;
                        unrolled<N>([&](auto v) { sum[k][v] += load(g + v * W); });
                    });
                for (; e < stop; ++e) {
                    const float* g = from + rows[e] * kLanes;
                    unrolled<N>([&](auto v) { sum[0][v] += load(g + v * W); });
                }
                unrolled<N>([&](auto v) { total[v] += (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]); });
            }
            float* target = grad + lane * kLanes + piece.lane_row;
            unrolled<N>([&](auto v) { store(target + v * W, load(target + v * W) + total[v]); });
        }
    }
}

// Which of both, with `strips` for those of the rows.
inline auto gradient_by_events(const Plan& plan, bool strips) {
    return !strips ? event_gradient : plan.rows.strip == 16 ? strip_gradient<16> : strip_gradient<32>;
}

}  // namespace g2g::G2G_ISA
