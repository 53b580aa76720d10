"""Networks of images: convolutions, pools and norms between populations, against a loop over steps in float64."""

# ruff: noqa: E501  (a table of refusals)

import copy
import random
from typing import Any

import pytest
import torch
from helpers import backends_of, compiles_whole, saved_and_read, seeded
from torch import nn
from torch.nn import functional as F

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.cpu import library
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.g2g_stack import WAYS, image_layers
from g2g_kernels.ops.g2g_stack.image_layers import UNPACK, PackedImages
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2gnet import (
    LIF,
    DSTScheduler,
    G2GConv2d,
    G2GLinear,
    G2GNet,
    Projection,
    SpikingNetwork,
    SpikingStack,
    SumPool2d,
    sparsify,
)
from g2gnet.activity_recorder import received_in

on_cpu = pytest.mark.skipif("cpu" not in backends_of(WAYS), reason="no compiled CPU kernels")
every_backend = pytest.mark.parametrize("backend", backends_of(WAYS))


def exact(module: nn.Module, numbers: torch.Generator) -> nn.Module:
    """The module with weights whose sums no float32 rounds."""
    for parameter in module.parameters():
        parameter.data = torch.randint(-3, 5, parameter.shape, generator=numbers) / 8.0
    return module


def linear(into: int, out: int, numbers: torch.Generator, **options) -> G2GLinear:
    layouts = GroupLayout(out, min(2, out)), GroupLayout(into, min(2, into))
    mask = BlockMask.sample(*layouts, p_inter=0.5, block_size=4, generator=numbers)
    return exact(G2GLinear(mask, **options), numbers)


class Drawn:
    """A random network of images, its inputs, and how it runs; or a ``chain`` without delays and dropout, whose images
    may have more channels than a word has bits."""

    def __init__(self, seed: int, chain: bool = False) -> None:
        draw, numbers = random.Random(seed), seeded(seed)
        self.chain = chain
        self.steps, samples = draw.choice([1, 3, 6]), draw.choice([1, 2, 3])
        shape = self.shape = draw.choice([1, 2, 3]), draw.choice([1, 4, 7, 9]), draw.choice([1, 5, 8])
        self.held, self.last = draw.random() < 0.3, draw.random() < 0.3
        x = torch.rand(samples if self.held else self.steps * samples, *shape, generator=numbers)
        x = (x < draw.choice([0, 0.2, 0.5, 1])).float()
        self.x = x if self.held else x.unflatten(0, (self.steps, samples))
        self.populations: dict[str, LIF] = {}
        self.projections: list[Projection] = []
        self.dropout = 0.0 if chain else draw.choice([0.0, 0.0, 0.5])
        source, into = "input", shape
        for number in range(draw.choice([1, 2, 3])):
            modules, out = self._modules(draw, numbers, into)
            name = f"image{number}"
            self.populations[name] = self._lif(draw)
            self.projections.append(Projection(source, name, modules, self._delay(draw, numbers, into)))
            if draw.random() < 0.3 and not chain:
                own = exact(G2GConv2d(out[0], out[0], 3, padding=1, bias=False), numbers)
                self.projections.append(Projection(name, name, own, draw.choice([1, 1, 2])))
            if number and draw.random() < 0.3 and not chain:
                flat = into[0] * into[1] * into[2], out[0] * out[1] * out[2]
                back = linear(flat[1], flat[0], numbers, bias=False)
                self.projections.append(Projection(name, source, back, draw.choice([1, 3])))
            source, into = name, out
        pool = nn.MaxPool2d(2, ceil_mode=True) if min(into[1:]) > 1 and draw.random() < 0.5 else None
        flat = into if pool is None else tuple(pool(torch.zeros(1, *into)).shape[1:])
        last = linear(flat[0] * flat[1] * flat[2], 4, numbers)
        parts = [nn.Flatten(), last] if pool is None else [pool, nn.Flatten(), last]
        self.populations["out"] = self._lif(draw)
        self.projections.append(Projection(source, "out", nn.Sequential(*parts)))
        drawn = {name: torch.rand(samples, 1000, generator=numbers) < 0.5 for name in self.populations}
        self.silent = {name: each for name, each in drawn.items() if self.dropout and name != "out"}
        self.way = draw.choice(["whole", "halves", "chunk"]) if self.steps > 1 else "whole"
        self.threads = draw.choice([1, 2])

    @staticmethod
    def _lif(draw: random.Random) -> LIF:
        return LIF(
            beta=0.5, threshold=draw.choice([0.25, 0.5]), reset=draw.choice(["subtract", "zero", "none"]),
            surrogate=draw.choice(["triangle", "atan"]), alpha=1.0,
        )  # fmt: skip

    def _delay(self, draw: random.Random, numbers: torch.Generator, shape: tuple[int, ...]):
        if self.chain:
            return 0
        each = torch.randint(0, 4, (shape[0] * shape[1] * shape[2],), generator=numbers)
        return draw.choice([0, 0, 0, 2, each])

    def _pool(self, draw: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
        size = tuple(min(2, each) for each in shape[1:])
        if draw.random() < 0.5:
            return None
        if self.chain and draw.random() < 0.8:
            return nn.MaxPool2d((min(3, shape[1]), size[1]), ceil_mode=draw.random() < 0.5)
        options = {"ceil_mode": draw.random() < 0.3, "stride": draw.choice([None, 1])}
        maximum = nn.MaxPool2d(size, padding=draw.choice([0, tuple(each // 2 for each in size)]), **options)
        return draw.choice([maximum, nn.AvgPool2d(size, **options), SumPool2d(size)])

    def _modules(self, draw: random.Random, numbers: torch.Generator, shape: tuple[int, ...]):
        """The modules of a projection of images, and the shape of what they give."""
        before = self._pool(draw, shape)
        inner = shape if before is None else tuple(before(torch.zeros(1, *shape)).shape[1:])
        groups = inner[0] if draw.random() < (0.05 if self.chain else 0.2) else 1
        kernel = tuple(min(draw.choice([1, 2, 3]), each) for each in inner[1:])
        out = groups * draw.choice([3, 16, 70, 130] if self.chain and groups == 1 else [1, 2, 5])
        mask = None
        if draw.random() < 0.3:
            layouts = GroupLayout(out, 1), GroupLayout(inner[0] // groups, 1)
            mask = BlockMask.sample(*layouts, p_intra=0.7, block_size=1, generator=numbers)
        padding, stride = draw.choice([0, 1, 2]), draw.choice([1, 1, 2])
        dilation = draw.choice([1, 2]) if padding == 2 else 1
        options = {"groups": groups, "bias": draw.random() < 0.7, "mask": mask}
        layer = exact(G2GConv2d(inner[0], out, kernel, stride, padding, dilation, **options), numbers)
        found = tuple(layer(torch.zeros(1, *inner)).shape[1:])
        after = self._pool(draw, found)
        if before is None and mask is None and draw.random() < 0.1 and not self.chain:  # a pool alone
            before, layer, after = SumPool2d(1), None, None
            found = shape
        parts = [each for each in (before, layer, after) if each is not None]
        found = found if after is None else tuple(after(torch.zeros(1, *found)).shape[1:])
        return (parts[0] if len(parts) == 1 else nn.Sequential(*parts)), found

    def network(self, backend: str | None = None) -> SpikingNetwork:
        given = copy.deepcopy((self.populations, self.projections))
        options = {"dropout": self.dropout, "backend": backend, "input_shape": self.shape}
        return SpikingNetwork(*given, "out", self.steps, **options).train()


def weights_of(net: SpikingNetwork) -> dict[str, torch.Tensor]:
    """The dense weights and all other parameters in float64, by the names of their gradients."""
    leaves = {name: each.detach().double().requires_grad_() for name, each in net.named_parameters()}
    for name, layer in net.connections().items():
        if f"{name}.values" in leaves:
            leaves[f"{name}.values"] = layer.dense_weight().detach().double().requires_grad_()
    return leaves


def by_steps(case: Drawn, net: SpikingNetwork, leaves: dict[str, torch.Tensor], x: torch.Tensor):
    """Spikes of each population [T, B, N] by the formula, one step after the other."""
    sent: dict[str, list[torch.Tensor]] = {name: [] for name in ("input", *case.populations)}
    membranes: dict[str, torch.Tensor] = {}
    joins = dict(zip(net_names(case), case.projections, strict=True))
    for t in range(case.steps):
        sent["input"].append((x if case.held else x[t]).flatten(1))
        for name, neurons in case.populations.items():
            current = torch.zeros(())
            for join, each in joins.items():
                if each.target == name:
                    current = current + applied(case, net, leaves, join, each, sent, t)
            beta, threshold = leaves[f"{name}.beta"], leaves[f"{name}.threshold"]
            before = membranes.get(name, torch.zeros_like(current))
            fired = (before > threshold).detach().double()
            decayed = beta * (before * (1 - fired) if neurons.reset == "zero" else before)
            now = decayed + current - (threshold * fired if neurons.reset == "subtract" else 0)
            membranes[name] = now
            smooth = SURROGATES[neurons.surrogate].primitive(now - threshold, neurons.alpha)
            spikes = (now > threshold).double() + (smooth - smooth.detach())
            silent = case.silent.get(name)
            sent[name].append(spikes if silent is None else spikes.masked_fill(silent[:, : spikes.shape[1]], 0))
    return {name: torch.stack(each) for name, each in sent.items()}


def net_names(case: Drawn) -> list[str]:
    names: list[str] = []
    for each in case.projections:
        name = f"{each.source}_to_{each.target}"
        names.append(name if name not in names else f"{name}_2")
    return names


def applied(case, net, leaves, join, each, sent, t):
    """What a projection adds to the current of step t."""
    size = net.sizes[-1] if each.source == "input" else net.sizes[net.populations.index(each.source)]
    samples = len(sent["input"][0])
    delays = torch.as_tensor(each.delay).expand(size)
    train = [*[torch.zeros(samples, size, dtype=torch.float64)] * 4, *sent[each.source]]
    train = train[: t + 5]
    train += [torch.zeros(samples, size, dtype=torch.float64)] * (t + 5 - len(train))
    y = torch.stack(train)[t + 4 - delays, :, torch.arange(size)].T
    y = y * (2.0 if case.dropout and each.source != "input" else 1.0)
    y = y.unflatten(1, net.shapes[each.source])
    modules = [*each.connection] if isinstance(each.connection, nn.Sequential) else [each.connection]
    for module in modules:
        weight = leaves.get(f"{join}.weight", leaves.get(f"{join}.values"))
        bias = leaves.get(f"{join}.bias")
        if isinstance(module, G2GConv2d):
            y = F.conv2d(y, weight, bias, module.stride, module.padding, module.dilation, module.groups)
        elif isinstance(module, G2GLinear):
            y = F.linear(y.flatten(1), weight, bias)
        else:
            y = module(y)
    return y.flatten(1)


def check(seed: int, backend: str | None, chain: bool = False) -> int:
    """Compares spikes and all gradients; returns the spikes of the hidden populations."""
    case = Drawn(seed, chain)
    torch.set_num_threads(case.threads)
    net = case.network(backend)
    if chain:
        assert net.explain(case.x).way.name == "cpu images"
    leaves, exact_x = weights_of(net), case.x.double().requires_grad_()
    wanted = by_steps(case, net, leaves, exact_x)
    slope = torch.linspace(-1, 1, 4, dtype=torch.float64)
    loss = (wanted["out"].sum(0) * slope).sum()
    loss = loss + sum(wanted[name].mean((0, 1)).sum() for name in case.populations)
    loss.backward()
    x = case.x.clone()
    if case.last:
        x = x.transpose(-3, -1).contiguous().transpose(-3, -1)
    x = x.detach().requires_grad_()
    sizes = dict(zip(net.populations, net.sizes, strict=False))
    dropped = [case.silent[name][:, : sizes[name]] for name in net.populations[:-1]] if case.dropout else None
    if case.way == "halves":
        half = case.steps // 2
        net.T = half
        first = net.simulate(x if case.held else x[:half], dropped=dropped)
        net.T = case.steps - half
        second = net.simulate(x if case.held else x[half:], first.state, dropped=dropped)
        counts, shares = first.counts + second.counts, ((half, first), (case.steps - half, second))
        spikes = {
            name: torch.cat([first.spikes[name].dense(), second.spikes[name].dense()]) for name in net.populations
        }
    else:
        activity = net.simulate(x, chunk=2 if case.way == "chunk" else None, dropped=dropped)
        counts, shares = activity.counts, ((case.steps, activity),)
        spikes = {name: activity.spikes[name].dense() for name in net.populations}
    for name in net.populations:
        assert torch.equal(spikes[name].double(), wanted[name].detach()), (seed, name)
    loss = (counts * slope.float()).sum()
    loss = loss + sum(size / case.steps * of.rates[name].sum() for size, of in shares for name in net.populations)
    loss.backward()
    found = {name: each.grad for name, each in net.named_parameters()}
    for name, leaf in leaves.items():
        mine, theirs = found[name], leaf.grad
        if name.endswith(".values") and None not in (mine, theirs):
            mask = net.connections()[name.removesuffix(".values")].mask
            theirs, mine = theirs * mask.to_dense().reshape(*mask.shape, *[1] * (theirs.dim() - 2)), mask.unpack(mine)
        near(mine, theirs, (seed, name))
    near(x.grad, exact_x.grad, (seed, "x"))
    return int(sum(spikes[name].sum() for name in net.populations))


def near(found: torch.Tensor | None, wanted: torch.Tensor | None, what) -> None:
    if wanted is None or found is None:
        assert not any(each is not None and each.any() for each in (found, wanted)), what
        return
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=3e-5 * scale + 1e-9, msg=str(what))


@pytest.fixture
def poisoned(monkeypatch):
    monkeypatch.setattr(workspace, "poison", True)


@every_backend
def test_random_networks_against_a_loop_in_float64(backend, poisoned):
    assert sum(check(seed, backend) for seed in range(2, 7)) > 100


@on_cpu
@pytest.mark.parametrize("cost", [0, 1, float("inf")])  # by events, by the faster product, by dense ones
def test_random_chains_of_images_against_a_loop_in_float64(cost, poisoned, monkeypatch):
    monkeypatch.setattr(library, "CONVOLUTION_COST", cost)
    assert sum(check(seed, "cpu", chain=True) for seed in range(4, 8)) > 1000


@on_cpu
@pytest.mark.parametrize("dense", [(), (0,), (1,), (0, 2), (0, 1, 2)])  # layers whose products are dense
def test_parts_of_a_batch_have_the_gradients_of_all(dense, poisoned, monkeypatch):
    numbers = seeded(7)
    sizes = (2, 8), (8, 20), (20, 6)
    layers = [(exact(G2GConv2d(*each, 3, padding=1), numbers), LIF(beta=0.5, threshold=0.5)) for each in sizes]
    net = SpikingStack([layers[0], nn.MaxPool2d(2), *layers[1:]], 4)
    x = (torch.rand(4, 5, 2, 8, 8, generator=numbers) < 0.4).float().requires_grad_()
    slope = torch.randn(5, 6 * 16, generator=numbers)
    arguments_of, chained = image_layers._arguments, image_layers._run_backward
    chains: list[int] = []

    def with_cost(call, of, *more, **options):
        arguments = arguments_of(call, of, *more, **options)
        number = next(number for number, layer in enumerate(call.layers) if layer is of.layer)
        arguments.convolution.event_cost = float("inf") if number in dense else 0.0
        return arguments

    def counted(call, chain, *more):
        chains.append(len(chain))
        return chained(call, chain, *more)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((net(x) * slope).sum(), [x, *net.parameters()])

    monkeypatch.setattr(image_layers, "_arguments", with_cost)
    monkeypatch.setattr(image_layers, "_run_backward", counted)
    whole = gradients()
    assert chains == {(): [3], (0,): [3], (1,): [2, 1], (0, 2): [1, 2], (0, 1, 2): [1, 1, 1]}[dense]
    monkeypatch.setattr(image_layers, "MOST_SUMS", 1)  # a sample for each thread
    torch.set_num_threads(2)
    for found, wanted in zip(gradients(), whole, strict=True):
        assert torch.equal(found, wanted) or (dense and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5))
    assert len(chains) == 4 * (1 + len({*dense} - {0}))


@on_cpu
@pytest.mark.long
@pytest.mark.parametrize("cost", [0, 1, float("inf")])
def test_a_hundred_random_chains_of_images_against_a_loop_in_float64(cost, poisoned, monkeypatch):
    monkeypatch.setattr(library, "CONVOLUTION_COST", cost)
    assert sum(check(seed, None, chain=True) for seed in range(100, 200)) > 50000


@pytest.mark.long
@pytest.mark.parametrize("first", range(100, 300, 50))
def test_two_hundred_random_networks_against_a_loop_in_float64(first, poisoned):
    assert sum(check(seed, None) for seed in range(first, first + 50)) > 5000


@on_cpu
@pytest.mark.parametrize("surrogate", ["atan", "triangle"])
@pytest.mark.parametrize("cost", [0, float("inf")])
def test_an_infinite_input_stays_with_its_channels(cost, surrogate, poisoned, monkeypatch):
    """A weight of 0, as behind the last channel, would make NaN of it."""
    monkeypatch.setattr(library, "CONVOLUTION_COST", cost)
    x = X.clone()
    x[1, 0, 0, 3, 3] = float("inf")
    found = []
    for backend in ("cpu", "torch"):
        options = {"beta": 0.5, "threshold": 0.25, "surrogate": surrogate}
        layers = [exact(G2GConv2d(*sizes, 3, padding=1), seeded(n)) for n, sizes in enumerate([(2, 4), (4, 6)])]
        for each in layers:
            each.weight.data += 1 / 16
        net = stack(*[(each, LIF(**options)) for each in layers], backend=backend)
        given = net.simulate(x)
        grads = torch.autograd.grad(given.output.sum(), list(net.parameters()))
        assert net.explain(x).way.name == ("cpu images" if backend == "cpu" else "reference")
        found.append([given.output.detach(), *[each.detach() for each in given.states], *grads])
        assert dict(zip(dict(net.named_parameters()), grads, strict=True))["lif1.threshold"].isfinite()
    assert not found[0][1].isfinite().all()
    torch.testing.assert_close(*found, equal_nan=True)


@on_cpu
@pytest.mark.parametrize("channels", [1, 16, 63, 64, 70, 129])
@pytest.mark.parametrize("pixels", [1, 15, 64, 100])
def test_words_as_numbers(channels, pixels, poisoned):
    spikes = torch.rand(2, 3, pixels, channels, generator=seeded(channels + pixels)) < 0.4
    bits = F.pad(spikes, (0, -channels % 64)).unflatten(3, (-1, 64)).long()
    words = (bits << torch.arange(64)).sum(4)  # bit 63 is the sign
    for last in (True, False):
        found = UNPACK(PackedImages(words, channels, last))
        assert torch.equal(found, (spikes if last else spikes.mT).float())


def stack(*layers, sizes=(2, 8, 8), steps: int = 5, **options) -> SpikingStack:
    """Two convolutions with a pool between them, and a linear layer."""
    numbers = seeded(0)
    layers = layers or (
        (exact(G2GConv2d(sizes[0], 4, 3, padding=1), numbers), LIF(beta=0.5, threshold=0.25)),
        nn.MaxPool2d(2),
        (exact(G2GConv2d(4, 6, 3, padding=1), numbers), LIF(beta=0.5, threshold=0.25)),
        nn.Flatten(),
        (linear(6 * 16, 5, numbers), LIF(beta=0.5, threshold=0.25)),
    )
    return SpikingStack(layers, steps, **options)


X = (torch.rand(5, 3, 2, 8, 8, generator=seeded(4)) < 0.3).float()


def test_sparse_images_give_what_dense_ones_give():
    net = stack()
    whole, found = net.simulate(X), net.simulate(X.to_sparse())
    assert whole.output.any()
    assert torch.equal(found.output, whole.output)
    with pytest.raises(ValueError, match="sparse images need 5 indices for each entry, not 3"):
        net(X.to_sparse(3))
    outside = torch.sparse_coo_tensor([[0], [0], [0], [8], [0]], [1.0], X.shape, check_invariants=False)
    with pytest.raises(ValueError, match=r"indices outside its shape \[5, 3, 2, 8, 8\]"):
        net(outside)


@on_cpu
def test_autocast_changes_nothing_of_what_events_are_added_for(poisoned):
    net = stack(
        (G2GConv2d(2, 8, 3, padding=1), LIF(threshold=0.3)),
        nn.MaxPool2d(2),
        (G2GConv2d(8, 16, 3), LIF(threshold=0.3)),
        steps=5,
    )
    x = torch.rand(5, 3, 2, 8, 8)
    assert net.explain(x).way.name == "cpu images"
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            counts = net(x)
            found.append([counts, *torch.autograd.grad(counts.square().sum(), [*net.parameters()])])
    assert found[0][0].any()
    assert all(map(torch.equal, *found))


def test_sizes_follow_from_the_first_images_and_stay():
    net = stack()
    with pytest.raises(ValueError, match=r"the input is \[5, 3, 128\]; give images"):
        net(X.flatten(2))
    for unknown in (lambda: net.shapes, lambda: net.drop(3)):
        with pytest.raises(ValueError, match="the sizes of this network follow from its inputs: give it input_shape"):
            unknown()
    assert net.input_shape is None
    copied = copy.deepcopy(net)
    expected = net(X)
    assert dict(net.shapes) == {"input": (2, 8, 8), "lif1": (4, 8, 8), "lif2": (6, 4, 4), "lif3": (5,)}
    assert torch.equal(net(X.flatten(2)), expected)
    assert torch.equal(net(X.transpose(0, 1), batch_first=True), expected)
    assert torch.equal(stack(input_shape=(2, 8, 8))(X.flatten(2)), expected)
    with pytest.raises(ValueError, match=r"images \[2, 9, 8\], and this network was made for \[2, 8, 8\]"):
        net(torch.zeros(3, 2, 9, 8))
    with pytest.raises(ValueError, match=r"conv2 has \[6, 5, 4\] outputs, but fc3 has 96 inputs"):
        copied(torch.zeros(3, 2, 10, 8))
    again = stack()
    again.load_state_dict(saved_and_read(net.state_dict()))
    assert torch.equal(again(X), expected)
    assert expected.any()
    assert list(net.connections()) == ["conv1", "conv2", "fc3"]


@every_backend
def test_steps_and_called_modules_give_what_one_call_gives(backend):
    net = stack(backend=backend).eval()
    activity, state, counts = net.simulate(X), None, 0
    for x in X:
        spikes, state = net.step(x, state)
        counts = counts + spikes
    assert torch.equal(counts, activity.counts)
    assert all(torch.equal(one, other) for one, other in zip(state, activity.state, strict=True))
    seen = []
    net.conv2.register_forward_hook(lambda module, given, output: seen.append(given[0].shape))
    called = net.simulate(X)
    assert seen == [(15, 4, 4, 4)]
    assert torch.equal(called.counts, activity.counts)
    assert called.synapses is None
    assert activity.counts.any()


def test_synaptic_operations_are_those_of_pooled_spikes_and_existing_kernels():
    net = stack().eval()
    with torch.no_grad():
        net.conv2.weight[:, 1] = 0
    activity = net.simulate(X)
    received, wanted = X.flatten(0, 1), []
    for number, layer in enumerate((net.conv1, net.conv2, net.fc3)):
        met = torch.zeros(2, dtype=torch.float64)
        for place, (x, weight) in enumerate(((received, layer.weight), (received + 1, layer.weight * 0 + 1))):
            x, weight = (x != 0).double(), (weight != 0).double()
            product = F.conv2d(x, weight, padding=1) if number < 2 else F.linear(x.flatten(1), weight)
            met[place] = product.sum()
        wanted.append((int(met[0]), 0, int(met[1])))
        shape = net.shapes[f"lif{number + 1}"]
        received = activity.spikes[number].dense().flatten(0, 1).unflatten(1, shape)
        received = F.max_pool2d(received, 2) if number == 0 else received
    assert [tuple(each) for each in activity.synaptic_operations()] == wanted


@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_norm_has_the_statistics_of_all_steps_and_is_folded_in_evaluation(momentum):
    convolution, norm = exact(G2GConv2d(2, 4, 3), seeded(1)), nn.BatchNorm2d(4, momentum=momentum)
    norm(torch.rand(3, 4, 5, 5, generator=seeded(3)))  # the first of its batches
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    neurons = LIF(beta=0.5, threshold=0.3)
    reference = copy.deepcopy((convolution, norm, neurons))
    layers = [(nn.Sequential(convolution, norm, nn.AvgPool2d(2)), neurons)]
    net = SpikingStack(layers, 5, input_shape=(2, 8, 8))
    for training in (True, False):
        net.train(training)
        reference[1].train(training)
        own = F.avg_pool2d(reference[1](reference[0](X.flatten(0, 1))), 2).flatten(1).unflatten(0, (5, 3))
        wanted = reference[2](own)
        activity = net.simulate(X)
        spikes = activity.spikes[0].dense()
        assert (spikes != wanted).float().mean() < 0.003  # currents at the threshold
        assert spikes.mean() > 0.05
        found = torch.autograd.grad(activity.counts.sum(), [convolution.weight, norm.weight, norm.bias])
        near_to = torch.autograd.grad(wanted.sum(), [reference[0].weight, reference[1].weight, reference[1].bias])
        torch.testing.assert_close(found, near_to, rtol=0.02, atol=0.02)
        torch.testing.assert_close(net.conv1_norm.state_dict(), reference[1].state_dict())
    assert net.conv1_norm.num_batches_tracked == 2
    net.train()
    with pytest.raises(ValueError, match="chunk=2 has no statistics of all steps"):
        net.simulate(X, chunk=2)
    own = exact(G2GConv2d(4, 4, 3, padding=1, bias=False), seeded(2))
    looped = SpikingNetwork(
        {"a": LIF()}, [Projection("input", "a", G2GConv2d(2, 4, 3, padding=1)),
                       Projection("a", "a", nn.Sequential(own, nn.BatchNorm2d(4)), delay=1)], "a",
    )  # fmt: skip
    with pytest.raises(ValueError, match="on a cycle and has a norm that trains"):
        looped(X)
    assert looped.eval()(X).shape == (3, 256)


@pytest.mark.ci
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_network_is_one_graph_with_equal_results(training):
    net = stack(input_shape=(2, 8, 8)).train(training)
    compiles_whole(net, X)


@pytest.mark.parametrize("density", ["uniform", "erk"])
def test_a_network_of_images_is_made_sparse_and_rewired_in_place(density):
    net = stack((G2GConv2d(2, 16, 3, padding=1), LIF()), nn.MaxPool2d(2), (G2GConv2d(16, 32, 3, padding=1), LIF()))
    sparsify(net, 0.2, density=density, num_groups=2, block_size=1, skip=["conv1"], generator=seeded(1))
    assert type(net.conv1) is G2GConv2d
    assert 0.4 < net.conv2.mask.density < 0.8
    optimizer = torch.optim.Adam(net.parameters())
    scheduler = DSTScheduler(net, optimizer, prune="set", grow="gradient", interval=1)
    before = net.conv2.mask.flat_unit().clone()
    net(X).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(net.conv2.mask.flat_unit(), before)
    assert net.conv2.mask.num_units == len(before)
    with pytest.raises(ValueError, match="a correlation is of neurons, and layer 0 joins channels"):
        DSTScheduler(net, optimizer, prune="hebb", grow="hebb")
    with pytest.raises(ValueError, match="quantize=8 rounds G2GLinear layers, and conv1 is a G2GConv2d"):
        net.quantize = 8
    with pytest.raises(ValueError, match="quantize=4 rounds G2GLinear layers, and conv1 is a MaskedConv2d"):
        stack((copy.deepcopy(net.conv2), LIF())).quantize = 4


def test_erk_is_of_the_channels_that_a_convolution_joins():
    """As for weights between as many neurons: a kernel of the mask counts as one, whatever its size."""
    found = []
    for kernel in (1, 5):
        model = nn.Sequential(nn.Conv2d(16, 32, kernel), nn.Conv2d(32, 64, 3))
        sparsify(model, 0.2, density="erk", num_groups=2, block_size=1, generator=seeded(1))
        found.append([layer.mask.density for layer in model])
    linear_layers = sparsify(
        nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 64)), 0.2, density="erk", num_groups=2, block_size=1,
        generator=seeded(1),
    )  # fmt: skip
    assert found[0] == found[1] == [layer.mask.density for layer in linear_layers]
    assert found[0][0] > found[0][1]


class Least(nn.MaxPool2d):
    """The least of each window."""

    def forward(self, x):
        return -super().forward(-x)


def hooked(module):
    module.register_forward_hook(lambda *arguments: None)
    return module


SHARED = nn.BatchNorm2d(2, momentum=None)
REFUSED = [
    (lambda: stack((nn.Conv2d(1, 8, 3), LIF())), TypeError, "layer 1 is a Conv2d; give G2GConv2d.from_conv2d"),
    (lambda: stack((nn.Sequential(nn.Dropout(), G2GConv2d(1, 8, 3)), LIF())), TypeError, "layer 1 is a Dropout; a net"),
    (lambda: stack((nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4)), LIF())), TypeError, "layer 1 is a BatchNorm2d"),
    (
        lambda: stack((nn.Sequential(G2GConv2d(1, 8, 3), nn.BatchNorm2d(4)), LIF())),
        ValueError,
        "the norm of layer 1 has 4 channels, not 8",
    ),
    (
        lambda: stack((hooked(nn.Sequential(G2GConv2d(1, 8, 3), nn.MaxPool2d(2))), LIF())),
        TypeError,
        "layer 1 has a Sequential that carries hooks, and a network takes over the options",
    ),
    (lambda: stack(hooked(nn.Flatten()), (linear(128, 4, seeded(0)), LIF())), TypeError, "has a Flatten that carries hooks"),
    (lambda: stack((nn.Sequential(G2GConv2d(2, 8, 3), Least(2)), LIF())), TypeError, "layer 1 has a Least that has a forward of its own"),
    (lambda: stack((G2GConv2d(2, 8, 3), LIF()), nn.Flatten(2), (linear(8, 4, seeded(0)), LIF())), ValueError, "by nn.Fl"),
    (
        lambda: SpikingStack([(nn.Sequential(G2GConv2d(2, 2, 1), SHARED), LIF()) for _ in range(2)]),
        ValueError,
        "conv2 shares its norm, whose momentum=None counts one batch",
    ),
    (lambda: stack(Least(2), (G2GConv2d(8, 8, 3), LIF())), TypeError, "has a Least that has a forward of its own"),
    (lambda: stack(input_shape=(2, 8, 8))(X[0, 0]), ValueError, "the input is one image, .2, 8, 8.; give .B, C, H, W."),
    (lambda: stack((nn.Sequential(nn.Flatten(), G2GConv2d(1, 8, 3)), LIF())), TypeError, "behind nn.Flatten"),
    (lambda: stack((G2GConv2d(1, 8, 3), LIF()), nn.Flatten()), TypeError, "behind the last neurons there is a Flatten"),
    (lambda: stack((nn.AvgPool2d(2, divisor_override=3), LIF())), ValueError, "divisor_override=3; give None, 1"),
    (lambda: stack((nn.MaxPool2d(2, return_indices=True), LIF())), ValueError, "return_indices=True"),
    (lambda: stack((nn.Sequential(nn.Flatten()), LIF())), TypeError, "has no weights and no pool"),
    (lambda: stack((linear(8, 4, seeded(0)), LIF()), (G2GConv2d(4, 8, 1), LIF())), ValueError, "its source is 4 neurons"),
    (lambda: stack(input_shape=(3, 8, 8)), ValueError, "conv1 cannot take images of .3, 8, 8.: images have 3 channels"),
    (lambda: stack(input_shape=(2, 8)), ValueError, r"input_shape=\(2, 8\) must be \(C, H, W\)"),
    (lambda: stack((G2GConv2d(2, 8, 9), LIF()), input_shape=(2, 8, 8)), ValueError, "smaller than the kernel, 9 × 9"),
    (lambda: stack((G2GConv2d(2, 8, 3), LIF(9)), input_shape=(2, 8, 8)), ValueError, "lif1 has 9 numbers beta, but 288"),
    (
        lambda: SpikingNetwork({"a": LIF()}, [Projection("input", "a", G2GConv2d(2, 4, 1), delay=[1, 2])], "a"),
        ValueError,
        r"has a delay for each neuron, whose number is unknown; give input_shape",
    ),
    (lambda: setattr(stack(), "quantize", 8), ValueError, "quantize=8 rounds G2GLinear layers, and conv1 is a G2GConv2d"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_no_network_of_images_can_be_made_of_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_correlations_are_of_the_pooled_spikes_that_weights_receive():
    numbers = seeded(0)
    parts = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), linear(64, 5, numbers))
    net = stack((exact(G2GConv2d(2, 4, 3, padding=1), numbers), LIF(beta=0.5, threshold=0.25)), (parts, LIF()))
    activity = net.simulate(X)
    spikes = activity.spikes[0].dense().unflatten(2, (4, 8, 8)).flatten(0, 1)
    *_, (layer, received, _) = received_in(net, X.flatten(2), activity)
    assert layer is net.fc2
    assert torch.equal(received, F.max_pool2d(spikes, 2).flatten(1).unflatten(0, (5, 3)))
    assert received.any()
    before = net.fc2.mask.flat_unit().clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    scheduler = DSTScheduler(net, optimizer, prune="hebb", grow="hebb", interval=1)
    net(X).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(net.fc2.mask.flat_unit(), before)


@pytest.mark.parametrize("model", ["conv", "random"])
def test_layers_in_the_notation_of_papers_are_the_stack_written_out(model):
    """Spikes after each layer, then a pool of them, in plain PyTorch."""
    options = {"num_groups": 2, "block_size": 1, "p_inter": 0.3, "p_intra": 0.7, "density": "uniform"}
    given = {} if model == "conv" else options
    net = G2GNet((2, 10, 9), None, 5, model, T=4, layers="4C3-AP2-6C5-MP2-P2-7", generator=seeded(3), **given)
    assert {name: layer.mask.shape for name, layer in net.connections().items()} == {
        "conv1": (4, 2), "conv2": (6, 4), "fc3": (7, 6), "fc4": (5, 7),
    }  # fmt: skip
    assert all(layer.mask.is_full for layer in net.connections().values()) == (model == "conv")
    assert [*net.shapes.values()] == [(2, 10, 9), (4, 10, 9), (6, 5, 4), (7,), (5,)]
    for module in net.connections().values():
        exact(module, seeded(4))
    x = (torch.rand(4, 3, 2, 10, 9, generator=seeded(5)) < 0.4).float()
    trains = []
    for name, pools in (("conv1", ()), ("conv2", (F.avg_pool2d,)), ("fc3", 2 * (F.max_pool2d,)), ("fc4", ())):
        layer: Any = getattr(net, name)
        source = trains[-1] if trains else x
        membrane, spikes = 0, []
        for now in source:
            for pool in pools:
                now = pool(now, 2)
            weight = layer.dense_weight()
            current = F.conv2d(now, weight, layer.bias, padding=weight.shape[-1] // 2) if weight.dim() == 4 else None
            current = F.linear(now.flatten(1), weight, layer.bias) if current is None else current
            membrane = 0.9 * membrane + current - (spikes[-1] if spikes else 0)
            spikes.append((membrane > 1).float())
        trains.append(torch.stack(spikes))
    activity = net.simulate(x)
    for own, spikes in zip(activity.spikes, trains, strict=True):
        assert 0 < spikes.mean() < 1
        assert torch.equal(own.dense(), spikes.flatten(2))
    assert torch.equal(net(x.flatten(2)), net(x))
    with pytest.raises(ValueError, match=r"layer 4: images of 1 × 1 are smaller than a pool of \(2, 2\)"):
        G2GNet((2, 4, 4), None, 5, "conv", layers="4C3-P2-4C3-P2-4C3-P2")
