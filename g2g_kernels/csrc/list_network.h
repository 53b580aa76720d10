// Populations that are joined by weights in lists (lists.h), forward over all steps: what a spike costs is the weights that it
// visits. Spikes are lists, too, and a delay is the place of a list in a ring; nothing of [T][B][N] is formed. list_gradients.h has
// the backward pass.
//
// A sample is one task, since samples fire at other times and share no list. In a step each population, in an order that
// connections without a delay allow, takes what arrives and gives its spikes. Neurons of the model CubaLif are visited where something
// arrives or where they may fire without it, or all are passed over, a vector at a time; other models are always passed over. In exact
// arithmetic visits and passes are equal. Sums have one order: connections as they are given, sources ascending.
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
#include "parameters.h"
#include "vec.h"

namespace g2g::G2G_ISA {

constexpr uint64_t kOfVector = (uint64_t{1} << W) - 1;  // a bit for each of its lanes

// Weights of one source, to targets of one range, that something arrives over, times a factor.
struct Arrival {
    Numbers target;  // from neuron `base` on
    const Real* weight;
    int32_t base;
    int64_t count;
    Real factor;
    bool to_membrane;
};
using Arrivals = std::vector<Arrival>;

// A list comes from memory: its first lines are fetched early.
inline void fetch(const Arrival& next) {
    for (int64_t e = 0; e < least(next.count, 64); e += 16) {
        __builtin_prefetch(next.target.at(e));
        __builtin_prefetch(next.weight + e);
    }
}
constexpr size_t kListsAhead = 3;

// A population as all samples share it.
struct SharedPopulation {
    const ListPopulation& given;
    const ModelInfo& model = model_info(given.neurons);
    int64_t size = given.size, padded = (size + W - 1) / W * W;
    std::vector<OfNeurons> parameters;
    // of Visits: [steps + 1][3], what is left of u and of g after so many steps, and what a g of 1 has given to u; the most of that in
    // any time; whether u stays below max(u, g, 0)
    std::vector<Real> decayed;
    Real kappa = 0;
    bool bounded = false;
    Real slack = given.slack;  // of gradient events, 0: none are noted

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

// A number of steps; a part of one is a whole one.
inline int32_t steps_of(Real number) { return static_cast<int32_t>(std::min(std::ceil(number), Real(1 << 29))); }

// The gradient events of a step, in any order: neurons, and their U − θ.
struct Events {
    std::vector<int32_t> neurons;
    std::vector<Real> excess;

    void clear() { neurons.clear(), excess.clear(); }
    // Notes one; returns whether it is no spike.
    bool note(int32_t n, Real over, Real slack) {
        if (!(std::abs(over) >= slack)) neurons.push_back(n), excess.push_back(over);
        return !(over > 0);
    }
};

// The steps that a neuron whose state is f waits: where f is not 0, one at least.
inline int32_t waiting(Real f) { return f == 0 ? 0 : std::max(steps_of(f), 1); }

// A population of a sample.
struct Stepper {
    Events events;
    virtual ~Stepper() = default;
    // Appends the neurons that fire in step t, ascending, if nothing that arrives in it has a part in that.
    virtual void fire(int32_t, std::vector<int32_t>&) {}
    // Takes what arrives in step t; appends the neurons that fire in it, ascending, if they did not before.
    virtual void receive(int32_t t, const Arrivals& arrivals, std::vector<int32_t>& fired) = 0;
    // The membrane of a neuron after step t; nothing changes by it.
    virtual Real membrane(int32_t, int32_t) const { return 0; }
    // The states after the last step, t, each `stride` after the one before it.
    virtual void end(int32_t t, Real* states, int64_t stride) = 0;
};

// f(arrival, target, what arrives there) for all that arrives, and ahead(target) some time before.
template <class F, class Ahead>
void each_weight(const Arrivals& arrivals, const Ahead& ahead, const F& f) {
    constexpr int64_t kAhead = 16;
    for (size_t i = 0; i < arrivals.size(); ++i) {
        if (i + kListsAhead < arrivals.size()) fetch(arrivals[i + kListsAhead]);
        const Arrival arrival = arrivals[i];
        const int64_t inside = most(arrival.count - kAhead, 0);
        for (int64_t e = 0; e < inside; ++e) {
            ahead(arrival.base + arrival.target[e + kAhead]);
            f(arrival, arrival.base + arrival.target[e], arrival.factor * arrival.weight[e]);
        }
        if (i + 1 < arrivals.size())
            for (int64_t e = 0; e < least(arrivals[i + 1].count, kAhead); ++e) ahead(arrivals[i + 1].base + arrivals[i + 1].target[e]);
        for (int64_t e = inside; e < arrival.count; ++e)
            f(arrival, arrival.base + arrival.target[e], arrival.factor * arrival.weight[e]);
    }
}

// --- any model --------------------------------------------------------------------------------------------------

// Passes over all neurons. What arrives is added up before.
template <class M, class R>
struct AllNeurons : Stepper {
    static constexpr int S = M::info.states, P = M::info.parameters;
    const SharedPopulation& shared;
    const Held& held;
    std::vector<Real> states, arrived[2];  // [states][padded]; what has arrived at the current and at the membrane
    std::vector<uint8_t> reached;          // of each vector: whether something has

    AllNeurons(const SharedPopulation& population, const Held& constant, const Real* before, int64_t stride)
        : shared(population), held(constant) {
        states.resize(S * shared.padded);
        reached.resize(shared.padded / W);
        for (int s = 0; before && s < S; ++s) std::copy_n(before + s * stride, shared.size, states.begin() + s * shared.padded);
    }

    void receive(int32_t, const Arrivals& arrivals, std::vector<int32_t>& fired) override {
        for (const Arrival& arrival : arrivals) arrived[arrival.to_membrane].resize(shared.padded);
        Real* const to[2] = {arrived[0].data(), arrived[1].data()};
        uint8_t* const any = reached.data();
        each_weight(
            arrivals, [](int32_t) {},
            [&](const Arrival& arrival, int32_t n, Real x) { to[arrival.to_membrane][n] += x, any[n / W] = 1; });
        for (int64_t i = 0; i < shared.padded; i += W) {
            const Vec current = take(0, i), membrane = take(1, i);
            reached[i / W] = 0;
            Vec before[S], now[S], p[P];
            for (int s = 0; s < S; ++s) now[s] = before[s] = load(states.data() + s * shared.padded + i);
            for (int k = 0; k < P; ++k) p[k] = shared.parameters[k].vector(i);
            M::charge(now, current, p, R{shared.given.neurons.reset});
            now[S - 1] = takes<M>(before, p, shared.given.neurons.reset) ? now[S - 1] + membrane : now[S - 1];
            for (int s = 0; s < S; ++s) store(states.data() + s * shared.padded + i, now[s]);
            for (uint64_t bits = greater_bits(compared<M>(before, now[S - 1], p), p[P - 1]); bits; bits &= bits - 1) {
                const int64_t n = i + __builtin_ctzll(bits);
                if (n < shared.size) fired.push_back(static_cast<int32_t>(n));
            }
        }
    }
    Real membrane(int32_t n, int32_t) const override { return states[(S - 1) * shared.padded + n]; }
    void end(int32_t, Real* after, int64_t stride) override {
        for (int s = 0; s < S; ++s) std::copy_n(states.begin() + s * shared.padded, shared.size, after + s * stride);
    }

private:
    // What arrives at a vector of neurons.
    Vec take(int port, int64_t i) {
        Vec sum = held.at[port].empty() ? Vec{} : load(held.at[port].data() + i);
        if (reached[i / W] && !arrived[port].empty()) {
            sum += load(arrived[port].data() + i);
            store(arrived[port].data() + i, Vec{});
        }
        return sum;
    }
};

// --- CubaLif ----------------------------------------------------------------------------------------------------
//
// Where ready, in step t:  u ← β·u + c·g, then g ← γ·g;  a spike where u > θ;  without one, what arrives is added. Since it is added
// last, all that happens between two arrivals is a linear step, which n times over is u ← βⁿ·u + cₙ·g, g ← γⁿ·g.

// A neuron after a step. It is ready from step `ready` on.
struct CubaLifState {
    Real u, g;
    int32_t ready;
};

template <int R>
struct Firing {
    const OfNeurons &refractory, &resets_current;

    explicit Firing(const SharedPopulation& shared) : refractory(shared.parameters[3]), resets_current(shared.parameters[4]) {}
    // The state after a spike in step t.
    CubaLifState state(int32_t n, int32_t t, Real u, Real g, Real theta) const {
        const Real left = R == kZero ? Real(0) : R == kSubtract ? u - theta : u;
        return {left, resets_current.of(n) > 0 ? Real(0) : g, t + std::max(steps_of(refractory.of(n)), 1)};
    }
};

// Passes over all neurons. Those that are not ready are passed over as well, and then set to what they were.
template <int R>
struct Passes {
    struct Frozen {
        int32_t neuron;
        CubaLifState state;
    };
    const SharedPopulation& shared;
    const Held& held;
    const Firing<R> firing{shared};
    std::vector<Real> u, g;
    std::vector<int32_t> ready;
    std::vector<Frozen> frozen;

    Passes(const SharedPopulation& population, const Held& constant) : shared(population), held(constant) {
        u.resize(shared.padded), g.resize(shared.padded), ready.resize(shared.size);
    }
    void set(int32_t n, int32_t t, const CubaLifState& state) {
        u[n] = state.u, g[n] = state.g, ready[n] = state.ready;
        if (state.ready > t + 1) frozen.push_back({n, state});
    }
    CubaLifState get(int32_t n, int32_t) const { return {u[n], g[n], ready[n]}; }

    void fire(int32_t t, std::vector<int32_t>& fired, Events& events) {
        const auto& p = shared.parameters;
        const bool alike = !p[0].step && !p[1].step && !p[2].step && !p[5].step;
        if (shared.slack > 0)
            alike ? pass<true, true>(t, fired, events) : pass<false, true>(t, fired, events);
        else
            alike ? pass<true, false>(t, fired, events) : pass<false, false>(t, fired, events);
    }
    void receive(int32_t t, const Arrivals& arrivals) {
        Real* const to[2] = {g.data(), u.data()};
        each_weight(
            arrivals, [](int32_t) {},
            [&](const Arrival& arrival, int32_t n, Real x) { to[arrival.to_membrane][n] += x; });
        for (int port = 0; port < 2; ++port)
            for (size_t i = 0; i < held.at[port].size(); i += W) store(to[port] + i, load(to[port] + i) + load(held.at[port].data() + i));
        size_t kept = 0;
        for (const Frozen& each : frozen) {
            u[each.neuron] = each.state.u, g[each.neuron] = each.state.g;
            if (each.state.ready > t + 1) frozen[kept++] = each;
        }
        frozen.resize(kept);
    }

private:
    template <bool Alike, bool Notes>
    void pass(int32_t t, std::vector<int32_t>& fired, Events& events) {
        const int64_t padded = shared.padded;
        Real *const at_u = u.data(), *const at_g = g.data();
        const OfNeurons* const p = shared.parameters.data();
        const Vec of_all[] = {p[0].vector(0), p[1].vector(0), p[2].vector(0), p[5].vector(0)};
        const auto of = [&](int k, int64_t i) { return Alike ? of_all[k] : p[k == 3 ? 5 : k].vector(i); };
        for (int64_t i = 0; i < padded; i += W) {
            const Vec before = load(at_g + i), now = of(1, i) * load(at_u + i) + of(2, i) * before;
            store(at_g + i, of(0, i) * before);
            store(at_u + i, now);
            // NaN is among those that are not below
            uint64_t bits = Notes ? ~greater_bits(of(3, i) - all(shared.slack), now) & kOfVector : greater_bits(now, of(3, i));
            for (; __builtin_expect(bits != 0, 0); bits &= bits - 1) {
                const auto n = static_cast<int32_t>(i + __builtin_ctzll(bits));
                if (n >= shared.size || ready[n] > t) continue;
                const Real theta = p[5].of(n);
                if (Notes && events.note(n, u[n] - theta, shared.slack)) continue;
                const CubaLifState after = firing.state(n, t, u[n], g[n], theta);
                ready[n] = after.ready;
                frozen.push_back({n, after});
                fired.push_back(n);
            }
        }
    }
};

// Visits neurons that something arrives at, and *hot* ones, which may reach their threshold without it. Others are caught up when they
// are visited. While nothing arrives u stays below max(u, g, 0), if β + c ≤ 1, and below max(u, 0) + κ·max(g, 0), κ = max cₙ.
template <int R>
struct Visits {
    struct State {
        Real u, g;
        int32_t at;                    // the step after which they hold
        uint32_t ready : 31, hot : 1;
    };
    const SharedPopulation& shared;
    const Firing<R> firing{shared};
    std::vector<State> states;
    std::vector<int32_t> hot;
    const Real *const decayed = shared.decayed.data(), *const thetas = shared.parameters[5].numbers.data();
    const int64_t theta_step = shared.parameters[5].step;
    const bool bounded = shared.bounded;
    const Real kappa = shared.kappa, slack = shared.slack;

    explicit Visits(const SharedPopulation& population) : shared(population) { states.resize(shared.size); }
    void set(int32_t n, int32_t t, const CubaLifState& state) {
        State& s = states[n];
        put(s, std::max(state.ready - 1, t), state);
        heat(s, n);
    }
    CubaLifState get(int32_t n, int32_t t) const {
        State s = states[n];
        if (s.at < t) catch_up(s, t);
        return {s.u, s.g, static_cast<int32_t>(s.ready)};
    }

    void fire(int32_t t, std::vector<int32_t>& fired, Events& events) {
        size_t kept = 0;
        for (const int32_t n : hot) {
            State& s = states[n];
            if (t >= static_cast<int32_t>(s.ready)) {
                const Real theta = thetas[n * theta_step];
                catch_up(s, t);
                if (slack > 0) events.note(n, s.u - theta, slack);
                if (s.u > theta) {
                    const CubaLifState after = firing.state(n, t, s.u, s.g, theta);
                    put(s, after.ready - 1, after);
                    fired.push_back(n);
                }
                if (quiet(s, theta)) {
                    s.hot = 0;
                    continue;
                }
            }
            hot[kept++] = n;
        }
        hot.resize(kept);
        std::sort(fired.begin(), fired.end());
    }
    void receive(int32_t t, const Arrivals& arrivals) {
        each_weight(
            arrivals, [&](int32_t n) { __builtin_prefetch(&states[n], 1); },
            [&](const Arrival& arrival, int32_t n, Real x) {
                State& s = states[n];
                if (t < static_cast<int32_t>(s.ready)) return;
                if (s.at < t) catch_up(s, t);
                (arrival.to_membrane ? s.u : s.g) += x;
                heat(s, n);
            });
    }

private:
    static void put(State& s, int32_t at, const CubaLifState& state) {
        s.u = state.u, s.g = state.g, s.at = at, s.ready = static_cast<uint32_t>(std::max(state.ready, 0));
    }
    // Whether a neuron cannot reach its threshold alone, nor by rounding; or where its gradient events begin.
    bool quiet(const State& s, Real theta) const {
        constexpr Real kRounding = 32 * (sizeof(Real) == 4 ? Real(0x1p-23) : Real(0x1p-52));
        const Real limit = theta - slack - std::abs(theta) * kRounding;
        return (bounded && limit >= 0 && s.u <= limit && s.g <= limit) ||
               std::max(s.u, Real(0)) + kappa * std::max(s.g, Real(0)) <= limit;
    }
    void heat(State& s, int32_t n) {
        if (!s.hot && !quiet(s, thetas[n * theta_step])) s.hot = 1, hot.push_back(n);
    }
    void catch_up(State& s, int32_t t) const {
        const Real* const left = decayed + 3 * int64_t{t - s.at};
        s.u = left[0] * s.u + left[2] * s.g, s.g *= left[1], s.at = t;
    }
};

// What Visits reads of a population; nothing where it cannot serve: where neurons have decays of their own, or g lowers u.
inline void prepare_visits(SharedPopulation& shared, int64_t steps) {
    const auto& p = shared.parameters;
    if (!shared.model.at_once || p[0].step || p[1].step || p[2].step) return;
    const double decay_g = p[0].of(0), decay_u = p[1].of(0), gain = p[2].of(0);
    if (!(gain >= 0 && std::isfinite(gain))) return;
    shared.bounded = decay_u + gain <= 1;
    double u = 1, g = 1, given = 0;
    for (int64_t n = 0; n <= steps; ++n) {
        for (const double each : {u, g, given}) shared.decayed.push_back(static_cast<Real>(each));
        shared.kappa = std::max(shared.kappa, static_cast<Real>(given));
        given = decay_u * given + gain * g, u *= decay_u, g *= decay_g;
    }
}

// Nanoseconds of a neuron in a pass, of a weight that is added there, of a hot neuron, and of a weight that visits one
// (PERFORMANCE.md).
constexpr double kPassed = 0.14, kAdded = 2.2, kHot = 15.0, kVisited = 8.0;
// Steps that are counted before a change, and steps without one after visits that cost more.
constexpr int32_t kCounted = 64, kStays = 2048;

// By visits or by passes, whichever its last steps would have been cheaper by: nothing that depends on time or on threads.
template <int R>
struct CubaLifs : Stepper {
    const SharedPopulation& shared;
    const Held& held;
    const double visit_cost;  // a factor on the cost of visits; 0: always these, ∞: never
    const bool can_visit = !shared.decayed.empty() && !held.any() && visit_cost < INFINITY;
    std::unique_ptr<Passes<R>> passes;
    std::unique_ptr<Visits<R>> visits;
    int64_t added = 0, hot = 0;  // since step `counted`
    int32_t counted = 0;

    CubaLifs(const SharedPopulation& population, const Held& constant, double cost, const Real* before, int64_t stride)
        : shared(population), held(constant), visit_cost(cost) {
        const auto state = [&](int32_t n, int32_t) -> CubaLifState {
            if (!before) return {0, 0, 0};
            return {before[2 * stride + n], before[stride + n], waiting(before[n])};
        };
        can_visit ? fill(visits, -1, state) : fill(passes, -1, state);
    }

    void fire(int32_t t, std::vector<int32_t>& fired) override {
        visits ? visits->fire(t, fired, events) : passes->fire(t, fired, events);
    }
    void receive(int32_t t, const Arrivals& arrivals, std::vector<int32_t>&) override {
        visits ? visits->receive(t, arrivals) : passes->receive(t, arrivals);
        if (!can_visit) return;
        for (const Arrival& arrival : arrivals) added += arrival.count;
        hot += visits ? visits->hot.size() : 0;
        if (t + 1 - counted < kCounted) return;
        const double of_passes = kCounted * kPassed * shared.size + added * kAdded;
        const double of_visits = visit_cost * (hot * kHot + added * kVisited);  // after passes without its hot neurons
        counted = t + 1, added = hot = 0;
        if (visits && of_visits > 1.5 * of_passes) {
            fill(passes, t, [&](int32_t n, int32_t now) { return visits->get(n, now); });
            visits.reset();
            counted += kStays;
        } else if (passes && 1.5 * of_visits < of_passes) {
            fill(visits, t, [&](int32_t n, int32_t now) { return passes->get(n, now); });
            passes.reset();
        }
    }

    Real membrane(int32_t n, int32_t t) const override { return state(n, t).u; }
    void end(int32_t t, Real* states, int64_t stride) override {
        for (int32_t n = 0; n < shared.size; ++n) {
            const CubaLifState after = state(n, t);
            states[n] = static_cast<Real>(std::max(after.ready - (t + 1), 0));
            states[stride + n] = after.g, states[2 * stride + n] = after.u;
        }
    }

private:
    CubaLifState state(int32_t n, int32_t t) const { return visits ? visits->get(n, t) : passes->get(n, t); }
    // Makes passes, or visits, of the states after step t.
    template <class Engine, class State>
    void fill(std::unique_ptr<Engine>& engine, int32_t t, const State& state) {
        if constexpr (std::is_same_v<Engine, Visits<R>>)
            engine = std::make_unique<Engine>(shared);
        else
            engine = std::make_unique<Engine>(shared, held);
        for (int32_t n = 0; n < shared.size; ++n) engine->set(n, t, state(n, t));
    }
};

template <class M, class R>
std::unique_ptr<Stepper> stepper(const SharedPopulation& shared, const Held& held, double visit_cost, const Real* before,
                                 int64_t stride) {
    if constexpr (std::is_same_v<M, CubaLif>)
        return choose(Resets{}, shared.given.neurons.reset, [&](auto reset) -> std::unique_ptr<Stepper> {
            return std::make_unique<CubaLifs<decltype(reset)::value>>(shared, held, visit_cost, before, stride);
        });
    else
        return std::make_unique<AllNeurons<M, R>>(shared, held, before, stride);
}

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

// Neurons by step, of one sample; without counts none.
struct Steps {
    const int32_t* neurons;
    std::vector<int64_t> first;  // [T + 1]

    Steps(const int32_t* counts, const int32_t* all, int64_t sample, int64_t steps) : neurons(all), first(steps + 1) {
        for (int64_t i = 0; counts && i < sample * steps; ++i) neurons += counts[i];
        for (int64_t t = 0; counts && t < steps; ++t) first[t + 1] = first[t] + counts[sample * steps + t];
    }
    int64_t offset(const int32_t* all) const { return neurons - all; }
    int64_t count(int64_t t) const { return first[t + 1] - first[t]; }
    const int32_t* at(int64_t t) const { return neurons + first[t]; }
};

// The inputs of one sample, where the call has them as events.
struct InputEvents : Steps {
    const Real* numbers;

    InputEvents(const ListNetwork& a, int64_t sample)
        : Steps(a.input_counts, a.input_neurons, sample, a.steps),
          numbers(static_cast<const Real*>(a.x) + offset(a.input_neurons)) {}
    void read(int64_t t, Sent& to) const {
        to.neurons.assign(at(t), at(t) + count(t));
        to.sizes.assign(numbers + first[t], numbers + first[t + 1]);
    }
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
    const InputEvents inputs{a, sample};
    std::vector<Held> held;
    std::vector<std::unique_ptr<Stepper>> steppers;
    std::vector<std::vector<Sent>> sent;  // of each source, a ring of steps
    Arrivals arrivals;
    std::vector<std::pair<int32_t, Real>> late;

    void arrive(const ListConnection& each, int32_t source, Real size) {
        const Lists& lists = *each.lists;
        for (int32_t range = 0; range < lists.ranges; ++range) {
            const int64_t* const first = lists.of_range(range) + source;
            const Real* const weights = static_cast<const Real*>(each.weights) + first[0];
            if (first[1] > first[0])
                arrivals.push_back({lists.other().from(first[0]), weights, range * lists.length, first[1] - first[0], size,
                                    each.to_membrane != 0});
        }
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
        if (a.input_counts) return inputs.read(t, of(a.population_count, t));
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
            each_weight(
                arrivals, [](int32_t) {}, [&](const Arrival&, int32_t n, Real x) { sum[n] += x; });
        }
    }

public:
    // stepper(number, what is held, states before, their stride) makes a population.
    template <class F>
    SampleRun(const NetworkCall& network, int64_t number, const F& stepper) : call(network), sample(number) {
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
            const auto states = static_cast<const Real*>(given.state);
            const Real* const before = states ? states + sample * given.size : nullptr;
            steppers.push_back(stepper(p, held[p], before, int64_t{a.samples} * given.size));
        }
    }

    void run() {
        for (int32_t t = 0; t < a.steps; ++t) {
            read_inputs(t);
            for (int32_t p = 0; p < a.population_count; ++p) {
                of(p, t).clear();
                steppers[p]->fire(t, of(p, t).neurons);
                if (call.populations[p].model.at_once) send(p, t);
            }
            for (int32_t i = 0; i < a.population_count; ++i) {
                const int32_t p = a.order[i];
                arrivals.clear();
                for (int32_t c = 0; c < a.connection_count; ++c)
                    if (a.connections[c].target == p && !call.constant(a.connections[c])) gather(a.connections[c], t);
                steppers[p]->receive(t, arrivals, of(p, t).neurons);
                if (!call.populations[p].model.at_once) send(p, t);
                show(p, t);
            }
        }
        for (int32_t p = 0; p < a.population_count; ++p) {
            const int64_t size = a.populations[p].size;
            const auto last = static_cast<Real*>(a.populations[p].last);
            steppers[p]->end(a.steps - 1, last ? last + sample * size : nullptr, a.samples * size);
        }
    }

private:
    bool silent(int32_t p, int32_t n) const {
        const ListPopulation& given = a.populations[p];
        return given.dropped && given.dropped[sample * given.size + n];
    }
    // Writes the membranes of a population that are wanted, after step t.
    void show(int32_t p, int64_t t) {
        const ListPopulation& given = a.populations[p];
        for (int32_t i = 0; i < given.shown_count; ++i) {
            const int32_t n = given.shown[i];
            const int64_t place = (t * a.samples + sample) * given.shown_count + i;
            static_cast<Real*>(given.membranes)[place] = silent(p, n) ? Real(0) : steppers[p]->membrane(n, static_cast<int32_t>(t));
        }
    }
    // Notes the spikes and the gradient events of a population in step t, but for those of neurons that are silent.
    void send(int32_t p, int32_t t) {
        std::vector<int32_t>& now = of(p, t).neurons;
        const uint8_t* const dropped = a.populations[p].dropped ? a.populations[p].dropped + sample * a.populations[p].size : nullptr;
        if (dropped) now.erase(std::remove_if(now.begin(), now.end(), [&](int32_t n) { return dropped[n] != 0; }), now.end());
        if (!a.spikes) return;  // of a run that is known
        SampleSpikes& spikes = a.spikes->of[p * a.samples + sample];
        spikes.neurons.insert(spikes.neurons.end(), now.begin(), now.end());
        spikes.counts.push_back(static_cast<int32_t>(now.size()));
        if (!a.events) return;
        SampleSpikes& noted = a.events->of[p * a.samples + sample];
        Events& events = steppers[p]->events;
        size_t kept = 0;
        for (size_t i = 0; dropped && i < events.neurons.size(); ++i)
            if (!dropped[events.neurons[i]]) events.neurons[kept] = events.neurons[i], events.excess[kept++] = events.excess[i];
        if (dropped) events.neurons.resize(kept), events.excess.resize(kept);
        const char* const bytes = reinterpret_cast<const char*>(events.excess.data());
        noted.counts.push_back(static_cast<int32_t>(events.neurons.size()));
        noted.neurons.insert(noted.neurons.end(), events.neurons.begin(), events.neurons.end());
        noted.values.insert(noted.values.end(), bytes, bytes + events.excess.size() * sizeof(Real));
        events.clear();
    }
};

inline void list_network(ListNetwork& a, Arena& arena) {
    if (!arena.base) return;
    NetworkCall call(a);
    for (SharedPopulation& population : call.populations) prepare_visits(population, a.steps);
    std::atomic<bool> failed{false};
    parallel(a.threads, a.samples, 1, [&](int64_t sample, int) {
        try {
            SampleRun(call, sample, [&](int32_t p, const Held& held, const Real* before, int64_t stride) {
                return with_step(a.populations[p].neurons, [&](auto model, auto reset) {
                    return stepper<decltype(model), decltype(reset)>(call.populations[p], held, a.visit_cost, before, stride);
                });
            }).run();
        } catch (const std::exception&) {
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
}

}  // namespace g2g::G2G_ISA
