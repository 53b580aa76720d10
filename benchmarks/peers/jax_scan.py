"""JAX: one jitted training step, a ``lax.scan`` over time, dense weights times a mask.

The strongest dense form that we know. XLA fuses the neurons of a step, multiplies weight and mask once per training
step instead of once per time step, as ``fc1`` at its held input, and updates weights and Adam's moments in place. A
network in one scan was as fast as layer after layer, each with one product over all time steps.
"""

import functools
import os
from typing import Any

import jax
import numpy as np
import torch
from jax import numpy as jnp

from ..contender import Contender
from ..reference import SPIKES, Results
from ..workload import Prepared

PEERS = (("jax-masked", "MaskedScan", ("step", "forward", "recurrent")),)
NEEDS = ("jax",)

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's

Tree = dict[str, jax.Array]


@jax.custom_jvp
def spike(above: jax.Array) -> jax.Array:
    """1 where the membrane is above the threshold, with the derivative of an arctangent (α = 2)."""
    return (above > 0).astype(above.dtype)


@spike.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return spike(*primals), tangents[0] / (1 + (jnp.pi * primals[0]) ** 2)


@functools.partial(jax.jit, static_argnames=("steps", "products", "keep"))
def simulate(
    parameters: Tree, masks: Tree, images: jax.Array, steps: int, products: str, keep: bool = False
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The spike counts [B, C], and with ``keep`` the spikes of each layer [T, B, N], as bool."""
    p = {name: value * masks[name] if name in masks else value for name, value in parameters.items()}

    def product(name: str, x: jax.Array) -> jax.Array:
        y = x.astype(products) @ p[f"{name}.weight"].astype(products).T
        return y.astype(jnp.float32) + p.get(f"{name}.bias", 0.0)

    held = product("fc1", images)

    def step(states: Any, _: None) -> tuple[Any, tuple[jax.Array, ...]]:
        *layers, counts = states
        for number, (membrane, spikes) in enumerate(layers, 1):
            current = held if number == 1 else product(f"fc{number}", layers[number - 2][1])
            if f"rec{number}.weight" in p:
                current = current + product(f"rec{number}", spikes)
            beta, threshold = (p[f"lif{number}.{name}"] for name in ("beta", "threshold"))
            reset = threshold * jax.lax.stop_gradient(spikes)
            membrane = beta.clip(0, 1) * membrane + current - reset
            layers[number - 1] = membrane, spike(membrane - threshold)
        kept = tuple(spikes > 0 for _, spikes in layers) if keep else ()
        return (*layers, counts + layers[-1][1]), kept

    zeros = [jnp.zeros((len(images), len(p[f"fc{number}.bias"]))) for number in (1, 2, 3)]
    scan: Any = jax.lax.scan
    (*_, counts), kept = scan(step, (*((zero, zero) for zero in zeros), zeros[-1]), None, length=steps)
    return counts, kept


def loss_of(parameters: Tree, masks: Tree, images: jax.Array, labels: jax.Array, **how: Any) -> Any:
    """Mean cross-entropy, and what :func:`simulate` gives."""
    counts, kept = simulate(parameters, masks, images, **how)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(counts), labels[:, None], 1)
    return -chosen.mean(), (counts, kept)


differentiated = jax.value_and_grad(loss_of, has_aux=True)


@functools.partial(jax.jit, static_argnames=("steps", "products"), donate_argnums=(0, 1))
def train(
    parameters: Tree, moments: Any, masks: Tree, images: jax.Array, labels: jax.Array, rate: float, decay: float,
    steps: int, products: str,
) -> tuple[Tree, Any]:  # fmt: skip
    """One step of Adam: the parameters and (count, first, second moments) after it."""
    _, gradients = differentiated(parameters, masks, images, labels, steps=steps, products=products)
    gradients = {name: gradient + decay * parameters[name] for name, gradient in gradients.items()}
    count, first, second = moments[0] + 1, *(
        {name: beta * old[name] + (1 - beta) * of(gradients[name]) for name in old}
        for beta, old, of in zip(BETAS, moments[1:], (jnp.asarray, jnp.square), strict=True)
    )  # fmt: skip
    by, root = (1 - beta**count for beta in BETAS)
    changed = {
        name: value - rate * (first[name] / by) / (jnp.sqrt(second[name] / root) + EPSILON)
        for name, value in parameters.items()
    }
    return changed, (count, first, second)


class MaskedScan(Contender):
    """The network with dense weights times a mask, on as many threads as PyTorch has."""

    def make(self, prepared: Prepared) -> None:
        if self.device.type != "cpu":
            raise ValueError("JAX is measured on a CPU only")
        w, net = prepared.workload, prepared.network("torch")
        self.how = {"steps": w.T, "products": "bfloat16" if self.precision == "bf16" else "float32"}
        self.rate, self.decay = 0.0, w.settings().weight_decay
        self.images, self.labels = (jnp.asarray(each.numpy()) for each in (prepared.images, prepared.labels))
        self.parameters, self.masks = {}, {}
        for name, connection in net.connections().items():
            self.parameters[f"{name}.weight"] = _array(connection.dense_weight())
            self.masks[f"{name}.weight"] = _array(connection.mask.to_dense().float())
            if connection.bias is not None:
                self.parameters[f"{name}.bias"] = _array(connection.bias)
        for number, (_, neurons) in enumerate(net.layers(), 1):
            self.parameters |= {f"lif{number}.{name}": _array(value) for name, value in neurons.by_name.items()}
        zeros = [{name: jnp.zeros_like(value) for name, value in self.parameters.items()} for _ in range(2)]
        self.moments = 0, *zeros

    @classmethod
    def preload(cls, prepared: Prepared, precision: str, inputs: str = "") -> None:
        os.environ["PJRT_NPROC"] = str(torch.get_num_threads())  # which XLA reads when it begins
        jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(8)))

    def step(self) -> None:
        given = self.masks, self.images, self.labels, self.rate, self.decay
        changed = train(self.parameters, self.moments, *given, **self.how)
        self.parameters, self.moments = jax.block_until_ready(changed)

    def forward(self) -> torch.Tensor:
        return _tensor(jax.block_until_ready(simulate(self.parameters, self.masks, self.images, **self.how)[0]))

    def results(self, kernel: str = "") -> Results:
        given = self.parameters, self.masks, self.images
        if kernel == "forward":
            return _results(*simulate(*given, keep=True, **self.how))
        compiled = jax.jit(differentiated, static_argnames=("steps", "products", "keep"))
        (loss, (counts, kept)), gradients = compiled(*given, self.labels, keep=True, **self.how)
        return {"loss": _tensor(loss), **_results(counts, kept), **{n: _tensor(g) for n, g in gradients.items()}}


def _results(counts: jax.Array, kept: tuple[jax.Array, ...]) -> Results:
    return {"counts": _tensor(counts), **{name: _tensor(each) for name, each in zip(SPIKES, kept, strict=True)}}


def _array(tensor: torch.Tensor) -> jax.Array:
    return jnp.array(tensor.detach().numpy())  # a copy, whose memory a step may take


def _tensor(array: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
