// LIF neurons that are images, behind a convolution of spikes, and the maxima over windows of their spikes: one pass over the
// frames of a layer forward, one backward. Between layers spikes are bits; gradients are floats with the channels last.
//
//   forward   U_t = β·U_{t−1} + (w ⋆ x_t + b) − θ·R_t by gather(), row by row: currents do not leave the L1 cache
//   backward  δ_t = e_t + β·δ_{t+1} (0 in place of δ_{t+1} where reset "zero" has discharged U_t), e_t = σ'(U_t − θ)·∂L/∂S_t
//             ∂b = Σ δ_t;  ∂w by the events of x_t (Chunk);  ∂β = Σ δ_t·U_{t−1};  ∂θ = −Σ (e_t + R_t·δ_t)
//             ∂x_t = Wᵀ·e_t + β·∂x_{t+1}, or Wᵀ·δ_t after that reset, by the events of e_t, or of δ_t
//
// Neurons whose current is the maximum over a window of w ⋆ x_t + b keep which it was in each step: δ_t is the gradient of that one.
//
// Behind windows a gradient reaches the first spike of a window, or its first neuron if none has fired, as in PyTorch. Where it
// reaches no neuron, e_t is 0 whatever σ' is.
#pragma once

#include <functional>

#include "convolution.h"
#include "neurons.h"
#include "parameters.h"

namespace g2g::G2G_ISA {

// Places of events that are listed at a time.
constexpr int64_t kListedTogether = 1 << 20;

// What both passes know of a layer.
struct LayerShape {
    const ImageLayer& a;
    Images inputs, outputs, cells;  // cells: the neurons
    int64_t words, pixels, lanes = a.lanes;
    int64_t pooled_pixels = int64_t{a.pooled_rows} * a.pooled_columns;

    explicit LayerShape(const ImageLayer& layer)
        : a(layer),
          inputs(inputs_of(layer.convolution)),
          outputs(outputs_of(layer.convolution)),
          cells{outputs.channels, 1, layer.rows, layer.columns, outputs.count, outputs.last},
          words(cells.words),
          pixels(cells.pixels) {}

    bool pools() const { return a.pooled; }
    int64_t merged() const { return int64_t{a.merged_rows} * a.merged_columns; }
    bool merges() const { return merged() > 1; }
    int64_t frame(int64_t t, int64_t b) const { return t * a.samples + b; }
    uint64_t* spikes(int64_t t, int64_t b, int64_t y) const {
        return a.spikes + (frame(t, b) * pixels + y * cells.width) * words;
    }
    float* states(int64_t t, int64_t b, int64_t y) const { return a.states + (frame(t, b) * pixels + y * cells.width) * lanes; }
    uint8_t* choices(int64_t t, int64_t b, int64_t y) const { return a.choices + (frame(t, b) * pixels + y * cells.width) * lanes; }
    const float* current(int64_t t, int64_t b) const { return a.current + (a.held ? b : frame(t, b)) * outputs.floats; }
    float beta() const { return std::clamp(*a.neurons.parameters[0].value, 0.0f, 1.0f); }
    float threshold() const { return *a.neurons.parameters[1].value; }
    Events events(Arena& arena) const { return a.inputs ? Events(inputs, a.inputs, arena) : Events(inputs, a.convolution.x, arena); }
    // The neurons as images with the channels first.
    Images first_in_memory() const { return {cells.channels, 1, cells.height, cells.width, cells.count, false}; }
    // The bits of an image of the inputs, whether they are spikes of a channel or of none.
    double bits() const { return a.inputs ? static_cast<double>(inputs.pixels * inputs.words * kLanes) : 0; }
    // The share of numbers of the inputs that are not 0; finds them if they are not spikes.
    double input_rate(const Events& events) const {
        const int threads = a.convolution.threads;
        if (a.convolution.sample) return events.sampled_rate();
        const int64_t found = a.inputs ? events.count(threads) : events.find(threads);
        return static_cast<double>(found) / static_cast<double>(inputs.floats * inputs.count);
    }
    // Row y of images [C][H][W], or of others, with 0 behind the last of n channels.
    void load_row(const Images& of, const float* image, int64_t y, int64_t first, int64_t n, float* out, int64_t stride) const {
        if (n < stride) zero(out, of.width * stride * sizeof(float));
        of.load_row(image, y, first, n, 0, of.width, out, stride);
    }
    void load_row(const float* image, int64_t y, float* out) const {
        load_row(first_in_memory(), image, y, 0, outputs.channels, out, lanes);
    }
    void store_row(float* image, int64_t y, const float* from, int64_t stride) const {
        first_in_memory().store_row(image, y, 0, outputs.channels, from, stride);
    }
    // The channels of word w.
    uint64_t valid(int64_t w) const {
        return (w + 1) * kLanes > outputs.channels ? (uint64_t{1} << outputs.channels % kLanes) - 1 : ~uint64_t{0};
    }
};

// 0 or 1 for each bit of images in words, [count][pixels][words].
inline void unpack_images(const uint64_t* words, int64_t count, int32_t pixels, int32_t channels, int32_t last, int32_t threads,
                          float* out) {
    const Images of{channels, 1, 1, pixels, count, last != 0};
    parallel(threads, of.count, 1, [&](int64_t image, int) {
        for (int64_t p = 0; p < of.pixels; p += kLanes)
            for (int64_t w = 0; w < of.words; ++w) {
                const int64_t wide = least(kLanes, of.pixels - p), deep = least(kLanes, of.channels - w * kLanes);
                uint64_t square[kLanes] = {};
                for (int64_t i = 0; i < wide; ++i) square[i] = words[(image * of.pixels + p + i) * of.words + w];
                if (!of.last) transpose_bits(square);
                for (int64_t i = 0; i < (of.last ? wide : deep); ++i) {
                    const int64_t n = of.last ? deep : wide;
                    float panel[kLanes];
                    float* const to = out + image * of.floats + (of.last ? of.at(p + i, w * kLanes) : of.at(p, w * kLanes + i));
                    expand_bits(square[i], n == kLanes ? to : panel);
                    if (n < kLanes) __builtin_memcpy(to, panel, n * sizeof(float));
                }
            }
    });
}

// --- forward ----------------------------------------------------------------------------------------------------------------

struct ImageForward : LayerShape {
    const Gather& of;
    const Events& events;
    const GatherBuffers& buffers;
    float *membranes, *counts;  // [workers][pixels of a band][lanes], [workers][pixels][lanes]
    // of each worker and of images of a task a row of currents: the maxima so far, and which they are
    float* best;
    int32_t* which;
    int64_t of_best = cells.width * kMostVecs * W;

    // Row y of the neurons in a step: the channels from `first` on, a strip of N vectors.
    template <int N, class R>
    void fire(R reset, int64_t t, int64_t b, int64_t y, int64_t first, const float* current, float* membrane, float* count) const {
        constexpr int wide = N * W, full = wide / kLanes;  // a strip of less than a word lies within one
        const Vec p[2] = {all(beta()), all(threshold())};
        const uint64_t last = valid((first + wide - 1) / kLanes);
        const int64_t place = first % kLanes;
        uint64_t* out = spikes(t, b, y) + first / kLanes;
        float* kept = a.states ? states(t, b, y) + first : nullptr;
        for (int64_t x = 0; x < cells.width; ++x, out += words, current += wide, membrane += lanes, count += lanes) {
            uint64_t fired[full + 1] = {};
            unrolled<N>([&](auto v) {
                Vec state[1] = {load(membrane + v * W)};
                Lif::charge(state, load(current + v * W), p, reset);
                store(membrane + v * W, state[0]);
                store(count + v * W, load(count + v * W) + heaviside(state[0], p[1]));
                if (kept) stream(kept + x * lanes + v * W, state[0]);
                fired[v * W / kLanes] |= greater_bits(state[0], p[1]) << (v * W % kLanes);
            });
            if (kept && first + wide >= of.targets.channels) zero(kept + x * lanes + wide, (lanes - first - wide) * sizeof(float));
            if constexpr (full) {
                for (int w = 0; w < full; ++w) out[w] = fired[w];
                out[full - 1] &= last;
            } else {
                out[0] = (place ? out[0] : 0) | (fired[0] << place & last);
            }
        }
    }

    // The maxima over windows, and which they are, with row y of the currents: the first of the largest, or a NaN.
    void merge(int64_t y, int64_t vecs, const float* current, float* to, int32_t* chosen) const {
        const int64_t wide = vecs * W, row = y % a.merged_rows;
        for (int64_t x = 0; x < cells.width; ++x, to += wide, chosen += wide)
            for (int64_t k = 0; k < a.merged_columns && x * a.merged_columns + k < outputs.width; ++k)
                for (int64_t lane = 0; lane < wide; lane += W) {
                    const Vec now = load(current + (x * a.merged_columns + k) * wide + lane), before = load(to + lane);
                    const IntVec larger = row + k ? (now > before) | (now != now) : IntVec{} - 1;
                    IntVec places;
                    __builtin_memcpy(&places, chosen + lane, sizeof places);
                    places = larger ? IntVec{} + static_cast<int32_t>(row * a.merged_columns + k) : places;
                    __builtin_memcpy(chosen + lane, &places, sizeof places);
                    store(to + lane, larger ? now : before);
                }
    }

    // Row y of which they are, the channels from `first` on.
    void keep_choices(int64_t t, int64_t b, int64_t y, int64_t first, int64_t wide, const int32_t* chosen) const {
        for (int64_t x = 0; x < cells.width; ++x) {
            uint8_t* const out = choices(t, b, y) + x * lanes + first;
            for (int64_t lane = 0; lane < wide; ++lane) out[lane] = static_cast<uint8_t>(chosen[x * wide + lane]);
        }
    }

    // Rows begin … end − 1 behind the windows.
    void pool(int64_t t, int64_t b, int64_t begin, int64_t end) const {
        for (int64_t y = begin; y < end; ++y)
            for (int64_t x = 0; x < a.pooled_columns; ++x) {
                uint64_t* out = a.pooled + (frame(t, b) * pooled_pixels + y * a.pooled_columns + x) * words;
                const int64_t bottom = least(cells.height, (y + 1) * a.window_rows), right = least(cells.width, (x + 1) * a.window_columns);
                for (int64_t w = 0; w < words; ++w) {
                    uint64_t any = 0;
                    for (int64_t i = y * a.window_rows; i < bottom; ++i)
                        for (int64_t k = x * a.window_columns; k < right; ++k) any |= spikes(t, b, i)[k * words + w];
                    out[w] = any;
                }
            }
    }

    // Rows begin … end − 1 of the currents of a sample in all steps, and of their neurons.
    template <class R>
    void run(R reset, int64_t b, int64_t begin, int64_t end, int worker) const {
        int64_t lowest;
        const int64_t rows = GatherBuffers::sources_of(of.rows, begin, end, lowest), width = cells.width;
        const int64_t top = begin / a.merged_rows, below = end == outputs.height ? cells.height : end / a.merged_rows;
        EventRows lists[kMostTogether];
        const uint8_t* valued[kMostTogether];
        float* const membrane = membranes + worker * buffers.band * width * lanes;
        float* const row = buffers.rows + worker * buffers.of_rows;
        if (!a.state) zero(membrane, (below - top) * width * lanes * sizeof(float));
        for (int64_t y = top; a.state && y < below; ++y)
            load_row(a.state + b * cells.floats, y, membrane + (y - top) * width * lanes);
        for (int64_t t = 0; t < a.steps; t += buffers.together) {
            const int64_t steps = least(buffers.together, a.steps - t);
            for (int64_t i = 0; i < steps && !a.current; ++i) {
                lists[i] = {buffers.lists, events, frame(t + i, b), 0, lowest, rows, buffers.tallest, worker * buffers.together + i};
                valued[i] = events.valued + frame(t + i, b);
            }
            each_strip(of.vecs(), outputs.channels, [&](int64_t first, int vecs) {
                const int64_t of_row = vecs * W * outputs.width, n = least(vecs * W, outputs.channels - first);
                const auto place = [&](int64_t i, int64_t y) {  // of one pass, neurons take a row at once
                    return of.slices == 1 ? row : row + (i * buffers.band + y - begin) * of_row;
                };
                const auto finished = [&](int64_t i, int64_t line) {
                    const int64_t y = line / a.merged_rows, number = worker * buffers.together + i;
                    const float* current = place(i, line);
                    if (y >= below) return;  // behind the last whole window
                    if (merges()) {
                        float* const largest = best + number * of_best;
                        merge(line, vecs, current, largest, which + number * of_best);
                        if (line + 1 < end && (line + 1) % a.merged_rows) return;
                        if (a.choices) keep_choices(t + i, b, y, first, vecs * W, which + number * of_best);
                        current = largest;
                    }
                    with_vecs<kMostVecs>(vecs, [&](auto N) {
                        fire<N>(reset, t + i, b, y, first, current, membrane + (y - top) * width * lanes + first,
                                counts + (worker * pixels + y * width) * lanes + first);
                    });
                };
                if (!a.current)
                    return gather_strip(of, lists, valued, steps, begin, end, vecs, buffers.weights + first * of.taps() * inputs.channels,
                                        buffers.bias + first, vecs * W, false, place, finished);
                for (int64_t y = begin; y < end; ++y)
                    for (int64_t i = 0; i < steps; ++i) {
                        load_row(outputs, current(t + i, b), y, first, n, row, vecs * W);
                        finished(i, y);
                    }
            });
            const int64_t bottom = below == cells.height ? a.pooled_rows : below / a.window_rows;
            for (int64_t i = 0; i < steps && pools(); ++i) pool(t + i, b, top / a.window_rows, bottom);
        }
        for (int64_t y = top; y < below; ++y)
            store_row(a.last + b * cells.floats, y, membrane + (y - top) * width * lanes, lanes);
        stream_fence();
    }
};

inline void image_layer_forward(ImageLayer& a, Arena& arena) {
    const int threads = a.convolution.threads;
    const LayerShape shape(a);
    const Images &inputs = shape.inputs, &outputs = shape.outputs;
    const Windows rows = rows_of(a.convolution, false, arena), columns = columns_of(a.convolution, false, arena);
    Gather of{rows, columns, inputs, outputs, nullptr};
    const Events events = shape.events(arena);
    // bands of whole windows, as many as there are threads
    const int64_t whole = int64_t{a.window_rows} * a.merged_rows;
    const int64_t band = divide_up(GatherBuffers::band_of(of, divide_up(4 * threads, a.samples)), whole) * whole;
    const int64_t listed = EventRows::room(inputs, least(inputs.height, rows.span(band)));
    const int64_t together = most(1, least(least(kMostTogether, a.steps), kListedTogether / listed));
    const GatherBuffers buffers(of, together, band, threads, arena);
    const int64_t merging = shape.merges() ? threads * together * shape.cells.width * kMostVecs * W : 0;
    const ImageForward layer{shape, of, events, buffers, arena.take<float>(threads * band * outputs.width * a.lanes),
                             arena.take<float>(threads * shape.pixels * a.lanes), arena.take<float>(merging),
                             arena.take<int32_t>(merging)};
    if (!arena.base) return;
    if (!a.current) {
        const double rate = layer.input_rate(events);
        a.convolution.y_by_events = a.convolution.event_cost * of.cost(rate).relative_in_layer(shape.bits()) <= 1;
        if (!a.convolution.y_by_events) return;
        of.choose_slices(rate);
        load_kernels(of, a.convolution.weight, false, threads, buffers.weights);
        load_bias(of, a.convolution.bias, buffers.bias);
    }
    zero_floats(layer.counts, threads * shape.pixels * a.lanes, threads);
    const int64_t bands = divide_up(outputs.height, band);
    choose(Resets{}, a.neurons.reset, [&](auto reset) {
        parallel_pairs(threads, a.samples, bands, 1, [&](int64_t b, int64_t i, int worker) {
            layer.run(reset, b, i * band, least(outputs.height, (i + 1) * band), worker);
        });
    });
    const float share = 1.0f / (static_cast<float>(a.samples) * static_cast<float>(a.steps));
    parallel(threads, shape.cells.height, 4, [&](int64_t y, int) {
        float* const row = layer.counts + y * shape.cells.width * a.lanes;
        for (int64_t i = 0; i < shape.cells.width * a.lanes; ++i) {
            float sum = row[i];
            for (int worker = 1; worker < threads; ++worker) sum += row[worker * shape.pixels * a.lanes + i];
            row[i] = sum * share;
        }
        layer.store_row(a.rates, y, row, a.lanes);
    });
}

// --- backward ---------------------------------------------------------------------------------------------------------------

struct ImageBackward : LayerShape {
    const Gather& of;  // the inputs
    const Scatter& weights;
    const Events& events;
    const GatherBuffers& buffers;
    const ScatterBuffers& sums;
    const EventRows& lists;
    int64_t left, top;  // of the frame that holds δ
    float* of_sent;     // [workers][pixels behind the windows][lanes]
    uint64_t* reaches;  // [workers] a row of words
    const float* sent;  // of a layer above, [workers][steps][pixels behind the windows][lanes], in place of a.grad_spikes; null: none
    float* below;  // for the layer below, [workers][steps][pixels][in_lanes]; null: none
    float* own;  // [workers][pixels][padded] of δ where currents are maxima, whose frame holds what each pixel of the convolution gets
    // [pixels][lanes] of ∂L/∂rates in each step; [workers][pixels][in_lanes] of ∂x_{t+1}; [workers][pixels][padded] of Σ δ_t; of each
    // worker a row of pixels; of each sample [padded] of ∂b; of each sample ∂β and ∂θ
    float *rates, *received, *held, *row, *bias;
    double* neurons;
    int64_t padded = weights.padded, wide = sums.wide;

    // A sample in a step.
    struct Frame {
        int64_t t, b;
        int worker;
        float* delta;  // of pixel (0, 0), in the frame
        EventRows list;
    };

    // The gradients of what is sent in a step, [pixels behind the windows][lanes]; numbers of no meaning if there are none.
    const float* grads_of(const Frame& at) const {
        if (at.t < 0) return states(0, at.b, 0);
        if (sent) return sent + (at.worker * a.steps + at.t) * pooled_pixels * lanes;
        if (a.grad_spikes) return a.grad_spikes + (at.t * a.count + at.b - a.first) * pooled_pixels * lanes;
        if (!a.grad_sent) return states(at.t, at.b, 0);
        const Images of_layer{outputs.channels, 1, a.pooled_rows, a.pooled_columns, 1, false};
        const float* const from = a.grad_sent + frame(at.t, at.b) * of_layer.floats;
        float* const grads = of_sent + at.worker * pooled_pixels * lanes;
        for (int64_t y = 0; y < of_layer.height; ++y)
            LayerShape::load_row(of_layer, from, y, 0, of_layer.channels, grads + y * of_layer.width * lanes, lanes);
        return grads;
    }

    // Row y of δ.
    float* row_of(const Frame& at, int64_t y) const {
        return merges() ? own + (at.worker * pixels + y * cells.width) * padded : at.delta + y * wide * padded;
    }

    // The channels of the pixels of row y that a gradient behind the windows reaches, [pixels][words].
    void find_reached(const Frame& at, int64_t y, uint64_t* reached) const {
        const int64_t pooled_y = y / a.window_rows, upper = pooled_y * a.window_rows;
        const int64_t bottom = y == upper ? least(cells.height, upper + a.window_rows) : y + 1;
        zero(reached, cells.width * words * sizeof(uint64_t));
        if (at.t < 0 || pooled_y >= a.pooled_rows || !(sent || a.grad_spikes || a.grad_sent)) return;
        for (int64_t pooled_x = 0; pooled_x < a.pooled_columns; ++pooled_x) {
            const int64_t left = pooled_x * a.window_columns, right = least(cells.width, left + a.window_columns);
            for (int64_t w = 0; w < words; ++w) {
                uint64_t any = 0;
                for (int64_t i = upper; i < bottom && pools(); ++i)
                    for (int64_t k = left; k < right; ++k) {
                        const uint64_t fired = spikes(at.t, at.b, i)[k * words + w];
                        if (i == y) reached[k * words + w] = fired & ~any & valid(w);
                        any |= fired;
                    }
                if (y == upper) reached[left * words + w] |= ~any & valid(w);
            }
        }
    }

    // δ_t of a frame from δ_{t+1}, in its place, and the list of what its inputs receive. `whole`: with the sums of parameters, and
    // after any reset; else membranes are read only where a gradient reaches them. In the step −1, before the first, membranes are the
    // given ones, or 0, and nothing is received.
    template <class S, bool whole>
    void step(Frame& at) const {
        const Vec decay = all(beta()), theta = all(threshold());
        const Steepness alpha = steepness(a.neurons);
        const bool zeros = a.neurons.reset == kZero, subtracts = a.neurons.reset == kSubtract, merging = merges();
        const bool last = a.grad_last && at.t + 1 == a.steps, lists_delta = zeros || last, before = at.t < 0;
        const float* const given = before ? a.state : last ? a.grad_last : nullptr;
        float* const row_bias = row + at.worker * (cells.width + 1) * lanes;
        float* const row_last = row_bias + lanes;
        uint64_t* const reached = reaches + at.worker * cells.width * words;
        const float* const grads = grads_of(at);
        double to_beta = 0, to_theta = 0;
        int32_t n = 0;
        for (int64_t y = 0; y < cells.height; ++y) {
            const float* u = before ? row_last : states(at.t, at.b, y);
            const float* const row_grads = grads + least(y / a.window_rows, a.pooled_rows - 1) * a.pooled_columns * lanes;
            int32_t* const starts = at.list.starts + y * (cells.width + 1);
            float* delta = row_of(at, y);
            Vec beta_sum = {}, theta_sum = {};
            find_reached(at, y, reached);
            zero(row_bias, padded * sizeof(float));
            if (given) load_row(given + at.b * cells.floats, y, row_last);
            else if (before) zero(row_last, cells.width * lanes * sizeof(float));
            int64_t pooled_x = 0, left_of_window = a.window_columns;
            for (int64_t x = 0; x < cells.width; ++x, delta += padded, u += lanes) {
                if (!merging) starts[x] = n;
                if (!left_of_window--) ++pooled_x, left_of_window = a.window_columns - 1;
                // what is behind the last window reaches nothing
                const float* g = row_grads + least(pooled_x, a.pooled_columns - 1) * lanes;
                const float* of_rate = a.grad_rates && !before ? rates + (y * cells.width + x) * lanes : nullptr;
                for (int64_t w = 0; w < words; ++w) {
                    uint64_t listed = 0;
                    int64_t found = n;
                    for (int64_t lane = w * kLanes; lane < least(padded, (w + 1) * kLanes); lane += W) {
                        const uint64_t bits = reached[x * words + w] >> lane % kLanes & (~uint64_t{0} >> (64 - W));
                        const Vec later = load(delta + lane);
                        Vec now = decay * later, e = {};
                        if (whole || bits || of_rate) {
                            // a weight of 0 makes NaN of an infinite input in lanes that are no channel's
                            const Vec membrane = load_chosen(Vec{}, u + lane, static_cast<uint32_t>(valid(w) >> lane % kLanes));
                            Vec grad = load_chosen(Vec{}, g + lane, static_cast<uint32_t>(bits));
                            if (of_rate) grad += load(of_rate + lane);
                            if (!before) e = S::derivative(membrane - theta, alpha) * grad;
                            if constexpr (whole) {
                                const IntVec fired = membrane > theta;
                                const Vec discharged = zeros ? (fired ? Vec{} : later) : later;
                                now = decay * discharged;
                                beta_sum += discharged * membrane;
                                theta_sum -= e;
                                if (subtracts) theta_sum -= fired ? later : Vec{};
                            }
                            now += e;
                        }
                        if (last) now += load(row_last + x * lanes + lane);
                        store(delta + lane, now);
                        store(row_bias + lane, load(row_bias + lane) + now);
                        if (merging) continue;
                        const Vec value = lists_delta ? now : e;
                        const uint64_t kept = nonzero_bits(value);
                        listed |= kept << lane % kLanes;
                        store_chosen(at.list.values + found, value, kept);
                        found += __builtin_popcountll(kept);
                    }
                    n += append_bits(at.list.places + n, listed & valid(w), x * outputs.channels + w * kLanes);
                }
            }
            if (!merging) starts[cells.width] = n;
            float* const of_bias = bias + (at.b - a.first) * padded;
            for (int64_t lane = 0; lane < padded && !before; lane += W) store(of_bias + lane, load(of_bias + lane) + load(row_bias + lane));
            to_beta += sum_of(beta_sum), to_theta += sum_of(theta_sum);
            if (!merging && !before) give_current(at, y);
        }
        if (merging && !before) spread(at);
        neurons[(at.b - a.first) * 2] += to_beta, neurons[(at.b - a.first) * 2 + 1] += to_theta;
    }

    // The frame and the list of what the pixels of the convolution get of δ, each from the neuron that has chosen it.
    void spread(Frame& at) const {
        int32_t n = 0;
        for (int64_t y = 0; y < outputs.height; ++y) {
            float* to = at.delta + y * wide * padded;
            for (int64_t x = 0; x < outputs.width; ++x, to += padded) {
                at.list.starts[y * (outputs.width + 1) + x] = n;
                const int64_t cell_y = y / a.merged_rows, cell_x = x / a.merged_columns;
                if (cell_y >= cells.height || cell_x >= cells.width) {
                    zero(to, padded * sizeof(float));
                    continue;
                }
                const float* delta = row_of(at, cell_y) + cell_x * padded;
                const uint8_t* choice = choices(at.t, at.b, cell_y) + cell_x * lanes;
                const auto place = static_cast<uint8_t>(y % a.merged_rows * a.merged_columns + x % a.merged_columns);
                for (int64_t w = 0; w < words; ++w) {
                    uint64_t listed = 0;
                    int64_t found = n;
                    for (int64_t lane = w * kLanes; lane < least(padded, (w + 1) * kLanes); lane += W) {
                        IntVec chosen;
                        for (int64_t l = 0; l < W; ++l) chosen[l] = choice[lane + l] == place ? -1 : 0;
                        const Vec value = chosen ? load(delta + lane) : Vec{};
                        store(to + lane, value);
                        const uint64_t kept = nonzero_bits(value);
                        listed |= kept << lane % kLanes;
                        store_chosen(at.list.values + found, value, kept);
                        found += __builtin_popcountll(kept);
                    }
                    n += append_bits(at.list.places + n, listed & valid(w), x * outputs.channels + w * kLanes);
                }
            }
            at.list.starts[y * (outputs.width + 1) + outputs.width] = n;
            give_current(at, y);
        }
    }

    // Row y of δ as the gradient of the current, the sum over all steps if that is held.
    void give_current(const Frame& at, int64_t y) const {
        if (!a.grad_current) return;
        const float* delta = at.delta + y * wide * padded;
        if (a.held) {
            float* const sum = held + (at.worker * pixels + y * outputs.width) * padded;
            for (int64_t i = 0; i < outputs.width * padded; i += W) store(sum + i, (at.t + 1 < a.steps ? load(sum + i) : Vec{}) + load(delta + i));
            if (!at.t) outputs.store_row(a.grad_current + (at.b - a.first) * outputs.floats, y, 0, outputs.channels, sum, padded);
        } else {
            outputs.store_row(a.grad_current + (at.t * a.current_samples + at.b - a.first) * outputs.floats, y, 0, outputs.channels, delta, padded);
        }
    }

    // The share of neurons that a gradient reaches in a step, and of what the inputs receive, by a sample of membranes.
    double reached_rate() const {
        // δ, which does not end with the step
        if (a.neurons.reset == kZero || merges()) return 1 / static_cast<double>(merged());
        constexpr int64_t kSamples = 256;
        const int64_t size = a.samples * a.steps * pixels * lanes / W, samples = least(size, kSamples);
        int64_t found = 0;
        for (int64_t i = 0; i < samples; ++i)
            found += __builtin_popcountll(nonzero_bits(
                AnySurrogate::derivative(load(a.states + size / samples * i * W) - all(threshold()), steepness(a.neurons))));
        const double reached = static_cast<double>(found) / static_cast<double>(samples * W);
        return a.grad_rates ? reached : reached * static_cast<double>(pooled_pixels) / static_cast<double>(pixels);
    }

    // What the inputs receive in a step.
    void give_inputs(const Frame& at) const {
        float* const to = received + at.worker * inputs.pixels * a.in_lanes;
        float* const sum = buffers.rows + at.worker * buffers.of_rows;
        const bool decays = a.neurons.reset != kZero && !merges() && at.t + 1 < a.steps;
        const Vec decay = all(beta());
        const uint8_t valued = 1;
        const uint8_t* const of_list = &valued;
        const auto give = [&](int64_t y, int64_t first, int64_t n) {
            const float* const from = to + y * inputs.width * a.in_lanes + first;
            float* const out = below ? below + ((at.worker * a.steps + at.t) * inputs.pixels + y * inputs.width) * a.in_lanes + first : nullptr;
            for (int64_t i = 0; i < inputs.width * a.in_lanes && out; i += a.in_lanes) __builtin_memcpy(out + i, from + i, n * sizeof(float));
            if (a.convolution.grad_x)
                inputs.store_row(a.convolution.grad_x + frame(at.t, at.b) * inputs.floats, y, first, least(n, inputs.channels - first), from, a.in_lanes);
        };
        if (merges()) zero(to, inputs.pixels * a.in_lanes * sizeof(float));
        each_strip(of.vecs(), of.targets.channels, [&](int64_t first, int vecs) {
            const int64_t wide = vecs * W;
            gather_strip(of, &at.list, &of_list, 1, 0, of.targets.height, vecs, buffers.weights + first * of.taps() * outputs.channels,
                         buffers.bias + first, wide, false, [&](int64_t, int64_t) { return sum; }, [&](int64_t, int64_t y) {
                if (merges()) return add_patches(y, first, wide, sum, to);
                float* const place = to + y * inputs.width * a.in_lanes + first;
                for (int64_t x = 0; x < inputs.width; ++x)
                    for (int64_t v = 0; v < wide; v += W) {
                        float* const p = place + x * a.in_lanes + v;
                        const Vec now = load(sum + x * wide + v);
                        store(p, decays ? decay * load(p) + now : now);
                    }
                give(y, first, wide);
            });
        });
        for (int64_t y = 0; y < inputs.height && merges(); ++y) give(y, 0, a.in_lanes);
    }

    // Adds what row y of the outputs gives the inputs of its windows: the lanes of [taps][in_lanes] from `first` on.
    void add_patches(int64_t y, int64_t first, int64_t wide, const float* sum, float* to) const {
        const Convolution& c = a.convolution;
        for (int64_t lane = 0; lane < wide; lane += W, sum += W) {
            const int64_t tap = (first + lane) / a.in_lanes, channel = (first + lane) % a.in_lanes;
            const int64_t row = y * c.stride_y - c.padding_y + tap / c.kernel_columns * c.dilation_y;
            if (row < 0 || row >= inputs.height) continue;
            int64_t column = tap % c.kernel_columns * c.dilation_x - c.padding_x;
            for (int64_t x = 0; x < outputs.width; ++x, column += c.stride_x) {
                if (column < 0 || column >= inputs.width) continue;
                float* const p = to + (row * inputs.width + column) * a.in_lanes + channel;
                store(p, load(p) + load(sum + x * wide));
            }
        }
    }

    template <class S>
    void run(int64_t b, int worker) const {
        Frame at{0, b, worker, nullptr, lists};
        at.list.places += worker * EventRows::room(outputs, outputs.height);
        at.list.values += worker * EventRows::room(outputs, outputs.height);
        at.list.starts += worker * outputs.height * (outputs.width + 1);
        Chunk chunk{weights, events, sums, 0, 1, 0, inputs.height, worker};
        chunk.left = left, chunk.top = top;
        at.delta = chunk.frame - (top * wide + left) * padded;
        zero(chunk.frame, sums.frame_floats(weights) * sizeof(float));
        if (merges()) zero(own + worker * pixels * padded, pixels * padded * sizeof(float));
        zero(bias + (b - a.first) * padded, padded * sizeof(float));
        neurons[(b - a.first) * 2] = neurons[(b - a.first) * 2 + 1] = 0;
        float* const to = sums.sums + (b - a.first) * weights.size;
        if (a.grad_weight) zero(to, weights.size * sizeof(float));
        const bool whole = a.grad_neurons || a.neurons.reset == kZero;
        for (int64_t t = 0; t < a.steps && !a.inputs && a.grad_weight; ++t) events.find_image(frame(t, b));
        for (at.t = a.steps - 1; at.t >= 0; --at.t) {
            whole ? step<S, true>(at) : step<S, false>(at);
            chunk.image = frame(at.t, b);
            if (a.grad_weight) chunk.add_group(0, to);
            if (below || a.convolution.grad_x) give_inputs(at);
        }
        if (a.grad_state || (a.grad_neurons && (a.state || threshold() < 0))) step<S, true>(at);
        for (int64_t y = 0; y < cells.height && a.grad_state; ++y)
            store_row(a.grad_state + b * cells.floats, y, row_of(at, y), padded);
    }
};

// The backward pass of layers from `a` down, a sample at a time, through all of them. `above`: that of those above, which leaves
// the gradients of what `a` sends in `sent`.
inline void backward_from(ImageLayer& a, Arena& arena, const float* sent, const std::function<void(int64_t, int)>& above) {
    const Convolution& c = a.convolution;
    const LayerShape shape(a);
    const Images &inputs = shape.inputs, &outputs = shape.outputs;
    const Windows rows = rows_of(c, true, arena), columns = columns_of(c, true, arena);
    // Where currents are maxima, most outputs receive something: they give their windows as many channels as these have numbers, in
    // few long sums, which are added up; else each input gathers a short sum of few events.
    const Windows row(outputs.height, outputs.height, 1, 1, 0, 1, true, arena), column(outputs.width, outputs.width, 1, 1, 0, 1, true, arena);
    const int64_t taps = rows.kernel * columns.kernel;
    const Images windows{taps * a.in_lanes, 1, outputs.height, outputs.width, outputs.count, true};
    const bool patched = shape.merges();
    const Gather of = patched ? Gather{row, column, outputs, windows, nullptr} : Gather{rows, columns, outputs, inputs, nullptr};
    float* const of_windows = arena.take<float>(patched ? outputs.channels * windows.channels : 0);  // weights [output][tap][in_lanes]
    Scatter weights{rows, columns, inputs, outputs, nullptr};
    weights.together = 1, weights.band = inputs.height, weights.parts = a.count;
    // a frame of all outputs, and of the places around them that a tap may read
    const int64_t left = -most(0, divide_up(columns.reach - c.padding_x, c.stride_x)), top = -most(0, divide_up(rows.reach - c.padding_y, c.stride_y));
    const int64_t wide = most(outputs.width, (inputs.width - 1 + c.padding_x) / c.stride_x + 1) - left;
    const int64_t tall = most(outputs.height, (inputs.height - 1 + c.padding_y) / c.stride_y + 1) - top;
    const Events events = shape.events(arena);
    const GatherBuffers buffers(of, 1, 1, c.threads, arena);
    const ScatterBuffers sums(weights, wide, tall, c.threads, arena);
    const EventRows lists(outputs, outputs.height, c.threads, arena);
    float* const below = a.below ? arena.take<float>(c.threads * a.steps * inputs.pixels * a.in_lanes) : nullptr;
    const ImageBackward layer{shape, of, weights, events, buffers, sums, lists, left, top,
                              arena.take<float>(a.grad_sent ? c.threads * shape.pooled_pixels * a.lanes : 0),
                              arena.take<uint64_t>(c.threads * shape.cells.width * shape.words), sent, below,
                              arena.take<float>(shape.merges() ? c.threads * shape.pixels * weights.padded : 0),
                              arena.take<float>(shape.pixels * a.lanes),
                              arena.take<float>(c.threads * inputs.pixels * a.in_lanes),
                              arena.take<float>(a.held ? c.threads * outputs.pixels * weights.padded : 0),
                              arena.take<float>(c.threads * (outputs.width + 1) * a.lanes),
                              arena.take<float>(a.count * weights.padded),
                              arena.take<double>(2 * a.count)};
    if (!arena.base) {
        if (a.below) backward_from(*a.below, arena, below, above);
        return;
    }
    if (c.sample) {
        const auto faster = [&](const ProductCost& cost, double bits) { return c.event_cost * cost.relative_in_layer(bits) <= 1; };
        a.convolution.grad_weight_by_events = c.grad_weight_by_events && faster(weights.cost(shape.input_rate(events)), shape.bits());
        a.convolution.grad_x_by_events = c.grad_x_by_events && faster(of.cost(layer.reached_rate()), 0);
        return;
    }
    if (below || c.grad_x) {
        for (int64_t i = 0; i < outputs.channels * windows.channels && patched; ++i) {
            const int64_t channel = i % a.in_lanes, tap = i / a.in_lanes % taps, output = i / windows.channels;
            of_windows[i] = channel < inputs.channels ? c.weight[(output * inputs.channels + channel) * taps + tap] : 0.0f;
        }
        load_kernels(of, patched ? of_windows : c.weight, true, c.threads, buffers.weights);
        load_bias(of, nullptr, buffers.bias);
    }
    if (a.grad_rates) {
        const Vec share = all(1.0f / (static_cast<float>(a.samples) * static_cast<float>(a.steps)));
        for (int64_t y = 0; y < shape.cells.height; ++y) layer.load_row(a.grad_rates, y, layer.rates + y * shape.cells.width * a.lanes);
        for (int64_t i = 0; i < shape.pixels * a.lanes; i += W) store(layer.rates + i, load(layer.rates + i) * share);
    }
    choose(Surrogates{}, a.neurons.surrogate, [&](auto surrogate) {
        using S = std::conditional_t<infrequent<decltype(surrogate)>, AnySurrogate, decltype(surrogate)>;
        const auto run = [&](int64_t i, int worker) {
            if (above) above(i, worker);
            layer.run<S>(a.first + i, worker);
        };
        if (a.below)
            backward_from(*a.below, arena, below, run);
        else
            parallel(c.threads, a.count, 1, run);
    });
    if (a.grad_weight) sum_parts(weights, sums, a.count, c.threads, true, a.grad_weight);
    for (int64_t i = 0; i < a.count; ++i) {
        for (int64_t o = 0; a.grad_bias && o < outputs.channels; ++o) a.grad_bias[o] += layer.bias[i * weights.padded + o];
        for (int k = 0; a.grad_neurons && k < 2; ++k) a.grad_neurons[k] += layer.neurons[2 * i + k];
    }
}

inline void image_layer_backward(ImageLayer& a, Arena& arena) { backward_from(a, arena, nullptr, {}); }

}  // namespace g2g::G2G_ISA
