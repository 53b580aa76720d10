// The gradients of list_network.h, backward over all steps, of CubaLif neurons whose surrogate is 0 beyond a distance from θ.
//
// A gradient begins only at gradient events, (step, neuron) whose surrogate derivative σ' is not 0, which the forward pass has noted:
//
//   h = σ'·∂L/∂S is added to what reaches u there;  ∂L/∂S = what is given of spikes, and Σ w·(what reaches a target when the spike arrives)
//   back over a step that a neuron is ready in:  u ← β·u, g ← γ·g + c·(u before);  its reset ends one or both
//
// So neither states nor checkpoints are kept. Only neurons that have gradient events take part, and of weights those to them. The gradients
// of the neurons' parameters are Σ h·∂U/∂p over gradient events, with a neuron's own derivatives ∂U/∂p, which a second run forward
// computes.
//
// A sample is one task's. Gradients of weights are summed in parts of the batch, which depend on sizes alone, and then part by part.
#pragma once

#include <array>

#include "list_network.h"

namespace g2g::G2G_ISA {

// Sums over some samples: where null, none is wanted.
struct Sums {
    struct OfConnection {
        Real *values, *bias;
    };
    std::vector<OfConnection> connections;
    std::vector<std::array<Real*, kMostParameters>> parameters;
    std::vector<std::vector<Real>> owned;

    // Those that the call wants, or others beside them. All are 0.
    Sums(const NetworkCall& call, bool beside) {
        const auto sum = [&](void* wanted, int64_t count) {
            if (!wanted) return static_cast<Real*>(nullptr);
            if (!beside) return std::fill_n(static_cast<Real*>(wanted), count, Real(0)), static_cast<Real*>(wanted);
            owned.emplace_back(count);
            return owned.back().data();
        };
        for (int32_t c = 0; c < call.a.connection_count; ++c) {
            const ListConnection& each = call.a.connections[c];
            connections.push_back({sum(each.grad_values, each.values), sum(each.grad_bias, call.populations[each.target].size)});
        }
        for (const SharedPopulation& of : call.populations) {
            parameters.emplace_back();
            for (int k = 0; k < of.model.parameters; ++k) {
                const Parameter& each = of.given.neurons.parameters[k];
                parameters.back()[k] = sum(each.grad, each.per_neuron ? of.size : 1);
            }
        }
    }
    void add(const Sums& other, const NetworkCall& call) {
        const auto add_to = [](Real* to, const Real* from, int64_t count) {
            for (int64_t i = 0; to && i < count; ++i) to[i] += from[i];
        };
        for (size_t c = 0; c < connections.size(); ++c) {
            const ListConnection& each = call.a.connections[c];
            add_to(connections[c].values, other.connections[c].values, each.values);
            add_to(connections[c].bias, other.connections[c].bias, call.populations[each.target].size);
        }
        for (size_t p = 0; p < parameters.size(); ++p)
            for (int k = 0; k < kMostParameters; ++k)
                add_to(parameters[p][k], other.parameters[p][k],
                       call.populations[p].given.neurons.parameters[k].per_neuron ? call.populations[p].size : 1);
    }
};

// What both runs know of a population in a sample.
struct KnownPopulation {
    const SharedPopulation& shared;
    const ListPopulation& given = shared.given;
    const OfNeurons &decay_g = shared.parameters[0], &decay_u = shared.parameters[1], &gain = shared.parameters[2],
                    &refractory = shared.parameters[3], &resets_current = shared.parameters[4], &theta = shared.parameters[5];
    const int64_t sample, samples;
    const Steps spikes, events;
    std::vector<std::vector<Real>> reaching;  // of each step's gradient events: ∂L/∂S by what has been visited, then h

    KnownPopulation(const SharedPopulation& population, const ListNetwork& a, int64_t number)
        : shared(population), sample(number), samples(a.samples),
          spikes(given.spike_counts, given.spike_neurons, number, a.steps),
          events(given.event_counts, given.event_neurons, number, a.steps), reaching(a.steps) {}

    const Real* row(const void* rows, int64_t number) const {
        return rows ? static_cast<const Real*>(rows) + (number * samples + sample) * shared.size : nullptr;
    }
    Real* row(void* rows, int64_t number) const { return const_cast<Real*>(row(const_cast<const void*>(rows), number)); }
    // From which step on a neuron is ready before its first spike, and after one in step t.
    int32_t first_ready(int32_t n) const { return given.state ? waiting(row(given.state, 0)[n]) : 0; }
    int32_t ready_after(int32_t n, int32_t t) const { return t + std::max(steps_of(refractory.of(n)), 1); }
    Real* reaching_in(int32_t t) { return reaching[t].resize(events.count(t)), reaching[t].data(); }
};

// --- backward ---------------------------------------------------------------------------------------------------

// Neurons that a gradient reaches in some step are numbered among themselves, ascending: a *member* is such a number.

// A member with a gradient: what reaches its states after a step.
struct Active {
    int32_t member, neuron;
    int32_t spike, ready;  // its last spike up to this step, or −1; after that it is ready from there on
    Real g, u, h;          // h: of its gradient event in this step
};

struct BackwardPopulation : KnownPopulation {
    std::vector<int32_t> member, neurons;  // [N], −1: none; [members]
    std::vector<Active> active;
    std::vector<int32_t> place;            // [members] among these, −1: not active
    std::vector<int64_t> first;            // [members + 1] into …
    std::vector<int32_t> times;            // … each one's spikes
    std::vector<int32_t> left;             // [members], how many of these were up to this step
    std::vector<Real> seen[2], total[2];   // [members] of what arrives in this step at the current, at the membrane; over all steps

    BackwardPopulation(const SharedPopulation& population, const ListNetwork& a, int64_t number)
        : KnownPopulation(population, a, number), member(population.size, -1) {
        const Real *const of_g = row(given.grad_last, 1), *const of_u = row(given.grad_last, 2);
        for (int64_t i = 0; i < events.first.back(); ++i) member[events.neurons[i]] = 0;
        for (int32_t n = 0; n < shared.size; ++n)
            if (member[n] == 0 || (of_g && (of_g[n] != 0 || of_u[n] != 0)))
                member[n] = static_cast<int32_t>(neurons.size()), neurons.push_back(n);
        place.assign(neurons.size(), -1), left.resize(neurons.size()), first.resize(neurons.size() + 1);
        for (auto& each : seen) each.resize(neurons.size());
        for (auto& each : total) each.resize(neurons.size());
        for (int64_t i = 0; i < spikes.first.back(); ++i)
            if (const int32_t m = member[spikes.neurons[i]]; m >= 0) ++left[m];
        for (size_t m = 0; m < neurons.size(); ++m) first[m + 1] = first[m] + left[m];
        times.resize(first.back());
        std::fill(left.begin(), left.end(), 0);
        for (int32_t t = 0; t < a.steps; ++t)
            for (int64_t i = 0; i < spikes.count(t); ++i)
                if (const int32_t m = member[spikes.at(t)[i]]; m >= 0) times[first[m] + left[m]++] = t;
        for (size_t m = 0; of_g && m < neurons.size(); ++m)
            if (const int32_t n = neurons[m]; of_g[n] != 0 || of_u[n] != 0) {
                Active& each = activate(n, a.steps - 1);
                each.g = of_g[n], each.u = of_u[n];
            }
    }
    Active& activate(int32_t n, int32_t t) {
        const int32_t m = member[n];
        if (place[m] < 0) {
            place[m] = static_cast<int32_t>(active.size());
            active.push_back({m, n, 0, 0, 0, 0, 0});
            find_spike(active.back(), t);
        }
        return active[place[m]];
    }
    // Notes what arrivals in step t see.
    void expose(int32_t t) {
        for (const Active& each : active) {
            const bool takes = t > each.spike && t >= each.ready;
            seen[0][each.member] = takes ? each.g : 0, seen[1][each.member] = takes ? each.u : 0;
            for (int port = 0; port < 2; ++port) total[port][each.member] += seen[port][each.member];
        }
    }
    // Back over step t, with its gradient events, of which it keeps h if that is needed later.
    void back(int32_t t, const ListNetwork& a, bool keeps) {
        const int32_t number = t - (a.steps - given.tail_steps);  // of the last steps
        const bool is_last = number >= 0 && !(a.truncate && t / a.truncate != (a.steps - 1) / a.truncate);
        const Real *const of_all = row(given.grad_rates, 0), *const of_last = is_last ? row(given.grad_tail, number) : nullptr;
        const Real* const slopes = static_cast<const Real*>(given.slopes) + events.offset(given.event_neurons);
        Real* const to_spikes = reaching_in(t);
        for (int64_t i = 0; i < events.count(t); ++i) {
            const int32_t n = events.at(t)[i];
            if (of_all) to_spikes[i] += of_all[n];
            if (of_last) to_spikes[i] += of_last[n];
            to_spikes[i] *= slopes[events.first[t] + i];
            if (to_spikes[i] != 0) activate(n, t).h = to_spikes[i];
        }
        if (!keeps) std::vector<Real>().swap(reaching[t]);
        for (Active& each : active) {
            const int32_t n = each.neuron;
            const bool fires = t == each.spike;
            if (!fires && t < each.ready) continue;
            if (fires && resets_current.of(n) > 0) each.g = 0;
            if (fires && given.neurons.reset == kZero) each.u = 0;
            const Real to_u = each.u + each.h;
            each.g = decay_g.of(n) * each.g + gain.of(n) * to_u, each.u = decay_u.of(n) * to_u, each.h = 0;
            if (fires) find_spike(each, t - 1);
        }
    }
    // Ends all that goes further back.
    void cut() {
        for (const Active& each : active) place[each.member] = -1, seen[0][each.member] = seen[1][each.member] = 0;
        active.clear();
    }
    void end() {
        if (!given.grad_state) return;
        for (int s = 0; s < 3; ++s) std::fill_n(row(given.grad_state, s), shared.size, Real(0));
        for (const Active& each : active) row(given.grad_state, 1)[each.neuron] = each.g, row(given.grad_state, 2)[each.neuron] = each.u;
    }

private:
    void find_spike(Active& each, int32_t t) {
        int32_t& up_to = left[each.member];
        while (up_to && times[first[each.member] + up_to - 1] > t) --up_to;
        each.spike = up_to ? times[first[each.member] + up_to - 1] : -1;
        each.ready = up_to ? ready_after(each.neuron, each.spike) : first_ready(each.neuron);
    }
};

// The weights of a connection that lead to members, of the sources that have been visited.
struct Visited {
    const ListConnection& given;
    const BackwardPopulation& target;
    const bool wanted;            // the gradients of weights are
    std::vector<int64_t> begin, end;  // of each source; −1: not visited
    std::vector<int32_t> members, places;
    std::vector<Real> weights, sums;

    Visited(const ListConnection& connection, const BackwardPopulation& population, bool wants)
        : given(connection), target(population), wanted(wants), begin(connection.lists->owners, -1), end(connection.lists->owners) {}

    // Visits the weights of a source: adds their gradients, times its size, and returns what reaches the source itself.
    Real visit(int32_t n, Real size, bool itself) {
        if (begin[n] < 0) find(n);
        const Real* const seen = target.seen[given.to_membrane].data();
        if (wanted && size != 0)
            for (int64_t e = begin[n]; e < end[n]; ++e) sums[e] += size * seen[members[e]];
        Real sum = 0;
        for (int64_t e = begin[n]; itself && e < end[n]; ++e) sum += weights[e] * seen[members[e]];
        return sum;
    }
    // Adds the gradients of weights to those of other samples.
    void add_to(Real* grads) const {
        for (size_t e = 0; wanted && e < sums.size(); ++e) grads[places[e]] += sums[e];
    }

private:
    void find(int32_t n) {
        const Lists& lists = *given.lists;
        const Numbers other = lists.other();
        begin[n] = static_cast<int64_t>(members.size());
        for (int32_t range = 0; range < lists.ranges; ++range)
            for (int64_t e = lists.of_range(range)[n]; e < lists.of_range(range)[n + 1]; ++e) {
                const int32_t m = target.member[range * lists.length + other[e]];
                if (m < 0) continue;
                members.push_back(m), weights.push_back(static_cast<const Real*>(given.weights)[e]);
                if (wanted) places.push_back(lists.place[e]), sums.push_back(0);
            }
        end[n] = static_cast<int64_t>(members.size());
    }
};

class BackwardRun {
    const NetworkCall& call;
    const ListNetwork& a = call.a;
    const int64_t sample;
    const InputEvents inputs{a, sample};
    Sums& sums;
    std::vector<Visited> visited;  // of each connection
    Sent sent;

    // What a connection brings in step t by a delay.
    void visit_spikes(int32_t c, int32_t t, int32_t delay) {
        const ListConnection& each = a.connections[c];
        BackwardPopulation& source = populations[each.source];
        const int32_t then = t - delay;
        if (then < 0) {
            const int32_t number = source.given.sent_steps + then;
            if (number < 0) return;
            Real* const grads = a.truncate && t >= a.truncate ? nullptr : source.row(source.given.grad_sent, number);
            visit_numbers(c, delay, source.row(source.given.sent, number), grads, source.shared.size);
            return;
        }
        const auto arrives = [&](int32_t n) { return !each.delays || each.delays[n] == delay; };
        for (int64_t i = 0; i < source.spikes.count(then); ++i)
            if (const int32_t n = source.spikes.at(then)[i]; arrives(n)) visited[c].visit(n, 1, false);
        if (a.truncate && then / a.truncate != t / a.truncate) return;
        Real* const to_spikes = source.reaching_in(then);
        for (int64_t i = 0; i < source.events.count(then); ++i)
            if (const int32_t n = source.events.at(then)[i]; arrives(n)) to_spikes[i] += visited[c].visit(n, 0, true);
    }

    // Visits those of a row of numbers that are not 0, or all, if their gradients are wanted.
    void visit_numbers(int32_t c, int32_t delay, const Real* row, Real* grads, int64_t size) {
        const ListConnection& each = a.connections[c];
        if (grads) {
            for (int32_t n = 0; n < size; ++n)
                if (!each.delays || each.delays[n] == delay) grads[n] += visited[c].visit(n, row[n], true);
            return;
        }
        sent.read(row, size);
        visit_sent(c, delay);
    }
    void visit_sent(int32_t c, int32_t delay) {
        const int64_t* const delays = a.connections[c].delays;
        for (size_t i = 0; i < sent.neurons.size(); ++i)
            if (const int32_t n = sent.neurons[i]; !delays || delays[n] == delay) visited[c].visit(n, sent.size(i), false);
    }

    void visit_inputs(int32_t c, int32_t t, int32_t delay) {
        const int32_t then = t - delay;
        if (then >= 0 && a.input_counts) return inputs.read(then, sent), visit_sent(c, delay);
        const int64_t number = then < 0 ? int64_t{a.before_steps} + then : a.held ? 0 : then;
        if (number < 0) return;
        const int64_t at = (number * a.samples + sample) * a.inputs;
        void* const grads = then < 0 ? a.grad_before : a.grad_x;
        visit_numbers(c, delay, static_cast<const Real*>(then < 0 ? a.before : a.x) + at, grads ? static_cast<Real*>(grads) + at : nullptr,
                      a.inputs);
    }

public:
    std::vector<BackwardPopulation> populations;

    BackwardRun(const NetworkCall& network, int64_t number, Sums& sums_of_part) : call(network), sample(number), sums(sums_of_part) {
        populations.reserve(call.populations.size());
        for (const SharedPopulation& each : call.populations) populations.emplace_back(each, a, sample);
        for (int32_t c = 0; c < a.connection_count; ++c)
            visited.emplace_back(a.connections[c], populations[a.connections[c].target], sums.connections[c].values != nullptr);
    }

    // keeps: h of every gradient event.
    void run(bool keeps) {
        for (int32_t t = a.steps - 1; t >= 0; --t) {
            for (BackwardPopulation& each : populations) each.expose(t);
            for (int32_t c = 0; c < a.connection_count; ++c) {
                const ListConnection& each = a.connections[c];
                if (call.constant(each) || populations[each.target].active.empty()) continue;
                for (int32_t delay = each.least; delay <= each.most; ++delay)
                    each.source < 0 ? visit_inputs(c, t, delay) : visit_spikes(c, t, delay);
            }
            for (BackwardPopulation& each : populations) each.back(t, a, keeps);
            if (a.truncate && t && t % a.truncate == 0)
                for (BackwardPopulation& each : populations) each.cut();
        }
        for (BackwardPopulation& each : populations) each.end();
        for (int32_t c = 0; c < a.connection_count; ++c) {
            const ListConnection& each = a.connections[c];
            BackwardPopulation& target = populations[each.target];
            std::vector<Real>& total = target.total[each.to_membrane];
            if (Real* const bias = sums.connections[c].bias)
                for (size_t m = 0; m < total.size(); ++m) bias[target.neurons[m]] += total[m];
            if (call.constant(each)) {
                std::swap(total, target.seen[each.to_membrane]);
                visit_inputs(c, 0, 0);
                std::swap(total, target.seen[each.to_membrane]);
            }
            visited[c].add_to(sums.connections[c].values);
        }
    }
};

// --- the parameters of neurons ------------------------------------------------------------------------------------

// Active neurons forward in time, with the derivatives of their states by their parameters where all that arrives is given.
struct Derivatives : Stepper {
    struct Neuron {
        int32_t number, ready;
        Real g, u;
        Real g_by_decay_g = 0, u_by_decay_g = 0, u_by_decay_u = 0, u_by_gain = 0, u_by_theta = 0;
        Real sum_decay_g = 0, sum_decay_u = 0, sum_gain = 0, sum_theta = 0;
    };
    const BackwardPopulation& known;
    const Held& held;
    const int32_t truncate;
    std::array<Real*, kMostParameters>& grads;
    std::vector<Neuron> members;

    Derivatives(const BackwardPopulation& population, const Held& constant, const ListNetwork& a,
                std::array<Real*, kMostParameters>& to, const Real* before, int64_t stride)
        : known(population), held(constant), truncate(a.truncate), grads(to) {
        for (const int32_t n : known.neurons)
            members.push_back({n, known.first_ready(n), before ? before[stride + n] : 0, before ? before[2 * stride + n] : 0});
    }

    void fire(int32_t t, std::vector<int32_t>& fired) override {
        if (truncate && t && t % truncate == 0)
            for (Neuron& each : members) each.g_by_decay_g = each.u_by_decay_g = each.u_by_decay_u = each.u_by_gain = each.u_by_theta = 0;
        for (Neuron& each : members) {
            if (t < each.ready) continue;
            const int32_t n = each.number;
            const Real gamma = known.decay_g.of(n), beta = known.decay_u.of(n), c = known.gain.of(n);
            each.u_by_decay_g = beta * each.u_by_decay_g + c * each.g_by_decay_g;
            each.u_by_decay_u = beta * each.u_by_decay_u + each.u;
            each.u_by_gain = beta * each.u_by_gain + each.g;
            each.u_by_theta *= beta;
            each.g_by_decay_g = gamma * each.g_by_decay_g + each.g;
            each.u = beta * each.u + c * each.g, each.g *= gamma;
        }
        for (int64_t i = 0; i < known.events.count(t); ++i)
            add(members[known.member[known.events.at(t)[i]]], known.reaching[t][i], -1, 0);
        fired.assign(known.spikes.at(t), known.spikes.at(t) + known.spikes.count(t));
        for (const int32_t n : fired)
            if (const int32_t m = known.member[n]; m >= 0) reset(members[m], t);
    }
    void receive(int32_t t, const Arrivals& arrivals, std::vector<int32_t>&) override {
        each_weight(
            arrivals, [](int32_t) {},
            [&](const Arrival& arrival, int32_t n, Real x) {
                const int32_t m = known.member[n];
                if (m < 0 || t < members[m].ready) return;
                (arrival.to_membrane ? members[m].u : members[m].g) += x;
            });
        for (int port = 0; port < 2 && held.any(); ++port)
            for (Neuron& each : members)
                if (!held.at[port].empty() && t >= each.ready) (port ? each.u : each.g) += held.at[port][each.number];
    }
    void end(int32_t, Real*, int64_t) override {
        const Real *const of_g = known.row(known.given.grad_last, 1), *const of_u = known.row(known.given.grad_last, 2);
        for (Neuron& each : members) {
            if (of_g) add(each, of_u[each.number], 0, of_g[each.number]);
            const Real found[] = {each.sum_decay_g, each.sum_decay_u, each.sum_gain, 0, 0, each.sum_theta};
            for (int k = 0; k < known.shared.model.parameters; ++k) {
                const Parameter& parameter = known.given.neurons.parameters[k];
                const int64_t n = parameter.per_neuron ? each.number : 0;
                const Real value = reinterpret_cast<const Real*>(parameter.value)[n];
                const bool clamped = known.shared.model.decays[k] && !(value > 0 && value < 1);
                if (grads[k] && !clamped) grads[k][n] += found[k];
            }
        }
    }

private:
    // Adds what reaches u − θ (θ in the proportion by_theta) and g.
    static void add(Neuron& each, Real to_u, Real by_theta, Real to_g) {
        each.sum_decay_g += to_u * each.u_by_decay_g + to_g * each.g_by_decay_g;
        each.sum_decay_u += to_u * each.u_by_decay_u;
        each.sum_gain += to_u * each.u_by_gain;
        each.sum_theta += to_u * (each.u_by_theta + by_theta);
    }
    void reset(Neuron& each, int32_t t) const {
        each.ready = known.ready_after(each.number, t);
        if (known.given.neurons.reset == kSubtract) each.u -= known.theta.of(each.number), each.u_by_theta -= 1;
        if (known.given.neurons.reset == kZero) each.u = each.u_by_decay_g = each.u_by_decay_u = each.u_by_gain = each.u_by_theta = 0;
        if (known.resets_current.of(each.number) > 0) each.g = each.g_by_decay_g = 0;
    }
};

// --- a network --------------------------------------------------------------------------------------------------

// Sums are in so many parts at most, and in as many as take so many bytes.
constexpr int64_t kParts = 8, kBytesOfParts = int64_t{1} << 28;

inline void list_gradients(ListNetwork& a, Arena& arena) {
    if (!arena.base) return;
    const NetworkCall call(a);
    int64_t bytes = 1;
    bool of_neurons = false;
    for (int32_t c = 0; c < a.connection_count; ++c) bytes += a.connections[c].values * int64_t{sizeof(Real)};
    for (const SharedPopulation& each : call.populations)
        for (int k = 0; k < each.model.parameters; ++k) of_neurons |= each.given.neurons.parameters[k].grad != nullptr;
    const int64_t inputs = int64_t{a.samples} * a.inputs;
    if (a.grad_x) std::fill_n(static_cast<Real*>(a.grad_x), inputs * (a.held ? 1 : a.steps), Real(0));
    if (a.grad_before) std::fill_n(static_cast<Real*>(a.grad_before), inputs * a.before_steps, Real(0));
    for (const SharedPopulation& each : call.populations)
        if (each.given.grad_sent)
            std::fill_n(static_cast<Real*>(each.given.grad_sent), int64_t{each.given.sent_steps} * a.samples * each.size, Real(0));

    const int64_t parts = least(a.samples, std::clamp(kBytesOfParts / bytes, int64_t{1}, kParts));
    std::vector<Sums> sums;
    for (int64_t part = 0; part < parts; ++part) sums.emplace_back(call, part > 0);
    std::atomic<bool> failed{false};
    parallel(a.threads, parts, 1, [&](int64_t part, int) {
        try {
            for (int64_t sample = part; sample < a.samples; sample += parts) {
                BackwardRun backward(call, sample, sums[part]);
                backward.run(of_neurons);
                if (!of_neurons) continue;
                ListNetwork known = a;
                known.spikes = known.events = nullptr;
                NetworkCall again(known);
                SampleRun(again, sample, [&](int32_t p, const Held& held, const Real* before, int64_t stride) {
                    return std::make_unique<Derivatives>(backward.populations[p], held, a, sums[part].parameters[p], before, stride);
                }).run();
            }
        } catch (const std::exception&) {
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
    for (int64_t part = 1; part < parts; ++part) sums[0].add(sums[part], call);
}

}  // namespace g2g::G2G_ISA
