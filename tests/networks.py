"""Networks and stacks as small as tests can use them."""

import itertools
from collections.abc import Sequence
from typing import Any

from helpers import seeded
from torch import nn

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import G2GLinear, G2GNet, SpikingStack


def small_net(
    model: str = "mixer", seed: int = 0, sizes: tuple[int, int, int] = (30, 40, 10), **options: Any
) -> G2GNet:
    """A network with units of 4 and six steps, unless the options say otherwise."""
    return G2GNet(*sizes, model, generator=seeded(seed), **{"block_size": 4, "T": 6, **options})


def sparse_stack(
    sizes: Sequence[int],
    neurons: Sequence[nn.Module],
    steps: int,
    backend: str | None = None,
    *,
    recurrent: bool = False,
    gain: float = 1.0,
    unit: int = 4,
    groups: int = 3,
    kinds: tuple[str, str] = ("random", "index"),
    seed: int = 3,
    **options: Any,
) -> SpikingStack:
    """Sparse layers between populations of these sizes, all but the last recurrent if ``recurrent``.

    Args:
        gain: factor on all weights.
        kinds: of the groups of each layer's outputs and inputs.
    """
    draw, layers = seeded(seed), []
    for (below, size), of_layer in zip(itertools.pairwise(sizes), neurons, strict=True):
        out, into = GroupLayout(size, groups, kinds[0], draw), GroupLayout(below, groups, kinds[1])
        masks = [BlockMask.sample(out, side, 1, 0.4, unit, draw) for side in ([into, out] if recurrent else [into])]
        connection, *joined = (
            G2GLinear(mask, bias=number == 0, backend=backend, generator=draw) for number, mask in enumerate(masks)
        )
        layers.append((connection, of_layer, *joined))
    stack = SpikingStack([*layers[:-1], layers[-1][:2]], steps, backend, **options)
    for connection in stack.connections().values():
        connection.values.data *= gain
    return stack
