"""A contender: an implementation of the workload's training step that can be checked.

Adam runs with a learning rate of zero: it does all its work but does not change the weights, so every repeat times the
network that was checked, at the printed firing rates.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import G2GLinear

from .reference import SPIKES, Results, is_wide, mean_weights
from .workload import NeuronInputs, Prepared


class Contender(ABC):
    """One way to compute the workload, built on one device in one precision.

    Of a part alone ``inputs`` is their name in :class:`~benchmarks.workload.Prepared`; ``backend`` is g2g's.
    """

    reset: ClassVar[str] = "after decay"  # as named in :mod:`benchmarks.reference`
    masked: ClassVar[bool] = True  # whether it has no weights outside the mask
    omits: ClassVar[tuple[str, ...]] = ()  # the names of the results that it does not compute
    differs: str = ""  # other differences in what it computes, in a few words

    def __init__(
        self, prepared: Prepared, device: torch.device, precision: str, *, inputs: str = "", backend: str = ""
    ) -> None:
        self.device, self.precision, self.inputs, self.backend = device, precision, inputs, backend
        self.make(prepared)

    @abstractmethod
    def make(self, prepared: Prepared) -> None:
        """Makes all that a turn needs; raises an exception if it cannot compute this."""

    @classmethod
    def preload(cls, prepared: Prepared, precision: str, inputs: str = "") -> None:
        """Loads the data, which is not the contender's own; called before its memory is counted."""
        if inputs:
            getattr(prepared, inputs)

    def before_turn(self) -> None:
        """Undoes the changes of a turn; called before each turn, outside its time."""
        return

    @abstractmethod
    def step(self) -> Any:
        """Runs one training step, or another kernel."""

    @abstractmethod
    def results(self, kernel: str = "") -> Results:
        """The results that :mod:`benchmarks.reference` computes, from the code of :meth:`step`, or of ``forward`` if
        that is the kernel, and the spikes that they follow from, bool [T, B, N] by its names.

        The judge computes everything else from these spikes: they have to be those of the same pass, to the last one.
        """

    def firing_rates(self, results: Results) -> list[float]:
        """Spikes per neuron, step and sample of each layer, of what :meth:`results` returned."""
        return [float(tensor.float().mean()) for name, tensor in results.items() if name.endswith("spikes")]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Products in bfloat16 for ``"bf16"``, nothing for ``"fp32"``."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


#: of products
FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ATan(torch.autograd.Function):
    """A step of the membrane above the threshold, with the derivative of an arctangent (α = 2)."""

    @staticmethod
    def forward(ctx, above):
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx, grad):
        (above,) = ctx.saved_tensors
        return grad / (1 + (torch.pi * above) ** 2)


#: for each layer of a network its spikes [T, B, N], or those of one step after another [B, N]
Kept = tuple[list[torch.Tensor], ...]


def keep(spikes: torch.Tensor, kept: Kept | None, layer: int) -> torch.Tensor:
    """``spikes``, which are put into ``kept`` if there is one."""
    if kept is not None:
        kept[layer].append(spikes.detach())
    return spikes


class NetworkContender(Contender):
    """A network from samples [B, D] to spike counts [B, C], trained with cross-entropy and fused Adam.

    It is called with the samples and a :data:`Kept` or None, and gives its spikes to :func:`keep`. Its modules are
    called ``fc1``, ``lif1``, … ``lif3``, and ``rec1``, ``rec2`` where they are recurrent; subclasses whose modules are
    neither like ``nn.Linear`` nor like :class:`G2GLinear`, or whose neurons have no parameters called ``beta`` and
    ``threshold``, override :meth:`gradients`.
    """

    #: whether a call that keeps spikes is not the program that is timed; then a call without gradients gives the
    #: spikes, which have to be the same
    apart: ClassVar[bool] = False

    def make(self, prepared: Prepared) -> None:
        self.images, self.labels = prepared.images.to(self.device), prepared.labels.to(self.device)
        self.net = self.build(prepared).to(self.device)
        self.wide, decay = is_wide(prepared.workload), prepared.workload.settings().weight_decay
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.0, weight_decay=decay, fused=True)

    @abstractmethod
    def build(self, prepared: Prepared) -> nn.Module:
        """The network with the workload's weights, on the CPU."""

    def counts(self, kept: Kept | None = None) -> torch.Tensor:
        """The spike counts of the batch [B, C]."""
        return self.net(self.images, kept)

    def _backward(self, kept: Kept | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            counts = self.counts(kept)
        loss = F.cross_entropy(counts.float(), self.labels)
        loss.backward()
        return loss.detach(), counts.detach()

    def step(self) -> None:
        self._backward()
        self.optimizer.step()

    @torch.no_grad()
    def forward(self, kept: Kept | None = None) -> torch.Tensor:
        """Evaluates the batch without gradients: spike counts [B, C]."""
        with autocast(self.device, self.precision):
            return self.counts(kept)

    def results(self, kernel: str = "") -> Results:
        kept: Kept = ([], [], [])
        of_pass = None if self.apart else kept
        if kernel == "forward":
            results = {"counts": self.forward(of_pass)}
        else:
            loss, counts = self._backward(of_pass)
            results = {"loss": loss, "counts": counts, **self.gradients()}
            self.optimizer.zero_grad(set_to_none=True)
        if self.apart:
            self.forward(kept)
        trains = (layer[0] if layer[0].dim() == 3 else torch.stack(layer) for layer in kept)
        return results | {name: train > 0.5 for name, train in zip(SPIKES, trains, strict=True)}

    def gradients(self) -> Results:
        """The gradients of the last :meth:`_backward`, those of weights as dense [out, in], or packed of a wide one."""
        found: Results = {}
        for name, parameter in self.net.named_parameters():
            module, _, kind = name.rpartition(".")
            if parameter.grad is not None and kind == "values":
                mask: Any = self.net.get_submodule(module).mask
                # the padding of packed ones is no weight
                packed = parameter.grad.masked_fill(~mask.valid(), 0)
                found[f"{module}.weight"] = packed if self.wide else mask.unpack(packed)
            elif parameter.grad is not None and kind in ("weight", "bias", "beta", "threshold"):
                found[name] = parameter.grad
        return found


class CompiledContender(NetworkContender):
    """A network through ``torch.compile``; its other base class builds it."""

    apart = True  # compiled once more to keep spikes: eagerly a GPU would round otherwise

    def __init__(self, *arguments: Any, compiler: str = "inductor", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.net.compile(fullgraph=True, backend=compiler)


class LayerByLayer(nn.Module):
    """The network, each layer over all time steps at once: ``linear`` in place of its connections, and our neurons, or
    ``neurons`` in their place. The input is the same at every step, and so is what ``fc1`` makes of it."""

    def __init__(
        self,
        prepared: Prepared,
        linear: Callable[[G2GLinear], nn.Module],
        neurons: Callable[[Any], nn.Module] = lambda ours: ours,
    ) -> None:
        super().__init__()
        self.steps = prepared.workload.T
        for number, (connection, ours) in enumerate(prepared.network().layers(), 1):
            self.add_module(f"fc{number}", linear(connection))
            self.add_module(f"lif{number}", neurons(ours))

    def forward(self, images: torch.Tensor, kept: Kept | None = None) -> torch.Tensor:
        x = images
        for number in (1, 2, 3):
            held = {"steps": self.steps} if number == 1 else {}
            current = self.get_submodule(f"fc{number}")(x)
            x = keep(self.get_submodule(f"lif{number}")(current, **held), kept, number - 1)
        return x.sum(0, dtype=torch.float32)


def dense_linear(connection: G2GLinear, kind: type[nn.Linear] = nn.Linear, **options: Any) -> nn.Linear:
    """A dense layer with the weights of ``connection``, zero where it has none."""
    linear = kind(connection.in_features, connection.out_features, connection.bias is not None, **options)
    with torch.no_grad():
        linear.weight.copy_(connection.dense_weight())
        if connection.bias is not None:
            linear.bias.copy_(connection.bias)
    return linear


class MaskedLinear(nn.Linear):
    """A dense layer whose weight is multiplied by ``mask`` at every call."""

    mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def masked_linear(connection: G2GLinear) -> MaskedLinear:
    """The same with the weights of ``connection``, the usual way to train sparse layers where a library has none."""
    linear = dense_linear(connection, MaskedLinear)
    assert isinstance(linear, MaskedLinear)
    linear.register_buffer("mask", connection.mask.to_dense().float())
    return linear


class NeuronContender(Contender):
    """Neurons alone, from currents [T, B, N] to spikes, forward and backward."""

    def make(self, prepared: Prepared) -> None:
        given: NeuronInputs = getattr(prepared, self.inputs)
        self.current = given.current.to(self.device).detach().requires_grad_()
        self.grad_spikes = given.grad_spikes.to(self.device)
        parameters = given.parameters.items()
        # the learnable scalars by name; subclasses whose library creates its own put those here
        self.parameters = {name: value.to(self.device, copy=True).requires_grad_() for name, value in parameters}

    @abstractmethod
    def run(self) -> torch.Tensor | list[torch.Tensor]:
        """Runs forward and backward and returns the spikes, [T, B, N] or a list of [B, N]."""

    def step(self) -> torch.Tensor | list[torch.Tensor]:
        for tensor in (self.current, *self.parameters.values()):
            tensor.grad = None
        return self.run()

    def results(self, kernel: str = "") -> Results:
        spikes = self.step()
        spikes = torch.stack(spikes) if isinstance(spikes, list) else spikes
        differentiable = {"current": self.current, **self.parameters}
        computed = {name: tensor.grad for name, tensor in differentiable.items() if tensor.grad is not None}
        return {"spikes": spikes.detach() > 0.5, **computed}


class LinearContender(Contender):
    """The second layer's product alone, forward and backward, with the gradients of input, weights and bias.

    In bfloat16 its input and the incoming gradient are bfloat16 too, as inside a network.
    """

    def make(self, prepared: Prepared) -> None:
        x, self.grad_y = (tensor.to(self.device, FORMATS[self.precision]) for tensor in getattr(prepared, self.inputs))
        self.x = x.detach().requires_grad_()
        self.layer = self.build(prepared.network("torch").fc2).to(self.device)

    @classmethod
    def preload(cls, prepared: Prepared, precision: str, inputs: str = "") -> None:
        prepared.convert(inputs, FORMATS[precision])

    @abstractmethod
    def build(self, connection: G2GLinear) -> nn.Module:
        """A module from [T, B, in] to [T, B, out] with a parameter called ``bias``, on the CPU."""

    def weight_gradient(self) -> torch.Tensor:
        """The gradient of the weights, as dense [out, in], of a layer like ``nn.Linear`` or :class:`G2GLinear`."""
        layer: Any = self.layer
        return layer.mask.unpack(layer.values.grad) if hasattr(layer, "values") else layer.weight.grad

    def step(self) -> torch.Tensor:
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            y = self.layer(self.x)
        y.backward(self.grad_y)
        return y.detach()

    def results(self, kernel: str = "") -> Results:
        y, bias = self.step(), self.layer.get_parameter("bias")
        assert self.x.grad is not None
        assert bias.grad is not None
        return {"y": y, "x": self.x.grad, "weight": self.weight_gradient(), "bias": bias.grad}

    def firing_rates(self, results: Results) -> list[float]:
        return [float((self.x != 0).float().mean())]


class UpdateContender(Contender):
    """One update of dynamic sparse training in all three layers: a tenth of the units pruned by mean |w|, as many grown
    by the correlation of the spikes before and after them."""

    def make(self, prepared: Prepared) -> None:
        self.images = prepared.images.to(self.device)
        self._weights = mean_weights(prepared)

    @abstractmethod
    def spikes(self) -> list[torch.Tensor]:
        """The spikes of each layer, 0 or 1, that are correlated, [T, B, N]."""

    @abstractmethod
    def correlations(self) -> list[torch.Tensor]:
        """The mean correlation of every unit of each layer computed by :meth:`step`, [block rows, block columns]."""

    @abstractmethod
    def units(self) -> list[torch.Tensor]:
        """The existing units of each layer, bool [block rows, block columns]."""

    def results(self, kernel: str = "") -> Results:
        self.before_turn()
        correlations = [correlation.cpu() for correlation in self.correlations()]
        before = [units.cpu() for units in self.units()]
        self.step()
        results: Results = {name: spikes > 0.5 for name, spikes in zip(SPIKES, self.spikes(), strict=True)}
        after = [units.cpu() for units in self.units()]
        for number, (had, has, scores, weights) in enumerate(
            zip(before, after, correlations, self._weights, strict=True), 1
        ):
            # as scores, since units of equal score may stand in for one another
            pruned, grown = weights[had & ~has].sort().values, scores[has & ~had].sort(descending=True).values
            results |= {f"fc{number}.correlation": scores, f"fc{number}.pruned": pruned, f"fc{number}.grown": grown}
        return results
