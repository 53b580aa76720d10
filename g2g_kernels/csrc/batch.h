// Products whose vectors are rows of data (samples, or samples at a time step), for units too small to fill a vector:
//
//   dense    Y[o][m] = Σ_k W[k]·X[lane k][m]        one multiply-add per weight and vector of rows
//   spikes   Y[o][m] = Σ_k W[k] where bit m of S[lane k] is set, one masked addition
//   outer    G[k] += Σ_m X[lane k][m]·E[o][m]       and the same with bits for X
//
// k runs over the list of weights of output lane o (WeightList). Dense sides lie in bands of 64 rows, [band][lane][64], which stay
// in L2 while all sums over them are formed. Spikes of 16 samples and some steps take 2 B per lane and step and stay in L1.
#pragma once

#include "events.h"
#include "layout.h"

namespace g2g::G2G_ISA {

constexpr int kSamples = 16;              // of a group, whose spikes at one step are 16 bits
constexpr int kQuarters = kSamples / W;   // vectors of a group
constexpr int kStepsAtOnce = W == 16 ? 8 : 2;  // whose sums fit into registers, two for each

struct Tap {
    int32_t lane;
    float weight;
};

// The weights of a list with their values.
inline void load_taps(const WeightList& list, const float* values, int threads, Tap* taps) {
    each_part(list.source.size(), 4096, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) taps[i] = {list.lane[i], values[list.source[i]]};
    });
}

// to[c][r] = from[r][c] for one 64 × 64 tile of which `rows` rows exist; the other columns of `to` become 0.
inline void transpose(const float* from, int64_t rows, float* to) {
    for (int64_t r = 0; r < kLanes; r += 16) {
        alignas(64) float padded[16 * kLanes];
        const float* source = from + r * kLanes;
        if (r + 16 > rows) {
            const int64_t exist = most(0, rows - r);
            if (exist) __builtin_memcpy(padded, source, exist * kLanes * 4);
            zero(padded + exist * kLanes, (16 - exist) * kLanes * 4);
            source = padded;
        }
        for (int64_t c = 0; c < kLanes; c += 16) transpose_16(source + c, kLanes, to + c * kLanes + r, kLanes);
    }
}

// A dense side in bands, [band][lanes][64 rows], 0 in rows that do not exist.
struct Bands {
    float* data = nullptr;
    int64_t lanes = 0;

    static size_t size(int64_t lanes, int64_t rows) { return lanes * divide_up(rows, kLanes) * kLanes; }
    float* at(int64_t band, int64_t lane) const { return data + (band * lanes + lane) * kLanes; }

    void fill(const Panel<float>& panel, int64_t rows, int threads) const {
        parallel_pairs(threads, divide_up(rows, kLanes), lanes / kLanes, 4, [&](int64_t band, int64_t block, int) {
            const int64_t row = band * kLanes;
            transpose(panel.at(block, row), least(kLanes, rows - row), at(band, block * kLanes));
        });
    }
};

constexpr int kTapsOfPart = 64;  // of a partial sum: rounding errors grow with its length

// sum[64 rows] = start + Σ over taps; `band` is [lanes][64].
inline void dense_sum(const Tap* tap, const Tap* end, const float* band, float start, float* sum) {
    constexpr int N = 4;  // vectors at once
    for (int row = 0; row < kLanes; row += N * W) {
        Vec total[N];
        for (int v = 0; v < N; ++v) total[v] = all(start);
        for (const Tap* k = tap; k < end;) {
            const Tap* const stop = end - k > kTapsOfPart ? k + kTapsOfPart : end;
            Vec even[N] = {}, odd[N] = {};
            for (; k + 1 < stop; k += 2) {
                const float *x = band + int64_t{k[0].lane} * kLanes + row, *y = band + int64_t{k[1].lane} * kLanes + row;
                const Vec w = all(k[0].weight), z = all(k[1].weight);
                unrolled<N>([&](auto v) {
                    even[v] = fma(w, load(x + v * W), even[v]);
                    odd[v] = fma(z, load(y + v * W), odd[v]);
                });
            }
            if (k < stop) {
                const float* x = band + int64_t{k->lane} * kLanes + row;
                const Vec w = all(k->weight);
                unrolled<N>([&](auto v) { even[v] = fma(w, load(x + v * W), even[v]); });
                ++k;
            }
            unrolled<N>([&](auto v) { total[v] += even[v] + odd[v]; });
        }
        unrolled<N>([&](auto v) { store(sum + row + v * W, total[v]); });
    }
}

// The spikes of groups of 16 samples by lane, in pieces of nearly equal numbers of steps, even but for the last:
// [groups][pieces][lanes][steps of the piece], from words [B][blocks][T].
struct SpikeGroups {
    uint16_t* bits = nullptr;
    int64_t lanes = 0, steps = 0;

    // The bits of two steps are read at once, so of one more than there are.
    static size_t size(int64_t batch, int64_t lanes, int64_t steps) {
        return divide_up(batch, kSamples) * lanes * steps + 1;
    }
    int64_t pieces() const { return divide_up(steps, kStepsAtOnce); }
    int64_t first_step(int64_t piece) const { return least(steps, divide_up(steps, 2) * piece / pieces() * 2); }
    SpikeGroups from(int64_t group) const { return {bits + group * lanes * steps, lanes, steps}; }

    void load(const uint64_t* words, int64_t batch, int threads) const {
        const int64_t blocks = lanes / kLanes, groups = divide_up(batch, kSamples);
        constexpr int64_t groups_at_once = 64 / kSamples;
        parallel(threads, blocks * divide_up(groups, groups_at_once), 1, [&](int64_t task, int) {
            const int64_t block = task % blocks, first = task / blocks * groups_at_once, sample = first * kSamples;
            for (int64_t piece = 0; piece < pieces(); ++piece) {
                const int64_t begin = first_step(piece), count = first_step(piece + 1) - begin;
                for (int64_t i = 0; i < count; ++i) {
                    uint64_t w[64];
                    for (int64_t b = 0; b < 64; ++b)
                        w[b] = sample + b < batch ? words[((sample + b) * blocks + block) * steps + begin + i] : 0;
                    transpose_bits(w);
                    for (int64_t g = first; g < least(groups, first + groups_at_once); ++g) {
                        uint16_t* to = bits + g * lanes * steps + lanes * begin + block * kLanes * count + i;
                        for (int64_t lane = 0; lane < kLanes; ++lane)
                            to[lane * count] = static_cast<uint16_t>(w[lane] >> ((g - first) * kSamples));
                    }
                }
            }
        });
    }
};

// sum[N steps][64 lanes][16 samples] of one lane from spikes [lanes][N].
template <int N>
void spike_sum(const Tap* tap, const Tap* end, const uint16_t* bits, float start, float* sum) {
    const auto each = [](const auto& f) {
        unrolled<N>([&](auto t) { unrolled<kQuarters>([&](auto q) { f(t, q); }); });
    };
    const auto at = [&](auto t, auto q) { return sum + t * kLanes * kSamples + q * W; };
    each([&](auto t, auto q) { store(at(t, q), all(start)); });
    using Sums = Vec[N][kQuarters];
    const auto add = [&](const Tap& tap, Sums& sums) {
        const uint16_t* own = bits + int64_t{tap.lane} * N;
        const Vec w = all(tap.weight);
        unrolled<(N + 1) / 2>([&](auto pair) {
            constexpr int t = 2 * decltype(pair)::value;
            const IntVec two = load_bits(own + t);
            unrolled<kQuarters>([&](auto q) {
                constexpr int part = decltype(q)::value;
                sums[t][part] = add_chosen<part>(sums[t][part], two, w);
                if constexpr (t + 1 < N) sums[t + 1][part] = add_chosen<kQuarters + part>(sums[t + 1][part], two, w);
            });
        });
    };
    while (tap < end) {
        const Tap* const stop = end - tap > kTapsOfPart ? tap + kTapsOfPart : end;
        Sums even = {}, odd = {};
        for (; tap + 1 < stop; tap += 2) add(tap[0], even), add(tap[1], odd);
        if (tap < stop) add(*tap++, even);
        each([&](auto t, auto q) { store(at(t, q), load(at(t, q)) + even[t][q] + odd[t][q]); });
    }
}

template <int N = kStepsAtOnce>
void spike_sum(int64_t steps, const Tap* tap, const Tap* end, const uint16_t* bits, float start, float* sum) {
    if (steps == N) return spike_sum<N>(tap, end, bits, start, sum);
    if constexpr (N > 1) spike_sum<N - 1>(steps, tap, end, bits, start, sum);
}

// Currents of a row block for the first group of samples, out[16 samples][T][64]; `room` as large.
inline void spike_currents(const WeightList& list, const Tap* taps, int64_t block, const SpikeGroups& spikes,
                           const float* bias, float* room, float* out) {
    for (int64_t piece = 0; piece < spikes.pieces(); ++piece) {
        const int64_t begin = spikes.first_step(piece), count = spikes.first_step(piece + 1) - begin;
        for (int64_t i = 0; i < kLanes; ++i) {
            const int32_t* first = list.first.data() + block * kLanes + i;
            spike_sum(count, taps + first[0], taps + first[1], spikes.bits + spikes.lanes * begin, bias[i],
                      room + (begin * kLanes + i) * kSamples);
        }
    }
    for (int64_t t = 0; t < spikes.steps; ++t)
        for (int64_t i = 0; i < kLanes; i += 16)
            transpose_16(room + (t * kLanes + i) * kSamples, kSamples, out + t * kLanes + i, spikes.steps * kLanes);
}

// Bits of rows by lane, [lanes][bands]: bit m of band n is row 64·n + m. From words [samples][blocks][T] of a slice, whose
// rows are (sample, t).
struct RowBits {
    uint16_t* bits = nullptr;  // [lanes][bands · 4]
    int64_t bands = 0;

    static size_t size(int64_t lanes, int64_t rows) { return lanes * divide_up(rows, kLanes) * 4; }
    const uint16_t* of(int64_t lane) const { return bits + lane * bands * 4; }

    void load(const uint64_t* words, int64_t blocks, int64_t samples, int64_t steps, int threads) {
        const int64_t rows = samples * steps;
        bands = divide_up(rows, kLanes);
        parallel(threads, blocks, 1, [&](int64_t block, int) {
            int64_t b = 0, t = 0;
            for (int64_t band = 0; band < bands; ++band) {
                uint64_t w[64] = {};
                for (int64_t i = 0; i < least(64, rows - band * 64); ++i) {
                    w[i] = words[(b * blocks + block) * steps + t];
                    if (++t == steps) ++b, t = 0;
                }
                transpose_bits(w);
                for (int64_t lane = 0; lane < kLanes; ++lane)
                    __builtin_memcpy(bits + ((block * kLanes + lane) * bands + band) * 4, w + lane, 8);
            }
        });
    }
};

constexpr int kWeightsAtOnce = 8;  // that share the loads of E

// grad[source] += Σ_m bit m of the weight's lane · E[m], for a lane's list of weights; e[bands · 64].
inline void spike_outer(const WeightList& list, int64_t lane, const RowBits& spikes, const float* e, float* grad) {
    for (int32_t k = list.first[lane], end = list.first[lane + 1]; k < end; k += kWeightsAtOnce) {
        const int count = static_cast<int>(least(kWeightsAtOnce, end - k));
        const uint16_t* bits[kWeightsAtOnce];
        for (int i = 0; i < kWeightsAtOnce; ++i) bits[i] = spikes.of(list.lane[i < count ? k + i : k]);
        Vec sum[kWeightsAtOnce] = {};
        for (int64_t band = 0; band < spikes.bands; ++band)
            for (int half = 0; half < 2; ++half) {
                constexpr int N = 32 / W;
                const float* rows = e + band * kLanes + half * 32;
                unrolled<kWeightsAtOnce>([&](auto i) {
                    const IntVec own = load_bits(bits[i] + band * 4 + half * 2);
                    unrolled<N>([&](auto v) { sum[i] = add_chosen<v>(sum[i], own, load(rows + v * W)); });
                });
            }
        for (int i = 0; i < count; ++i) grad[list.source[k + i]] += sum_of(sum[i]);
    }
}

// The same for a dense side.
inline void dense_outer(const WeightList& list, int64_t lane, const Bands& x, int64_t bands, const float* e, float* grad) {
    for (int32_t k = list.first[lane], end = list.first[lane + 1]; k < end; k += kWeightsAtOnce) {
        const int count = static_cast<int>(least(kWeightsAtOnce, end - k));
        const float* at[kWeightsAtOnce];
        for (int i = 0; i < kWeightsAtOnce; ++i) at[i] = x.at(0, list.lane[i < count ? k + i : k]);
        Vec sum[kWeightsAtOnce] = {};
        for (int64_t band = 0; band < bands; ++band)
            for (int v = 0; v < kVecs; ++v) {
                const Vec y = load(e + band * kLanes + v * W);
                const int64_t here = band * x.lanes * kLanes + v * W;
                unrolled<kWeightsAtOnce>([&](auto i) { sum[i] = fma(load(at[i] + here), y, sum[i]); });
            }
        for (int i = 0; i < count; ++i) grad[list.source[k + i]] += sum_of(sum[i]);
    }
}

}  // namespace g2g::G2G_ISA
