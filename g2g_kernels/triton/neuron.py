"""Device functions of LIF neurons, which ``lif`` and the fused ``g2g_stack`` kernel share.

They take tiles of float32 values, one element a neuron and sample. The order of operations is that of ``reference.py``
(and so of snnTorch): multiply, add, subtract, each rounded. A compiler would contract β·U + I into one fused
multiply-add, rounded once, and a membrane within an ulp of θ could then fire here and not there. Kernels that call
:func:`charge` are therefore launched with :data:`EXACT`; θ·R is exact either way, since R is 0 or 1.
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
def decaying(membrane, fired, RESET: tl.constexpr):
    """V, the part of U_{t−1} that decays into U_t: all of it, or nothing after a reset to zero."""
    if RESET == "zero":
        return tl.where(fired, 0.0, membrane)
    else:
        return membrane


@triton.jit
def charge(membrane, fired, current, decay, theta, RESET: tl.constexpr):
    """U_t = decay·V_{t−1} + I_t − θ·R_t (the last term for reset by subtraction only); ``fired`` is R_t."""
    charged = decaying(membrane, fired, RESET) * decay + current
    if RESET == "subtract":
        return tl.where(fired, charged - theta, charged)
    else:
        return charged


@triton.jit
def surrogate_derivative(x, alpha, SURROGATE: tl.constexpr):
    """dS/dU at x = U − θ: the formulas of ``g2g_kernels/ops/lif/surrogates.py``."""
    if SURROGATE == "atan":
        scaled = (1.5707963267948966 * alpha) * x  # π/2
        return (alpha * 0.5) / (1 + scaled * scaled)
    elif SURROGATE == "fast_sigmoid":
        root = 1 + alpha * tl.abs(x)
        return 1 / (root * root)
    elif SURROGATE == "sigmoid":
        # of −|x|: the derivative is even, and e^(α|x|) cannot overflow so
        decline = tl.exp(-alpha * tl.abs(x))
        return alpha * decline / ((1 + decline) * (1 + decline))
    elif SURROGATE == "triangle":
        return alpha * tl.maximum(1 - alpha * tl.abs(x), 0.0)
    else:
        tl.static_assert(SURROGATE == "boxcar")
        return tl.where(alpha * tl.abs(x) < 1, alpha * 0.5, 0.0)
