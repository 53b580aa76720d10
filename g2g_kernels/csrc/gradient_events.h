// The input gradient of a layer by events, for neurons through whose reset no gradient passes and that share one β:
//
//   X_t = ∂L/∂x_t = Wᵀ·∂I_t = Wᵀ·e_t + β·X_{t+1},   e_t = σ'(U_t − θ)·∂L/∂S_t
//
// since ∂I_t = e_t + β·∂I_{t+1}, where e of the last step has what reaches the last states, too: the forward product by events in
// reverse, with weights scaled by e; X stays in registers over all T. Scans list e for each block of rows (scan.h). Once per slice those lists are merged into one for each step of each
// sample, in the order of lanes, from which each block of columns copies the parts that have weights there.
#pragma once

#include "events.h"
#include "parallel.h"
#include "scan.h"

namespace g2g::G2G_ISA {

constexpr int64_t kMostEventBlocks = 1023;  // of rows: lanes and events of a step are numbered in 16 bits

// Copies events and moves their lanes by `shift`, `at_once` at a time; may write as many entries more than `count`.
template <int at_once>
inline void copy_events(const uint16_t* lane, const float* value, int64_t count, uint16_t shift, uint16_t* row, float* to) {
    typedef uint16_t Numbers __attribute__((vector_size(2 * at_once)));
    int64_t i = 0;
    do {  // most strips have some events here, and a branch for those that have none would be mispredicted
        Numbers numbers;
        __builtin_memcpy(&numbers, lane + i, sizeof numbers);
        numbers += shift;
        __builtin_memcpy(row + i, &numbers, sizeof numbers);
        __builtin_memcpy(to + i, value + i, at_once * sizeof(float));
        asm("");  // as in copy_values()
        i += at_once;
    } while (i < count);
}

// What the scans of a layer list, for the samples of a slice.
struct EventLists {
    int64_t samples = 0, steps = 0;
    float* value = nullptr;     // [row blocks][samples][T · 64]
    uint64_t* words = nullptr;  // [row blocks][samples][T]

    static constexpr int64_t kSlack = 64;  // entries that are written beyond a list

    EventLists() = default;
    EventLists(int64_t most_blocks, int64_t slice_samples, int64_t T, Arena& arena) : samples(slice_samples), steps(T) {
        value = arena.take<float>(most_blocks * samples * steps * kLanes + kSlack);
        words = arena.take<uint64_t>(most_blocks * samples * steps);
    }

    BlockEvents of(int64_t block, int64_t sample) const {
        const int64_t list = block * samples + sample;
        return {value + list * steps * kLanes, words + list * steps};
    }
};

// The same as one list per step of each sample, sample by sample, the steps downwards; memory for them.
class MergedEvents {
  public:
    MergedEvents() = default;
    MergedEvents(int64_t most_blocks, int64_t samples, int64_t T, int64_t most_events, Arena& arena) : steps(T) {
        constexpr int64_t slack = EventLists::kSlack;
        lane = arena.take<uint16_t>(most_events + samples * slack);
        value = arena.take<float>(most_events + samples * slack);
        begin = arena.take<int64_t>(samples * steps);
        first = arena.take<uint16_t>(samples * steps * (most_blocks * kGranules + 1));
        number = arena.take<int64_t>(samples);
        next = arena.take<int64_t>(samples * most_blocks);
    }

    // Merges what the scans of `of_blocks` blocks listed for the first `samples` samples, unless it is more than `most` events;
    // returns how many they are.
    int64_t merge(const EventLists& lists, int64_t of_blocks, int64_t samples, int64_t most, int threads) {
        blocks = of_blocks;
        parallel(threads, samples, 1, [&](int64_t sample, int) {
            int64_t sum = 0;
            for (int64_t r = 0; r < of_blocks; ++r)
                for (int64_t t = 0; t < lists.steps; ++t) sum += __builtin_popcountll(lists.of(r, sample).words[t]);
            number[sample] = sum;
        });
        int64_t total = 0;
        for (int64_t sample = 0; sample < samples; ++sample) {
            const int64_t place = total + sample * EventLists::kSlack;
            total += number[sample];
            number[sample] = place;
        }
        if (total <= most) parallel(threads, samples, 1, [&](int64_t sample, int) { merge_sample(lists, sample); });
        return total;
    }

    // X of column block `block` for one sample of the slice, out[T][64]; `tiles` as load_tiles<kByCol>() gives them. `row`
    // and `factor` have room for the events of a step, and W more.
    void input_gradient(const Plan& plan, const float* tiles, float decay, int64_t block, int64_t sample, uint16_t* row,
                        float* factor, float* out) const {
        const float* own = tiles + int64_t{plan.col_first[block]} * kTile;
        const int32_t width = plan.event_runs.width;
        if (width == kLanes) return strip_gradients<kLanes>(plan, own, decay, block, sample, row, factor, out);
        if (width == 32) return strip_gradients<32>(plan, own, decay, block, sample, row, factor, out);
        strip_gradients<16>(plan, own, decay, block, sample, row, factor, out);
    }

  private:
    // Strip by strip of L lanes, each with events of its own.
    template <int L>
    void strip_gradients(const Plan& plan, const float* tiles, float decay, int64_t block, int64_t sample, uint16_t* row,
                         float* factor, float* out) const {
        constexpr int strips = kLanes / L, N = L / W, chains = L == kLanes ? 2 : 4;
        const Vec beta = all(decay);
        for (int s = 0; s < strips; ++s, tiles += L, out += L) {
            const EventRun* const runs = plan.event_runs.list.data() + plan.event_runs.first[block * strips + s];
            const int64_t count = plan.event_runs.first[block * strips + s + 1] - plan.event_runs.first[block * strips + s];
            Vec x[N] = {};
            for (int64_t t = steps - 1; t >= 0; --t) {
                const int64_t at = sample * steps + t;
                const uint16_t* starts = first + at * (blocks * kGranules + 1);
                const uint16_t* const lanes = lane + begin[at];
                const float* const values = value + begin[at];
                int64_t size = 0;
                for (int64_t k = 0; k < count; ++k) {
                    const int64_t start = starts[runs[k].first], events = starts[runs[k].last] - start;
                    copy_events<L == kLanes ? 16 : 8>(lanes + start, values + start, events, runs[k].shift, row + size, factor + size);
                    size += events;
                }
                Vec sum[chains][N] = {};  // for speed, and for smaller rounding errors
                each<N>([&](auto v) { sum[0][v] = x[v] * beta; });
                const auto add = [&](auto c, float a, const float* w) {
                    each<N>([&](auto v) { sum[c][v] = fma(all(a), load(w + v * W), sum[c][v]); });
                };
                int64_t e = 0;
                for (; e + chains <= size; e += chains)
                    unrolled<chains>([&](auto c) { add(c, factor[e + c], tiles + int64_t{row[e + c]} * kLanes); });
                if (e < size)  // zeros in place of those that do not exist: a loop over the rest would be mispredicted
                    unrolled<chains>([&](auto c) {
                        const bool exists = e + c < size;
                        add(c, exists ? factor[e + c] : 0.0f, exists ? tiles + int64_t{row[e + c]} * kLanes : kZeros);
                    });
                each<N>([&](auto v) {
                    x[v] = sum[0][v];
                    for (int c = 1; c < chains; ++c) x[v] += sum[c][v];
                    store(out + t * kLanes + v * W, x[v]);
                });
            }
        }
    }
    void merge_sample(const EventLists& lists, int64_t sample) const {
        int64_t at = number[sample];
        int64_t* const from = next + sample * blocks;
        zero(from, blocks * sizeof *from);
        for (int64_t t = steps - 1; t >= 0; --t) {
            const int64_t row = sample * steps + t;
            uint16_t* starts = first + row * (blocks * kGranules + 1);
            int64_t size = 0;
            for (int64_t r = 0; r < blocks; ++r) {
                const BlockEvents list = lists.of(r, sample);
                const uint64_t word = list.words[t];
                int64_t start = size;
                for (int g = 0; g < kGranules; ++g) {
                    *starts++ = static_cast<uint16_t>(start);
                    start += __builtin_popcountll(word >> (g * kGranule) & ((1u << kGranule) - 1));
                }
                const int64_t events = append_bits(lane + at + size, word, r * kLanes);
                copy_values(list.value + from[r], events, value + at + size);
                from[r] += events, size += events;
            }
            *starts = static_cast<uint16_t>(size);
            begin[row] = at;
            at += size;
        }
    }

    int64_t steps = 0, blocks = 0;
    uint16_t* lane = nullptr;
    float* value = nullptr;
    int64_t* begin = nullptr;   // [samples][T] where the events of a step begin
    uint16_t* first = nullptr;  // [samples][T][granules + 1] the first event of each granule
    int64_t* number = nullptr;  // [samples] the events of a sample, then where they begin
    int64_t* next = nullptr;    // [samples][row blocks]
};

}  // namespace g2g::G2G_ISA
