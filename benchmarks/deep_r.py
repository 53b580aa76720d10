"""DEEP R (Bellec et al., ICLR 2018), a rule of rewiring that g2gnet does not offer, for the studies.

Every possible connection has a sign. A weight that crosses zero is pruned, and as many absent connections are drawn
and grown at zero; so the number of weights is constant. A constant force draws every weight towards zero. As in later
work of the authors (Bellec et al., NeurIPS 2018), Adam scales the gradient, and there is no noise. All else is that of
:class:`g2gnet.training.Trainer`.
"""

import torch

from g2gnet.base.seeding import stream
from g2gnet.data import ImageData
from g2gnet.dst.rules import Evidence
from g2gnet.dst.scheduler import DSTScheduler
from g2gnet.layers import G2GLinear
from g2gnet.training import Machine, Trainer, TrainSettings
from g2gnet.weights.tied_averages import rewire_averages

#: of a step's learning rate: the force towards zero
FORCE = 0.01


class DeepR(DSTScheduler):
    """Rewires layers of single weights after every optimizer step.

    Args:
        layers: of which every weight is a unit.
        optimizer: of their weights.
        seed: of the signs and the draws.
        force: what is taken off the size of each weight in a step, over the learning rate.

    Raises:
        ValueError: if a unit has more than one weight.
    """

    def __init__(
        self, layers: list[G2GLinear], optimizer: torch.optim.Optimizer, seed: int, force: float = FORCE
    ) -> None:
        if any(layer.mask.unit_sizes.max() > 1 for layer in layers):
            raise ValueError("DEEP R rewires single weights; give block_size=1")
        super().__init__(layers, optimizer, 1, 1.0, "random", "random", seed, process_group=None)
        self.force = force
        self._signs = [self._draw_signs(number) for number in range(len(layers))]
        with torch.no_grad():
            for number, layer in enumerate(layers):
                layer.values.copy_(layer.values.abs() * self._signs_of(number, layer))

    def _draw_signs(self, number: int) -> torch.Tensor:
        """The sign of every possible connection of a layer, float [grid]."""
        rows, columns = self.layers[number].mask.grid
        return torch.randint(2, (rows * columns,), generator=stream(self.seed, "dst", 0, number)) * 2.0 - 1

    def _signs_of(self, number: int, layer: G2GLinear) -> torch.Tensor:
        """Those of the connections that exist, [num_units, 1, 1]."""
        return self._signs[number][layer.mask.flat_unit()][:, None, None]

    def _update(self, evidence: list[tuple[int, Evidence]]) -> None:
        rate = float(self._state.optimizers[0].param_groups[0]["lr"])
        for number, (layer, *_) in evidence:
            signs = self._signs_of(number, layer)
            layer.values.sub_(rate * self.force * signs)
            crossed = (layer.values * signs < 0).flatten().nonzero().flatten()
            absent = (~layer.mask.present()).flatten().nonzero().flatten()
            order = torch.randperm(len(absent), generator=stream(self.seed, "dst", self.steps, number))
            slots = crossed[: len(absent)]
            layer.rewire_(slots, absent[order[: len(slots)]], torch.tensor(True))
            rewire_averages(layer)
            self._state.reset_(layer.values, slots, torch.tensor(True))
            self._pruned += len(slots)
            self._grown += len(slots)


class DeepRTrainer(Trainer):
    """Trains a :class:`g2gnet.G2GNet` of static settings, whose connections DEEP R rewires."""

    def __init__(self, settings: TrainSettings, data: ImageData, machine: Machine) -> None:
        super().__init__(settings, data, machine)
        self.dst = DeepR(list(self.net.connections().values()), self.optimizer, settings.seed)
