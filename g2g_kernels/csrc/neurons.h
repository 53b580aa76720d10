// Neuron models, resets and surrogates, and everything that depends on them. A model is a struct of
//
//   info             its name, states and parameters. The last state is the membrane, the last parameter its threshold θ.
//   charge           one step of time: moves the states on by the current I_t. The order of operations is PyTorch's
//                    (and snnTorch's), so that float32 membranes are equal to the last bit. A reset follows the spike of the step before.
//   charge_backward  the same step backwards. `through` is what reaches the membrane through its own spike,
//                    σ'(U_t − θ)·∂L/∂S_t; `before` are the states before the step; g is, for each state, what reaches it
//                    from later steps, and is moved on to the states `before`. Adds to the parameters' gradients and
//                    returns ∂L/∂I_t. slope(U) is σ'(U − θ): what reaches S_{t−1}, on which a step may depend by more than
//                    the reset, goes on to U_{t−1}, and negated to θ, times slope(U_{t−1}). Who does not call it pays nothing.
//   compared         of a model whose spikes do not follow from its states (info.hidden): the membrane that a step from these
//                    states compares with θ, −∞ where it is refractory. `through` is then what reaches this membrane.
//
// A spike is U_t > θ; it is compared, counted and differentiated outside. Everything works on one vector of lanes and is
// inlined into loops that hold these arrays in registers. Padding lanes have θ = ∞: they never spike and every surrogate
// is 0 there.
//
// A model is compiled once for each reset and surrogate; an `infrequent` one for all resets at once, and it and `infrequent`
// surrogates with AnySurrogate, out of line: slower, but compiled in a fraction of the time.
#pragma once

#include <cmath>
#include <stdexcept>

#include "interface.h"
#include "vec.h"

namespace g2g::G2G_ISA {

// Whether a model or a surrogate is.
template <class T, class = void>
constexpr bool infrequent = false;
template <class T>
constexpr bool infrequent<T, std::enable_if_t<T::infrequent>> = true;

// U_t = β·U_{t−1} + I_t − θ·R_t,  R_t = 1[U_{t−1} > θ]; reset "zero" discharges U_{t−1} before the step.
//
//   g_t = through_t + β·g_{t+1};  ∂I_t = g_t;  ∂β += g_t·U_{t−1};  ∂θ −= through_t + R_t·g_t
//   "zero": 0 in place of g_t where R_t = 1, but for ∂I_t
struct Lif {
    static constexpr const char* refractory = "refractory_lif";  // the name of Refractory<Lif>
    static constexpr ModelInfo info = {"lif", 1, 2, {"membrane"}, {"beta", "threshold"}, {true, false}};

    template <class R>
    static G2G_INLINE void charge(Vec (&state)[1], Vec current, const Vec (&p)[2], R reset) {
        const Vec decay = p[0], theta = p[1];
        Vec u = state[0];
        const IntVec fired = u > theta;
        if (reset == kZero) u = fired ? Vec{} : u;
        u = decay * u + current;
        if (reset == kSubtract) u = u - (fired ? theta : Vec{});
        state[0] = u;
    }

    template <class R, class Slope>
    static G2G_INLINE Vec charge_backward(Vec through, const Slope&, const Vec (&before)[1], const Vec (&p)[2], Vec (&g)[1],
                                          Vec (&grad)[2], R reset) {
        const Vec decay = p[0], theta = p[1];
        const IntVec fired = before[0] > theta;
        const Vec now = through + g[0];
        grad[1] -= through;
        if (reset == kSubtract) grad[1] -= fired ? now : Vec{};
        const Vec reaching = reset == kZero ? (fired ? Vec{} : now) : now;
        grad[0] += now * (reset == kZero ? (fired ? Vec{} : before[0]) : before[0]);
        g[0] = decay * reaching;
        return now;
    }
};

// C_t = γ·C_{t−1} + I_t;  U_t = β·U_{t−1} + C_t − θ·R_t; reset "zero" discards β·U_{t−1} + C_t after the step.
//
//   g_t = through_t + β·g_{t+1};  ∂C_t = g_t + γ·∂C_{t+1};  ∂I_t = ∂C_t
//   ∂γ += ∂C_t·C_{t−1};  ∂β += g_t·U_{t−1};  ∂θ −= through_t + R_t·g_t
//   "zero": 0 in place of g_t where R_t = 1
struct Synaptic {
    static constexpr const char* refractory = "refractory_synaptic";  // the name of Refractory<Synaptic>
    static constexpr ModelInfo info = {
        "synaptic", 2, 3, {"synaptic_current", "membrane"}, {"syn_decay", "beta", "threshold"}, {true, true, false}};

    template <class R>
    static G2G_INLINE void charge(Vec (&state)[2], Vec current, const Vec (&p)[3], R reset) {
        const Vec syn_decay = p[0], decay = p[1], theta = p[2];
        const IntVec fired = state[1] > theta;
        const Vec c = syn_decay * state[0] + current;
        Vec u = decay * state[1] + c;
        if (reset == kSubtract) u = u - (fired ? theta : Vec{});
        if (reset == kZero) u = fired ? Vec{} : u;
        state[0] = c;
        state[1] = u;
    }

    template <class R, class Slope>
    static G2G_INLINE Vec charge_backward(Vec through, const Slope&, const Vec (&before)[2], const Vec (&p)[3], Vec (&g)[2],
                                          Vec (&grad)[3], R reset) {
        const Vec syn_decay = p[0], decay = p[1], theta = p[2];
        const IntVec fired = before[1] > theta;
        const Vec now = through + g[1];
        grad[2] -= through;
        if (reset == kSubtract) grad[2] -= fired ? now : Vec{};
        const Vec reaching = reset == kZero ? (fired ? Vec{} : now) : now;
        const Vec to_current = reaching + g[0];
        grad[0] += to_current * before[0];
        grad[1] += reaching * before[1];
        g[0] = syn_decay * to_current;
        g[1] = decay * reaching;
        return to_current;
    }
};

// w_t = ρ·w_{t−1} + a·U_{t−1} + b·S_{t−1};  U_t = β·U_{t−1} + I_t − w_t − θ·R_t; reset "zero" discharges U_{t−1} before the
// step, for both of them.
//
//   g_t = through_t + …_{t+1};  h_t = ρ·h_{t+1} − g_t;  e_t = σ'(U_{t−1} − θ)·b·h_t;  ∂I_t = g_t
//   to U_{t−1}: β·g_t + a·h_t + e_t
//   ∂ρ += h_t·w_{t−1};  ∂β += g_t·U_{t−1};  ∂a += h_t·U_{t−1};  ∂b += h_t·S_{t−1};  ∂θ −= through_t + e_t + R_t·g_t
//   "zero": 0 in place of β·g_t + a·h_t, and of U_{t−1}, where R_t = 1
struct AdLif {
    static constexpr const char* refractory = "refractory_adlif";  // the name of Refractory<AdLif>
    static constexpr ModelInfo info = {"adlif", 2, 5, {"adaptation", "membrane"}, {"adapt_decay", "beta", "a", "b", "threshold"},
                                       {true, true, false, false, false}};

    template <class R>
    static G2G_INLINE void charge(Vec (&state)[2], Vec current, const Vec (&p)[5], R reset) {
        const Vec adapt_decay = p[0], decay = p[1], a = p[2], b = p[3], theta = p[4];
        Vec u = state[1];
        const IntVec fired = u > theta;
        const Vec spikes = heaviside(u, theta);
        if (reset == kZero) u = fired ? Vec{} : u;
        const Vec w = (adapt_decay * state[0] + a * u) + b * spikes;
        u = (decay * u + current) - w;
        if (reset == kSubtract) u = u - (fired ? theta : Vec{});
        state[0] = w;
        state[1] = u;
    }

    template <class R, class Slope>
    static G2G_INLINE Vec charge_backward(Vec through, const Slope& slope, const Vec (&before)[2], const Vec (&p)[5],
                                          Vec (&g)[2], Vec (&grad)[5], R reset) {
        const Vec adapt_decay = p[0], decay = p[1], a = p[2], b = p[3], theta = p[4];
        const IntVec fired = before[1] > theta;
        const Vec now = through + g[1];
        const Vec to_adaptation = g[0] - now;
        const Vec through_before = slope(before[1]) * (b * to_adaptation);
        const Vec decaying = reset == kZero ? (fired ? Vec{} : before[1]) : before[1];
        const Vec reaching = decay * now + a * to_adaptation;
        grad[0] += to_adaptation * before[0];
        grad[1] += now * decaying;
        grad[2] += to_adaptation * decaying;
        grad[3] += to_adaptation * heaviside(before[1], theta);
        grad[4] -= through + through_before;
        if (reset == kSubtract) grad[4] -= fired ? now : Vec{};
        g[0] = adapt_decay * to_adaptation;
        g[1] = (reset == kZero ? (fired ? Vec{} : reaching) : reaching) + through_before;
        return now;
    }
};

// Where ready, f = 0: v = β·U_{t−1} + c·g_{t−1}, S_t = 1[v > θ], g = γ·g_{t−1}, and without a spike g_t = g + I_t, U_t = v; a spike
// resets v at once, and g with `reset_current`, and begins f = max(R, 1) − 1. Elsewhere f counts down, and g and U stay.
//
//   to v: h_t = through_t + ∂U_t, ∂U_t as the reset leaves it;  ∂I_t = ∂g_t without a spike;  to U_{t−1}: β·h_t;  to g_{t−1}: c·h_t + γ·∂g_t
//   ∂γ += ∂g_t·g_{t−1};  ∂β += h_t·U_{t−1};  ∂c += h_t·g_{t−1};  ∂θ −= through_t + S_t·∂U_t ("subtract"); all of them where ready
struct CubaLif {
    static constexpr bool infrequent = true;
    static constexpr ModelInfo info = {"cubalif",
                                       3,
                                       6,
                                       {"refractory_steps", "synaptic_current", "membrane"},
                                       {"syn_decay", "beta", "gain", "refractory", "reset_current", "threshold"},
                                       {true, true, false, false, false, false},
                                       true,
                                       true};

    static G2G_INLINE Vec compared(const Vec (&before)[3], Vec, const Vec (&p)[6]) {
        return before[0] == Vec{} ? p[1] * before[2] + p[2] * before[1] : all(-__builtin_inff());
    }

    static G2G_INLINE IntVec takes(const Vec (&before)[3], const Vec (&p)[6], int32_t) {
        return (before[0] == Vec{}) & ~(compared(before, Vec{}, p) > p[5]);
    }

    template <class R>
    static G2G_INLINE void charge(Vec (&state)[3], Vec current, const Vec (&p)[6], R reset) {
        const Vec refractory = p[3], theta = p[5];
        const IntVec ready = state[0] == Vec{}, fires = compared(state, Vec{}, p) > theta;
        Vec u = ready ? p[1] * state[2] + p[2] * state[1] : state[2];
        Vec g = ready ? p[0] * state[1] : state[1];
        g = (ready & ~fires) ? g + current : g;
        g = (fires & (p[4] > Vec{})) ? Vec{} : g;
        if (reset == kSubtract) u = fires ? u - theta : u;
        if (reset == kZero) u = fires ? Vec{} : u;
        const Vec one = all(1.0f), waits = refractory > one ? refractory - one : Vec{};
        state[0] = fires ? waits : (state[0] > one ? state[0] - one : Vec{});
        state[1] = g;
        state[2] = u;
    }

    template <class R, class Slope>
    static G2G_INLINE Vec charge_backward(Vec through, const Slope&, const Vec (&before)[3], const Vec (&p)[6], Vec (&g)[3],
                                          Vec (&grad)[6], R reset) {
        const Vec theta = p[5];
        const IntVec ready = before[0] == Vec{}, fires = compared(before, Vec{}, p) > theta;
        grad[5] -= through;
        if (reset == kSubtract) grad[5] -= fires ? g[2] : Vec{};
        const Vec to_membrane = (reset == kZero ? (fires ? Vec{} : g[2]) : g[2]) + through;
        const Vec to_input = (ready & ~fires) ? g[1] : Vec{};
        const Vec to_current = (fires & (p[4] > Vec{})) ? Vec{} : g[1];
        grad[0] += ready ? to_current * before[1] : Vec{};
        grad[1] += ready ? to_membrane * before[2] : Vec{};
        grad[2] += ready ? to_membrane * before[1] : Vec{};
        g[0] = Vec{};
        g[1] = ready ? p[0] * to_current + p[2] * to_membrane : to_current;
        g[2] = ready ? p[1] * to_membrane : to_membrane;
        return to_input;
    }
};

constexpr ModelInfo refractory_info(const char* name, const ModelInfo& of) {
    ModelInfo info = {name, of.states + 1, of.parameters + 1, {"refractory_steps"}, {}, {}, true};
    for (int s = 0; s < of.states; ++s) info.state_names[s + 1] = of.state_names[s];
    for (int k = 0; k < of.parameters - 1; ++k) info.parameter_names[k] = of.parameter_names[k], info.decays[k] = of.decays[k];
    info.parameter_names[of.parameters - 1] = "refractory";
    info.parameter_names[of.parameters] = of.parameter_names[of.parameters - 1];
    return info;
}

// A model M that resets a step after its spike, with a refractory period R. The step after a spike, and those before which f is 2
// or more, are refractory, if R is: the membrane is reset, then held, and the other states go on with I = 0. f is R − 1 after the
// first of these steps and 1 after the last: then S_{t−1} is 0, whatever U_{t−1}, so that M sees θ = ∞ and no slope.
template <class M>
struct Refractory {
    static constexpr bool infrequent = true;
    static constexpr int S = M::info.states + 1, P = M::info.parameters + 1;
    static constexpr ModelInfo info = refractory_info(M::refractory, M::info);

    struct Before {
        Vec state[S - 1], p[P - 1], left;  // of M; f after this step
        IntVec knows, fired, waits;        // S_{t−1} follows from the membrane; it is 1; this step is refractory
        G2G_INLINE Before(const Vec (&before)[S], const Vec (&given)[P]) {
            for (int s = 1; s < S; ++s) state[s - 1] = before[s];
            for (int k = 0; k < P - 2; ++k) p[k] = given[k];
            const Vec f = before[0], period = given[P - 2], one = all(1.0f);
            knows = f == Vec{};
            p[P - 2] = knows ? given[P - 1] : all(__builtin_inff());
            fired = before[S - 1] > p[P - 2];
            const IntVec begins = fired & (period > one);
            waits = begins | (f > one);
            left = begins ? period - one : (f > one ? f - one : Vec{});
        }
    };

    static IntVec takes(const Vec (&before)[S], const Vec (&p)[P], int32_t reset) {
        const Before b(before, p);
        return ~(reset == kZero ? b.waits | b.fired : b.waits);
    }

    static G2G_INLINE Vec compared(const Vec (&before)[S], Vec after, const Vec (&p)[P]) {
        return Before(before, p).waits ? all(-__builtin_inff()) : after;
    }

    template <class R>
    static G2G_OUT_OF_LINE void charge(Vec (&state)[S], const Vec& current, const Vec (&p)[P], R reset) {
        Before b(state, p);
        Vec held = state[S - 1];
        if (reset == kSubtract) held = b.fired ? held - p[P - 1] : held;
        if (reset == kZero) held = b.fired ? Vec{} : held;
        M::charge(b.state, b.waits ? Vec{} : current, b.p, reset);
        state[0] = b.left;
        for (int s = 1; s < S; ++s) state[s] = b.state[s - 1];
        state[S - 1] = b.waits ? held : state[S - 1];
    }

    template <class R, class Slope>
    static G2G_OUT_OF_LINE Vec charge_backward(const Vec& through, const Slope& slope, const Vec (&before)[S], const Vec (&p)[P],
                                               Vec (&g)[S], Vec (&grad)[P], R reset) {
        const Before b(before, p);
        Vec inner[S - 1], sums[P - 1];
        for (int s = 1; s < S; ++s) inner[s - 1] = g[s];
        for (int k = 0; k < P - 2; ++k) sums[k] = grad[k];
        sums[P - 2] = grad[P - 1];
        const Vec held = b.waits ? g[S - 1] : Vec{};
        inner[S - 2] = b.waits ? Vec{} : inner[S - 2];
        if (reset == kSubtract) sums[P - 2] -= b.fired ? held : Vec{};
        const auto known = [&](Vec u) { return b.knows ? slope(u) : Vec{}; };
        const Vec now = M::charge_backward(b.waits ? Vec{} : through, known, b.state, b.p, inner, sums, reset);
        g[0] = Vec{};
        for (int s = 1; s < S; ++s) g[s] = inner[s - 1];
        g[S - 1] += reset == kZero ? (b.fired ? Vec{} : held) : held;
        for (int k = 0; k < P - 2; ++k) grad[k] = sums[k];
        grad[P - 1] = sums[P - 2];
        return b.waits ? Vec{} : now;
    }
};

// The membrane that is compared with the threshold in a step, from the states before it and the membrane after it.
template <class M>
G2G_INLINE Vec compared(const Vec (&before)[M::info.states], Vec after, const Vec (&p)[M::info.parameters]) {
    if constexpr (M::info.hidden)
        return M::compared(before, after, p);
    else
        return after;
}

// Where the membrane takes a current of its own in a step from the states `before`, of a model whose current goes elsewhere.
template <class M>
G2G_INLINE IntVec takes(const Vec (&before)[M::info.states], const Vec (&p)[M::info.parameters], int32_t reset) {
    if constexpr (M::info.hidden)
        return M::takes(before, p, reset);
    else
        return reset == kZero ? ~(before[M::info.states - 1] > p[M::info.parameters - 1]) : Vec{} == Vec{};
}

// One step; returns the membrane that is compared.
template <class M, class R>
G2G_INLINE Vec step(Vec (&state)[M::info.states], Vec current, const Vec (&p)[M::info.parameters], R reset) {
    Vec before[M::info.states];
    for (int s = 0; s < M::info.states; ++s) before[s] = state[s];
    M::charge(state, current, p, reset);
    return compared<M>(before, state[M::info.states - 1], p);
}

// A surrogate is its name and its derivative at x = U − θ.

constexpr double kHalfPi = 1.57079632679489661923;

struct Atan {
    static constexpr const char* name = "atan";
    static G2G_INLINE Vec derivative(Vec x, float alpha) {
        const Vec z = all(static_cast<float>(kHalfPi * alpha)) * x;
        return all(alpha / 2) / (all(1.0f) + z * z);
    }
};

struct FastSigmoid {
    static constexpr const char* name = "fast_sigmoid";
    static G2G_INLINE Vec derivative(Vec x, float alpha) {
        const Vec root = all(1.0f) + all(alpha) * absolute(x);
        return all(1.0f) / (root * root);
    }
};

struct Sigmoid {
    static constexpr bool infrequent = true;
    static constexpr const char* name = "sigmoid";
    static G2G_INLINE Vec derivative(Vec x, float alpha) {
        const Vec e = exp_negative(-(all(alpha) * absolute(x)));
        return all(alpha) * e / ((all(1.0f) + e) * (all(1.0f) + e));
    }
};

struct Triangle {
    static constexpr const char* name = "triangle";
    static G2G_INLINE Vec derivative(Vec x, float alpha) {
        const Vec height = all(1.0f) - all(alpha) * absolute(x);
        return height < Vec{} ? Vec{} : all(alpha) * height;  // NaN stays NaN
    }
};

struct Boxcar {
    static constexpr bool infrequent = true;
    static constexpr const char* name = "boxcar";
    static G2G_INLINE Vec derivative(Vec x, float alpha) {
        const Vec z = all(alpha) * absolute(x);
        return z < all(1.0f) ? all(alpha / 2) : (z >= all(1.0f) ? Vec{} : z);  // NaN stays NaN
    }
};

// A reset that is known when a step is compiled, made from its number like one that is not, an int32_t.
template <int32_t Number>
struct OneReset {
    static constexpr int32_t value = Number;
    OneReset(int32_t = Number) {}
    constexpr operator int32_t() const { return Number; }
};

// All options, in the order in which Python numbers them.
template <class... Each>
struct Types {
    static constexpr int32_t count = sizeof...(Each);
    static constexpr ModelInfo infos[sizeof...(Each)] = {Each::info...};  // of models
    static constexpr const char* names[sizeof...(Each)] = {Each::name...};  // of surrogates
};
using Models = Types<Lif, Synaptic, AdLif, CubaLif, Refractory<Lif>, Refractory<Synaptic>, Refractory<AdLif>>;
using Resets = Types<OneReset<kSubtract>, OneReset<kZero>, OneReset<kNone>>;
using Surrogates = Types<Atan, FastSigmoid, Sigmoid, Triangle, Boxcar>;

constexpr Options kOptions = {Models::infos, Models::count, Surrogates::names, Surrogates::count};

[[noreturn]] inline void unknown_option() { throw std::out_of_range("an option of neurons has an unknown number"); }

inline const ModelInfo& model_info(const Neurons& neurons) {
    if (neurons.model < 0 || neurons.model >= kOptions.model_count) unknown_option();
    return Models::infos[neurons.model];
}

// call(T{}) with the numbered type, to turn an option of a call into a template argument.
template <class First, class... Rest, class F>
auto choose(Types<First, Rest...>, int32_t number, const F& call) {
    if constexpr (sizeof...(Rest) > 0) {
        if (number) return choose(Types<Rest...>{}, number - 1, call);
    } else if (number) {
        unknown_option();
    }
    return call(First{});
}

// The α of neurons, and the number of their surrogate, which AnySurrogate chooses in each step.
struct Steepness {
    float alpha;
    int32_t surrogate;
    operator float() const { return alpha; }
};
inline Steepness steepness(const Neurons& neurons) { return {neurons.alpha, neurons.surrogate}; }

struct AnySurrogate {
    static G2G_OUT_OF_LINE Vec derivative(const Vec& x, Steepness alpha) {
        return choose(Surrogates{}, alpha.surrogate, [&](auto surrogate) { return decltype(surrogate)::derivative(x, alpha); });
    }
};

// call(model, reset), call(surrogate), and call(model, reset, surrogate).
template <class F>
auto with_step(const Neurons& neurons, const F& call) {
    return choose(Models{}, neurons.model, [&](auto model) {
        return choose(Resets{}, neurons.reset, [&](auto reset) {
            if constexpr (infrequent<decltype(model)>)
                return call(model, int32_t{reset});
            else
                return call(model, reset);
        });
    });
}
template <class F>
auto with_surrogate(const Neurons& neurons, const F& call) {
    return choose(Surrogates{}, neurons.surrogate, call);
}
template <class F>
auto with_gradient(const Neurons& neurons, const F& call) {
    return with_step(neurons, [&](auto model, auto reset) {
        if constexpr (infrequent<decltype(model)>)
            return call(model, reset, AnySurrogate{});
        else
            return with_surrogate(neurons, [&](auto surrogate) {
                using Own = std::conditional_t<infrequent<decltype(surrogate)>, AnySurrogate, decltype(surrogate)>;
                return call(model, reset, Own{});
            });
    });
}

}  // namespace g2g::G2G_ISA
