// A convolution of images that are mostly zero, and its gradients, by events: only what is not zero is visited.
//
//   y[o][q]   = b[o] + Σ over taps k, Σ over events (c, p) with p = q·stride − padding + k·dilation:  x[c][p] · w[o][c][k]
//   ∂x[c][p]  = the same of the events of ∂y, with the taps that lead from p to q
//   ∂w[o][c][k] = Σ over events (c, p) of x:  x[c][p] · ∂y[o][q]
//
// The first two are one kernel (gather()): of a place of the result it visits the windows of the other image, a run of events for
// each row of the kernel, since events are listed row by row. The sums of a strip of channels stay in registers. For the third
// (scatter()) events are sorted by channel, and the sums of three taps of a strip stay in registers over all events of a
// channel; ∂y lies in a frame with a border of zeros, so that no tap has to be checked.
//
// Images are divided into groups of channels, each a convolution of its own. Where an image is not sparse enough for events to
// be faster than a dense product, nothing is computed, and the caller is told so.
#pragma once

#include <numeric>

#include "events.h"
#include "interface.h"
#include "parallel.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// Along one axis, which places of the source each place of the target reads: `count` of them from `source` on, `step` apart,
// times the weights from `slot` on. Slots number the taps so that those of a place follow one another.
struct Windows {
    int32_t *source, *count, *slot;  // [targets]
    int32_t *tap;                    // [kernel] of a slot
    int32_t *begin;                  // [targets] the source of the first slot of the place's class, inside the image or not
    int32_t *kind;                   // [targets] the class: −1 where no tap leads to
    int32_t *first;                  // [classes + 1] the first slot of each class
    int64_t targets, sources, kernel, stride, reach, classes, step;
    bool back;

    // Of the outputs (targets) of a convolution, or (`back`) of its inputs.
    Windows(int64_t inputs, int64_t outputs, int64_t taps, int64_t apart_by, int64_t padding, int64_t dilation, bool backward,
            Arena& arena)
        : targets(backward ? inputs : outputs),
          sources(backward ? outputs : inputs),
          kernel(taps),
          stride(apart_by),
          reach((taps - 1) * dilation),
          back(backward) {
        int64_t common = stride, other = dilation;
        while (other) other = std::exchange(common, other) % other;
        const int64_t apart = back ? stride / common : 1;  // taps of a class
        step = back ? dilation / common : dilation;
        classes = least(apart, kernel);
        for (int32_t** of_target : {&source, &count, &slot, &begin, &kind}) *of_target = arena.take<int32_t>(targets);
        tap = arena.take<int32_t>(kernel);
        first = arena.take<int32_t>(classes + 1);
        if (!arena.base) return;
        int32_t slots = 0;
        for (int64_t c = 0; c < classes; ++c) {
            first[c] = slots;
            // sources ascend: with the tap forward, against it backward
            const int64_t of_class = (kernel - 1 - c) / apart + 1;
            for (int64_t i = 0; i < of_class; ++i) tap[slots++] = static_cast<int32_t>(c + (back ? of_class - 1 - i : i) * apart);
        }
        first[classes] = slots;
        for (int64_t t = 0; t < targets; ++t) {
            kind[t] = -1, count[t] = 0, source[t] = 0, slot[t] = 0, begin[t] = 0;
            for (int64_t c = 0; c < classes && kind[t] < 0; ++c) {
                const int64_t at = back ? t + padding - tap[first[c]] * dilation : t * stride - padding;
                if (back && at % stride != 0) continue;
                kind[t] = static_cast<int32_t>(c), begin[t] = static_cast<int32_t>(back ? at / stride : at);
                for (int32_t s = first[c]; s < first[c + 1]; ++s) {
                    const int64_t of = begin[t] + (s - first[c]) * step;
                    if (of < 0 || of >= sources) continue;
                    if (!count[t]++) source[t] = static_cast<int32_t>(of), slot[t] = s;
                }
            }
        }
    }

    // How many sources `places` targets in a row read at most, were the image without an end.
    int64_t span(int64_t places) const {
        return back ? (places - 1) / stride + reach / stride + 3 : (places - 1) * stride + reach + 1;
    }

    // How many pairs of a target and a tap there are.
    int64_t pairs() const { return std::accumulate(count, count + targets, int64_t{0}); }
};

// Some images of one size, their channels in groups.
struct Images {
    int64_t channels, groups, height, width, count;
    bool last;  // channels last in memory
    int64_t of_group = channels / groups;
    int64_t words = divide_up(of_group, kLanes);  // of a pixel's bits
    int64_t pixels = height * width;
    int64_t floats = channels * pixels;  // of an image

    // Where a number is in an image.
    int64_t at(int64_t pixel, int64_t channel) const { return last ? pixel * channels + channel : channel * pixels + pixel; }

    // out[x − from][0 … n − 1] = the channels from c on of a row, for pixels from … to − 1; pixels of `out` are `stride` apart.
    void load_row(const float* image, int64_t y, int64_t c, int64_t n, int64_t from, int64_t to, float* out, int64_t stride) const {
        const auto copy = [](const float* p, float* row, int64_t count) { __builtin_memcpy(row, p, count * sizeof(float)); };
        const auto turn = [&](const float* p, float* row) { transpose_16(p, pixels, row, stride); };
        each_piece(image + at(y * width + from, c), n, to - from, out, stride, copy, turn);
    }

    // The inverse, for a whole row.
    void store_row(float* image, int64_t y, int64_t c, int64_t n, const float* from, int64_t stride) const {
        const auto copy = [](float* p, const float* row, int64_t count) { __builtin_memcpy(p, row, count * sizeof(float)); };
        const auto turn = [&](float* p, const float* row) { transpose_16(row, stride, p, pixels); };
        each_piece(image + at(y * width, c), n, width, from, stride, copy, turn);
    }

private:
    // Of n channels of `count` pixels from p on and row[pixel][stride]: copy() of what follows one another in both, else turn() of
    // squares of 16 and copy() of single numbers.
    template <class P, class R, class Copy, class Turn>
    void each_piece(P* p, int64_t n, int64_t count, R* row, int64_t stride, const Copy& copy, const Turn& turn) const {
        if (last && n == channels && n == stride) return copy(p, row, count * n);
        for (int64_t x = 0; last && x < count; ++x) copy(p + x * channels, row + x * stride, n);
        if (last) return;
        const int64_t wide = count / 16 * 16, deep = n / 16 * 16;
        for (int64_t x = 0; x < wide; x += 16)
            for (int64_t i = 0; i < deep; i += 16) turn(p + i * pixels + x, row + x * stride + i);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t x = i < deep ? wide : 0; x < count; ++x) copy(p + i * pixels + x, row + x * stride + i, 1);
    }
};

// Which numbers of images are not zero: bits [image][pixel][group][words], how many there are, and which images have others
// than 1 among them.
struct Events {
    const Images& of;
    const float* x;
    uint64_t* bits;
    int64_t* counts;
    uint8_t* valued;

    Events(const Images& images, const float* numbers, Arena& arena)
        : of(images),
          x(numbers),
          bits(arena.take<uint64_t>(images.count * images.pixels * images.groups * images.words)),
          counts(arena.take<int64_t>(images.count)),
          valued(arena.take<uint8_t>(images.count)) {}

    // Those of spikes, whose bits are known.
    Events(const Images& images, uint64_t* spikes, Arena& arena)
        : of(images), x(nullptr), bits(spikes), counts(arena.take<int64_t>(images.count)), valued(arena.take<uint8_t>(images.count)) {
        if (arena.base) zero(valued, images.count);
    }

    uint64_t* pixel(int64_t image, int64_t p, int64_t group) const {
        return bits + ((image * of.pixels + p) * of.groups + group) * of.words;
    }

    // The share of numbers that are not zero, of a few thousand, or of those of a few thousand words.
    double sampled_rate() const {
        constexpr int64_t kRuns = 32, kLength = 128;
        const int64_t size = of.count * (x ? of.floats : of.pixels * of.groups * of.words);
        const int64_t length = least(size, kLength), runs = least(kRuns, size / length);
        int64_t found = 0;
        for (int64_t i = 0; i < runs; ++i) {
            const int64_t first = runs > 1 ? (size - length) / (runs - 1) * i : 0;
            for (int64_t k = first; k < first + length; ++k) found += x ? x[k] != 0.0f : __builtin_popcountll(bits[k]);
        }
        const int64_t numbers = x ? runs * length : divide_up(runs * length * of.of_group, of.words);
        return static_cast<double>(found) / static_cast<double>(numbers);
    }

    // Finds all; returns how many.
    int64_t find(int threads) const {
        parallel(threads, of.count, 1, [&](int64_t image, int) { find_image(image); });
        return count(threads);
    }

    // Those of an image.
    void find_image(int64_t image) const {
        bool others = false;
        const float* from = x + image * of.floats;
        for (int64_t g = 0; g < of.groups; ++g) others |= of.last ? find_last(from, image, g) : find_first(from, image, g);
        valued[image] = others;
    }

    // How many there are.
    int64_t count(int threads) const {
        parallel(threads, of.count, 1, [&](int64_t image, int) {
            int64_t found = 0;
            const uint64_t* w = pixel(image, 0, 0);
            for (int64_t i = 0; i < of.pixels * of.groups * of.words; ++i) found += __builtin_popcountll(w[i]);
            counts[image] = found;
        });
        return std::accumulate(counts, counts + of.count, int64_t{0});
    }

private:
    // The bits of n ≤ 64 numbers that follow one another; sets `others` where one is neither 0 nor 1.
    static G2G_INLINE uint64_t word(const float* p, int64_t n, uint64_t& others) {
        uint64_t bits = 0;
        const auto of_vec = [&](int64_t i) {
            const Vec v = load(p + i);
            const uint64_t found = nonzero_bits(v);
            bits |= found << i;
            others |= found & nonzero_bits(v - all(1.0f));
        };
        if (n == kLanes) {
            unrolled<kVecs>([&](auto v) { of_vec(v * W); });
            return bits;
        }
        int64_t i = 0;
        for (; i + W <= n; i += W) of_vec(i);
        for (; i < n; ++i) {
            const bool found = p[i] != 0.0f;
            bits |= static_cast<uint64_t>(found) << i;
            others |= found & (p[i] != 1.0f);
        }
        return bits;
    }

    bool find_last(const float* from, int64_t image, int64_t g) const {
        uint64_t others = 0;
        for (int64_t p = 0; p < of.pixels; ++p) {
            const float* channels = from + p * of.channels + g * of.of_group;
            uint64_t* out = pixel(image, p, g);
            for (int64_t w = 0; w < of.words; ++w)
                out[w] = word(channels + w * kLanes, least(kLanes, of.of_group - w * kLanes), others);
        }
        return others;
    }

    bool find_first(const float* from, int64_t image, int64_t g) const {
        constexpr int64_t kFew = 8;  // channels whose bits are moved one by one
        uint64_t others = 0, square[kLanes];
        for (int64_t w = 0; w < of.words; ++w) {
            const int64_t channels = least(kLanes, of.of_group - w * kLanes);
            const float* rows = from + (g * of.of_group + w * kLanes) * of.pixels;
            for (int64_t p = 0; p < of.pixels; p += kLanes) {
                const int64_t n = least(kLanes, of.pixels - p);
                if (channels <= kFew) {
                    for (int64_t i = 0; i < n; ++i) pixel(image, p + i, g)[w] = 0;
                    for (int64_t c = 0; c < channels; ++c)
                        for (uint64_t left = word(rows + c * of.pixels + p, n, others); left; left &= left - 1)
                            pixel(image, p + __builtin_ctzll(left), g)[w] |= uint64_t{1} << c;
                    continue;
                }
                for (int64_t c = 0; c < kLanes; ++c) square[c] = c < channels ? word(rows + c * of.pixels + p, n, others) : 0;
                transpose_bits(square);
                for (int64_t i = 0; i < n; ++i) pixel(image, p + i, g)[w] = square[i];
            }
        }
        return others;
    }
};

// The events of some rows of one group of an image, row by row: number x · channels + c of each, and its value.
struct EventRows {
    uint16_t* places;
    float* values;
    int32_t* starts;  // [rows][width + 1]
    int64_t first;    // the first row

    EventRows() = default;
    static int64_t room(const Images& of, int64_t rows) { return rows * of.width * of.of_group + kLanes; }  // what is read and written past the end, too

    EventRows(const Images& of, int64_t rows, int64_t workers, Arena& arena)
        : places(arena.take<uint16_t>(workers * room(of, rows))),
          values(arena.take<float>(workers * room(of, rows))),
          starts(arena.take<int32_t>(workers * rows * (of.width + 1))),
          first(0) {}

    // Those of a worker, of the rows y … y + rows − 1; room for `most` was made.
    EventRows(const EventRows& all, const Events& events, int64_t image, int64_t g, int64_t y, int64_t rows, int64_t most, int64_t worker)
        : places(all.places + worker * room(events.of, most)),
          values(all.values + worker * room(events.of, most)),
          starts(all.starts + worker * most * (events.of.width + 1)),
          first(y) {
        const Images& of = events.of;
        const bool valued = events.valued[image];
        int32_t n = 0;
        int32_t* start = starts;
        for (int64_t r = y; r < y + rows; ++r) {
            for (int64_t x = 0; x < of.width; ++x) {
                *start++ = n;
                const int64_t p = r * of.width + x;
                const uint64_t* bits = events.pixel(image, p, g);
                for (int64_t w = 0; w < of.words; ++w) {
                    const int32_t before = n;
                    n += append_bits(places + n, bits[w], x * of.of_group + w * kLanes);
                    if (!valued || n == before) continue;
                    const float* from = events.x + image * of.floats + of.at(p, g * of.of_group + w * kLanes);
                    load_values(from, of.last ? 1 : of.pixels, bits[w], of.of_group - w * kLanes, values + before);
                }
            }
            *start++ = n;
        }
    }
    const int32_t* row(int64_t y, int64_t width) const { return starts + (y - first) * (width + 1); }

private:
    // The numbers of a word's set bits, which are `apart` in memory and no more than n; may write W more.
    static void load_values(const float* from, int64_t apart, uint64_t bits, int64_t n, float* to) {
        if (apart == 1 && n >= kLanes) {
            unrolled<kVecs>([&](auto v) {
                const uint64_t of_vec = bits >> (v * W) & ((uint64_t{1} << W) - 1);
                store_chosen(to, load(from + v * W), of_vec);
                to += __builtin_popcountll(of_vec);
            });
            return;
        }
        for (; bits; bits &= bits - 1) *to++ = from[__builtin_ctzll(bits) * apart];
    }
};

// The channels of a group's result in strips of 1, 2, 4 or 8 vectors.
constexpr int kMostVecs = 8;
template <class F>
void each_strip(int most, int64_t channels, const F& f) {
    int64_t left = divide_up(channels, W), first = 0;
    while (left) {
        int vecs = most;
        while (vecs > left) vecs /= 2;
        f(first * W, vecs);
        first += vecs, left -= vecs;
    }
}
// f of a strip of `vecs` vectors.
template <int most, class F>
void with_vecs(int vecs, const F& f) {
    if constexpr (most == 8)
        if (vecs == 8) return f(Constant<8>{});
    if (vecs == 4) return f(Constant<4>{});
    if (vecs == 2) return f(Constant<2>{});
    f(Constant<1>{});
}

// Cycles as measured on a Zen 4 with AVX-512: of the addition of a vector, from an L1 cache or from L2, and what an event costs
// besides; of a run of events, whose end is mispredicted; of visiting an event for up to three taps; per number, of finding out
// whether it is zero, of writing it, of copying it into a frame, and of making a float of a bit. And how many multiplications a
// dense product does in one.
constexpr double kAddition = 1.5, kFarAddition = 2.2, kEvent = 1.0, kRun = 18.0, kVisit = 8.0;
constexpr double kFound = 0.7, kWritten = 1.0, kFramed = 2.0, kUnpacked = 1.5, kDense = 13.0;
// Events are chosen where they should take less than this share of the dense time; where they have been found, as a sample
// promised, up to so much more.
constexpr double kWorthwhile = 0.9, kOnceFound = 1.1;

// What a product of source and target channels in `pairs` of places costs.
struct ProductCost {
    double events, dense;   // by events, at a rate of these, and an expense for each image; by the dense product
    double found, written;  // finding the events in numbers; writing the result

    ProductCost(double rate, int64_t pairs, double addition, double each, double expense, const Images& sources, const Images& targets) {
        const double of_source = static_cast<double>(sources.of_group), of_target = static_cast<double>(targets.of_group);
        const double vecs = static_cast<double>(divide_up(targets.of_group, W)), places = static_cast<double>(pairs);
        events = rate * places * of_source * (vecs * addition + each) + expense;
        dense = places * of_source * vecs * W / kDense;  // in whole vectors, too
        found = static_cast<double>(sources.pixels) * of_source * kFound;
        written = static_cast<double>(targets.pixels) * of_target * kWritten;
    }
    // Of numbers to numbers, events in relation to the dense product.
    double relative() const { return (events + found + written) / ((dense + written) * kWorthwhile); }
    // In a layer, where events are known, and what only a dense product takes or gives is written, put in another order and read; it
    // takes bits as floats.
    double relative_in_layer(double bits) const { return events / ((dense + found + 3 * written + bits * kUnpacked) * kWorthwhile); }
};

// Weights by a row of a kernel and strips of 32 channels, which stay in an L1 cache: where all weights do not, and there are so
// many events that it pays, or weights exceed L2.
constexpr int kSliceVecs = 32 / W < 1 ? 1 : 32 / W;
constexpr int64_t kL1Floats = 3 << 13, kL2Floats = 1 << 17, kL1Weights = 1 << 14;  // of all weights; kL1Weights: of a slice
constexpr double kSliceRate = 0.12;
constexpr int64_t kStreamed = 1 << 20;  // floats of results that are in no cache when they are read

// What gather() computes: targets from the events of sources, with weights [group][strip][slot of row][slot of column][source
// channel][channels of the strip].
struct Gather {
    const Windows &rows, &columns;
    const Images &sources, &targets;
    float* out;
    int64_t slices = 1;

    int vecs() const { return slices == 1 ? kMostVecs : kSliceVecs; }
    int64_t taps() const { return rows.kernel * columns.kernel; }
    void choose_slices(double rate) {
        if (group_floats() > (rate > kSliceRate ? kL1Floats : kL2Floats)) slices = rows.kernel;
    }
    ProductCost cost(double rate) const {
        const double runs = static_cast<double>(rows.pairs() * targets.width * (columns.step == 1 ? 1 : columns.kernel));
        const bool far = columns.kernel * sources.of_group * kSliceVecs * W > kL1Weights;
        return {rate, rows.pairs() * columns.pairs(), far ? kFarAddition : kAddition, kEvent, runs * kRun, sources, targets};
    }
    int64_t group_floats() const { return divide_up(targets.of_group, W) * W * taps() * sources.of_group; }
};

// sum += Σ over n events: value · weights[place], in several chains where N vectors are too few to hide the time of an addition.
template <int N, bool valued, int chains>
G2G_INLINE void add_events(const uint16_t* places, const float* values, int64_t n, const float* weights, Vec (&sum)[chains][N]) {
    const auto add = [&](int64_t i, auto c) {
        const float* w = weights + int64_t{places[i]} * (N * W);
        if constexpr (valued) {
            const Vec value = all(values[i]);
            unrolled<N>([&](auto v) { sum[c][v] = fma(value, load(w + v * W), sum[c][v]); });
        } else {
            unrolled<N>([&](auto v) { sum[c][v] += load(w + v * W); });
        }
    };
    int64_t i = 0;
    if constexpr (chains > 1)
        for (; i + chains <= n; i += chains) unrolled<chains>([&](auto c) { add(i + c, c); });
    for (; i < n; ++i) add(i, Constant<0>{});
}

// Rows of a kernel that gather() knows.
constexpr int kMostTaps = 64;

// Row y of the targets: the windows of the rows `begin` … `end` − 1 that it reads, times the weights of a strip of N vectors, on
// top of the bias or, where there were others before, of what is there. To out[x · stride].
template <int N, bool valued>
void gather_row(const Gather& a, const EventRows& events, int64_t y, int64_t begin, int64_t end, const float* weights,
                const float* bias, float* out, int64_t stride, bool streamed) {
    constexpr int chains = N >= 4 ? 1 : 4 / N;
    const int64_t tap = a.sources.of_group * N * W, rows = end - begin, step = a.columns.step;  // tap: its weights
    const int32_t* starts[kMostTaps];
    for (int64_t r = 0; r < rows; ++r) starts[r] = events.row(a.rows.source[y] + (begin + r) * a.rows.step, a.sources.width);
    const int64_t of_row = a.columns.kernel * tap;
    weights += (a.rows.slot[y] + begin) * of_row;
    for (int64_t x = 0; x < a.targets.width; ++x, out += stride) {
        Vec sum[chains][N];
        unrolled<N>([&](auto v) { sum[0][v] = load((begin ? out : bias) + v * W); });
        unrolled<chains - 1>([&](auto c) { unrolled<N>([&](auto v) { sum[c + 1][v] = Vec{}; }); });
        const int64_t from = a.columns.source[x], count = a.columns.count[x];
        const float* w = weights + (a.columns.slot[x] - from) * tap;
        for (int64_t r = 0; r < rows; ++r, w += of_row) {
            const int32_t* start = starts[r] + from;
            const auto add = [&](int32_t first, int32_t end, const float* of_run) {
                add_events<N, valued, chains>(events.places + first, events.values + first, end - first, of_run, sum);
            };
            if (step == 1)
                add(start[0], start[count], w);
            else
                for (int64_t k = 0; k < count; ++k) add(start[k * step], start[k * step + 1], w + (k - k * step) * tap);
        }
        unrolled<N>([&](auto v) {
            Vec total = sum[0][v];
            unrolled<chains - 1>([&](auto c) { total += sum[c + 1][v]; });
            if (streamed)
                stream(out + v * W, total);
            else
                store(out + v * W, total);
        });
    }
}

// Rows of sources that are listed at a time: so many events of a full image stay in an L2 cache.
constexpr int64_t kListed = 1 << 17;

// Small images of a task, which reads its weights once for all of them: so many that they have this many pixels together.
constexpr int64_t kPixelsTogether = 1024;
constexpr int kMostTogether = 16;

struct GatherBuffers {
    int64_t together, band, tallest;  // images and rows of targets of a task, and rows of sources that one needs at most
    EventRows lists;
    int64_t of_rows;  // floats of `rows`, a strip of a band
    float *weights, *bias, *rows;

    GatherBuffers(const Gather& a, int threads, Arena& arena)
        : GatherBuffers(a, most(1, least(least(kPixelsTogether / a.targets.pixels, kMostTogether), a.targets.count / (4 * threads))),
                        band_of(a, divide_up(4 * threads, most(1, a.targets.count))), threads, arena) {}

    GatherBuffers(const Gather& a, int64_t images, int64_t rows_of_task, int threads, Arena& arena)
        : together(images),
          band(rows_of_task),
          tallest(least(a.sources.height, a.rows.span(band))),
          lists(a.sources, tallest, threads * together, arena),
          of_rows(together * band * a.targets.width * kMostVecs * W),
          weights(arena.take<float>(a.group_floats() * a.targets.groups)),
          bias(arena.take<float>(a.targets.groups * divide_up(a.targets.of_group, W) * W)),
          rows(arena.take<float>(threads * of_rows)) {}

    // The rows of targets in a task: few enough for `tasks` tasks of an image, and for the events of the rows that it reads to
    // stay in L2.
    static int64_t band_of(const Gather& a, int64_t tasks) {
        int64_t band = divide_up(a.targets.height, tasks);
        while (band > 1 && a.rows.span(band) * a.sources.width * a.sources.of_group > kListed) band = divide_up(band, 2);
        return band;
    }

    // The rows of sources that targets first … end − 1 read.
    static int64_t sources_of(const Windows& rows, int64_t first, int64_t end, int64_t& lowest) {
        int64_t low = rows.sources, high = 0;
        for (int64_t y = first; y < end; ++y)
            if (rows.count[y]) {
                low = least(low, rows.source[y]);
                high = most(high, rows.source[y] + (rows.count[y] - 1) * rows.step + 1);
            }
        lowest = least(low, high);
        return high - lowest;
    }
};

// The rows begin … end − 1 of some images from their lists, a strip of `vecs` vectors: in one pass over the rows of a kernel; or in
// `slices` of one row, with few weights, where there are many events. Sums go to place(image, y), pixels `stride` apart;
// finished(image, y) follows.
template <class Place, class Finished>
void gather_strip(const Gather& a, const EventRows* lists, const uint8_t* const* valued, int64_t images, int64_t begin, int64_t end,
                  int vecs, const float* weights, const float* bias, int64_t stride, bool streamed, const Place& place,
                  const Finished& finished) {
    with_vecs<kMostVecs>(vecs, [&](auto N) {
        const auto run = [&](int64_t slice, int64_t i, int64_t y) {
            const int64_t count = a.rows.count[y], after = a.slices == 1 ? count : least(slice + 1, count);
            const auto row = *valued[i] ? gather_row<N, true> : gather_row<N, false>;
            if (slice == 0 || slice < count) row(a, lists[i], y, slice, after, weights, bias, place(i, y), stride, streamed);
        };
        for (int64_t slice = 0; slice + 1 < a.slices; ++slice)
            for (int64_t i = 0; i < images; ++i)
                for (int64_t y = begin; y < end; ++y) run(slice, i, y);
        for (int64_t y = begin; y < end; ++y)
            for (int64_t i = 0; i < images; ++i) {
                run(a.slices - 1, i, y);
                finished(i, y);
            }
    });
}

inline void gather(const Gather& a, const Events& events, const GatherBuffers& buffers, int threads) {
    const int64_t bands = divide_up(a.targets.height, buffers.band), of_bias = divide_up(a.targets.of_group, W) * W;
    const bool streamed = a.targets.floats * a.targets.count > kStreamed && a.slices == 1;
    parallel_pairs(threads, divide_up(a.targets.count, buffers.together), bands, 1, [&](int64_t group, int64_t part, int worker) {
        const int64_t begin = part * buffers.band, end = least(a.targets.height, begin + buffers.band);
        const int64_t first_image = group * buffers.together, images = least(buffers.together, a.targets.count - first_image);
        int64_t lowest;
        const int64_t rows = GatherBuffers::sources_of(a.rows, begin, end, lowest);
        EventRows lists[kMostTogether];
        const uint8_t* valued[kMostTogether];
        for (int64_t g = 0; g < a.targets.groups; ++g) {
            for (int64_t i = 0; i < images; ++i) {
                lists[i] = {buffers.lists, events, first_image + i, g, lowest, rows, buffers.tallest, worker * buffers.together + i};
                valued[i] = events.valued + first_image + i;
            }
            each_strip(a.vecs(), a.targets.of_group, [&](int64_t first, int vecs) {
                const float* weights = buffers.weights + g * a.group_floats() + first * a.taps() * a.sources.of_group;
                const float* bias = buffers.bias + g * of_bias + first;
                const int64_t channel = g * a.targets.of_group + first, n = least(vecs * W, a.targets.of_group - first);
                const bool direct = a.targets.last && n == vecs * W;
                const int64_t stride = direct ? a.targets.channels : vecs * W, of_row = a.targets.width * stride;
                float* const buffer = buffers.rows + worker * buffers.of_rows;
                const auto place = [&](int64_t i, int64_t y) {
                    return direct ? a.out + (first_image + i) * a.targets.floats + y * of_row + channel
                                  : buffer + (i * buffers.band + y - begin) * of_row;
                };
                gather_strip(a, lists, valued, images, begin, end, vecs, weights, bias, stride, streamed && direct, place,
                             [&](int64_t i, int64_t y) {
                                 float* const image = a.out + (first_image + i) * a.targets.floats;
                                 if (!direct) a.targets.store_row(image, y, channel, n, place(i, y), stride);
                             });
            });
        }
        if (streamed) stream_fence();
    });
}

// The weights in the order of gather(), 0 in the lanes of no channel. `back`: targets are the inputs of the convolution.
inline void load_kernels(const Gather& a, const float* weight, bool back, int threads, float* to) {
    const int64_t taps = a.taps(), of_group = (back ? a.targets : a.sources).of_group;  // inputs of an output
    parallel_pairs(threads, a.targets.groups, taps, 1, [&](int64_t g, int64_t s, int) {
        const int64_t tap = int64_t{a.rows.tap[s / a.columns.kernel]} * a.columns.kernel + a.columns.tap[s % a.columns.kernel];
        each_strip(a.vecs(), a.targets.of_group, [&](int64_t first, int vecs) {
            const int64_t wide = int64_t{vecs} * W;
            float* out = to + g * a.group_floats() + (first * taps + s * wide) * a.sources.of_group;
            for (int64_t c = 0; c < a.sources.of_group; ++c)
                for (int64_t t = first; t < first + wide; ++t) {
                    const int64_t output = back ? g * a.sources.of_group + c : g * a.targets.of_group + t;
                    *out++ = t < a.targets.of_group ? weight[(output * of_group + (back ? t : c)) * taps + tap] : 0.0f;
                }
        });
    });
}

// The bias by strips, 0 in the lanes of no channel; null: none.
inline void load_bias(const Gather& a, const float* bias, float* to) {
    for (int64_t g = 0; g < a.targets.groups; ++g)
        for (int64_t i = 0; i < divide_up(a.targets.of_group, W) * W; ++i)
            *to++ = bias && i < a.targets.of_group ? bias[g * a.targets.of_group + i] : 0.0f;
}

// --- the gradient of the weights --------------------------------------------------------------------------------------------

// Pixels of inputs whose events are sorted at a time: of several small images, or of some rows of a large one.
constexpr int64_t kSorted = 2048, kSortedEvents = 1 << 18;

struct Scatter {
    const Windows &rows, &columns;  // of the inputs
    const Images &inputs, &outputs;
    const float* grad_y;
    int64_t kinds = rows.classes * columns.classes;
    int64_t padded = divide_up(outputs.of_group, W) * W;               // lanes of a group's outputs
    int64_t taps = rows.kernel * columns.kernel;
    int64_t size = inputs.groups * inputs.of_group * taps * padded;    // floats of the sums, [group][input][slots][output]

    // Images of a chunk, or rows of an image.
    int64_t sorted = most(1, least(kSorted, kSortedEvents / inputs.of_group));
    int64_t together = most(1, least(inputs.count, sorted / inputs.pixels));
    int64_t band = inputs.pixels <= sorted ? inputs.height : most(1, sorted / inputs.width);
    int64_t chunks = divide_up(inputs.count, together) * divide_up(inputs.height, band);

    // Sums that are added in the end. How many there are does not depend on the threads.
    int64_t parts = least(chunks, least(16, 4 + (int64_t{16} << 20) / (size * 4)));

    ProductCost cost(double rate) const {
        const int64_t copied = rows.span(inputs.height) * columns.span(inputs.width) * padded;
        return {rate, rows.pairs() * columns.pairs(), kAddition, kVisit / static_cast<double>(least(3, columns.kernel)),
                static_cast<double>(copied) * kFramed, inputs, outputs};
    }
};

// sums[k][0 … N·W − 1] += Σ over events: value · frame[place + k · step], for K taps of a row.
template <int N, int K, bool valued>
void sum_taps(const int32_t* places, const float* values, int64_t n, const float* frame, int64_t step, int64_t padded, float* sums) {
    Vec acc[K][N];
    unrolled<K>([&](auto k) { unrolled<N>([&](auto v) { acc[k][v] = Vec{}; }); });
    for (int64_t i = 0; i < n; ++i) {
        const float* p = frame + int64_t{places[i]} * padded;
        unrolled<K>([&](auto k) {
            unrolled<N>([&](auto v) {
                const Vec x = load(p + k * step + v * W);
                if constexpr (valued)
                    acc[k][v] = fma(all(values[i]), x, acc[k][v]);
                else
                    acc[k][v] += x;
            });
        });
    }
    unrolled<K>([&](auto k) {
        unrolled<N>([&](auto v) {
            float* to = sums + k * padded + v * W;
            store(to, load(to) + acc[k][v]);
        });
    });
}

struct ScatterBuffers {
    int64_t wide, tall, room;  // of the frame of an image, and events of a channel and a class
    float *sums, *frames, *values;
    int32_t *places, *counts;

    ScatterBuffers(const Scatter& a, int64_t width, int64_t height, int threads, Arena& arena)
        : wide(width),
          tall(height),
          room(a.together * a.band * a.inputs.width),
          sums(arena.take<float>(a.parts * a.size)),
          frames(arena.take<float>(threads * frame_floats(a))),
          values(arena.take<float>(threads * room * a.inputs.of_group * a.kinds)),
          places(arena.take<int32_t>(threads * room * a.inputs.of_group * a.kinds)),
          counts(arena.take<int32_t>(threads * a.inputs.of_group * a.kinds)) {}

    int64_t frame_floats(const Scatter& a) const { return a.together * tall * wide * a.padded; }
};

// The first place on an axis that some targets read, inside the image or not.
inline int64_t lowest_of(const Windows& of, int64_t first, int64_t end) {
    int64_t low = int64_t{1} << 40;
    for (int64_t t = first; t < end; ++t)
        if (of.kind[t] >= 0) low = least(low, of.begin[t]);
    return low;
}

// The sums of one chunk: images … of the rows y … of the inputs.
struct Chunk {
    const Scatter& a;
    const Events& events;
    const ScatterBuffers& buffers;
    int64_t image, images, y, end;
    int worker;
    int64_t left = lowest_of(a.columns, 0, a.columns.targets), top = lowest_of(a.rows, y, end);
    float* frame = buffers.frames + worker * buffers.frame_floats(a);
    float* values = buffers.values + worker * buffers.room * a.inputs.of_group * a.kinds;
    int32_t* places = buffers.places + worker * buffers.room * a.inputs.of_group * a.kinds;
    int32_t* counts = buffers.counts + worker * a.inputs.of_group * a.kinds;

    // ∂y of a group, with a border of zeros.
    void fill_frame(int64_t g) const {
        const Images& of = a.outputs;
        float* row = frame;
        for (int64_t k = 0; k < images; ++k)
            for (int64_t r = top; r < top + buffers.tall; ++r, row += buffers.wide * a.padded) {
                const int64_t from = most(0, left), to = least(of.width, left + buffers.wide);  // what the frame has of a row
                zero(row, buffers.wide * a.padded * sizeof(float));
                if (r < 0 || r >= of.height || from >= to) continue;
                of.load_row(a.grad_y + (image + k) * of.floats, r, g * of.of_group, of.of_group, from, to,
                            row + (from - left) * a.padded, a.padded);
            }
    }

    // Sorts the events of a group by channel and class; returns whether their values are other than 1.
    bool sort(int64_t g) const {
        const Images& of = a.inputs;
        bool valued = false;
        for (int64_t k = 0; k < images; ++k) valued |= events.valued[image + k];
        zero(counts, of.of_group * a.kinds * sizeof(int32_t));
        for (int64_t k = 0; k < images; ++k)
            for (int64_t r = y; r < end; ++r) {
                if (a.rows.kind[r] < 0) continue;
                const int64_t row = (k * buffers.tall + a.rows.begin[r] - top) * buffers.wide - left, room = buffers.room;
                const int64_t kind_of_row = a.rows.kind[r] * a.columns.classes, kinds = a.kinds, words = of.words;
                const uint64_t* bits = events.pixel(image + k, r * of.width, g);
                for (int64_t x = 0; x < of.width; ++x, bits += of.groups * words) {
                    if (a.columns.kind[x] < 0) continue;
                    const int64_t kind = kind_of_row + a.columns.kind[x];
                    const int32_t place = static_cast<int32_t>(row + a.columns.begin[x]);
                    for (int64_t w = 0; w < words; ++w)
                        for (uint64_t word = bits[w]; word; word &= word - 1) {
                            const int64_t c = w * kLanes + __builtin_ctzll(word), key = c * kinds + kind;
                            const int64_t at = key * room + counts[key]++;
                            places[at] = place;
                            if (valued) values[at] = events.x[(image + k) * of.floats + of.at(r * of.width + x, g * of.of_group + c)];
                        }
                }
            }
        return valued;
    }

    template <int N, bool valued>
    void add_strip(int64_t key, const float* strip, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                   float* sums) const {
        const int32_t* of_key = places + key * buffers.room;
        const float* with = values + key * buffers.room;
        const int64_t n = counts[key], step = a.columns.step * a.padded;
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = strip + r * a.rows.step * buffers.wide * a.padded;
            float* to = sums + ((first_row + r) * a.columns.kernel + first_column) * a.padded;
            int64_t k = 0;
            for (; k + 3 <= columns; k += 3) sum_taps<N, 3, valued>(of_key, with, n, row + k * step, step, a.padded, to + k * a.padded);
            if (columns - k == 2) sum_taps<N, 2, valued>(of_key, with, n, row + k * step, step, a.padded, to + k * a.padded);
            if (columns - k == 1) sum_taps<N, 1, valued>(of_key, with, n, row + k * step, step, a.padded, to + k * a.padded);
        }
    }

    // Adds what the events of a group find in the frame.
    void add_group(int64_t g, float* sums) const {
        const bool valued = sort(g);
        for (int64_t c = 0; c < a.inputs.of_group; ++c)
            for (int64_t kind = 0; kind < a.kinds; ++kind) {
                const int64_t key = c * a.kinds + kind, row = kind / a.columns.classes, column = kind % a.columns.classes;
                if (!counts[key]) continue;
                float* of_channel = sums + (g * a.inputs.of_group + c) * a.taps * a.padded;
                const int64_t rows = a.rows.first[row + 1] - a.rows.first[row];
                const int64_t columns = a.columns.first[column + 1] - a.columns.first[column];
                each_strip(4, a.outputs.of_group, [&](int64_t first, int vecs) {
                    with_vecs<4>(vecs, [&](auto N) {
                        const auto add = valued ? &Chunk::add_strip<N, true> : &Chunk::add_strip<N, false>;
                        (this->*add)(key, frame + first, a.rows.first[row], rows, a.columns.first[column], columns, of_channel + first);
                    });
                });
            }
    }
};

// ∂w from so many parts of its sums, on top of what is there or not.
inline void sum_parts(const Scatter& a, const ScatterBuffers& buffers, int64_t parts, int threads, bool on_top, float* grad_weight) {
    parallel(threads, a.inputs.channels, 4, [&](int64_t channel, int) {
        const int64_t g = channel / a.inputs.of_group, c = channel % a.inputs.of_group;
        for (int64_t s = 0; s < a.taps; ++s) {
            const int64_t tap = int64_t{a.rows.tap[s / a.columns.kernel]} * a.columns.kernel + a.columns.tap[s % a.columns.kernel];
            for (int64_t o = 0; o < a.outputs.of_group; ++o) {
                const float* from = buffers.sums + (channel * a.taps + s) * a.padded + o;
                float& to = grad_weight[((g * a.outputs.of_group + o) * a.inputs.of_group + c) * a.taps + tap];
                float sum = on_top ? to : 0.0f;
                for (int64_t part = 0; part < parts; ++part) sum += from[part * a.size];
                to = sum;
            }
        }
    });
}

inline void scatter(const Scatter& a, const Events& events, const ScatterBuffers& buffers, int threads, float* grad_weight) {
    const int64_t bands = divide_up(a.inputs.height, a.band);
    parallel(threads, a.parts, 1, [&](int64_t part, int worker) {
        float* sums = buffers.sums + part * a.size;
        zero(sums, a.size * sizeof(float));
        for (int64_t i = a.chunks * part / a.parts; i < a.chunks * (part + 1) / a.parts; ++i) {
            const int64_t image = i / bands * a.together, y = i % bands * a.band;
            const int64_t images = least(a.together, a.inputs.count - image), end = least(a.inputs.height, y + a.band);
            const Chunk chunk{a, events, buffers, image, images, y, end, worker};
            for (int64_t g = 0; g < a.inputs.groups; ++g) {
                chunk.fill_frame(g);
                chunk.add_group(g, sums);
            }
        }
    });
    sum_parts(a, buffers, a.parts, threads, false, grad_weight);
}

// --- calls ------------------------------------------------------------------------------------------------------------------

// The share of events, by a sample or by finding them all; −1 where a dense product is faster.
template <class F>
double rate_of(const Events& events, const F& of, const Convolution& a) {
    const double all = static_cast<double>(events.of.floats * events.of.count);
    const double rate = a.sample ? events.sampled_rate() : static_cast<double>(events.find(a.threads)) / all;
    return a.event_cost * of.cost(rate).relative() <= (a.sample ? 1.0 : kOnceFound) ? rate : -1;
}

inline Images inputs_of(const Convolution& a) { return {a.channels, a.groups, a.height, a.width, a.images, a.x_last != 0}; }
inline Images outputs_of(const Convolution& a) { return {a.out_channels, a.groups, a.out_height, a.out_width, a.images, a.y_last != 0}; }
inline Windows rows_of(const Convolution& a, bool back, Arena& arena) {
    return {a.height, a.out_height, a.kernel_rows, a.stride_y, a.padding_y, a.dilation_y, back, arena};
}
inline Windows columns_of(const Convolution& a, bool back, Arena& arena) {
    return {a.width, a.out_width, a.kernel_columns, a.stride_x, a.padding_x, a.dilation_x, back, arena};
}

// Computes a product by events, unless a dense one is faster or only that is asked; returns whether it is by events.
// `back`: targets are the inputs of the convolution.
inline bool gather_by_events(const Convolution& a, Gather of, const float* numbers, const float* bias, bool back, Arena& arena) {
    const Events events(of.sources, numbers, arena);
    const GatherBuffers buffers(of, a.threads, arena);
    if (!arena.base) return true;
    const double rate = rate_of(events, of, a);
    if (a.sample || rate < 0) return rate >= 0;
    of.choose_slices(rate);
    load_kernels(of, a.weight, back, a.threads, buffers.weights);
    load_bias(of, bias, buffers.bias);
    gather(of, events, buffers, a.threads);
    return true;
}

inline void convolution_forward(Convolution& a, Arena& arena) {
    const Images inputs = inputs_of(a), outputs = outputs_of(a);
    const Windows rows = rows_of(a, false, arena), columns = columns_of(a, false, arena);
    a.y_by_events = gather_by_events(a, {rows, columns, inputs, outputs, a.y}, a.x, a.bias, false, arena);
}

inline void convolution_backward(Convolution& a, Arena& arena) {
    const Images inputs = inputs_of(a), outputs = outputs_of(a);
    const Windows rows = rows_of(a, true, arena), columns = columns_of(a, true, arena);
    if (a.grad_weight_by_events) {
        const Scatter of{rows, columns, inputs, outputs, a.grad_y};
        const Events events(inputs, a.x, arena);
        const ScatterBuffers buffers(of, columns.span(inputs.width), rows.span(of.band), a.threads, arena);
        if (arena.base) a.grad_weight_by_events = rate_of(events, of, a) >= 0;
        if (arena.base && !a.sample && a.grad_weight_by_events) scatter(of, events, buffers, a.threads, a.grad_weight);
    }
    if (a.grad_x_by_events)
        a.grad_x_by_events = gather_by_events(a, {rows, columns, outputs, inputs, a.grad_x}, a.grad_y, nullptr, true, arena);
}

}  // namespace g2g::G2G_ISA
