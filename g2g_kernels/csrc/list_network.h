// Populations that are joined by weights in lists (lists.h), forward over all steps: what a spike costs is the weights that it
// visits. Spikes are lists, too, and a delay is the place of a list in a ring; nothing of [T][B][N] is formed.
//
// A sample is one task, since samples fire at other times and share no list. In a step each population, in an order that
// connections without a delay allow, takes what arrives and gives its spikes. There are two ways to do so:
//
//   AllNeurons   passes over all neurons, a vector at a time. What arrives is added up before.
//   Reached      visits neurons that something arrives at, and those that may reach their threshold without it (*hot* ones).
//                A neuron that is not visited is caught up later, in closed form.
//
// A population changes from one to the other by what its spikes have visited in the last steps, so by nothing that depends on
// time or threads. In exact arithmetic both are equal. Sums have one order: connections as they are given, sources ascending.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "interface.h"
#include "lists.h"
#include "neurons.h"
#include "parallel.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// Weights of one source that something arrives over, times a factor.
struct Arrival {
    const int32_t* target;
    const Real* weight;
    int64_t count;
    Real factor;
    bool to_membrane;

    // f(target, what arrives there)
    template <class F>
    void each(const F& f) const {
        for (int64_t e = 0; e < count; ++e) f(target[e], factor * weight[e]);
    }
};
using Arrivals = std::vector<Arrival>;

// A list comes from memory: its first lines are fetched early.
inline void fetch(const Arrival& next) {
    for (int64_t e = 0; e < least(next.count, 64); e += 16) {
        __builtin_prefetch(next.target + e);
        __builtin_prefetch(next.weight + e);
    }
}
constexpr size_t kListsAhead = 2;

// A parameter of each of a population's neurons, decays clamped: one number that all have (step 0), or one each.
struct OfNeurons {
    std::vector<Real> numbers;
    int64_t step;

    OfNeurons(const Parameter& parameter, bool decay, int64_t size) {
        const Real* const given = reinterpret_cast<const Real*>(parameter.value);
        step = parameter.per_neuron && std::any_of(given, given + size, [&](Real each) { return each != given[0]; });
        numbers.assign(step ? (size + W - 1) / W * W : W, given[0]);
        if (step) std::copy(given, given + size, numbers.begin());
        if (decay)
            for (Real& each : numbers) each = std::clamp(each, Real(0), Real(1));
    }
    Vec vector(int64_t i) const { return load(numbers.data() + i * step); }
    Real of(int64_t i) const { return numbers[i * step]; }
};

// A population as all samples share it.
struct SharedPopulation {
    const ListPopulation& given;
    const ModelInfo& model = model_info(given.neurons);
    int64_t size = given.size, padded = (size + W - 1) / W * W;
    std::vector<OfNeurons> parameters;
    std::vector<Real> decayed;      // of Reached, [steps + 1][3]: what is left of u and of g after so many steps, and what g gave to u
    Real kappa = 0;                 // the most that a g of 1 gives to u in any time
    bool bounded = false;           // u stays below max(u, g, 0) until something arrives

    explicit SharedPopulation(const ListPopulation& population) : given(population) {
        for (int k = 0; k < model.parameters; ++k)
            parameters.emplace_back(given.neurons.parameters[k], model.decays[k], size);
        with_step(given.neurons, [](auto, auto) { return true; });  // throws for an unknown reset
    }
};

// What arrives in each step at the current and at the membrane of a population: biases, and inputs that are held; empty: nothing.
struct Held {
    std::vector<Real> at[2];
    bool any() const { return !at[0].empty() || !at[1].empty(); }
};

// A number of steps, of which a neuron counts no parts.
inline int32_t steps_of(Real number) { return static_cast<int32_t>(std::min(std::ceil(number), Real(1 << 29))); }

// --- all neurons ------------------------------------------------------------------------------------------------

// Where the membrane takes a current of its own in a step from the states `before`, of a model whose current goes elsewhere.
template <class M, int R>
G2G_INLINE IntVec takes(const Vec (&before)[M::info.states], const Vec (&p)[M::info.parameters]) {
    constexpr int S = M::info.states, P = M::info.parameters;
    if constexpr (M::info.at_once) return (before[0] == Vec{}) & ~(M::compared(before, p) > p[P - 1]);
    return R == kZero ? ~(before[S - 1] > p[P - 1]) : Vec{} == Vec{};
}

template <class M, int R>
struct AllNeurons {
    static constexpr int S = M::info.states, P = M::info.parameters;
    enum Mark : uint8_t { kArrived = 1, kWaiting = 2 };
    const SharedPopulation& shared;
    const Held& held;
    std::vector<Real> states, arrived[2];  // [states][padded]; what has arrived at the current and at the membrane
    std::vector<uint8_t> marks;  // of each vector: whether something has; whether a neuron may be refractory

    AllNeurons(const SharedPopulation& population, const Held& constant) : shared(population), held(constant) {
        states.resize(S * shared.padded);
        marks.resize(shared.padded / W, kWaiting);
    }

    template <class F>  // fires(neuron)
    void step(const Arrivals& arrivals, const F& fires) {
        for (size_t i = 0; i < arrivals.size(); ++i) {
            if (i + kListsAhead < arrivals.size()) fetch(arrivals[i + kListsAhead]);
            std::vector<Real>& sums = arrived[arrivals[i].to_membrane];
            if (sums.empty()) sums.resize(shared.padded);
            Real* const to = sums.data();
            uint8_t* const mark = marks.data();
            arrivals[i].each([&](int32_t n, Real x) { to[n] += x, mark[n / W] |= kArrived; });
        }
        const bool to_membrane = !arrived[1].empty() || !held.at[1].empty();
        if (held.any())
            pass<true, true>(fires);
        else
            to_membrane ? pass<true, false>(fires) : pass<false, false>(fires);
    }

private:
    // What arrives at a vector of neurons.
    static Vec take(Real* arrived, const Real* held, int64_t i) {
        Vec sum = held ? load(held + i) : Vec{};
        if (arrived) {
            sum += load(arrived + i);
            store(arrived + i, Vec{});
        }
        return sum;
    }
    template <class V>
    static auto data_of(V& numbers) {
        return numbers.empty() ? nullptr : numbers.data();
    }

    template <bool ToMembrane, bool IsHeld, class F>
    void pass(const F& fires) {
        // copies, which no store of the loop can change
        const int64_t padded = shared.padded, size = shared.size;
        Real *const state = states.data(), *const to[2] = {data_of(arrived[0]), data_of(arrived[1])};
        const Real* const constant[2] = {data_of(held.at[0]), data_of(held.at[1])};
        uint8_t* const mark = marks.data();
        const Real* numbers[P];
        int64_t step[P];
        for (int k = 0; k < P; ++k) numbers[k] = shared.parameters[k].numbers.data(), step[k] = shared.parameters[k].step;
        for (int64_t i = 0; i < padded; i += W) {
            const uint8_t own = mark[i / W];
            Vec current{}, membrane{};
            if (IsHeld || own & kArrived) {
                current = take(to[0], constant[0], i);
                if (ToMembrane) membrane = take(to[1], constant[1], i);
                mark[i / W] = own & ~kArrived;
            }
            const Vec theta = load(numbers[P - 1] + i * step[P - 1]);
            if constexpr (M::info.at_once) {
                if (!(own & kWaiting)) {  // the same step, for neurons that are not refractory and do not fire
                    Real *const at_g = state + padded + i, *const at_u = at_g + padded;
                    const Vec alpha = load(numbers[0] + i * step[0]), beta = load(numbers[1] + i * step[1]);
                    const Vec g = load(at_g), u = beta * load(at_u) + load(numbers[2] + i * step[2]) * g;
                    if (__builtin_expect(!greater_bits(u, theta), 1)) {
                        store(at_g, alpha * g + current);
                        store(at_u, ToMembrane ? u + membrane : u);
                        continue;
                    }
                }
            }
            Vec before[S], now[S], p[P];
            for (int s = 0; s < S; ++s) now[s] = before[s] = load(state + s * padded + i);
            for (int k = 0; k < P; ++k) p[k] = load(numbers[k] + i * step[k]);
            M::template charge<R>(now, current, p);
            if (ToMembrane) now[S - 1] = takes<M, R>(before, p) ? now[S - 1] + membrane : now[S - 1];
            uint64_t bits = greater_bits(compared<M>(before, now[S - 1], p), theta);
            for (int s = 0; s < S; ++s) store(state + s * padded + i, now[s]);
            if (M::info.at_once) mark[i / W] = greater_bits(now[0], Vec{}) ? kWaiting : 0;
            for (; bits; bits &= bits - 1) {
                const int64_t n = i + __builtin_ctzll(bits);
                if (n < size) fires(static_cast<int32_t>(n));
            }
        }
    }
};

// --- those that something reaches -------------------------------------------------------------------------------

// What CubaLif neurons do where they are left alone: u ← βⁿ·u + cₙ·g, g ← γⁿ·g; and what bounds u then, which holds for
// c ≥ 0 and, of `bounded`, for β + c ≤ 1, where u moves to a mean of itself, of g and of 0.
inline void prepare_reached(SharedPopulation& shared, int64_t steps) {
    const auto& p = shared.parameters;
    if (!shared.model.at_once || p[0].step || p[1].step || p[2].step || p[4].step) return;
    const double decay_g = p[0].of(0), decay_u = p[1].of(0), gain = p[2].of(0);
    if (!(gain >= 0 && std::isfinite(gain))) return;
    shared.bounded = decay_u + gain <= 1;
    double u = 1, g = 1, given = 0;
    shared.decayed.resize(3 * (steps + 2));
    for (int64_t n = 0; n < steps + 2; ++n) {
        shared.decayed[3 * n] = static_cast<Real>(u);
        shared.decayed[3 * n + 1] = static_cast<Real>(g);
        shared.decayed[3 * n + 2] = static_cast<Real>(given);
        shared.kappa = std::max(shared.kappa, static_cast<Real>(given));
        given = decay_u * given + gain * g, u *= decay_u, g *= decay_g;
    }
}

template <int R>
struct Reached {
    struct State {
        Real u, g;
        int32_t at;  // the step after which they hold
        uint32_t ready : 31, hot : 1;  // the first step that is not refractory; whether it is among the hot ones
    };
    const SharedPopulation& shared;
    std::vector<State> state;
    std::vector<int32_t> hot;
    const Real *const decayed = shared.decayed.data(), *const thetas = shared.parameters[5].numbers.data();
    const int64_t theta_step = shared.parameters[5].step;
    const bool bounded = shared.bounded, resets_current = shared.parameters[4].of(0) > 0;
    const Real kappa = shared.kappa;

    explicit Reached(const SharedPopulation& population) : shared(population) { state.resize(shared.size); }

    // Whether a neuron cannot reach its threshold alone, nor by rounding.
    bool quiet(Real u, Real g, Real theta) const {
        constexpr Real kRounding = 32 * (sizeof(Real) == 4 ? Real(0x1p-23) : Real(0x1p-52));
        const Real limit = theta - std::abs(theta) * kRounding;
        return (bounded && limit >= 0 && u <= limit && g <= limit) || std::max(u, Real(0)) + kappa * std::max(g, Real(0)) <= limit;
    }
    void heat(State& s, int32_t n) {
        if (!s.hot && !quiet(s.u, s.g, thetas[n * theta_step])) s.hot = 1, hot.push_back(n);
    }
    void catch_up(State& s, int32_t t) const {
        const Real* const left = decayed + 3 * int64_t{t - s.at};
        s.u = left[0] * s.u + left[2] * s.g, s.g *= left[1], s.at = t;
    }

    template <class F>
    void step(int32_t t, const Arrivals& arrivals, const F& fires) {
        size_t kept = 0;
        for (size_t i = 0; i < hot.size(); ++i) {
            const int32_t n = hot[i];
            State& s = state[n];
            if (t >= static_cast<int32_t>(s.ready)) {
                const Real theta = thetas[n * theta_step];
                catch_up(s, t);
                if (s.u > theta) {
                    fires(n);
                    s.u = R == kZero ? Real(0) : R == kSubtract ? s.u - theta : s.u;
                    if (resets_current) s.g = 0;
                    s.ready = t + std::max(steps_of(shared.parameters[3].of(n)), 1);
                    s.at = s.ready - 1;
                }
                if (quiet(s.u, s.g, theta)) {
                    s.hot = 0;
                    continue;
                }
            }
            hot[kept++] = n;
        }
        hot.resize(kept);
        for (size_t i = 0; i < arrivals.size(); ++i) {
            if (i + kListsAhead < arrivals.size()) fetch(arrivals[i + kListsAhead]);
            const Arrival& arrival = arrivals[i];
            for (int64_t e = 0; e < arrival.count; ++e) {
                constexpr int64_t kAhead = 8;
                if (e + kAhead < arrival.count) __builtin_prefetch(&state[arrival.target[e + kAhead]], 1);
                State& s = state[arrival.target[e]];
                if (t < static_cast<int32_t>(s.ready)) continue;  // it is refractory, or fires in this step
                if (s.at < t) catch_up(s, t);
                (arrival.to_membrane ? s.u : s.g) += arrival.factor * arrival.weight[e];
                heat(s, arrival.target[e]);
            }
        }
    }
};

// --- a population of a sample -----------------------------------------------------------------------------------

struct Stepper {
    virtual ~Stepper() = default;
    // Takes what arrives in step t; appends the neurons that fire in it, ascending.
    virtual void step(int32_t t, const Arrivals& arrivals, std::vector<int32_t>& fired) = 0;
    // The states [states][B][N] of one sample, `stride` apart, before the first step, and after the last step, t.
    virtual void begin(const Real* states, int64_t stride) = 0;
    virtual void end(int32_t t, Real* states, int64_t stride) = 0;
};

// Nanoseconds of a neuron in a pass over all, of a weight that is added up for it, of a hot neuron, and of a weight that
// visits a neuron (PERFORMANCE.md).
constexpr double kPassed = 0.16, kAdded = 1.2, kHot = 3.0, kVisited = 8.0;
// Steps that are counted before a change, and steps without one after a change that did not pay.
constexpr int32_t kCounted = 64, kStays = 2048;

template <class M, int R>
struct Neuronal : Stepper {
    static constexpr int S = M::info.states;
    static constexpr bool kReached = std::is_same_v<M, CubaLif>;
    const SharedPopulation& shared;
    const Held& held;
    const double visit_cost;  // a factor on the cost of Reached; 0: always that, ∞: never
    const bool can_be_reached;
    std::unique_ptr<AllNeurons<M, R>> all;
    std::unique_ptr<Reached<R>> reached;
    int64_t added = 0, hot = 0;  // since `counted`
    int32_t counted = 0;

    Neuronal(const SharedPopulation& population, const Held& constant, double cost)
        : shared(population), held(constant), visit_cost(cost),
          can_be_reached(kReached && !shared.decayed.empty() && !held.any() && cost < INFINITY) {}

    void begin(const Real* states, int64_t stride) override {
        all = std::make_unique<AllNeurons<M, R>>(shared, held);
        for (int s = 0; states && s < S; ++s)
            std::copy(states + s * stride, states + s * stride + shared.size, all->states.begin() + s * shared.padded);
        if (can_be_reached) reach(-1);
    }

    void step(int32_t t, const Arrivals& arrivals, std::vector<int32_t>& fired) override {
        for (const Arrival& arrival : arrivals) added += arrival.count;
        const auto fires = [&](int32_t n) { fired.push_back(n); };
        if (reached) {
            reached->step(t, arrivals, fires);
            std::sort(fired.begin(), fired.end());
            hot += reached->hot.size();
        } else {
            all->step(arrivals, fires);
        }
        if (can_be_reached && t + 1 - counted >= kCounted) change(t);
    }

    // Goes over to what would have been cheaper since `counted`; after a pass over all neurons their hot ones are not known.
    void change(int32_t t) {
        const double passes = (t + 1 - counted) * kPassed * shared.size + added * kAdded;
        const double visits = visit_cost * (hot * kHot + added * kVisited);
        counted = t + 1, added = hot = 0;
        if (reached && visits > 1.5 * passes)
            pass_all(t), counted += kStays;
        else if (!reached && 1.5 * visits < passes)
            reach(t);
    }

    // The states after step t for visits, and for passes.
    void reach(int32_t t) {
        if constexpr (kReached) {
            reached = std::make_unique<Reached<R>>(shared);
            const Real *const f = all->states.data(), *const g = f + shared.padded, *const u = g + shared.padded;
            for (int32_t n = 0; n < shared.size; ++n) {
                auto& s = reached->state[n];
                const int32_t waits = steps_of(f[n]);
                s.u = u[n], s.g = g[n], s.at = t + waits, s.ready = t + 1 + waits;
                reached->heat(s, n);
            }
            all.reset();
        }
    }
    void pass_all(int32_t t) {
        if constexpr (kReached) {
            all = std::make_unique<AllNeurons<M, R>>(shared, held);
            Real *const f = all->states.data(), *const g = f + shared.padded, *const u = g + shared.padded;
            for (int32_t n = 0; n < shared.size; ++n) {
                auto& s = reached->state[n];
                if (s.at < t) reached->catch_up(s, t);
                f[n] = static_cast<Real>(std::max(static_cast<int32_t>(s.ready) - (t + 1), 0)), g[n] = s.g, u[n] = s.u;
            }
            reached.reset();
        }
    }

    void end(int32_t t, Real* states, int64_t stride) override {
        if (reached) pass_all(t);
        for (int s = 0; s < S; ++s) std::copy_n(all->states.begin() + s * shared.padded, shared.size, states + s * stride);
    }
};

// --- a network --------------------------------------------------------------------------------------------------

// What a source sends in a step: neurons, ascending, and how much each (empty: 1).
struct Sent {
    std::vector<int32_t> neurons;
    std::vector<Real> sizes;

    void clear() { neurons.clear(), sizes.clear(); }
    // Those of a row that are not 0.
    void read(const Real* row, int64_t size) {
        clear();
        const auto add = [&](int64_t n) {
            if (row[n] != Real(0)) neurons.push_back(static_cast<int32_t>(n)), sizes.push_back(row[n]);
        };
        int64_t n = 0;
        for (; n + W <= size; n += W)
            for (uint64_t bits = nonzero_bits(load(row + n)); bits; bits &= bits - 1) add(n + __builtin_ctzll(bits));
        for (; n < size; ++n) add(n);
    }
    Real size(size_t i) const { return sizes.empty() ? Real(1) : sizes[i]; }
};

// What all samples share.
struct NetworkCall {
    const ListNetwork& a;
    std::vector<SharedPopulation> populations;
    std::vector<int32_t> rings;  // steps of each source that are kept, the inputs' last

    explicit NetworkCall(const ListNetwork& network) : a(network) {
        for (int32_t p = 0; p < a.population_count; ++p) populations.emplace_back(a.populations[p]);
        rings.assign(a.population_count + 1, 1);
        for (int32_t c = 0; c < a.connection_count; ++c) {
            const ListConnection& each = a.connections[c];
            int32_t& ring = rings[source(each)];
            ring = std::max(ring, each.most + 1);
        }
    }
    int32_t source(const ListConnection& each) const { return each.source < 0 ? a.population_count : each.source; }
    // Whether a connection brings the same in each step.
    bool constant(const ListConnection& each) const { return a.held && each.source < 0 && each.most == 0; }
};

class SampleRun {
    const NetworkCall& call;
    const ListNetwork& a = call.a;
    const int64_t sample;
    std::vector<Held> held;
    std::vector<std::unique_ptr<Stepper>> steppers;
    std::vector<std::vector<Sent>> sent;  // of each source, a ring of steps
    Arrivals arrivals;
    std::vector<std::pair<int32_t, Real>> late;

    void arrive(const ListConnection& each, int32_t source, Real size) {
        const int64_t* const first = each.lists->first.data() + source;
        const Real* const weights = static_cast<const Real*>(each.weights) + first[0];
        if (first[1] > first[0])
            arrivals.push_back({each.lists->other.data() + first[0], weights, first[1] - first[0], size, each.to_membrane != 0});
    }
    Sent& of(int32_t source, int64_t t) {
        std::vector<Sent>& ring = sent[source];
        const auto size = static_cast<int64_t>(ring.size());
        return ring[(t % size + size) % size];
    }

    // Appends what a connection brings in step t.
    void gather(const ListConnection& each, int64_t t) {
        const int32_t source = call.source(each);
        if (!each.delays) {
            const Sent& from = of(source, t - each.least);
            for (size_t i = 0; i < from.neurons.size(); ++i) arrive(each, from.neurons[i], from.size(i));
            return;
        }
        late.clear();
        for (int32_t delay = each.least; delay <= each.most; ++delay) {
            const Sent& from = of(source, t - delay);
            for (size_t i = 0; i < from.neurons.size(); ++i)
                if (each.delays[from.neurons[i]] == delay) late.emplace_back(from.neurons[i], from.size(i));
        }
        std::sort(late.begin(), late.end());
        for (const auto& [neuron, size] : late) arrive(each, neuron, size);
    }

    void read_inputs(int64_t t) {
        const int64_t row = (a.held ? 0 : t) * a.samples + sample;
        of(a.population_count, t).read(static_cast<const Real*>(a.x) + row * a.inputs, a.inputs);
    }

    // Adds up what is the same in each step.
    void hold() {
        held.resize(a.population_count);
        for (int32_t c = 0; c < a.connection_count; ++c) {
            const ListConnection& each = a.connections[c];
            if (!each.bias && !call.constant(each)) continue;
            const SharedPopulation& target = call.populations[each.target];
            std::vector<Real>& sum = held[each.target].at[each.to_membrane];
            sum.resize(target.padded);
            for (int64_t n = 0; each.bias && n < target.size; ++n) sum[n] += static_cast<const Real*>(each.bias)[n];
            if (!call.constant(each)) continue;
            read_inputs(0);
            arrivals.clear();
            gather(each, 0);
            for (const Arrival& arrival : arrivals) arrival.each([&](int32_t n, Real x) { sum[n] += x; });
        }
    }

public:
    SampleRun(const NetworkCall& network, int64_t number) : call(network), sample(number) {
        for (int32_t source = 0; source <= a.population_count; ++source) {
            const bool inputs = source == a.population_count;
            const int64_t size = inputs ? a.inputs : a.populations[source].size;
            const auto before = static_cast<const Real*>(inputs ? a.before : a.populations[source].sent);
            const int64_t known = !before ? 0 : inputs ? a.before_steps : a.populations[source].sent_steps;
            sent.emplace_back(call.rings[source]);
            for (int64_t ago = 1; ago <= least(known, call.rings[source] - 1); ++ago)
                of(source, -ago).read(before + ((known - ago) * a.samples + sample) * size, size);
        }
        hold();
        for (int32_t p = 0; p < a.population_count; ++p) {
            const ListPopulation& given = a.populations[p];
            steppers.push_back(with_step(given.neurons, [&](auto model, auto reset) -> std::unique_ptr<Stepper> {
                return std::make_unique<Neuronal<decltype(model), decltype(reset)::value>>(call.populations[p], held[p], a.visit_cost);
            }));
            const auto state = static_cast<const Real*>(given.state);
            steppers[p]->begin(state ? state + sample * given.size : nullptr, int64_t{a.samples} * given.size);
        }
    }

    void run() {
        for (int32_t t = 0; t < a.steps; ++t) {
            read_inputs(t);
            for (int32_t i = 0; i < a.population_count; ++i) {
                const int32_t p = a.order[i];
                arrivals.clear();
                for (int32_t c = 0; c < a.connection_count; ++c)
                    if (a.connections[c].target == p && !call.constant(a.connections[c])) gather(a.connections[c], t);
                take_step(p, t);
            }
        }
        for (int32_t p = 0; p < a.population_count; ++p) {
            const int64_t size = a.populations[p].size;
            steppers[p]->end(a.steps - 1, static_cast<Real*>(a.populations[p].last) + sample * size, a.samples * size);
        }
    }

private:
    void take_step(int32_t p, int32_t t) {
        Sent& now = of(p, t);
        now.clear();
        steppers[p]->step(t, arrivals, now.neurons);
        if (const uint8_t* dropped = a.populations[p].dropped) {
            dropped += sample * a.populations[p].size;
            const auto silent = [&](int32_t n) { return dropped[n] != 0; };
            now.neurons.erase(std::remove_if(now.neurons.begin(), now.neurons.end(), silent), now.neurons.end());
        }
        SampleSpikes& spikes = a.spikes->of[p * a.samples + sample];
        spikes.neurons.insert(spikes.neurons.end(), now.neurons.begin(), now.neurons.end());
        spikes.counts.push_back(static_cast<int32_t>(now.neurons.size()));
    }
};

inline void list_network(ListNetwork& a, Arena& arena) {
    if (!arena.base) return;
    NetworkCall call(a);
    for (SharedPopulation& population : call.populations) prepare_reached(population, a.steps);
    std::atomic<bool> failed{false};
    parallel(a.threads, a.samples, 1, [&](int64_t sample, int) {
        try {
            SampleRun(call, sample).run();
        } catch (const std::exception&) {
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
}

}  // namespace g2g::G2G_ISA
