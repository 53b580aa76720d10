"""Images behind convolutions on the compiled CPU kernels: operators ``g2g::images_forward`` (with its autograd formula)
and ``g2g::images_backward``. They run the first populations of a network, as many as are a chain of convolutions; what
follows is a network of its own, whose inputs are the spikes of the last of these.

Between layers spikes are words, int64 [T, B, pixels, words] with a bit for each channel. What the forward pass keeps is
of each layer these, behind its windows, too, if there are any, and the membranes of every step, float32
[T, B, pixels, lanes]; where currents are maxima over windows, also which of its window each is, uint8 of that shape.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from ctypes import Structure, addressof
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.flops import count_flops
from g2g_kernels.ops.g2g_conv2d import g2g_conv2d
from g2g_kernels.ops.g2g_conv2d.cpu import refuses_sizes
from g2g_kernels.ops.g2g_stack.activity import Activity, Spikes
from g2g_kernels.ops.g2g_stack.cpu import refuses_tensors
from g2g_kernels.ops.g2g_stack.images import (
    Convolution,
    Images,
    Pool,
    Shape,
    convolved,
    convolved_shape,
    pooled_shape,
    through,
)
from g2g_kernels.ops.g2g_stack.population import (
    Call,
    Connection,
    Population,
    refuses_fields,
    refuses_kernels,
    unread,
)
from g2g_kernels.ops.g2g_stack.reference import PRODUCTS, functions_of, in_turn
from g2g_kernels.ops.neurons import run_neurons
from g2g_kernels.ops.neurons.cpu import neuron_arguments
from g2g_kernels.ops.neurons.models import Neurons
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, Expected, Output, RecordOperator
from g2g_kernels.tracing import replaced

#: numbers that a pixel's channels take in what passes between layers are a multiple of this
LANES = 16
#: bytes of the gradients between two layers that are there at a time, where products are dense, and of the sums of the
#: weights' gradients
MOST_BETWEEN, MOST_SUMS = 8 << 20, 64 << 20
#: places of a window of which the maximum is a current
MOST_MERGED = 256
#: fields that these kernels read
READ = ("neurons", "connections", "state", "kind", "values", "mask", "source", "bias", "images")


class ImageLayer(NamedTuple):
    """A convolution, windows whose maxima are currents, the neurons that receive these, and windows of spikes whose
    maxima are sent on.

    Attributes:
        weight, bias: of the convolution, or None: the current is given.
        neurons: LIF, with one β and one θ.
        state: [1, B, N] before the first step, or None.
        shape: of the neurons.
        convolution: None where the current is given.
        merge: of what the convolution gives, over windows side by side; or None.
        pool: of the spikes, over windows side by side; or None.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    neurons: Neurons
    state: torch.Tensor | None
    shape: Shape
    convolution: Convolution | None
    merge: Pool | None
    pool: Pool | None


class ImagesCall(NamedTuple):
    """What the forward pass takes.

    Attributes:
        x: [T, B, N_in], images of the shape ``source``; or the current of the first layer, [T, B, N], or [B, N], held
            for ``steps``.
        source: None where x is the current.
        layers: each behind the one before.
        steps: 0 if x is not held.
    """

    x: torch.Tensor
    source: Shape | None
    layers: tuple[ImageLayer, ...]
    steps: int

    def expected(self) -> Expected:
        """What the kernels take for granted; ValueError for images that do not fit."""
        shape, batch = self.source, self.x.shape[-2]
        first = self.layers[0].shape if shape is None else shape
        lead = (batch,) if self.steps else (self.x.shape[0], batch)
        yield "x", self.x, (*lead, math.prod(first)), torch.float32
        for number, layer in enumerate(self.layers):
            if (layer.weight is None) != (shape is None) or (number and shape is None):
                raise ValueError(f"layer {number} needs a weight and images, or the current of its neurons")
            if layer.weight is not None:
                assert layer.convolution is not None
                assert shape is not None
                if _merged(convolved_shape(shape, layer.weight.shape, layer.convolution), layer.merge) != layer.shape:
                    raise ValueError(f"the convolution of layer {number} must be one to images of {layer.shape}")
                yield f"weight {number}", layer.weight, layer.weight.shape, torch.float32
                yield f"bias {number}", layer.bias, (layer.shape[0],), torch.float32
            yield f"state {number}", layer.state, (1, batch, math.prod(layer.shape)), torch.float32
            for each in layer.neurons.parameters:
                yield f"a parameter of layer {number}", each, (1,), torch.float32
            shape = sent_shape(layer)


TYPES |= {"ImageLayer": ImageLayer, "ImagesCall": ImagesCall}


def sent_shape(layer: ImageLayer) -> Shape:
    """Of what a layer sends on."""
    return _merged(layer.shape, layer.pool)


def _merged(shape: Shape, pool: Pool | None) -> Shape:
    return shape if pool is None else pooled_shape(shape, pool)


# --- which populations these kernels run ----------------------------------------------------------------------------


def side_by_side(pool: Pool) -> bool:
    """Whether a pool gives the maxima over windows that do not overlap."""
    return pool.kind == "max" and pool.kernel == pool.stride and pool.padding == (0, 0) and pool.dilation == (1, 1)


def _why_not(number: int, population: Population) -> str | None:
    """Why population ``number`` is none that these kernels run behind the ones before it, or None."""
    each, *others = population.connections
    if others or each.source != number - 1 or each.kind != "convolution":
        return f"population {number} does not receive one convolution of what comes before it, and nothing else"
    if reason := refuses_fields(unread(READ), [population]):
        return reason
    neurons = population.neurons
    if neurons.model != "lif" or any([each.numel() > 1 for each in neurons.parameters]):
        return f"population {number} is not LIF with one beta and one threshold"
    if number and not _is_plain(each, most=1):
        return f"the connection to population {number} is not one convolution of one group, between at most maxima"
    return None


def _parts(connection: Connection) -> tuple[Images, Convolution]:
    """Of a connection that is a convolution."""
    images = connection.images
    assert images is not None
    assert images.convolution is not None
    return images, images.convolution


def _is_plain(connection: Connection, most: int) -> bool:
    """Whether a connection is a convolution that the kernels compute themselves, behind at most ``most`` pools side by
    side, and before at most one."""
    images, convolution = _parts(connection)
    before, after = images.before, images.after
    if images.norm is not None or convolution.groups > 1 or len(before) > most or len(after) > 1:
        return False
    if any([math.prod(pool.kernel) > MOST_MERGED for pool in after]):
        return False
    sizes = convolved(images), connection.values.shape, convolution
    return all([side_by_side(pool) for pool in (*before, *after)]) and refuses_sizes(*sizes) is None


def _length(populations: Sequence[Population]) -> tuple[int, str]:
    """How many of the first populations these kernels run, and why not more."""
    length, reason = len(populations), ""
    for number, population in enumerate(populations):
        if why := _why_not(number, population):
            length, reason = number, why
            break
    while length:
        inside = [
            each
            for population in populations[length:]
            for each in population.connections
            if each.source < length and (each.source != length - 1 or each.delay is not None)
        ]
        if not inside:
            break
        length -= 1
        reason = f"what comes behind population {length} also receives what comes before it, or receives it late"
    return length, reason


def refuses(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if reason := refuses_kernels(call, ()) or refuses_tensors(call):
        return reason
    if call.spikes:
        return "gives spikes over time no gradient"
    if call.truncate is not None or call.x.numel() == 0:
        return "takes no truncated run, and needs a batch that is not empty"
    length, reason = _length(call.populations)
    return None if length else reason


def g2g_images(call: Call, again: Callable[[Call], Activity]) -> Activity:
    """Runs the first populations; ``again`` runs those behind them."""
    length, _ = _length(call.populations)
    populations, rest = call.populations[:length], list(call.populations[length:])
    layers = []
    for number, population in enumerate(populations):
        each = population.connections[0]
        shape, pool = _given(each), None
        if number + 1 < length:
            pool = next(iter(_parts(populations[number + 1].connections[0])[0].before), None)
        elif rest:
            pool = _shared_pool(rest, number)
        parameters = tuple([parameter.reshape(-1).contiguous() for parameter in population.neurons.parameters])
        state = None if population.state is None else population.state.contiguous()
        neurons = replaced(population.neurons, parameters=parameters)
        values, bias = each.values.contiguous(), None if each.bias is None else each.bias.contiguous()
        images, convolution = _parts(each)
        layers.append(
            ImageLayer(values, bias, neurons, state, shape, convolution, next(iter(images.after), None), pool)
        )
    first = call.populations[0].connections[0]
    x, source, steps = call.x, _parts(first)[0].source, 0
    if call.steps is not None or not _is_plain(first, most=0):
        product = partial(g2g_conv2d, backend=call.backend)
        (of_first,) = functions_of(call.populations[:1], {"convolution": product}, run_neurons)
        x, steps = of_first.products[0](x), call.steps or 0
        layers[0] = replaced(layers[0], weight=None, bias=None, convolution=None, merge=None)
    spikes, rates, last, kept = FORWARD(
        ImagesCall(x.float().contiguous(), None if layers[0].weight is None else source, tuple(layers), steps)
    )
    words, trains = iter(kept), []
    for layer in layers:
        trains.append(ImageSpikes(next(words), layer.shape))
        if layer.pool is not None:
            next(words)
    if rest:
        behind = [_behind(population, length, layers[-1].pool) for population in rest]
        found = again(replaced(call, x=spikes, populations=tuple(behind), steps=None))
    else:
        found = Activity(spikes.sum(0), (), (), states=())
    assert found.states is not None
    nothing = (None,) * length
    return replaced(
        found,
        rates=(*rates, *found.rates),
        spikes=(*trains, *found.spikes),
        states=(*last, *found.states),
        membranes=None if found.membranes is None else (*nothing, *found.membranes),
        sent=(*nothing, *found.sent) if found.sent else (),
    )


def _given(connection: Connection) -> Shape:
    """The shape of what a convolution gives its neurons."""
    images, convolution = _parts(connection)
    shape = convolved_shape(convolved(images), connection.values.shape, convolution)
    for pool in images.after:
        shape = pooled_shape(shape, pool)
    return shape


def _shared_pool(populations: Sequence[Population], source: int) -> Pool | None:
    """The pool behind which all that these receive from population ``source`` lies, or None."""
    readers = [each for population in populations for each in population.connections if each.source == source]
    firsts = [None if each.images is None or not each.images.before else each.images.before[0] for each in readers]
    pool = firsts[0] if firsts and all([first == firsts[0] for first in firsts]) else None
    return pool if pool is not None and side_by_side(pool) else None


def _behind(population: Population, length: int, pool: Pool | None) -> Population:
    """A population whose inputs are what ``length`` ones before it send, behind a pool."""
    connections = []
    for each in population.connections:
        images = each.images
        if each.source == length - 1 and pool is not None:
            assert images is not None
            images = replaced(images, source=pooled_shape(images.source, pool), before=images.before[1:])
        connections.append(replaced(each, source=max(each.source - length, -1), images=images))
        if each.kind == "linear" and images is not None and not images.before:
            connections[-1] = replaced(connections[-1], images=None)
    return replaced(population, connections=tuple(connections))


class ImageSpikes(Spikes):
    """Spikes of one population, a bit each."""

    def __init__(self, words: torch.Tensor, shape: Shape) -> None:
        self._words, self._shape = words, shape

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        return UNPACK(PackedImages(self._words, self._shape[0], last=False)).flatten(2)


class PackedImages(NamedTuple):
    """Spikes as words [T, B, pixels, words], and how many channels these hold; as numbers these are ``last``,
    [T, B, pixels, C], or first, [T, B, C, pixels]."""

    words: torch.Tensor
    channels: int
    last: bool

    def expected(self) -> Expected:
        """What the kernel takes for granted."""
        yield "words", self.words, (*self.words.shape[:3], -(-self.channels // 64)), torch.int64


TYPES["PackedImages"] = PackedImages


def _numbers(packed: PackedImages) -> tuple[int, ...]:
    """The shape of these spikes as numbers."""
    steps, batch, pixels, _ = packed.words.shape
    return (steps, batch, pixels, packed.channels) if packed.last else (steps, batch, packed.channels, pixels)


def _unpack(packed: PackedImages) -> torch.Tensor:
    words, channels, last = packed
    (steps, batch, pixels, _), spikes = words.shape, workspace.empty(_numbers(packed))
    words = words.contiguous()  # which lives until the kernel has read it
    sizes = steps * batch, pixels, channels, last, torch.get_num_threads()
    library().g2g_unpack_images(words.data_ptr(), *sizes, spikes.data_ptr())
    return spikes


UNPACK = RecordOperator(
    "unpack_images", "Tensor", _unpack, lambda packed: packed.words.new_empty(_numbers(packed), dtype=torch.float32)
)


# --- operators ------------------------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """Sizes of a layer in a call; ``given``: of what its convolution gives."""

    layer: ImageLayer
    source: Shape
    given: Shape
    pixels: int
    words: int
    lanes: int
    in_lanes: int
    sent: Shape


def _lanes(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _sizes(call: ImagesCall) -> Iterator[_Sizes]:
    shape = call.source
    for layer in call.layers:
        channels, rows, columns = layer.shape
        source = (1, rows, columns) if shape is None else shape
        sent, given = sent_shape(layer), layer.shape
        if layer.weight is not None:
            given = convolved_shape(source, layer.weight.shape, _options(layer))
        pixels, lanes = rows * columns, _lanes(channels)
        yield _Sizes(layer, source, given, pixels, -(-channels // 64), lanes, _lanes(source[0]), sent)
        shape = sent


def _lead(call: ImagesCall) -> tuple[int, int]:
    """T and B."""
    return call.steps or call.x.shape[0], call.x.shape[-2]


def _arguments(call: ImagesCall, of: _Sizes, words: Sequence[torch.Tensor], first: bool) -> Structure:
    """The arguments of a layer; ``words`` as :func:`_words_of` gives them."""
    layer = of.layer
    (steps, batch), (channels, height, width) = _lead(call), of.source
    out_channels, out_height, out_width = of.given
    convolution = _options(layer)
    kernel = (1, 1) if layer.weight is None else layer.weight.shape[2:]
    inputs, spikes, pooled = words
    merged, window = [(1, 1) if pool is None else pool.kernel for pool in (layer.merge, layer.pool)]
    return structures.ImageLayer(
        convolution=structures.Convolution(
            x=call.x.data_ptr() if first else None,
            weight=pointer(layer.weight),
            bias=pointer(layer.bias),
            images=steps * batch,
            channels=channels,
            out_channels=out_channels,
            groups=1,
            threads=torch.get_num_threads(),
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            kernel_rows=kernel[0],
            kernel_columns=kernel[1],
            stride_y=convolution.stride[0],
            stride_x=convolution.stride[1],
            padding_y=convolution.padding[0],
            padding_x=convolution.padding[1],
            dilation_y=convolution.dilation[0],
            dilation_x=convolution.dilation[1],
            event_cost=cpu_library.CONVOLUTION_COST,
        ),
        neurons=neuron_arguments(layer.neurons),
        samples=batch,
        steps=steps,
        lanes=of.lanes,
        in_lanes=of.in_lanes,
        rows=layer.shape[1],
        columns=layer.shape[2],
        merged_rows=merged[0],
        merged_columns=merged[1],
        window_rows=window[0],
        window_columns=window[1],
        pooled_rows=of.sent[1],
        pooled_columns=of.sent[2],
        inputs=pointer(inputs),
        current=call.x.data_ptr() if layer.weight is None else None,
        held=call.steps > 0 and layer.weight is None,
        spikes=spikes.data_ptr(),
        pooled=pointer(pooled),
        state=pointer(layer.state),
    )


def _kept_shapes(call: ImagesCall) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of the words and of the membranes of the layers, and of what says which current is a maximum."""
    words: list[tuple[int, ...]] = []
    states: list[tuple[int, ...]] = []
    choices: list[tuple[int, ...]] = []
    for of in _sizes(call):
        words.append((*_lead(call), of.pixels, of.words))
        if of.layer.pool is not None:
            words.append((*_lead(call), of.sent[1] * of.sent[2], of.words))
        states.append((*_lead(call), of.pixels, of.lanes))
        if of.layer.merge is not None:
            choices.append(states[-1])
    return words, states, choices


def _words_of(call: ImagesCall, words: Sequence[torch.Tensor]) -> list[tuple[Any, Any, Any]]:
    """Of each layer its inputs, its spikes, and these behind windows."""
    found: list[tuple[Any, Any, Any]] = []
    given, inputs = iter(words), None
    for layer in call.layers:
        spikes = next(given)
        pooled = None if layer.pool is None else next(given)
        found.append((inputs, spikes, pooled))
        inputs = spikes if pooled is None else pooled
    return found


def _choices_of(call: ImagesCall, choices: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Of each layer which currents are maxima, where these are kept."""
    given = iter(choices)
    return [None if layer.merge is None else next(given, None) for layer in call.layers]


def _images(call: ImagesCall, of: _Sizes, words: torch.Tensor | None, some: slice = slice(None)) -> torch.Tensor:
    """The inputs of a layer in some samples as images [T·B, C, H, W], channels last if they are spikes."""
    if words is None:
        return call.x[:, some].reshape(-1, *of.source)
    channels, rows, columns = of.source
    return _unpack(PackedImages(words[:, some], channels, last=True)).view(-1, rows, columns, channels).movedim(3, 1)


def _options(layer: ImageLayer) -> Convolution:
    return layer.convolution or Convolution((1, 1), (0, 0), (1, 1), 1)


_Each = list[torch.Tensor]


def _forward(call: ImagesCall, keep: bool) -> tuple[torch.Tensor, _Each, _Each, _Each]:
    of_words, of_states, of_choices = _kept_shapes(call)
    words = workspace.each(of_words, torch.int64)
    states = workspace.each(of_states) if keep else []
    choices = workspace.each(of_choices, torch.uint8) if keep else []
    choice_of = _choices_of(call, choices)
    (_, batch), sizes = _lead(call), list(_sizes(call))
    numbers = [math.prod(layer.shape) for layer in call.layers]
    rates, last = workspace.each([(n,) for n in numbers]), workspace.each([(1, batch, n) for n in numbers])
    for number, (of, of_layer) in enumerate(zip(sizes, _words_of(call, words), strict=True)):
        arguments = _arguments(call, of, of_layer, first=number == 0)
        arguments.states = states[number].data_ptr() if keep else None
        arguments.choices = pointer(choice_of[number])
        arguments.rates, arguments.last = rates[number].data_ptr(), last[number].data_ptr()
        run(library().g2g_image_layer, arguments)
        if of.layer.weight is not None and not arguments.convolution.y_by_events:
            with torch.autocast("cpu", enabled=False):  # events are added in float32, too
                current = F.conv2d(
                    _images(call, of, of_layer[0]), of.layer.weight, of.layer.bias, *_options(of.layer)
                ).contiguous(memory_format=torch.channels_last)
            arguments.current, arguments.convolution.y_last = current.data_ptr(), True
            run(library().g2g_image_layer, arguments)
    sent = _unpack(PackedImages(words[-1], sizes[-1].sent[0], last=False)).flatten(2)
    return sent, rates, last, [*words, *states, *choices]


def _shapes(call: ImagesCall, keep: bool) -> list[Output | list[Output]]:
    words, states, choices = _kept_shapes(call)
    (steps, batch), (*_, last) = _lead(call), _sizes(call)
    numbers = [math.prod(layer.shape) for layer in call.layers]
    kept = [Output(shape, torch.int64) for shape in words]
    if keep:
        kept += [*[Output(shape) for shape in states], *[Output(shape, torch.uint8) for shape in choices]]
    spikes = Output((steps, batch, math.prod(last.sent)))
    return [spikes, [Output((n,)) for n in numbers], [Output((1, batch, n)) for n in numbers], kept]


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, kept, (grad_spikes, *of_layers), _ = given
    count, (_, batch), sizes = len(call.layers), _lead(call), list(_sizes(call))
    of_words, of_states, _ = map(len, _kept_shapes(call))
    words, states = _words_of(call, kept[:of_words]), kept[of_words : of_words + of_states]
    choices = _choices_of(call, kept[of_words + of_states :])
    grads, to = given.made(workspace.alike)
    sums = []
    for layer in to.layers:
        for each in (layer.weight, layer.bias):
            if each is not None:
                each.zero_()
        sums.append(torch.zeros(2, dtype=torch.float64))
    passes = []
    for number, (of, grad) in enumerate(zip(sizes, to.layers, strict=True)):
        arguments = _arguments(call, of, words[number], first=number == 0)
        arguments.states, arguments.choices = states[number].data_ptr(), pointer(choices[number])
        arguments.grad_rates, arguments.grad_last = pointer(of_layers[number]), pointer(of_layers[count + number])
        arguments.grad_bias, arguments.grad_state = pointer(grad.bias), pointer(grad.state)
        if any([each is not None for each in grad.neurons.parameters]):
            arguments.grad_neurons = sums[number].data_ptr()
        passes.append(_Pass.of_layer(of, arguments, words[number][0], grad.weight, number > 0 or to.x is not None))
    passes[-1].arguments.grad_sent = pointer(grad_spikes)
    together = _together(call, passes)
    for first in range(0, batch, together):
        some = slice(first, min(first + together, batch))
        received: torch.Tensor | None = None
        chain: list[_Pass] = []
        for each in reversed(passes):
            each.arguments.first, each.arguments.count = first, some.stop - first
            if chain:
                chain[-1].arguments.below = addressof(each.arguments)
            chain.append(each)
            if each.dense_x or each is passes[0]:
                received, chain = _run_backward(call, chain, some, received, to.x), []
    for layer, own, (to_beta, to_theta) in zip(call.layers, to.layers, sums, strict=True):
        beta, (grad_beta, grad_theta) = layer.neurons.parameters[0], own.neurons.parameters
        if grad_beta is not None:  # nothing where the decay is clamped
            grad_beta.copy_(to_beta * ((beta > 0) & (beta < 1)))
        if grad_theta is not None:
            grad_theta.copy_(to_theta)
    return grads


class _Pass(NamedTuple):
    """The backward pass of a layer: its sizes and arguments; its inputs, words or None for the images of the call; the
    gradient of its weight, which is added to, or None; and whether this and that of its inputs are dense products."""

    of: _Sizes
    arguments: Structure
    words: torch.Tensor | None
    grad_weight: torch.Tensor | None
    dense_weight: bool
    dense_x: bool

    @classmethod
    def of_layer(
        cls,
        of: _Sizes,
        arguments: Structure,
        words: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
        want_x: bool,
    ) -> "_Pass":
        """A sample of its inputs and membranes says which products are faster by events."""
        if of.layer.weight is None:
            return cls(of, arguments, words, None, False, False)
        convolution, want_weight = arguments.convolution, grad_weight is not None
        convolution.grad_x_by_events, convolution.grad_weight_by_events = want_x, want_weight
        convolution.sample = True
        run(library().g2g_image_layer, arguments, backward=True)
        convolution.sample = False
        dense_weight = want_weight and not convolution.grad_weight_by_events
        if not dense_weight:
            arguments.grad_weight = pointer(grad_weight)
        return cls(of, arguments, words, grad_weight, dense_weight, want_x and not convolution.grad_x_by_events)


def _run_backward(
    call: ImagesCall, chain: Sequence[_Pass], some: slice, received: torch.Tensor | None, grad_x: torch.Tensor | None
) -> torch.Tensor | None:
    """The backward pass of layers, each of which receives the next one, in some samples. ``received`` are the gradients
    of what the first sends. Returns those of what the last receives, or, of the inputs of the call, gives ``grad_x``
    them."""
    (steps, batch), count = _lead(call), some.stop - some.start
    chain[0].arguments.grad_spikes = pointer(received)
    deltas: list[torch.Tensor | None] = []
    for of, arguments, words, *_, dense_weight, dense_x in chain:
        delta = None
        if dense_weight or dense_x:
            channels, rows, columns = of.given
            delta = workspace.empty((steps * count, rows, columns, channels))
            arguments.grad_current, arguments.current_samples = delta.data_ptr(), count
            arguments.convolution.y_last = True
        deltas.append(delta)
        if words is None and of.layer.weight is not None and not dense_x:
            arguments.convolution.grad_x = pointer(grad_x)
        elif grad_x is not None and of.layer.weight is None:  # the current
            arguments.grad_current, arguments.current_samples = grad_x[..., some, :].data_ptr(), batch
    run(library().g2g_image_layer, chain[0].arguments, backward=True)
    below = None
    for (of, _, words, grad_weight, dense_weight, dense_x), delta in zip(chain, deltas, strict=True):
        if delta is None:
            continue
        operands = delta.permute(0, 3, 1, 2), _images(call, of, words, some), of.layer.weight
        options = [list(each) for each in _options(of.layer)[:3]]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            *operands, None, *options, False, [0, 0], 1, [dense_x, dense_weight, False]
        )
        if dense_weight:
            grad_weight += of_weight
        if dense_x and words is None:
            assert grad_x is not None
            grad_x[:, some] = of_x.reshape(steps, count, -1)
        elif dense_x:
            below = workspace.empty((steps, count, math.prod(of.source[1:]), of.in_lanes))
            below[..., : of.source[0]] = of_x.permute(0, 2, 3, 1).reshape(steps, count, -1, of.source[0])
    return below


def _together(call: ImagesCall, passes: Sequence[_Pass]) -> int:
    """Samples whose gradients are computed together: as many for each thread. Sums over samples are in order, whatever
    this is."""
    (steps, _), threads = _lead(call), torch.get_num_threads()
    sums = sum([4 * _lanes(each.of.layer.weight.numel()) for each in passes if each.of.layer.weight is not None])
    most = MOST_SUMS // max(1, sums)
    if any([each.dense_x or each.dense_weight for each in passes]):
        of_pixel = [each.of.in_lanes * math.prod(each.of.source[1:]) for each in passes]
        most = min(most, MOST_BETWEEN // (4 * steps * max(of_pixel)))
    return max(1, most // threads) * threads


def _plain(call: ImagesCall) -> list[torch.Tensor]:
    """Spikes, rates and last states by plain operations."""
    shape, before = call.source or call.layers[0].shape, _of(None)
    populations = []
    for number, layer in enumerate(call.layers):
        images = Images(shape, before, layer.convolution, None, _of(layer.merge))
        kind = "pool" if layer.weight is None else "convolution"
        connection = Connection(kind, layer.weight, None, number - 1, bias=layer.bias, images=images)
        populations.append(Population(layer.neurons, (connection,), state=layer.state))
        shape, before = layer.shape, _of(layer.pool)
    activity = in_turn(Call(call.x, tuple(populations), call.steps or None, spikes=True), PRODUCTS, in_steps)
    assert activity.states is not None
    sent = through(Images(shape, before), activity.spikes[-1].dense(), lambda x: x, flat=False)
    return [sent, *activity.rates, *activity.states]


def _of(pool: Pool | None) -> tuple[Pool, ...]:
    return () if pool is None else (pool,)


def _flops(call: ImagesCall) -> int:
    steps, batch = _lead(call)
    of_frame = sum(
        [math.prod(of.given) * of.layer.weight[0].numel() for of in _sizes(call) if of.layer.weight is not None]
    )
    return 2 * steps * batch * of_frame


RESULTS = "(Tensor spikes, Tensor[] rates, Tensor[] last, Tensor[] kept)"
FORWARD = Differentiable("images", RESULTS, 3, _forward, _backward, _shapes, _plain)
count_flops(FORWARD, _flops)
count_flops(FORWARD.backward, lambda given: 2 * _flops(given.call))
