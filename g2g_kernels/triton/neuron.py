"""Device functions of neurons, which the kernels of ``neurons`` and the fused ones of ``g2g_stack`` share.

A model (``g2g_kernels/ops/neurons/models.py``) is two functions here, ``_…_charge`` and ``_…_charge_backward``, which
:func:`charge` and :func:`charge_backward` choose between; kernels loop over the tuples of its states and parameters.

All take tiles of float32 values, one element per neuron and sample. The order of operations is that of the models in
PyTorch (and so of snnTorch): multiply, add, subtract, each rounded. A compiler would contract β·U + I into one fused
multiply-add, rounded once, and a membrane within an ulp of θ could then fire here and not in PyTorch. Kernels
that call :func:`charge` are therefore launched with :data:`EXACT`; θ·R is exact either way, since R is 0 or 1.
"""

import triton
import triton.language as tl

#: launch options of every kernel that charges membranes: no contraction to fused multiply-adds
EXACT = {"enable_fp_fusion": False}


@triton.jit
def fires(membrane, theta):
    """S = 1[U > θ], strict; as the reset R of the next step it is the same comparison."""
    return membrane > theta


@triton.jit
def _after_zero(value, fired, RESET: tl.constexpr):
    """``value``, or nothing after a reset to zero."""
    if RESET == "zero":
        return tl.where(fired, 0.0, value)
    else:
        return value


# --- the models -------------------------------------------------------------------------------------------------
#
# charge(states, fired, current, parameters) -> states after one more step; ``fired`` is R_t.
# charge_backward(grads, sums, states, fired, begins, parameters, alpha) -> the gradients of the current and of the
# states before the step, and ``sums`` of the parameters' gradients including this step; ``states`` are those before the
# step, ``grads`` the gradients of those after it. A model whose step depends on S_{t−1} by more than the reset
# multiplies the gradient of S_{t−1} by :func:`slope_before`.


@triton.jit
def _lif_charge(states, fired, current, parameters, RESET: tl.constexpr):
    charged = _after_zero(states[0], fired, RESET) * parameters[0] + current
    if RESET == "subtract":
        charged = tl.where(fired, charged - parameters[1], charged)
    return (charged,)


@triton.jit
def _lif_charge_backward(grads, sums, states, fired, parameters, RESET: tl.constexpr):
    grad = grads[0]
    to_theta = sums[1]
    if RESET == "subtract":
        to_theta -= tl.where(fired, grad, 0.0)
    to_beta = sums[0] + grad * _after_zero(states[0], fired, RESET)
    return grad, (_after_zero(grad * parameters[0], fired, RESET),), (to_beta, to_theta)


@triton.jit
def _synaptic_charge(states, fired, current, parameters, RESET: tl.constexpr):
    synaptic_current = states[0] * parameters[0] + current
    charged = states[1] * parameters[1] + synaptic_current
    if RESET == "subtract":
        charged = tl.where(fired, charged - parameters[2], charged)
    return (synaptic_current, _after_zero(charged, fired, RESET))


@triton.jit
def _synaptic_charge_backward(grads, sums, states, fired, parameters, RESET: tl.constexpr):
    to_membrane = _after_zero(grads[1], fired, RESET)
    to_current = grads[0] + to_membrane
    to_theta = sums[2]
    if RESET == "subtract":
        to_theta -= tl.where(fired, to_membrane, 0.0)
    before = (to_current * parameters[0], to_membrane * parameters[1])
    return to_current, before, (sums[0] + to_current * states[0], sums[1] + to_membrane * states[1], to_theta)


@triton.jit
def _adlif_charge(states, fired, current, parameters, RESET: tl.constexpr):
    membrane = _after_zero(states[1], fired, RESET)
    adaptation = states[0] * parameters[0] + membrane * parameters[2] + fired.to(tl.float32) * parameters[3]
    charged = membrane * parameters[1] + current - adaptation
    if RESET == "subtract":
        charged = tl.where(fired, charged - parameters[4], charged)
    return (adaptation, charged)


@triton.jit
def _adlif_charge_backward(
    grads, sums, states, fired, begins, parameters, alpha, RESET: tl.constexpr, SURROGATE: tl.constexpr
):
    to_membrane = grads[1]
    to_adaptation = grads[0] - to_membrane
    through_spike = slope_before(states, begins, parameters, alpha, SURROGATE) * (to_adaptation * parameters[3])
    before = _after_zero(to_membrane * parameters[1] + to_adaptation * parameters[2], fired, RESET) + through_spike
    membrane = _after_zero(states[1], fired, RESET)
    to_theta = sums[4] - through_spike
    if RESET == "subtract":
        to_theta -= tl.where(fired, to_membrane, 0.0)
    sums = (
        sums[0] + to_adaptation * states[0],
        sums[1] + to_membrane * membrane,
        sums[2] + to_adaptation * membrane,
        sums[3] + to_adaptation * fired.to(tl.float32),
        to_theta,
    )
    return to_membrane, (to_adaptation * parameters[0], before), sums


@triton.jit
def charge(states, fired, current, parameters, MODEL: tl.constexpr, RESET: tl.constexpr):
    if MODEL == "lif":
        return _lif_charge(states, fired, current, parameters, RESET)
    elif MODEL == "synaptic":
        return _synaptic_charge(states, fired, current, parameters, RESET)
    else:
        tl.static_assert(MODEL == "adlif")
        return _adlif_charge(states, fired, current, parameters, RESET)


@triton.jit
def charge_backward(
    grads, sums, states, fired, begins, parameters, alpha,
    MODEL: tl.constexpr, RESET: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    if MODEL == "lif":
        return _lif_charge_backward(grads, sums, states, fired, parameters, RESET)
    elif MODEL == "synaptic":
        return _synaptic_charge_backward(grads, sums, states, fired, parameters, RESET)
    else:
        tl.static_assert(MODEL == "adlif")
        return _adlif_charge_backward(grads, sums, states, fired, begins, parameters, alpha, RESET, SURROGATE)


# --- what holds for every model ---------------------------------------------------------------------------------


@triton.jit
def load_parameters(pointers, neuron, exists, DECAYS: tl.constexpr, PER_NEURON: tl.constexpr):
    """The parameters of a row of neurons, [1, N] each; the first DECAYS are clamped, bit i of PER_NEURON says whether
    parameter i has one entry per neuron."""
    parameters = ()
    for i in tl.static_range(len(pointers)):
        value = tl.load(pointers[i] + neuron * ((PER_NEURON >> i) & 1), mask=exists, other=0.0)
        if i < DECAYS:
            value = tl.clamp(value, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        parameters += (value[None, :],)
    return parameters


@triton.jit
def zeros(count: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``count`` tiles of float32 zeros."""
    tiles = ()
    for _ in tl.static_range(count):
        tiles += (tl.zeros([ROWS, COLS], tl.float32),)
    return tiles


@triton.jit
def load_states(pointer, stride, offsets, inside, count: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``count`` tiles of states, or of their gradients, ``stride`` apart; zeros if ``pointer`` is None."""
    tiles = zeros(count, ROWS, COLS)
    if pointer is not None:
        tiles = ()
        for i in tl.static_range(count):
            tiles += (tl.load(pointer + i * stride + offsets, mask=inside, other=0.0),)
    return tiles


@triton.jit
def load_at_all_steps(
    grad_counts, grad_rates, offsets, inside, neuron, exists, rate_scale, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The spikes' gradient that is the same at all steps: from counts [B, N] and rates [N], unless None."""
    grad = tl.zeros([ROWS, COLS], tl.float32)
    if grad_counts is not None:
        grad += tl.load(grad_counts + offsets, mask=inside, other=0.0).to(tl.float32)
    if grad_rates is not None:
        grad += tl.load(grad_rates + neuron, mask=exists, other=0.0).to(tl.float32)[None, :] * rate_scale
    return grad


@triton.jit
def to_keep(membrane, threshold, dtype: tl.constexpr):
    """The margin θ − U in 16 bits, or U where that is nearer to 0, or is a number of 16 bits with that bit: the lowest
    one says which, 1 of a margin, 0 of U.

    The value becomes a number next to it with that bit, finite if U is. No membrane crosses θ: a margin keeps its sign,
    since 0 is even (a margin of 0 becomes positive: no spike), and U moves by less than its distance from θ.
    """
    LARGEST: tl.constexpr = 65503.0 if dtype == tl.float16 else 3.3895e38  # both are rounded up to the largest number
    margin, size = threshold - membrane, tl.abs(membrane)
    finite = size < float("inf")
    narrow = membrane.to(dtype)
    exact = (narrow.to(tl.float32) == membrane) & ((narrow.to(tl.int16, bitcast=True) & 1) == 0)
    is_margin = (tl.abs(margin) <= size) & finite & ~exact
    value = tl.where(is_margin, margin, membrane)
    value = tl.where(finite, tl.clamp(value, -LARGEST, LARGEST), value)
    # both in one register, since a fused layer has no register to spare
    word = (value.to(tl.int32, bitcast=True) & -2) | is_margin.to(tl.int32)
    value = word.to(tl.float32, bitcast=True)
    nearest = value.to(dtype)
    bits = nearest.to(tl.int16, bitcast=True)
    step = tl.where(tl.abs(value) >= tl.abs(nearest.to(tl.float32)), 1, -1)  # away from 0, or towards it; and of NaN
    return (bits + ((bits ^ word.to(tl.int16)) & 1) * step.to(tl.int16)).to(dtype, bitcast=True)


@triton.jit
def from_kept(kept, threshold):
    """U and U − θ of what :func:`to_keep` gave."""
    is_margin, value = (kept.to(tl.int16, bitcast=True) & 1) == 1, kept.to(tl.float32)
    other = threshold - value
    return tl.where(is_margin, other, value), -tl.where(is_margin, value, other)


@triton.jit
def store_states(pointer, stride, offsets, inside, tiles):
    """Stores what :func:`load_states` loads."""
    for i in tl.static_range(len(tiles)):
        tl.store(pointer + i * stride + offsets, tiles[i], mask=inside)


@triton.jit
def store_partials(
    here, apart, sums, grad_current, inside, parameters, neuron, exists,
    DECAYS: tl.constexpr, PER_NEURON: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Stores the sums over samples of tiles, those of the parameters' gradients and then of the current's, ``apart``;
    to what is there if ADD."""
    for i in tl.static_range(len(sums) + 1):
        if i < len(sums):
            total = tl.sum(tl.where(inside, sums[i], 0.0), 0)
        else:
            total = tl.sum(tl.where(inside, grad_current, 0.0), 0)
        if i < DECAYS:  # the clamp's own derivative, 0 at its bounds
            decay = tl.load(parameters[i] + neuron * ((PER_NEURON >> i) & 1), mask=exists, other=0.0)
            total = tl.where((decay <= 0) | (decay >= 1), 0.0, total)
        if ADD:
            total += tl.load(here + i * apart, mask=exists, other=0.0)
        tl.store(here + i * apart, total, mask=exists)


@triton.jit
def load_dropped(dropped, offsets, inside):
    """Whether each neuron of a tile is silent and gets no gradient; False if ``dropped`` is None."""
    silent = tl.zeros_like(inside)
    if dropped is not None:
        silent = tl.load(dropped + offsets, mask=inside, other=0) != 0
    return silent


@triton.jit
def select(condition, left, right):
    """The left one of two tuples of tiles where a scalar is true, else the right one."""
    result = ()
    for i in tl.static_range(len(left)):
        result += (tl.where(condition, left[i], right[i]),)
    return result


@triton.jit
def plus(left, right):
    """Two tuples of tiles, added one by one."""
    result = ()
    for i in tl.static_range(len(left)):
        result += (left[i] + right[i],)
    return result


@triton.jit
def plus_last(values, term):
    """``values`` with ``term`` added to the last: to the membrane, or to the threshold."""
    result = ()
    for i in tl.static_range(len(values)):
        if i == len(values) - 1:
            result += (values[i] + term,)
        else:
            result += (values[i],)
    return result


@triton.jit
def step_backward(
    grads, sums, states, fired, margin, grad_spike, begins, parameters, alpha,
    MODEL: tl.constexpr, RESET: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """One step of time backwards; as :func:`charge_backward`, with the gradient that comes through the spike:
    ``margin`` is U_t − θ after the step, ``grad_spike`` ∂L/∂S_t, ``begins`` true at the first step of a run without a
    state, before which no spike has a gradient."""
    through_spike = surrogate_derivative(margin, alpha, SURROGATE) * grad_spike
    grads, sums = plus_last(grads, through_spike), plus_last(sums, -through_spike)
    return charge_backward(grads, sums, states, fired, begins, parameters, alpha, MODEL, RESET, SURROGATE)


@triton.jit
def slope_before(states, begins, parameters, alpha, SURROGATE: tl.constexpr):
    """σ'(U_{t−1} − θ), and 0 where the spike before the step is a constant."""
    margin = states[len(states) - 1] - parameters[len(parameters) - 1]
    return tl.where(begins, 0.0, surrogate_derivative(margin, alpha, SURROGATE))


@triton.jit
def surrogate_derivative(x, alpha, SURROGATE: tl.constexpr):
    """dS/dU at x = U − θ: the formulas of ``g2g_kernels/ops/neurons/surrogates.py``."""
    if SURROGATE == "atan":
        scaled = (1.5707963267948966 * alpha) * x  # π/2
        return (alpha * 0.5) / (1 + scaled * scaled)
    elif SURROGATE == "fast_sigmoid":
        root = 1 + alpha * tl.abs(x)
        return 1 / (root * root)
    elif SURROGATE == "sigmoid":
        # at −|x|: the derivative is even, and the exponential cannot overflow
        decline = tl.exp(-alpha * tl.abs(x))
        return alpha * decline / ((1 + decline) * (1 + decline))
    elif SURROGATE == "triangle":
        return alpha * tl.maximum(1 - alpha * tl.abs(x), 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(SURROGATE == "boxcar")
        scaled = alpha * tl.abs(x)
        return tl.where(scaled < 1, alpha * 0.5, tl.where(scaled >= 1, 0.0, scaled))  # NaN stays NaN
