"""G2GNet: layers of spiking neurons joined by dense or group-sparse connections, with recurrence and delays."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.numbers import COUNT
from g2gnet.convolution import MaskedConv2d
from g2gnet.encoding import SampleForm, as_samples, check_samples, encode
from g2gnet.images import Shape, checked_shape
from g2gnet.layers import G2GLinear
from g2gnet.network_settings import NetworkSettings
from g2gnet.neurons import NEURONS, SpikingNeurons
from g2gnet.notation import placed
from g2gnet.sequences import tapped, unfold
from g2gnet.spiking_network import Projection, SpikingNetwork, answer, check_input
from g2gnet.weights.densities import layer_probabilities
from g2gnet.weights.patterns import FULL, Pattern, layer_mask, mask_between


class Prediction(NamedTuple):
    """What :meth:`G2GNet.predict` returns, on the samples' device.

    Attributes:
        classes: of each sample, int64 [N]; of equal logits the first.
        logits: [N, C], as ``net(x)`` returns them.

    Example:
        >>> found = G2GNet(64, 32, 10, T=5).predict(torch.rand(3, 8, 8))
        >>> found.classes.shape, found.logits.shape
        (torch.Size([3]), torch.Size([3, 10]))
    """

    classes: torch.Tensor
    logits: torch.Tensor


class G2GNet(SpikingNetwork):
    """Input → hidden 1 → hidden 2 → output, each connection a :class:`G2GLinear`, each population of one model.

    Args:
        input_dim, hidden_dim, num_classes: the sizes of the populations. ``input_dim`` counts the inputs of one time
            step; ``hidden_dim`` is the size of each of two hidden layers, or a list of the size of each. With
            ``layers``, ``input_dim`` is the shape of these inputs, (C, H, W), and ``hidden_dim`` None.
        model: ``"dense"`` (of ``layers`` ``"conv"``), or how neurons, or channels, are grouped. ``"index"``: contiguous
            ranges. ``"random"``: drawn for each side of each layer. ``"mixer"``: in turns contiguous (fc1: spatial
            mixing) and interleaved (fc2: feature mixing). ``"erdos_renyi"``, ``"small_world"``, ``"distance"``:
            contiguous groups, with equally many units in other places (:mod:`g2gnet.weights.patterns`). Or a pattern of
            your own, a function of its form.
        p_inter, p_intra: the probability of a unit between and inside groups (ignored for dense and a pattern of your
            own).
        layers: hidden layers of images, ``"32C3-64C3-P2-128C3-P2"``: ``32C3`` is a convolution with 32 channels and
            3 × 3 kernels that keeps the size (``conv1``, …), ``P2`` or ``AP2`` a pool of 2 × 2 spikes (maximum or
            mean), ``256`` so many neurons without a place (``fc3``). A sparse model then connects groups of channels.
        block_size: side of a connection unit, in weights (of a convolution, in kernels).
        T: number of time steps of a sample [B, D].
        num_groups: groups on each side of a sparse layer; on a side with fewer neurons, one per neuron.
        density: ``"uniform"``, or ``"erk"``: small layers keep more of their weights
            (:func:`g2gnet.weights.densities.layer_probabilities`).
        enc, enc_scale, enc_bias: how samples become input (:func:`g2gnet.encoding.encode`).
        standardize: before that, subtract ``input_mean`` from samples and divide them by ``input_deviation``: two
            scalar buffers, 0 and 1 until they are set, saved with the network. For ``"current"`` only.
        sequence: a name in :data:`g2gnet.sequences.SEQUENCES`. Other than ``"none"``, samples [B, T·D] unfold over T
            steps as the buffer ``input_order`` [T, D] says: where the D = ``input_dim`` inputs of a step lie in
            a sample. It is 0, 1, 2, … until it is set (:func:`g2gnet.sequences.input_order`), saved with the network.
            The network does not know the shape of an image: any image with T·D values fits.
        recurrent: whether the neurons of each hidden layer are joined to one another, by ``rec1``, ``rec2``, …: spikes
            reach them one step later. Or a list of hidden layers, numbered from 1. The groups are those of the layer's
            neurons.
        feedback: whether each hidden layer is joined to the one below it, by ``fb1`` to ``lif1``, …, one step later.
        input_taps: N: of samples that unfold, fc1 receives at each step the inputs of N steps, from a tapped delay line
            (:func:`g2gnet.sequences.tapped`). Then ``input_dim`` is N·D.
        delay: N: what each neuron sends arrives later by a whole number of steps, drawn once for each projection and
            each neuron of its source from 0 to N, from 1 for ``rec`` and ``fb`` (:meth:`delays`).
        learn_delay: whether these are parameters, which stay from 0 to N (:class:`Projection`).
        delay_width: how many steps on either side of a spike their gradients see (:class:`Projection`).
        p_rec_inter: the probability of a recurrent unit between groups; None: ``p_inter``.
        rec_gain: factor on the initial recurrent (and feedback) weights, above 0.
        neuron: model of all neurons: ``"lif"`` (:class:`LIF`), ``"synaptic"`` (:class:`Synaptic`), ``"adlif"``
            (:class:`AdLIF`) or ``"cubalif"`` (:class:`CubaLIF`).
        per_neuron: one value of each of the neurons' parameters per neuron instead of one per layer.
        reset: as for :func:`g2g_kernels.lif`.
        surrogate, alpha: of the hidden layers, as for :func:`g2g_kernels.lif`. The output layer keeps ATan with α = 2:
            its few neurons must always get a gradient.
        parameters: the initial values of the neurons' parameters and whether they are learned, as for
            :class:`SpikingNeurons`: ``beta=0.95``, ``learn_threshold=False``.
        dropout: of hidden neurons, in training mode (:class:`SpikingNetwork`).
        readout: the output: spike ``"counts"``, or the ``"last"``, ``"mean"`` or ``"max"`` membrane of output neurons
            that do not spike (:class:`SpikingNetwork`). Their threshold then has no effect and is not learned, nor are
            they reset; of ``"adlif"``, b is 0.
        quantize: bits of the weights that it computes with, 8 or 4 (:attr:`SpikingNetwork.quantize`).
        init_gain: factor on the initial weights of fc2 and fc3, above 0. Above 1, fewer neurons are silent at first.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.
        generator: source of randomness for masks and weights, on the CPU (PyTorch's global one if None).

    Raises:
        ValueError: for a value out of range.
        TypeError: for an unknown parameter of the neurons.

    Example:
        >>> net = G2GNet(784, 256, 10, model="mixer", p_inter=0.15, block_size=16, T=10)
        >>> net(torch.rand(5, 784)).shape  # spike counts of ten classes
        torch.Size([5, 10])
    """

    fc1: G2GLinear
    lif1: SpikingNeurons
    fc2: G2GLinear
    lif2: SpikingNeurons
    fc3: G2GLinear
    lif3: SpikingNeurons
    input_mean: torch.Tensor
    input_deviation: torch.Tensor
    input_order: torch.Tensor
    #: The kind and shape of the samples it was trained on, or None. :func:`g2gnet.load` and the trainer set it.
    trained_on: SampleForm | None = None

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_dim: int | Sequence[int] | None,
        num_classes: int,
        model: str | Pattern = NetworkSettings.model,
        p_inter: float = NetworkSettings.p_inter,
        block_size: int = NetworkSettings.block_size,
        T: int = NetworkSettings.T,  # noqa: N803  (the field's name for it)
        *,
        p_intra: float = NetworkSettings.p_intra,
        layers: str | None = NetworkSettings.layers,
        num_groups: int = NetworkSettings.num_groups,
        density: str = NetworkSettings.density,
        enc: str = NetworkSettings.enc,
        enc_scale: float = NetworkSettings.enc_scale,
        enc_bias: float = NetworkSettings.enc_bias,
        standardize: bool = NetworkSettings.standardize,
        sequence: str = NetworkSettings.sequence,
        neuron: str = NetworkSettings.neuron,
        recurrent: bool | Sequence[int] = NetworkSettings.recurrent,
        feedback: bool = NetworkSettings.feedback,
        delay: int = NetworkSettings.delay,
        learn_delay: bool = NetworkSettings.learn_delay,
        delay_width: int = NetworkSettings.delay_width,
        input_taps: int = NetworkSettings.input_taps,
        p_rec_inter: float | None = NetworkSettings.p_rec_inter,
        rec_gain: float = NetworkSettings.rec_gain,
        per_neuron: bool = NetworkSettings.per_neuron,
        reset: str = NetworkSettings.reset,
        surrogate: str = NetworkSettings.surrogate,
        alpha: float = NetworkSettings.alpha,
        dropout: float = NetworkSettings.dropout,
        quantize: int | None = NetworkSettings.quantize,
        init_gain: float = NetworkSettings.init_gain,
        readout: str = NetworkSettings.readout,
        backend: str | None = None,
        generator: torch.Generator | None = None,
        **parameters: float,
    ) -> None:
        given = locals()  # whose names are those of the settings
        if layers is not None and hidden_dim is None:
            given["hidden_dim"] = NetworkSettings.hidden_dim  # which has no effect
        settings = NetworkSettings(**{name: given[name] for name in NetworkSettings.defaults() if name in given})
        shape = checked_shape(input_dim) if isinstance(input_dim, Sequence) else (input_dim,)
        populations, projections = _projections(settings, shape, num_classes, backend, generator, parameters)
        output, images = f"lif{len(populations)}", None if len(shape) == 1 else shape
        super().__init__(
            populations, projections, output, settings.T, settings.dropout, settings.readout, backend, images
        )
        self.quantize = settings.quantize
        self.model = settings.model
        self.enc = settings.enc
        self.enc_scale = settings.enc_scale
        self.enc_bias = settings.enc_bias
        self.standardize = settings.standardize
        self.sequence = settings.sequence
        if self.standardize:
            self.register_buffer("input_mean", torch.zeros(()))
            self.register_buffer("input_deviation", torch.ones(()))
        self.input_taps = settings.input_taps
        if shape[0] % self.input_taps:
            raise ValueError(
                f"input_dim={input_dim} is no multiple of input_taps={self.input_taps}; give N·D of a step's D"
            )
        if self.sequence != "none":
            at_once = math.prod(shape) // self.input_taps
            self.register_whole("input_order", torch.arange(self.T * at_once).view(self.T, at_once))

    @classmethod
    def from_settings(
        cls,
        settings: NetworkSettings,
        input_dim: int | Sequence[int],
        num_classes: int,
        backend: str | None = None,
        generator: torch.Generator | None = None,
    ) -> "G2GNet":
        """The network that ``settings`` (:class:`NetworkSettings`, or a training run's) describe, for data of these
        sizes (of sequences the inputs of one step); ``backend`` and ``generator`` as for the constructor."""
        options = settings.network_options()
        return cls(input_dim, num_classes=num_classes, backend=backend, generator=generator, **options)

    def encode(
        self, x: torch.Tensor, generator: torch.Generator | None = None, part: slice | None = None
    ) -> torch.Tensor:
        """What fc1 receives: samples [B, D], or [B, T·D] if they unfold over time, as [B, D] (held at every step) or
        [T, B, D]; x [T, B, D] as it is. With ``part``, only these samples are encoded, as they would be in the whole
        batch.
        """
        if not isinstance(x, torch.Tensor):
            check_input(x)
        if x.dim() == 3:
            return x if part is None else x[:, part]
        if self.standardize:
            check_samples(x)  # which would be floats
            x = (x - self.input_mean) / self.input_deviation
        if self.sequence != "none":
            self.settle()
            x = unfold(x, self.whole("input_order"))
        x = encode(x, self.enc, self._T, self.enc_scale, self.enc_bias, generator, part)
        return x if self.input_taps == 1 else tapped(x, self.input_taps)

    def forward(
        self, x: torch.Tensor, generator: torch.Generator | None = None, *, batch_first: bool | None = None
    ) -> torch.Tensor:
        """Samples [B, D], or inputs over time [T, B, D] → logits [B, C]: the output's spike counts, or its readout.

        Inputs over time go to fc1 as they are, neither standardised nor encoded; ``batch_first`` as for
        :meth:`simulate`. :meth:`predict` takes samples of any shape.
        """
        return answer(self.simulate(self.encode(self._time_first(x, batch_first), generator), batch_first=False))

    def predict(
        self, samples: torch.Tensor | np.ndarray, batch_size: int = 256, generator: torch.Generator | None = None
    ) -> Prediction:
        """Classifies samples as a file of data has them: scales, standardises and encodes them as training does.

        Runs in evaluation mode and without gradients; afterwards each module has the mode that it had.

        Args:
            samples: an array or a tensor, on any device, of uint8, floats, or counts of events in int8, int16 or int32
                (:func:`g2gnet.data.as_samples`). Vectors [N, D], images [N, height, width] or [N, channels, height,
                width], or sequences [N, T, …] of either; those of one sample lie as in training. Where
                ``self.trained_on`` (:class:`~g2gnet.encoding.SampleForm`) says what training samples were, it has to be
                that shape and kind of dtype, or flattened from it; otherwise only the number of values is checked.
            batch_size: how many samples are computed at a time.
            generator: of the spikes of ``enc="rate"``, drawn batch by batch (PyTorch's global one if None), so that
                they depend on ``batch_size``.

        Raises:
            TypeError: for samples of another type or dtype.
            ValueError: for none, for another shape, and for a number that is not finite.

        Example:
            >>> net = G2GNet(28, 64, 10, T=28, sequence="rows")
            >>> net.predict(torch.randint(256, (5, 28, 28), dtype=torch.uint8)).logits.shape
            torch.Size([5, 10])
        """
        batch_size = COUNT.check("batch_size", batch_size)
        SampleForm.of(samples)  # whose errors name type and dtype
        self._check_shape(tuple(samples.shape))
        if self.trained_on is not None:
            self.trained_on.check(samples)
        like, logits = next(layer.values for layer, _ in self.layers()), []
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for first in range(0, len(samples), batch_size):
                x = as_samples(samples[first : first + batch_size])
                if not (finite := x.isfinite().all(1)).all():
                    raise ValueError(f"sample {first + int(finite.long().argmin())} is not finite everywhere")
                with torch.no_grad():
                    logits.append(self(x.to(like.device, like.dtype), generator).to(x.device))
        finally:
            for module, training in modes:
                module.training = training
        of_all = torch.cat(logits)
        return Prediction(of_all.argmax(1), of_all)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless samples of this shape are as the network takes them."""
        steps, values = self._fixed_steps(), self.sizes[-1] // self.input_taps
        total = values * (steps or 1)
        takes = f"[N, …] with {total} values each" + (f", {values} at each of T={steps} steps" if steps else "")
        fits = len(shape) > 1 and shape[0] > 0 and math.prod(shape[1:]) == total
        if self.sequence == "own":
            takes = f"[N, {steps}, …] with {values} values at each of {steps} steps"
            fits = fits and (len(shape) == 2 or shape[1] == steps)
        if not fits:
            one = " (one sample is samples[None])" if math.prod(shape) == total else ""
            raise ValueError(f"samples are {list(shape)}; this network takes {takes}{one}")

    def _fixed_steps(self) -> int | None:
        order = self._buffers.get("input_order")
        return None if order is None else len(order)

    def fitted(self, name: str, given: torch.Tensor, where: str) -> torch.Tensor:
        numbers = super().fitted(name, given, where)
        if name == "input_order" and given.shape == self.input_order.shape:  # others are refused by PyTorch
            values = numbers.flatten().sort().values
            if not torch.equal(values, torch.arange(len(values), dtype=values.dtype, device=values.device)):
                raise ValueError(f"{where} does not have each value of a sample once")
        return numbers

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        *_, error_msgs = rest
        deviation = state_dict.get(f"{prefix}input_deviation")
        if isinstance(deviation, torch.Tensor) and self.standardize and not (deviation > 0).all():
            error_msgs.append(f"{prefix}input_deviation is not above 0")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _projections(
    settings: NetworkSettings,
    input_shape: Shape,
    num_classes: int,
    backend: str | None,
    generator: torch.Generator | None,
    parameters: Mapping[str, float],
) -> tuple[dict[str, nn.Module], dict[str, Projection]]:
    """Draws the populations and what joins them, for inputs of this shape; ``parameters`` are arguments of the
    neurons."""
    forms = settings.layer_forms(num_classes)
    places = placed(forms, input_shape)
    sizes = [math.prod(shape) for shape in (input_shape, *[each.shape for each in places])]
    model, kind, count = settings.model, NEURONS[settings.neuron], len(places)
    back = [(f"rec{n}", n, n) for n in range(1, count) if settings.is_recurrent(n)]
    back += [(f"fb{n}", n + 1, n) for n in range(1, count - 1) if settings.feedback]
    shapes = [each.weight for each in places]
    probabilities = layer_probabilities(
        shapes + [(sizes[target], sizes[source]) for _, source, target in back],
        settings.p_intra,
        settings.p_inter,
        settings.num_groups,
        settings.density,
    )
    populations: dict[str, nn.Module] = {}
    connections: dict[str, tuple[int, int, G2GLinear | MaskedConv2d]] = {}
    for number, (form, shape) in enumerate(zip(forms, shapes, strict=True)):
        if model in FULL:
            out_layout, in_layout = (GroupLayout(size, 1) for size in shape)
            mask = BlockMask.full(out_layout, in_layout, settings.block_size)
        else:
            mask = layer_mask(
                model, number, shape, probabilities[number], settings.num_groups, settings.block_size, generator
            )
        options: dict[str, Any] = {"reset": settings.reset, "backend": backend, **parameters}
        if number < len(shapes) - 1:
            options |= {"surrogate": settings.surrogate, "alpha": settings.alpha}
        elif settings.readout != "counts":
            options["reset"] = "none"
            for name in (*kind.model.by_spikes, "threshold"):  # nothing reaches them
                options[f"learn_{name}"] = False
            options |= dict.fromkeys(kind.model.by_spikes, 0.0)
        connection: G2GLinear | MaskedConv2d
        if form.kernel is None:
            connection = G2GLinear(mask, backend=backend, generator=generator)
        else:
            connection = MaskedConv2d(
                shape[1], shape[0], form.kernel, padding="same", mask=mask, backend=backend, generator=generator
            )
        if number > 0:
            with torch.no_grad():
                connection.values.mul_(settings.init_gain)
        connections[f"{'fc' if form.kernel is None else 'conv'}{number + 1}"] = number, number + 1, connection
        populations[f"lif{number + 1}"] = kind(sizes[number + 1] if settings.per_neuron else None, **options)
    # after all others, which are the same without them
    for (name, source, target), probability in zip(back, probabilities[len(shapes) :], strict=True):
        if source == target and settings.p_rec_inter is not None:
            probability = settings.p_intra, settings.p_rec_inter
        out, into = (connections[f"fc{number}"][2].mask.rows.layout for number in (target, source))
        mask = mask_between(model, out, into, probability, settings.block_size, generator)
        connection = G2GLinear(mask, bias=False, backend=backend, generator=generator)
        with torch.no_grad():
            connection.values.mul_(settings.rec_gain)
        connections[name] = source, target, connection
    projections = {}
    names = ["input", *populations]
    for name, (source, target, connection) in connections.items():
        pools = () if source >= target else forms[source].pools
        module = nn.Sequential(*pools, connection) if pools else connection
        delay: int | torch.Tensor = int(source >= target)
        learned: dict[str, Any] = {}
        if settings.delay:
            least = int(source >= target)
            delay = torch.randint(least, settings.delay + 1, (sizes[source],), generator=generator)
            learned = {"learn_delay": settings.learn_delay, "max_delay": settings.delay}
            learned |= {"delay_width": settings.delay_width if settings.learn_delay else 1}
        projections[name] = Projection(names[source], names[target], module, delay, **learned)
    return populations, projections
