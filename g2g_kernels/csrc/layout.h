// Copies between the user's layouts (neuron order, packed units) and the kernels' (lanes, tiles, spike words).
#pragma once

#include <type_traits>

#include "interface.h"
#include "parallel.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// --- weights ----------------------------------------------------------------------------------------------------

// Weights by tile, [tile][k][64 outputs]; in bfloat16 two k side by side, [tile][k / 2][64][2]. By row, for products that give
// row blocks, k is the source lane; by column the output lane, and tiles lie in the order of `col_tile`.
constexpr bool kByRow = true, kByCol = false;
template <bool by_row, class E>
void load_tiles(const Plan& plan, const float* values, int threads, E* tiles) {
    parallel(threads, plan.tiles, 4, [&](int64_t place, int) {
        E* t = tiles + place * kTile;
        zero(t, kTile * sizeof(E));
        for_each_weight(plan, by_row ? place : plan.col_tile[place], [&](int64_t i, int32_t row, int32_t col) {
            const int32_t k = by_row ? col : row, out = by_row ? row : col;
            put(t + (sizeof(E) == 2 ? (k / 2 * kLanes + out) * 2 + k % 2 : k * kLanes + out), values[i]);
        });
    });
}

inline void zero_gradient(const Plan& plan, int threads, float* grad_values) {
    zero_floats(grad_values, static_cast<int64_t>(plan.unit_rows) * plan.unit_cols * plan.units, threads);
}

// Gradients of the packed values from tiles [source lane][output lane]; padding becomes 0.
inline void unpack_gradient(const Plan& plan, const float* tiles, int threads, float* grad_values) {
    zero_gradient(plan, threads, grad_values);
    parallel(threads, plan.tiles, 4, [&](int64_t tile, int) {
        const float* t = tiles + tile * kTile;
        for_each_weight(plan, tile,
                        [&](int64_t i, int32_t row, int32_t col) { grad_values[i] = t[col * kLanes + row]; });
    });
}

// --- dense rows -------------------------------------------------------------------------------------------------

// Where row r of a slice lies in a user's matrix: rows are samples, or (sample, t) pairs of a [T, B, N] tensor.
struct Rows {
    int64_t first, steps, batch, size;  // first sample of the slice; steps = 1 for plain rows; size = N
    int64_t operator()(int64_t r) const { return ((r % steps) * batch + first + r / steps) * size; }
};

// panel[block][r][·] = the lanes of one block from rows of a matrix in neuron order, 0 in padding. Matrices are float or
// bfloat16 (uint16_t), panels float.
template <class E>
inline void load_block(const Axis& axis, int64_t block, const E* x, const Rows& at, int64_t rows, float* panel) {
    const int32_t from = axis.contiguous[block];
    const int32_t* neuron = axis.neuron.data() + block * kLanes;
    for (int64_t r = 0; r < rows; ++r, panel += kLanes) {
        const E* source = x + at(r);
        if (from >= 0)
            for (int v = 0; v < kVecs; ++v) store(panel + v * W, load(source + from + v * W));
        else
            for (int i = 0; i < kLanes; ++i) panel[i] = neuron[i] >= 0 ? get(source + neuron[i]) : 0.0f;
    }
}

template <class Place, class E>
inline void store_block(const Axis& axis, int64_t block, const float* panel, const Place& at, int64_t rows, E* x) {
    const int32_t from = axis.contiguous[block];
    const int32_t* neuron = axis.neuron.data() + block * kLanes;
    for (int64_t r = 0; r < rows; ++r, panel += kLanes) {
        E* target = x + at(r);
        if (from >= 0)
            for (int v = 0; v < kVecs; ++v) store(target + from + v * W, load(panel + v * W));
        else
            for (int i = 0; i < kLanes; ++i)
                if (neuron[i] >= 0) put(target + neuron[i], panel[i]);
    }
}

// call(pointer to element begin), with x as bfloat16 if `half`, else as float.
template <class Void, class F>
inline void with_elements(Void* x, int32_t half, int64_t begin, const F& call) {
    if (half) return call(static_cast<std::conditional_t<std::is_const_v<Void>, const uint16_t, uint16_t>*>(x) + begin);
    call(static_cast<std::conditional_t<std::is_const_v<Void>, const float, float>*>(x) + begin);
}

constexpr int64_t kNoSpikes = -1;  // in place of the number of ones: some value is neither 0 nor 1

// Packs rows into spike words and returns the number of ones; or kNoSpikes, as soon as it sees that, the words unfinished.
template <class E>
inline int64_t pack_block(const Axis& axis, int64_t block, const E* x, const Rows& at, int64_t rows, uint64_t* words) {
    int64_t count = 0;
    const int32_t from = axis.contiguous[block];
    const int32_t* neuron = axis.neuron.data() + block * kLanes;
    const Vec one = all(1.0f);
    for (int64_t r = 0; r < rows; ++r) {
        E lanes[kLanes];
        const E* source = x + at(r);
        if (from < 0)
            for (int i = 0; i < kLanes; ++i) lanes[i] = neuron[i] >= 0 ? source[neuron[i]] : E{};
        else
            source += from;
        const E* value = from < 0 ? lanes : source;
        uint64_t word = 0, other = 0;
        for (int v = 0; v < kVecs; ++v) {
            const Vec s = load(value + v * W);
            other |= nonzero_bits(s) & nonzero_bits(s - one);
            word |= greater_bits(s, Vec{}) << (v * W);
        }
        if (other) return kNoSpikes;
        words[r] = word;
        count += __builtin_popcountll(word);
    }
    return count;
}

inline void convert_bf16(const float* from, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; i += W) store(to + i, load(from + i));
}

// --- panels: the dense sides of products, in lane order ---------------------------------------------------------

// [blocks][rows][64], in float32 or bfloat16.
template <class T>
struct Panel {
    T* data = nullptr;
    int64_t rows = 0;
    T* at(int64_t block, int64_t row) const { return data + (block * rows + row) * kLanes; }
    operator Panel<const T>() const { return {data, rows}; }
};

// A panel in float32, and in bfloat16 beside it where products take that.
struct DualPanel {
    Panel<float> floats;
    Panel<uint16_t> halves;

    DualPanel() = default;
    DualPanel(int64_t blocks, int64_t rows, bool bf16, Arena& arena)
        : floats{arena.take<float>(blocks * rows * kLanes), rows} {
        if (bf16) halves = {arena.take<uint16_t>(blocks * rows * kLanes), rows};
    }

    // Fills the bfloat16 panel, if there is one, from the first rows of the other.
    void convert(int64_t blocks, int64_t rows, int threads) const {
        if (!halves.data) return;
        parallel(threads, blocks, 1, [&](int64_t block, int) {
            convert_bf16(floats.at(block, 0), rows * kLanes, halves.at(block, 0));
        });
    }
};

// --- spike words ------------------------------------------------------------------------------------------------

// The words of sample b before a layer sends anything, out[blocks][T]: what it sent before the first step, and arrives by `delays`
// (null: none).
inline void begin_words(const Stack& s, const Layer& from, const Axis& to, int64_t b, const int64_t* delays, uint64_t* out) {
    const int64_t N = from.plan->rows.size;
    zero(out, to.blocks * s.steps * sizeof(uint64_t));
    for (int64_t i = 0; delays && from.sent && i < from.sent_steps; ++i)
        for (int64_t n = 0; n < N; ++n) {
            const int64_t t = delays[n] + i - from.sent_steps;
            if (t < 0 || t >= s.steps || !from.sent[(i * s.batch + b) * N + n]) continue;
            out[to.lane[n] / kLanes * s.steps + t] |= uint64_t{1} << (to.lane[n] % kLanes);
        }
}

// The words of sample b of a layer at some steps in another order of lanes, out[blocks][T]: every set bit moves to its neuron's
// other lane, and by `delays` to a later step (null: none).
inline void move_words(const Stack& s, const Layer& from, const Axis& to, int64_t b, int64_t first, int64_t last,
                       const int64_t* delays, uint64_t* out) {
    const Axis& axis = from.plan->rows;
    const int64_t steps = s.steps;
    for (int64_t block = 0; block < axis.blocks; ++block) {
        const int32_t* neuron = axis.neuron.data() + block * kLanes;
        const uint64_t* const in = from.spikes + (b * axis.blocks + block) * steps;
        for (int64_t t = first; t < last; ++t)
            for (uint64_t word = in[t]; word; word &= word - 1) {
                const int32_t n = neuron[__builtin_ctzll(word)], lane = to.lane[n];
                const int64_t late = delays ? t + delays[n] : t;
                if (late < steps) out[(lane / kLanes) * steps + late] |= uint64_t{1} << (lane % kLanes);
            }
    }
}

// A layer's spike words in another order of lanes, and where and when they arrive; what was sent before arrives, too.
inline void reorder_words(const Stack& s, const Layer& from, const Axis& to, const int64_t* delays, uint64_t* target) {
    parallel(s.threads, s.batch, 1, [&](int64_t b, int) {
        uint64_t* out = target + b * to.blocks * s.steps;
        begin_words(s, from, to, b, delays, out);
        move_words(s, from, to, b, 0, s.steps, delays, out);
    });
}

// The ones of each lane among some words, [64].
inline void count_spikes(const uint64_t* words, int64_t steps, float* count) {
    Vec sum[kVecs] = {};
    alignas(64) float lanes[kLanes];
    for (int64_t t = 0; t < steps; ++t) {
        expand_bits(words[t], lanes);
        for (int v = 0; v < kVecs; ++v) sum[v] += load(lanes + v * W);
    }
    for (int v = 0; v < kVecs; ++v) store(count + v * W, sum[v]);
}

// spikes[t][b][n], 0 or 1, of some steps of packed words; those of a block begin `stride` after those of the one before.
inline void unpack(const Plan& plan, const uint64_t* words, int64_t stride, int32_t batch, int32_t steps, int32_t threads,
                   float* spikes) {
    const Axis& axis = plan.rows;
    parallel(threads, batch, 1, [&](int64_t b, int) {
        float panel[kLanes];
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t block = 0; block < axis.blocks; ++block) {
                expand_bits(words[(b * axis.blocks + block) * stride + t], panel);
                store_block(axis, block, panel, Rows{0, 1, batch, axis.size}, 1, spikes + (t * batch + b) * axis.size);
            }
    });
}

}  // namespace g2g::G2G_ISA
