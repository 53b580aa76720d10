// Neurons that are joined to one another by weights in lists (lists.h), for all steps: a network of the size of a brain. What a
// neuron sends arrives D ≥ 1 steps later.
//
//   I_t = (current)_t + V·S_{t−D},    ∂L/∂S_t = (from outside) + Vᵀ·∂I_{t+D},    ∂L/∂V = Σ_t ∂I_t ⊗ S_{t−D}
//
// Forward, a sample is a task, and a spike costs the weights of its list; spikes are kept as bits. Backward, a weight is visited once
// for a row of lanes: the samples of a group, in as many steps as D allows at a time, a *window*. ∂I lies by neuron for that, [N][lanes],
// and so does Vᵀ·∂I, which a window needs of windows before it. In the same visit the weight's gradient is summed over the lanes in
// which its source has spiked. Memory: the weights, the states of every step, and D steps of Vᵀ·∂I.
//
// Each sum has one order whatever the threads: of currents, by source; of Vᵀ·∂I, by range, those at even and at odd places apart; of
// gradients of weights, by group, window downwards and lane.
#pragma once

#include <vector>

#include "interface.h"
#include "lists.h"
#include "neurons.h"
#include "parallel.h"
#include "parameters.h"
#include "vec.h"

namespace g2g::G2G_ISA {

constexpr int kMostLanes = 16;
constexpr int64_t kSources = 1024;  // lists of a task
constexpr int64_t kNeurons = 256;   // neurons of a task backward, whose lanes stay in L1

// L floats.
template <int L>
struct RowOf {
    typedef float type __attribute__((vector_size(4 * L), aligned(4), may_alias));
};
template <>
struct RowOf<1> {
    typedef float type;
};

// The numbers of lanes, each at the place of its logarithm.
using Widths = Types<Constant<1>, Constant<2>, Constant<4>, Constant<8>, Constant<kMostLanes>>;

// What both passes have: the parameters, and where things lie. Rows of neurons are padded to whole words of 64.
struct LoopCall {
    const ListLoop& a;
    const Lists& lists = *a.by_cols;
    const ModelInfo& model = model_info(a.neurons);
    std::vector<OfNeurons> parameters;
    int64_t words = divide_up(a.size, 64), padded = 64 * words;
    int64_t matrix = int64_t{a.samples} * a.size;  // floats of a [B][N] matrix
    int64_t rows = model.states * padded;          // and of the states of a sample in a step

    explicit LoopCall(const ListLoop& loop) : a(loop) {
        for (int k = 0; k < model.parameters; ++k) parameters.emplace_back(a.neurons.parameters[k], model.decays[k], a.size);
    }
    float* states(int64_t t, int64_t sample) const { return a.kept + (t * a.samples + sample) * rows; }
    uint64_t* spikes(int64_t t, int64_t sample) const { return a.words + (t * a.samples + sample) * words; }
    // What a sample sent in a step before the first, −D … −1.
    const float* sent(int64_t t, int64_t sample) const {
        return a.sent ? a.sent + (t + a.delay) * matrix + sample * a.size : nullptr;
    }
    // A sample's row of [T][B][N], or of [B][N], if it is held; null of null.
    template <class E>
    E* row(E* numbers, int32_t held, int64_t t, int64_t sample) const {
        return numbers ? numbers + (held ? 0 : t * matrix) + sample * a.size : nullptr;
    }
    // A sample's states [states][B][N] (null: zeros) as rows, and back.
    void load_states(const float* given, int64_t sample, float* to) const {
        zero(to, rows * sizeof(float));
        for (int s = 0; given && s < model.states; ++s)
            __builtin_memcpy(to + s * padded, given + s * matrix + sample * a.size, a.size * sizeof(float));
    }
    void store_states(const float* from, int64_t sample, float* to) const {
        for (int s = 0; s < model.states; ++s)
            __builtin_memcpy(to + s * matrix + sample * a.size, from + s * padded, a.size * sizeof(float));
    }
};

// f(neuron) for each bit that is set, ascending.
template <class F>
void each_bit(const uint64_t* words, int64_t first, int64_t last, const F& f) {
    for (int64_t w = first; w < last; ++w)
        for (uint64_t bits = words[w]; bits; bits &= bits - 1) f(w * 64 + __builtin_ctzll(bits));
}

// --- forward ----------------------------------------------------------------------------------------------------

// One step of a sample: what arrives in, spikes out as bits.
struct LoopStep {
    const float *current, *membrane;  // [padded]; membrane null: nothing arrives there
    const float* before;              // states [states][padded]
    float* now;
    const uint64_t* sends;            // bits, null: all are sent
    uint64_t* spikes;
};

template <class M, class R>
void loop_step(const LoopCall& call, const LoopStep& step) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{call.a.neurons.reset};
    for (int64_t w = 0; w < call.words; ++w) {
        uint64_t word = 0;
        for (int64_t i = w * 64; i < w * 64 + 64; i += W) {
            Vec before[S], now[S], p[P];
            for (int s = 0; s < S; ++s) now[s] = before[s] = load(step.before + s * call.padded + i);
            for (int k = 0; k < P; ++k) p[k] = call.parameters[k].vector(i);
            M::charge(now, load(step.current + i), p, reset);
            if (step.membrane) now[S - 1] = takes<M>(before, p, call.a.neurons.reset) ? now[S - 1] + load(step.membrane + i) : now[S - 1];
            for (int s = 0; s < S; ++s) store(step.now + s * call.padded + i, now[s]);
            word |= greater_bits(compared<M>(before, now[S - 1], p), p[P - 1]) << (i % 64);
        }
        if (w + 1 == call.words && call.a.size % 64) word &= (uint64_t{1} << call.a.size % 64) - 1;
        step.spikes[w] = step.sends ? word & step.sends[w] : word;
    }
}

// current += V·S of the spikes `words`, or of the numbers `sent`.
struct SpikeSum {
    const LoopCall& call;
    int32_t* const neurons;  // [N]

    void add(const uint64_t* words, const float* sent, float* current) const {
        constexpr int64_t kAhead = 3;
        const Lists& lists = call.lists;
        const Numbers target = lists.other();
        const float* const weights = call.a.weights;
        int64_t count = 0;
        const auto note = [&](int64_t n) { neurons[count++] = static_cast<int32_t>(n); };
        if (words) each_bit(words, 0, call.words, note);
        for (int64_t n = 0; sent && n < call.a.size; ++n)
            if (sent[n] != 0.0f) note(n);
        for (int32_t range = 0; range < lists.ranges; ++range) {
            const int64_t* const first = lists.of_range(range);
            float* const targets = current + int64_t{range} * lists.length;
            for (int64_t i = 0; i < count; ++i) {
                if (i + kAhead < count) {
                    const int64_t* const next = first + neurons[i + kAhead];
                    for (int64_t e = next[0]; e < least(next[0] + 64, next[1]); e += 16)
                        __builtin_prefetch(target.at(e)), __builtin_prefetch(weights + e);
                }
                const float size = sent ? sent[neurons[i]] : 1.0f;
                const int64_t last = first[neurons[i] + 1];
                for (int64_t e = first[neurons[i]]; e < last; ++e) targets[target[e]] += size * weights[e];
            }
        }
    }
};

inline void list_loop_forward(ListLoop& a, Arena& arena) {
    const LoopCall call(a);
    const int64_t rows = call.rows, padded = call.padded;
    // of each thread
    float* const currents = arena.take<float>(a.threads * padded);
    float* const membranes = arena.take<float>(a.to_membrane ? a.threads * padded : 0);
    float* const own = arena.take<float>(a.threads * 2 * rows);
    uint64_t* const sends = arena.take<uint64_t>(a.dropped ? a.threads * call.words : 0);
    int32_t* const neurons = arena.take<int32_t>(a.threads * padded);
    if (!arena.base) return;

    const auto step = with_step(a.neurons, [](auto model, auto reset) { return &loop_step<decltype(model), decltype(reset)>; });
    parallel(a.threads, a.samples, 1, [&](int64_t sample, int worker) {
        float *const current = currents + worker * padded, *const membrane = a.to_membrane ? membranes + worker * padded : nullptr;
        float* const states = own + worker * 2 * rows;
        uint64_t* const sent = a.dropped ? sends + worker * call.words : nullptr;
        const SpikeSum sum{call, neurons + worker * padded};
        zero(current, padded * sizeof(float));
        if (membrane) zero(membrane, padded * sizeof(float));
        if (sent) zero(sent, call.words * sizeof(uint64_t));
        for (int64_t n = 0; sent && n < a.size; ++n) sent[n / 64] |= uint64_t{!a.dropped[sample * a.size + n]} << n % 64;
        call.load_states(a.state, sample, states);
        const float* from = states;
        for (int64_t t = 0; t < a.steps; ++t) {
            float* const to = a.kept ? call.states(t, sample) : states + (t + 1) % 2 * rows;
            __builtin_memcpy(current, call.row(a.current, a.held, t, sample), a.size * sizeof(float));
            if (membrane && !(a.membrane_held && t))
                __builtin_memcpy(membrane, call.row(a.to_membrane, a.membrane_held, t, sample), a.size * sizeof(float));
            const int64_t then = t - a.delay;
            sum.add(then < 0 ? nullptr : call.spikes(then, sample), then < 0 ? call.sent(then, sample) : nullptr, current);
            (*step)(call, {current, membrane, from, to, sent, call.spikes(t, sample)});
            float* const spikes = call.row(a.spikes, a.summed, t, sample);
            if (!a.summed || t == 0) zero(spikes, a.size * sizeof(float));
            each_bit(call.spikes(t, sample), 0, call.words, [&](int64_t n) { spikes[n] += 1.0f; });
            from = to;
        }
        call.store_states(from, sample, a.last);
    });
}

// --- backward ---------------------------------------------------------------------------------------------------

// One step backwards of some neurons of a sample.
struct LoopStepBackward {
    int64_t first, last;
    const float* spike_grad;          // of the first of these neurons on, as …
    float *to_current, *to_membrane;  // out: ∂I, and of what arrives at the membrane, null: not wanted
    float* parameters[kMostParameters];  // += their gradients
    const float *now, *before;        // states [states][padded], of all neurons
    float* states;                    // in and out: what reaches them
    bool begins;                      // without a state the spike before the first step is a constant
};

template <class M, class R, class Surrogate>
void loop_step_backward(const LoopCall& call, const LoopStepBackward& step) {
    constexpr int S = M::info.states, P = M::info.parameters;
    const R reset{call.a.neurons.reset};
    const Steepness alpha = steepness(call.a.neurons);
    for (int64_t i = step.first; i < step.last; i += W) {
        const int64_t at = i - step.first;
        Vec p[P], before[S], g[S], grad[P];
        for (int k = 0; k < P; ++k) p[k] = call.parameters[k].vector(i), grad[k] = load(step.parameters[k] + at);
        for (int s = 0; s < S; ++s) before[s] = load(step.before + s * call.padded + i), g[s] = load(step.states + s * call.padded + i);
        const auto slope = [&](Vec u) { return Surrogate::derivative(u - p[P - 1], alpha); };
        const auto slope_before = [&](Vec u) { return step.begins ? Vec{} : slope(u); };
        const Vec through =
            load(step.spike_grad + at) * slope(compared<M>(before, load(step.now + (S - 1) * call.padded + i), p));
        if (step.to_membrane) {
            const Vec reaching = M::info.at_once ? g[S - 1] : g[S - 1] + through;
            store(step.to_membrane + at, takes<M>(before, p, call.a.neurons.reset) ? reaching : Vec{});
        }
        store(step.to_current + at, M::charge_backward(through, slope_before, before, p, g, grad, reset));
        for (int s = 0; s < S; ++s) store(step.states + s * call.padded + i, g[s]);
        for (int k = 0; k < P; ++k) store(step.parameters[k] + at, grad[k]);
    }
}

// Of one source and the targets of a range: adds Vᵀ·∂I to its row, and what its spikes, a bit per lane, add to the gradients of its
// weights.
template <int L>
void gather(const LoopCall& call, int32_t range, int64_t source, const float* to_current, uint32_t spikes, float* sum, float* grad) {
    typedef typename RowOf<L>::type Row;
    const float* const weights = call.a.weights;
    const Numbers target = call.lists.other();
    const int64_t first = call.lists.of_range(range)[source], last = call.lists.of_range(range)[source + 1];
    const float* const rows = to_current + int64_t{range} * call.lists.length * L;
    const auto row = [&](int64_t e) -> const Row& { return *reinterpret_cast<const Row*>(rows + int64_t{target[e]} * L); };
    Row even = Row{}, odd = Row{};
    int64_t e = first;
    for (; e + 2 <= last; e += 2) even = even + row(e) * weights[e], odd = odd + row(e + 1) * weights[e + 1];
    if (e < last) even = even + row(e) * weights[e];
    Row& to = *reinterpret_cast<Row*>(sum);
    to = range ? to + (even + odd) : even + odd;
    for (; spikes; spikes &= spikes - 1) {
        const float* const lane = rows + __builtin_ctz(spikes);
        for (e = first; e < last; ++e) grad[e] += lane[int64_t{target[e]} * L];
    }
}

// All steps of a group of samples backwards, a window of them after the other.
struct LoopBackward {
    const LoopCall& call;
    const ListLoop& a = call.a;
    const int64_t lanes = int64_t{a.width} * a.window, rings = divide_up(a.delay, a.window);
    void (*step)(const LoopCall&, const LoopStepBackward&) = with_gradient(a.neurons, [](auto m, auto reset, auto surrogate) {
        return &loop_step_backward<decltype(m), decltype(reset), decltype(surrogate)>;
    });
    float *own, *states;          // [width][states][padded] before the first step, and what reaches them
    float* reaching;              // [rings][padded][lanes]: Vᵀ·∂I of the last windows
    float* to_current;            // [padded][lanes]: ∂I of this one
    uint32_t* spikes;             // [padded] of D steps before, a bit per lane
    float* held[2];               // [width][padded] of the current, of the membrane, if it is held and wanted
    float* sums[kMostParameters]; // [padded]
    float* tiles;                 // of each thread: [2 · lanes + 2][kNeurons]
    float* grad;                  // [entries], null: not wanted
    int64_t sample = 0, samples = 0;  // of the group
    int64_t window = 0, begin = 0;    // its number, from the end, and its first step, which may be before the run

    LoopBackward(const LoopCall& loop, Arena& arena) : call(loop) {
        const int64_t padded = call.padded;
        own = arena.take<float>(a.width * call.rows);
        states = arena.take<float>(a.width * call.rows);
        reaching = arena.take<float>(rings * padded * lanes);
        to_current = arena.take<float>(padded * lanes);
        spikes = arena.take<uint32_t>(padded);
        held[0] = a.held && a.grad_current ? arena.take<float>(a.width * padded) : nullptr;
        held[1] = a.membrane_held && a.grad_membrane ? arena.take<float>(a.width * padded) : nullptr;
        for (int k = 0; k < call.model.parameters; ++k) sums[k] = arena.take<float>(padded);
        tiles = arena.take<float>(a.threads * (2 * lanes + 2) * kNeurons);
        grad = a.grad_values ? arena.take<float>(call.lists.entries()) : nullptr;
    }

    void start(int64_t group) {
        sample = group * a.width, samples = least(a.width, a.samples - sample);
        for (float* each : held)
            if (each) zero(each, a.width * call.padded * sizeof(float));
        for (int k = 0; k < call.model.parameters; ++k) zero(sums[k], call.padded * sizeof(float));
        for (int64_t s = 0; s < samples; ++s) {
            call.load_states(a.state, sample + s, own + s * call.rows);
            call.load_states(a.grad_last, sample + s, states + s * call.rows);
        }
    }

    // f(t, sample of the group, lane) for the steps of this window that are in the run, downwards.
    template <class F>
    void each_lane(const F& f) const {
        for (int64_t t = begin + a.window - 1; t >= most(begin, 0); --t)
            for (int64_t s = 0; s < samples; ++s) f(t, s, (t - begin) * a.width + s);
    }

    // The window's steps of neurons first … last − 1, whole vectors.
    void back(int64_t first, int64_t last, int worker) const {
        float* const from = tiles + worker * (2 * lanes + 2) * kNeurons;
        float *const to = from + lanes * kNeurons, *const membrane = to + lanes * kNeurons, *const unwanted = membrane + kNeurons;
        const int64_t inside = least(last, a.size);
        load_reaching(first, last, from);
        zero(to, lanes * kNeurons * sizeof(float));  // those of no sample, or of no step, too
        each_lane([&](int64_t t, int64_t s, int64_t lane) {
            float *const of_spikes = from + lane * kNeurons, *const of_current = to + lane * kNeurons;
            const float* const outside = call.row(a.grad_spikes, a.grad_held, t, sample + s);
            for (int64_t n = first; outside && n < inside; ++n) of_spikes[n - first] += outside[n];
            const uint8_t* const dropped = call.row(a.dropped, 1, t, sample + s);
            for (int64_t n = first; dropped && n < inside; ++n)
                if (dropped[n]) of_spikes[n - first] = 0;
            LoopStepBackward now{first, last, of_spikes, of_current, a.grad_membrane ? membrane : nullptr, {}};
            for (int k = 0; k < call.model.parameters; ++k)
                now.parameters[k] = a.neurons.parameters[k].grad ? sums[k] + first : unwanted;
            now.now = call.states(t, sample + s), now.before = t ? call.states(t - 1, sample + s) : own + s * call.rows;
            now.states = states + s * call.rows, now.begins = t == 0 && !a.state;
            (*step)(call, now);
            give(of_current, first, inside, held[0] ? held[0] + s * call.padded : nullptr, call.row(a.grad_current, a.held, t, sample + s));
            if (a.grad_membrane)
                give(membrane, first, inside, held[1] ? held[1] + s * call.padded : nullptr,
                     call.row(a.grad_membrane, a.membrane_held, t, sample + s));
        });
        for (int64_t n = first; n < last; ++n)
            for (int64_t lane = 0; lane < lanes; ++lane) to_current[n * lanes + lane] = to[lane * kNeurons + n - first];
        if (!grad) return;
        zero(spikes + first, (last - first) * sizeof(uint32_t));
        each_lane([&](int64_t t, int64_t s, int64_t lane) {
            const int64_t then = t - a.delay;
            if (then >= 0)
                each_bit(call.spikes(then, sample + s), first / 64, last / 64, [&](int64_t n) { spikes[n] |= uint32_t{1} << lane; });
            const float* const sent = then < 0 ? call.sent(then, sample + s) : nullptr;
            for (int64_t n = first; sent && n < inside; ++n) spikes[n] |= uint32_t{sent[n] != 0.0f} << lane;
        });
    }

    // Sources first … last − 1, to which this window passes what reaches the spikes of D steps before from the targets of a range.
    void visit(int32_t range, int64_t first, int64_t last) const {
        float* const to = reaching + window % rings * call.padded * lanes;
        choose(Widths{}, __builtin_ctzll(lanes), [&](auto width) {
            for (int64_t n = first; n < last; ++n)
                gather<decltype(width)::value>(call, range, n, to_current, grad ? spikes[n] : 0, to + n * lanes, grad);
        });
        if (a.grad_sent && range + 1 == call.lists.ranges)
            each_lane([&](int64_t t, int64_t s, int64_t lane) {
                float* const of_sent = t < a.delay ? call.row(a.grad_sent, 0, t, sample + s) : nullptr;
                for (int64_t n = first; of_sent && n < last; ++n) of_sent[n] = to[n * lanes + lane];
            });
    }

private:
    // tile[lane][n − first] = Vᵀ·∂I of the steps of this window.
    void load_reaching(int64_t first, int64_t last, float* tile) const {
        zero(tile, lanes * kNeurons * sizeof(float));
        for (int64_t t = most(begin, 0); t < begin + a.window && t + a.delay < a.steps; ++t) {
            const int64_t then = (a.steps - 1 - t - a.delay) / a.window;  // the window of step t + D
            const int64_t lane = (t + a.delay - (a.steps - (then + 1) * a.window)) * a.width;
            const float* const from = reaching + then % rings * call.padded * lanes + lane;
            float* const to = tile + (t - begin) * a.width * kNeurons;
            for (int64_t n = first; n < last; ++n)
                for (int64_t s = 0; s < a.width; ++s) to[s * kNeurons + n - first] = from[n * lanes + s];
        }
    }
    // Gives what reaches a port in a step.
    static void give(const float* tile, int64_t first, int64_t last, float* sum, float* to) {
        for (int64_t n = first; sum && n < last; ++n) sum[n] += tile[n - first];
        if (to && !sum) __builtin_memcpy(to + first, tile, (last - first) * sizeof(float));
    }
};

inline void list_loop_backward(ListLoop& a, Arena& arena) {
    const LoopCall call(a);
    LoopBackward run(call, arena);
    double* totals[kMostParameters] = {};
    for (int k = 0; k < call.model.parameters; ++k) totals[k] = arena.take<double>(a.size);
    if (!arena.base) return;

    if (run.grad) zero_floats(run.grad, call.lists.entries(), a.threads);
    for (int k = 0; k < call.model.parameters; ++k) zero(totals[k], a.size * sizeof(double));
    for (int64_t t = a.steps; a.grad_sent && t < a.delay; ++t)  // what arrives after the run
        zero(a.grad_sent + t * call.matrix, call.matrix * sizeof(float));

    for (int64_t group = 0; group * a.width < a.samples; ++group) {
        run.start(group);
        for (run.window = 0; run.window * a.window < a.steps; ++run.window) {
            run.begin = a.steps - (run.window + 1) * a.window;
            parallel(a.threads, divide_up(call.padded, kNeurons), 8, [&](int64_t i, int worker) {
                run.back(i * kNeurons, least(call.padded, (i + 1) * kNeurons), worker);
            });
            const bool visits = run.begin + a.window > a.delay || a.sent;
            for (int32_t range = 0; visits && range < call.lists.ranges; ++range)
                each_part(a.size, kSources, a.threads, [&](int64_t first, int64_t last) { run.visit(range, first, last); });
        }
        for (int64_t s = 0; s < run.samples; ++s) {
            if (a.grad_state) call.store_states(run.states + s * call.rows, run.sample + s, a.grad_state);
            for (int port = 0; port < 2; ++port)
                if (run.held[port])
                    __builtin_memcpy(call.row(port ? a.grad_membrane : a.grad_current, 1, 0, run.sample + s), run.held[port] + s * call.padded,
                                     a.size * sizeof(float));
        }
        for (int k = 0; k < call.model.parameters; ++k)
            for (int64_t n = 0; n < a.size; ++n) totals[k][n] += run.sums[k][n];
    }
    for (int k = 0; k < call.model.parameters; ++k)
        gradient_of_totals(a.neurons.parameters[k], call.model.decays[k], totals[k], a.size, [](int64_t n) { return n; }, a.size);
    if (!a.grad_values) return;
    zero_floats(a.grad_values, a.values, a.threads);  // padding of units too
    each_part(call.lists.entries(), kCopied, a.threads, [&](int64_t first, int64_t last) {
        for (int64_t e = first; e < last; ++e) a.grad_values[call.lists.place[e]] = run.grad[e];
    });
}

}  // namespace g2g::G2G_ISA
