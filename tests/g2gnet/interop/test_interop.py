"""Networks from and to snnTorch and NIR: equal spikes on both sides, and a round trip that loses nothing."""

import functools
import itertools
import re
import sys

import networks
import nir
import numpy as np
import pytest
import snntorch
import torch
from helpers import seeded
from snntorch import surrogate, utils
from snntorch.import_nir import import_from_nir
from torch import nn
from torch.nn.utils import prune

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2gnet import (
    LIF,
    G2GConv2d,
    G2GLinear,
    G2GNet,
    Projection,
    SpikingNetwork,
    SpikingStack,
    SumPool2d,
    Synaptic,
    sparsify,
)
from g2gnet.interop import from_nir, from_snntorch, to_nir, to_snntorch
from g2gnet.interop.plain import plain

STEPS = 12
SAMPLES = torch.rand(STEPS, 6, 30, generator=seeded(1)) * 3
LEAKY = snntorch.Leaky(beta=0.9)

small_net = functools.partial(networks.small_net, T=STEPS)


def trained_net(**options):
    net = small_net(**options)
    optimizer = torch.optim.Adam(net.parameters(), lr=9e-3)  # with which no beta gets from 0.9 to 1
    for _ in range(10):
        loss = nn.functional.cross_entropy(net(SAMPLES), torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def output_spikes(net):
    """Of a stack of ours, [T, B, C], with something in them to compare."""
    spikes = net.simulate(SAMPLES).spikes[-1].dense()
    assert 0 < spikes.sum() < spikes.numel()
    return spikes


def options_of(stack):
    return [(neurons.reset, neurons.surrogate, neurons.alpha) for _, neurons in stack.layers()]


def assert_equal_states(one, other):
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


# --- snnTorch -----------------------------------------------------------------------------------------------------


class TutorialNet(nn.Module):
    """The modules of a network as snnTorch's tutorials write it."""

    def __init__(self, **options):
        super().__init__()
        self.fc1 = nn.Linear(30, 40)
        self.lif1 = snntorch.Leaky(beta=0.8, **options)
        self.fc2 = nn.Linear(40, 10, bias=False)
        self.lif2 = snntorch.Leaky(beta=torch.linspace(0.5, 0.9, 10), threshold=0.7, learn_beta=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_neuron": True, "reset": "zero"},
        {"learn_beta": False, "alpha": 3.0},
        {"neuron": "synaptic", "surrogate": "boxcar"},
        {"neuron": "synaptic", "per_neuron": True, "reset": "zero", "learn_syn_decay": False, "surrogate": "triangle"},
        {"recurrent": True, "per_neuron": True, "learn_beta": False, "threshold": 0.6},
        {"recurrent": True, "neuron": "synaptic", "reset": "zero"},
        {"recurrent": [2], "threshold": 0.6},
    ],
)
def test_there_and_back_again_is_the_same_network(options):
    net, draws = small_net(**options), torch.get_rng_state()
    list(net.connections().values())[1].requires_grad_(False)
    theirs = to_snntorch(net)
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.equal(torch.stack([theirs(x_t) for x_t in SAMPLES]), output_spikes(net))

    names = {name: name.replace("rec", "lif") + ".recurrent" * (name[0] == "r") for name in net.connections()}
    masks = {names[name]: connection.mask for name, connection in net.connections().items()}
    back = from_snntorch(theirs, masks, T=STEPS)
    assert_equal_states(back, net)
    assert options_of(back) == options_of(net)
    assert [type(neurons) for _, neurons in back.layers()] == [type(neurons) for _, neurons in net.layers()]
    learnable = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in back.named_parameters()} == learnable
    # without the masks, the same graph as single weights
    for name, connection in from_snntorch(theirs, T=STEPS).connections().items():
        assert torch.equal(connection.mask.to_dense(), net.get_submodule(name).mask.to_dense())


@pytest.mark.parametrize("masked", [False, True])
def test_a_network_of_convolutions_and_pools_is_snntorchs_step_by_step(masked):
    """The network of snnTorch's tutorial, pools before the neurons, and pools, a norm and a pool of spikes."""
    leaky = functools.partial(snntorch.Leaky, beta=0.5, threshold=0.5, init_hidden=True)
    theirs = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.MaxPool2d(2), leaky(), nn.AvgPool2d(2), nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5),
        leaky(), nn.Flatten(), nn.Linear(45, 4), leaky(),
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        if parameter.dim():
            parameter.data = torch.randint(-4, 5, parameter.shape, generator=seeded(parameter.numel())) / 8
    nn.init.ones_(theirs[5].weight)
    theirs[5].eps = 0.0  # the variance is 1: nothing is rounded
    kernels = torch.rand(5, 6, generator=seeded(3)) < 0.6
    x = (torch.rand(7, 3, 2, 14, 14, generator=seeded(2)) < 0.3).float()
    ours = from_snntorch(theirs, {"4": kernels} if masked else None, T=7)
    if masked:
        theirs[4].weight.data *= kernels[:, :, None, None]
    utils.reset(theirs)
    wanted = torch.stack([theirs(x_t) for x_t in x])
    assert torch.equal(ours.simulate(x).spikes[-1].dense(), wanted)
    assert 0.1 < wanted.mean() < 0.9
    assert hasattr(ours.conv2, "mask") == masked
    with pytest.raises(ValueError, match="to_snntorch has no form for conv1, which is a convolution"):
        to_snntorch(ours)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("alpha", [0.5, 2.0, 25.0])
def test_every_surrogate_is_told_by_its_derivative(name, alpha):
    stack = SpikingStack([(G2GLinear.from_linear(nn.Linear(4, 3)), LIF(surrogate=name, alpha=alpha))])
    assert options_of(from_snntorch(to_snntorch(stack), T=STEPS)) == [("subtract", name, alpha)]
    model = TutorialNet(reset_mechanism="zero", spike_grad=surrogate.fast_sigmoid(slope=5))
    assert options_of(from_snntorch(model, T=STEPS)) == [("zero", "fast_sigmoid", 5.0)] * 2


def test_what_the_other_library_lacks_is_refused():
    resetting, mixed = small_net(reset="zero"), small_net(reset="zero", per_neuron=True)
    joins = [Projection(source, target, G2GLinear.from_linear(nn.Linear(4, 4)), onto="membrane")
             for source, target in (("input", "s"), ("s", "out"))]  # fmt: skip
    passing_by = SpikingNetwork({"s": Synaptic(reset="zero"), "out": LIF(reset="zero")}, joins, "out")
    mixed.lif2.beta.data[3:5] = 1.2
    refractory = SpikingStack([(G2GLinear.from_linear(nn.Linear(4, 4)), LIF(reset="zero", refractory=3))])
    watched = small_net(reset="zero")
    hooked(watched.lif1)
    for convert, message in (
        (lambda: to_snntorch(small_net(neuron="adlif")), "lif1: snnTorch has no 'adlif' neurons; only lif, synaptic"),
        (lambda: to_snntorch(small_net(recurrent=True, reset="zero")), "lif1: snn.RLeaky with reset to zero holds"),
        (lambda: to_nir(small_net(neuron="adlif")), "lif1: NIR has no 'adlif' neurons; only lif, synaptic convert"),
        (lambda: to_nir(refractory), "lif1: NIR has no 'refractory_lif' neurons"),
        (lambda: to_nir(watched), "to_nir has no form for what calls of modules run .lif1 carries hooks.; remove it"),
        (lambda: to_snntorch(watched), "to_snntorch has no form for what calls of modules run .lif1 carries hooks"),
        (lambda: to_snntorch(refractory), "lif1: snnTorch has no 'refractory_lif' neurons"),
        (lambda: plain(refractory), "lif1: 'refractory_lif' neurons are not written"),
        (lambda: to_nir(small_net(neuron="cubalif")), "lif1: NIR has no 'cubalif' neurons .its CubaLIF stands"),
        (lambda: to_nir(small_net()), "reset='subtract' cannot be written to NIR, .*; train the .* with reset='zero'"),
        (lambda: to_nir(mixed),
         r"lif2 has beta=1, no decay, in 2 of 40 neurons: .*learn_beta=False.*net\.lif2\.beta\.data\.clamp_"),
        (lambda: to_nir(small_net(neuron="synaptic", reset="zero", syn_decay=1.0)),
         "lif1 has syn_decay=1, no decay, in 40 of 40 neurons"),
        (lambda: to_nir(resetting, dt=0), "dt=0 must be a number above 0"),
        (lambda: to_nir(passing_by), "input_to_s adds to the membrane, and all that reaches NIR's CubaLIF"),
        (lambda: to_snntorch(passing_by), "no form for input_to_s, .* to membrane 1"),
        (lambda: plain(passing_by), "input_to_s adds to the membrane, which is not written"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert()


def changed(name, attribute, value):
    """The tutorial's network, of whose layer ``name`` an attribute is another one."""
    model = TutorialNet()
    value = nn.Parameter(value, requires_grad=False) if attribute == "weight" else value
    setattr(model.get_submodule(name), attribute, value)
    return model


def constant_derivative(x):
    return (x > 0).float() + 0.25 * (x - x.detach())


WRONG_MODELS = [
    (lambda: TutorialNet(inhibition=True), "lif1: our LIF has no inhibition"),
    (lambda: TutorialNet(reset_delay=False), "our LIF has no reset_delay=False; only snn.Leaky with reset_delay=True"),
    (lambda: TutorialNet(graded_spikes_factor=2.0), "our LIF has no graded_spikes_factor; only snn.Leaky with .*=1"),
    (lambda: TutorialNet(state_quant=lambda x: x), "lif1: our LIF has no state_quant"),
    (lambda: TutorialNet(spike_grad=surrogate.triangular()), "lif1: spike_grad is not one of g2g's surrogates"),
    (lambda: TutorialNet(spike_grad=constant_derivative), "lif1: spike_grad is not one of g2g's surrogates"),
    (lambda: changed("fc1", "weight", torch.full((40, 30), torch.nan)), "fc1: weight=nan must be a finite number"),
    (lambda: changed("fc1", "weight", torch.ones(40, 30).char()), "weight of fc1 must be a floating-point tensor"),
    (lambda: changed("fc1", "weight", torch.ones(40, 30, 2)), r"fc1: weight has shape \[40, 30, 2\]; give a matrix"),
    (lambda: changed("lif1", "threshold", torch.tensor(torch.nan)), "lif1: threshold=nan must be a number that"),
    (lambda: changed("lif1", "threshold", torch.tensor(1j)), r"lif1: threshold is a Tensor \(of complex64\)"),
    (lambda: changed("lif1", "beta", torch.ones(3)), r"lif1: beta has 3 numbers, of shape \[3\]; give one, or 40"),
    (lambda: nn.Sequential(nn.Conv1d(1, 1, 3), LEAKY), "0 is a Conv1d; from_snntorch takes networks of nn.Linear"),
    (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), snntorch.RLeaky(beta=0.9, conv2d_channels=1, kernel_size=3)),
     "1 is recurrent behind a convolution"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
     "1 is a Linear, but snn.Leaky, snn.RLeaky, snn.Synaptic or snn.RSynaptic should come next"),
    (lambda: nn.Sequential(nn.Linear(3, 3)), "the model has 1 nn.Linear and 0 snn.Leaky, snn.RLeaky, snn.S"),
    (lambda: nn.Sequential(nn.Linear(3, 3), type("SynapticDelay", (nn.Module,), {})(), LEAKY),  # no release has it
     "1 is a SynapticDelay; from_snntorch takes networks"),
    (lambda: nn.Sequential(nn.Linear(3, 4), LEAKY, nn.Linear(3, 3)), "the model has 2 nn.Linear and 1 snn.L"),
    (lambda: nn.Sequential(nn.Linear(3, 4), LEAKY, nn.Linear(4, 3), LEAKY), "1 and 3 are one Leaky, which would"),
    (lambda: nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), LEAKY)] * 2), "0 and 1 are one Sequential, which would be"),
    (lambda: with_one_pool(), "2 and 5 are one MaxPool2d, which would be two in a stack; register it once"),
    (lambda: with_one_weight(), "0 and 2 share a parameter, which would be two in a stack; give each a copy"),
    (lambda: nn.Sequential(nn.Conv2d(2, 2, 3), LEAKY, nn.AvgPool2d(2)), "the AvgPool2d is registered behind"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), LEAKY, snntorch.Leaky(0.9)),
     "1 is a Linear, but snn.Leaky, .* should come next; register modules in the order in which they run"),
    (lambda: nn.Sequential(nn.Linear(3, 3), snntorch.Leaky(0.9, spike_grad=torch.sigmoid)),
     "1: spike_grad does not return 1 above 0 and 0 elsewhere"),
    (lambda: nn.Sequential(nn.Linear(3, 3), snntorch.Leaky(0.9, learn_graded_spikes_factor=True)),
     "1: our LIF has no learn_graded_spikes_factor"),
    (lambda: nn.Sequential(prune.l1_unstructured(nn.Conv2d(2, 2, 3), "weight", 0.5), LEAKY),
     "the Conv2d is pruned within kernels, and a mask has whole ones: zeros in them would train. Give mask="),
    (lambda: nn.Sequential(nn.LazyLinear(3), LEAKY), "weight of the LazyLinear has no size yet; call its model once"),
    (lambda: nn.Sequential(nn.Linear(3, 3), snntorch.Synaptic(0.9, 0.9, reset_mechanism="zero", reset_delay=False)),
     "1: our Synaptic has no reset_delay=False; only"),
    (lambda: nn.Sequential(nn.Linear(3, 3), snntorch.Synaptic(0.9, 0.9, reset_delay=False)),
     "1: our Synaptic has no reset_delay=False; only"),
    (lambda: nn.Sequential(nn.Linear(9, 9), snntorch.RLeaky(beta=0.9, conv2d_channels=1, kernel_size=3)),
     r"1.recurrent is Conv2d\(.*\); from_snntorch takes snn.RLeaky with linear_features=9"),
    (lambda: nn.Sequential(nn.Linear(9, 9), snntorch.RLeaky(beta=0.9, all_to_all=False, V=torch.ones(9))),
     r"1.recurrent is RecurrentOneToOne\(.*\); from_snntorch takes snn.RLeaky with linear_features=9"),
    (lambda: nn.Sequential(nn.Linear(9, 9), snntorch.RLeaky(beta=0.9, linear_features=8)),
     r"1.recurrent is Linear\(in_features=8, .*; from_snntorch takes snn.RLeaky with linear_features=9"),
    # with delay it holds the membrane at zero, where our LIF lets it charge; without, its gradients differ
    *((lambda delay=delay: nn.Sequential(nn.Linear(9, 9), snntorch.RLeaky(
        beta=0.9, linear_features=9, reset_mechanism="zero", reset_delay=delay)),
       "1: snn.RLeaky with reset to zero holds .* or convert by NIR") for delay in (True, False)),
]  # fmt: skip


def with_one_pool():
    first, second = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
    pool = nn.MaxPool2d(3, 1, 1)
    return nn.Sequential(first, snntorch.Leaky(0.9), pool, second, snntorch.Leaky(0.9), pool)


def with_one_weight():
    model = nn.Sequential(nn.Linear(3, 3), snntorch.Leaky(0.9), nn.Linear(3, 3), snntorch.Leaky(0.9))
    model[2].weight = model[0].weight
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # snnTorch's own, of inhibition
@pytest.mark.parametrize(("make", "message"), WRONG_MODELS)
def test_models_that_no_network_of_ours_is_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        from_snntorch(make(), T=STEPS)


class Halved(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / 2, bias)


def hooked(module):
    module.register_forward_hook(lambda *arguments: None)
    return module


def with_hook(module):
    module.weight.register_hook(lambda grad: 2 * grad)
    return module


def parametrized(module):
    return nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(hooked(nn.Linear(3, 3)), LEAKY), r"0 \(Linear\) carries hooks, which a stack"),
        (lambda: hooked(nn.Sequential(nn.Linear(3, 3), LEAKY)), r"the model \(Sequential\) carries hooks"),
        (lambda: nn.Sequential(nn.Linear(3, 3), hooked(snntorch.Leaky(0.9))), r"1 \(Leaky\) carries hooks"),
        (lambda: nn.Sequential(hooked(nn.AvgPool2d(2)), nn.Linear(3, 3), LEAKY), r"0 \(AvgPool2d\) carries hooks"),
        (lambda: nn.Sequential(with_hook(nn.Linear(3, 3)), LEAKY), r"0 \(Linear\) carries hooks on its parameters"),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3), prune.l1_unstructured(nn.BatchNorm2d(4), "weight", 0.5), LEAKY),
            r"1 \(BatchNorm2d\) carries hooks",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3), parametrized(nn.BatchNorm2d(4)), LEAKY),
            r"1 \(Param.*is parametriz",
        ),
        (lambda: nn.Sequential(Halved(2, 2, 3), LEAKY), r"0 \(Halved\) has a forward of its own"),
        (lambda: nn.Sequential(nn.Linear(3, 3), type("Own", (snntorch.Leaky,), {})(0.9)), "1 is a Own, whose methods"),
    ],
)
def test_what_a_stack_would_leave_out_of_a_model_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        from_snntorch(make(), T=STEPS)


def test_sparse_layers_compiled_parts_and_a_flatten_before_all_are_taken():
    sparse = sparsify(nn.Sequential(nn.Linear(32, 24), LEAKY, nn.Linear(24, 8), snntorch.Leaky(0.9)), block_size=4)
    model = nn.Sequential(nn.Flatten(), nn.Sequential(), *[torch.compile(each) for each in sparse])
    stack = from_snntorch(model, T=STEPS)
    for ours, theirs in ((stack.fc1, sparse[0]), (stack.fc2, sparse[2])):
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.mask.to_dense(), theirs.mask.to_dense())
    images = torch.rand(3, 2, 4, 4, generator=seeded(1))
    assert torch.equal(stack(images), stack(images.flatten(1)))


def test_each_module_keeps_its_mode_and_parametrized_weights_their_value():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4), snntorch.Leaky(0.9), nn.Flatten(),
        nn.Linear(16, 3), snntorch.Leaky(0.9),
    )  # fmt: skip
    model[1].eval()
    model[5].eval()
    model[0].parametrizations.weight.original0.data *= 3
    stack = from_snntorch(model, T=STEPS)
    assert torch.equal(stack.conv1.weight, model[0].weight)
    trains = [each.training for each in (stack, stack.conv1, stack.conv1_norm, stack.lif1, stack.fc2, stack.lif2)]
    assert trains == [True, True, False, True, True, False]


# --- NIR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_neuron": True, "surrogate": "sigmoid", "learn_threshold": False},
        {"neuron": "synaptic", "syn_decay": 0.6},
        {"neuron": "synaptic", "syn_decay": 0.6, "per_neuron": True, "learn_syn_decay": False},
        {"recurrent": True, "per_neuron": True, "learn_threshold": False},
        {"recurrent": True, "neuron": "synaptic", "syn_decay": 0.5, "surrogate": "boxcar"},
        {"leaks": False},
        {"leaks": False, "per_neuron": True, "learn_beta": False},
        {"leaks": False, "recurrent": True},
    ],
)
def test_a_file_of_nir_gives_the_same_network_back(options, tmp_path):
    """Neurons that do not leak are NIR's integrate-and-fire ones."""
    options = dict(options)
    leaks = options.pop("leaks", True)
    net, dt = trained_net(reset="zero", **options), 1e-4 if leaks else 1e-3
    if not leaks:
        net.lif1.beta.data.fill_(1)
    nir.write(tmp_path / "net.nir", to_nir(net, dt))
    graph = nir.read(tmp_path / "net.nir")
    node = graph.nodes["lif1"]
    node = node.nodes["lif"] if "recurrent" in options else node
    assert isinstance(node, nir.IF) != leaks
    back = from_nir(graph, dt, T=STEPS)
    assert_equal_states(back, net)
    assert options_of(back) == options_of(net)
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert torch.equal(back(SAMPLES), net(SAMPLES))
    assert net(SAMPLES).sum() > 0


@pytest.mark.parametrize("recurrent", [False, True])
def test_weights_of_few_bits_stay_so_in_nir(recurrent, tmp_path):
    net = trained_net(reset="zero", recurrent=recurrent)
    net.quantize = 4
    nir.write(tmp_path / "net.nir", to_nir(net))
    graph = nir.read(tmp_path / "net.nir")
    back = from_nir(graph, T=STEPS)
    assert back.quantize == 4
    assert torch.equal(back(SAMPLES), net(SAMPLES))
    assert all(len(layer.weights()[0].unique()) <= 16 for layer in back.connections().values())
    graph.nodes["fc2"].metadata["bits"] = np.array(8)
    with pytest.raises(ValueError, match="the weights of nodes have other numbers of bits"):
        from_nir(graph, T=STEPS)
    graph.nodes["fc2"].metadata["bits"] = np.array(5)
    with pytest.raises(ValueError, match="node fc2: metadata: bits=5 is not one of 8, 4; correct or delete it"):
        from_nir(graph, T=STEPS)


def one_layer():
    torch.manual_seed(0)
    neurons = Synaptic(neurons=40, syn_decay=0.6, beta=0.8, reset="zero")
    for decay in (neurons.syn_decay, neurons.beta):
        decay.data.uniform_(0.3, 0.9)
    return SpikingStack([(G2GLinear.from_linear(nn.Linear(30, 40)), neurons)], T=STEPS)


@pytest.mark.parametrize("dt", [1e-4, 1e-3])
def test_synaptic_neurons_are_nirs_differential_equations_but_for_the_step_after_a_spike(dt, caplog):
    stack = one_layer()
    nodes = to_nir(stack, dt).nodes
    assert "lif1: after a spike NIR's CubaLIF charges from zero, Synaptic stays at zero for that step" in caplog.text
    affine, cuba = nodes["fc1"], nodes["lif1"]
    current, v, fired, spikes = np.zeros((6, 40)), np.zeros((6, 40)), np.zeros((6, 40), bool), []
    for x in SAMPLES.double().numpy():
        current = current + dt / cuba.tau_syn * (-current + cuba.w_in * (x @ affine.weight.T + affine.bias))
        v = v + dt / cuba.tau_mem * (cuba.v_leak - v + cuba.r * current)
        v = np.where(fired, cuba.v_reset, v)  # NIR resets in the step before, from where this one's current charges
        fired = v > cuba.v_threshold
        spikes.append(torch.from_numpy(fired))
    assert torch.equal(torch.stack(spikes).float(), output_spikes(stack))


@torch.no_grad()
def spikes_of(theirs):
    """Of a network that takes and gives its state."""
    state, trains = None, []
    for x_t in SAMPLES:
        spikes, state = theirs(x_t, state)
        trains.append(spikes)
    return torch.stack(trains)


@pytest.mark.filterwarnings("ignore")  # norse's own
@pytest.mark.parametrize("reader", ["snntorch", "norse"])
def test_importers_of_snntorch_and_norse_run_the_graph_to_the_same_spikes(reader, capsys):
    """Of synaptic neurons, which reset a step later there, to the same first ones."""
    if reader == "norse":
        norse = pytest.importorskip("norse.torch")
        read = functools.partial(norse.from_nir, dt=1e-4, ignore_warnings=True)
        stacks = [trained_net(reset="zero", per_neuron=True) for _ in range(2)]
        stacks[1].lif1.beta.data.fill_(1)  # an integrate-and-fire node
    else:
        read, stacks = import_from_nir, [trained_net(reset="zero")]
    for stack in stacks:
        assert torch.equal(spikes_of(read(to_nir(stack))), output_spikes(stack))
    stack = one_layer()
    stack.lif1.threshold.data.fill_(0.75)  # one for all, as snnTorch's importer demands
    trains = output_spikes(stack), spikes_of(read(to_nir(stack)))
    assert torch.equal(*(spikes * (spikes.cumsum(0) == 1) for spikes in trains))
    capsys.readouterr()  # snnTorch prints that it scales the threshold


def graph_of(nodes):
    """A chain of nodes, as tools without input and output nodes write it, its edges in no order."""
    return nir.NIRGraph(nodes=nodes, edges=list(itertools.pairwise(nodes))[::-1], type_check=False)


def between_ends(inputs, outputs, **nodes):
    """Such a chain between an input and an output node."""
    ends = nir.Input(input_type={"input": np.array([inputs])}), nir.Output(output_type={"output": np.array([outputs])})
    return graph_of({"input": ends[0], **nodes, "output": ends[1]})


def test_graphs_of_pytorchs_tensors_without_ends_and_within_graphs_are_read():
    """As norse, sinabs and nirtorch write them (``tests/clients`` has their own)."""
    torch.manual_seed(0)
    weight, bias, zero, one = torch.randn(40, 30), torch.randn(40), torch.tensor(0.0), torch.tensor(1.0)
    lif = nir.LIF(tau=torch.tensor(20.0), r=one, v_leak=zero, v_threshold=torch.tensor(0.1))
    fires = nir.IF(r=torch.full((10,), 2.0), v_threshold=torch.linspace(0.2, 2, 10))
    inner = between_ends(40, 10, w=nir.Linear(weight=torch.randn(10, 40, requires_grad=True)), n=fires)
    stack = from_nir(graph_of({"0": nir.Affine(weight, bias), "1": lif, "rest": inner}), dt=1.0, T=STEPS)
    assert torch.equal(stack.fc1.dense_weight(), weight)
    assert torch.equal(stack.fc1.bias, bias)
    assert stack.lif1.beta.item() == pytest.approx(0.95)  # 1 − Δt/τ
    assert stack.lif1.threshold.item() == pytest.approx(0.1 * 20)  # v_threshold/(R·Δt/τ)
    assert isinstance(stack.lif1.beta, nn.Parameter)
    assert stack.lif2.beta.item() == 1, "an integrate-and-fire neuron does not leak"
    assert not isinstance(stack.lif2.beta, nn.Parameter)
    torch.testing.assert_close(stack.lif2.threshold.detach(), torch.linspace(0.1, 1, 10))
    assert output_spikes(stack).shape == (STEPS, 6, 10)


@pytest.mark.parametrize("synaptic", [False, True])
def test_a_graph_of_another_tool_is_read_with_its_own_strengths_and_time_step(synaptic):
    weight = torch.randn(5, 30, generator=seeded(3)).numpy()
    dt, syn_decay, beta, gain, threshold = 1e-3, np.linspace(0.3, 0.7, 5), np.linspace(0.5, 0.9, 5), 0.25, 0.8
    tau_syn, tau, w_in = dt / (1 - syn_decay), dt / (1 - beta), np.linspace(1, 2, 5)
    ends = {"v_leak": np.zeros(5), "v_reset": np.zeros(5), "v_threshold": np.full(5, threshold)}
    if synaptic:
        node = nir.CubaLIF(tau_syn=tau_syn, tau_mem=tau, r=gain / w_in * tau_syn * tau / dt**2, w_in=w_in, **ends)
    else:
        node = nir.LIF(tau=tau, r=gain * tau / dt, **ends)
    graph = between_ends(30, 5, w=nir.Linear(weight=weight), n=node)
    stack = from_nir(graph, dt, masks={"w": BlockMask.full(GroupLayout(5, 1), GroupLayout(30, 1), 8)}, T=STEPS)
    torch.testing.assert_close(stack.lif1.beta.detach(), torch.from_numpy(beta).float())
    torch.testing.assert_close(stack.lif1.threshold.detach().expand(5), torch.full((5,), threshold / gain))
    if synaptic:
        torch.testing.assert_close(stack.lif1.syn_decay.detach(), torch.from_numpy(syn_decay).float())
    assert torch.equal(stack.fc1.dense_weight(), torch.from_numpy(weight))
    assert stack.fc1.bias is None
    assert stack.fc1.mask.block_size == 8
    assert from_nir(graph, dt, T=STEPS).fc1.mask.is_full
    with pytest.raises(ValueError, match=r"node n has a time constant below dt=0.1 s"):
        from_nir(graph, 0.1, T=STEPS)


def graph_with(node, **values):
    """A graph of 3 inputs and 5 neurons, CubaLIF, of whose node ``w`` or ``n`` these values are set unchecked."""
    one = np.ones(5)
    cuba = nir.CubaLIF(one * 1e-3, one * 1e-3, one, one * 0, one * 0.5, one * 0, one)
    nodes = {"w": nir.Affine(np.ones((5, 3)), one), "n": cuba}
    vars(nodes[node]).update(values)
    return between_ends(3, 5, **nodes)


DIAGONAL = BlockMask.from_dense(torch.eye(5, 3, dtype=torch.bool)).state_dict()["wiring"].numpy()
POSITIVE, ANY = ("tau_syn", "tau_mem", "r", "w_in"), ("v_leak", "v_reset", "weight", "bias")
WRONG = [
    *[(name, number) for name in (*POSITIVE, *ANY, "v_threshold") for number in (np.nan, 1 + 1j, -np.inf, 1e300)],
    *[(name, number) for name in POSITIVE for number in (0.0, -1.0, np.inf)],
    *[(name, np.inf) for name in ANY],
    ("v_threshold", -1.0),
]


@pytest.mark.parametrize(("name", "number"), WRONG)
def test_numbers_that_no_network_has_are_refused_by_node_and_name(name, number):
    node, shape = ("w", (5, 3)) if name == "weight" else ("w" if name == "bias" else "n", (5,))
    values = np.full(shape, 1e-3 if name in POSITIVE else 0.0, type(number))
    values.flat[2] = number
    shown = r" is a ndarray (of complex128)" if isinstance(number, complex) else f"={number}"
    with pytest.raises(ValueError, match=f"node {node}: {name}{re.escape(shown)}.*(give an array of real|must be) "):
        from_nir(graph_with(node, **{name: values}), T=STEPS)


@pytest.mark.parametrize(
    ("node", "values", "message"),
    [
        ("w", {"weight": np.ones((1, 5, 3))}, r"node w: weight has shape \[1, 5, 3\]; give a matrix"),
        ("w", {"weight": torch.ones(5, 3).to_sparse()}, "node w: weight is a Tensor .*[Ss]parse.*; give an array"),
        ("w", {"bias": np.ones(4)}, r"node w: bias has 4 numbers, of shape \[4\]; give one, or 5"),
        ("w", {"metadata": {"wiring": "x"}}, "node w: metadata: wiring is a str .*; give .*; correct or delete it"),
        ("w", {"metadata": {"wiring": np.ones(7)}}, "node w: metadata: wiring and its checksum do not match"),
        ("w", {"metadata": {"wiring": DIAGONAL}}, "node w: metadata: wiring calls weights absent that are not 0; give"),
        ("n", {"v_leak": np.ones(5)}, "node n has v_leak other than 0"),
        ("n", {"v_reset": np.ones(5)}, "node n has v_reset other than 0"),
        ("n", {"tau_mem": "1 ms"}, "node n: tau_mem is a str .*; give an array of real numbers"),
        ("n", {"r": np.full(5, 1e-30), "w_in": np.full(5, 1e-30)}, "node n: gain g=1.*e-62 must be a number above"),
        ("n", {"metadata": None}, "node n: metadata is a NoneType; give a dict"),
        ("n", {"metadata": {"alpha": [1, 2]}}, r"node n: metadata: alpha=\[1, 2\] must be .*; correct or delete it"),
        ("n", {"metadata": {"learn_beta": "no"}}, "node n: metadata: learn_beta='no' must be True or False"),
        ("n", {"metadata": {"beta_per_neuron": "no"}}, "node n: metadata: beta_per_neuron='no' must be True or False"),
    ],
)  # fmt: skip
def test_arrays_and_metadata_of_another_form_are_refused_by_node_and_name(node, values, message):
    with pytest.raises(ValueError, match=message):
        from_nir(graph_with(node, **values), T=STEPS)


def test_a_parameter_that_differs_is_one_of_each_neuron_whatever_the_metadata_say():
    tau = np.linspace(1e-3, 2e-3, 5)
    stack = from_nir(graph_with("n", tau_mem=tau[:, None], metadata={"beta_per_neuron": False}), T=STEPS)
    torch.testing.assert_close(stack.lif1.beta.detach(), torch.from_numpy(1 - 1e-4 / tau).float())
    assert stack.lif1.syn_decay.shape == (1,)
    never = from_nir(graph_with("n", v_threshold=np.full(5, np.inf)), T=STEPS)
    assert never.lif1.threshold.isinf().all(), "a threshold that is never reached"
    assert not never(torch.ones(2, 3)).any()


@pytest.mark.parametrize(
    ("package", "load", "give"), [("nir", from_nir, to_nir), ("snntorch", from_snntorch, to_snntorch)]
)
def test_the_package_and_the_number_of_steps_are_asked_for(package, load, give, monkeypatch):
    """No form knows the steps, and a stack that holds samples for another number of them would do so in silence."""
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'T'"):
        load(TutorialNet())
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs the package {package}; pip install 'g2gnet\[interop\]' installs it"
    for convert in (functools.partial(load, T=STEPS), give):
        with pytest.raises(ImportError, match=message):
            convert(small_net(reset="zero"))


def image_net(kind):
    """Networks of images whose neurons fire."""
    draw = torch.Generator().manual_seed(1)

    def conv(*sizes, **options):
        layer = G2GConv2d(*sizes, generator=draw, **options)
        layer.weight.data.mul_(3)
        return layer

    def cells():
        return LIF(reset="zero", threshold=0.5)

    if kind == "layers":
        options = {"num_groups": 2, "block_size": 1, "p_inter": 0.6, "per_neuron": True, "delay": 1, "threshold": 0.2}
        net = G2GNet((2, 11, 9), None, 5, "random", layers="4C3-AP2-6C5-AP2-7", reset="zero", generator=draw, **options)
        for name in ("conv2", "fc3", "fc4"):
            getattr(net, name).values.data.mul_(6)
    else:
        norm = nn.BatchNorm2d(6)
        norm.running_mean.copy_(torch.linspace(-0.3, 0.3, 6))
        norm.weight.data.fill_(1.5)
        last = G2GLinear(BlockMask.full(GroupLayout(5, 1), GroupLayout(18, 1), 64), generator=draw)
        last.values.data.mul_(4)
        net = SpikingNetwork(
            {"a": cells(), "p": cells(), "out": cells()},
            [
                Projection("input", "a", nn.Sequential(conv(2, 6, 3, stride=2, bias=False), norm, SumPool2d((1, 2)))),
                Projection("a", "a", conv(6, 6, 3, padding=1, dilation=1, bias=False), delay=1),
                Projection("a", "p", nn.Sequential(SumPool2d(1), nn.AvgPool2d((1, 2), (1, 1))), delay=2),
                Projection("p", "out", nn.Sequential(nn.AvgPool2d((2, 1), padding=(1, 0)), nn.Flatten(), last)),
            ],
            "out",
            input_shape=(2, 11, 9),
        )  # fmt: skip
    net.T = 6
    return net


@pytest.mark.parametrize("kind", ["layers", "pools"])
def test_a_network_of_images_comes_back_from_a_file_of_nir(kind, tmp_path):
    net = image_net(kind)
    if kind == "pools":
        with pytest.raises(ValueError, match=r"input_to_a_norm takes .*; call net\.eval\(\) first, which folds it"):
            to_nir(net)
    nir.write(tmp_path / "net.nir", to_nir(net.eval()))
    graph = nir.read(tmp_path / "net.nir")
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert kinds >= {"Conv2d", "AvgPool2d", "Flatten", "Delay", *(["SumPool2d"] if kind == "pools" else [])}
    back = from_nir(graph, T=6)
    assert back.shapes == net.shapes
    x = (torch.rand(6, 3, 2, 11, 9, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    activity = net.simulate(x)
    assert all(0 < train.dense().mean() < 1 for train in activity.spikes)
    for own, read in zip(activity.spikes, back.simulate(x).spikes, strict=True):
        assert torch.equal(own.dense(), read.dense())
    if kind == "layers":
        assert {name: layer.mask.num_units for name, layer in back.connections().items()} == {
            name: layer.mask.num_units for name, layer in net.connections().items()
        }


def test_convolutions_of_other_tools_are_read_and_what_nir_cannot_say_of_images_is_named():
    weight, one = np.ones((2, 1, 3, 3)) / 4, np.ones(1)
    conv = nir.Conv2d((4, 4), weight, 1, "same", 1, 1, np.zeros(2))
    cells = nir.IF(r=np.ones((2, 4, 4)), v_threshold=np.ones((2, 4, 4)))
    pool = nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0]))
    flat = nir.Flatten({"input": np.array([2, 2, 2])}, 0)
    last = nir.Linear(weight=np.ones((1, 8))), nir.IF(r=one, v_threshold=one)
    nodes = {
        "in": nir.Input(np.array([1, 4, 4])),
        "c": conv,
        "n": cells,
        "s": pool,
        "f": flat,
        "w": last[0],
        "o": last[1],
    }
    graph = graph_of({**nodes, "out": nir.Output(np.array([1]))})
    net = from_nir(graph, dt=1.0, T=2)
    assert (type(net), net.shapes["lif1"]) == (SpikingStack, (2, 4, 4))
    spikes = net.simulate(torch.ones(2, 1, 1, 4, 4)).spikes[0].dense()[0, 0].view(2, 4, 4)
    # an inner pixel sums nine quarters, a corner four
    assert spikes[:, 1:3, 1:3].all()
    assert not spikes[:, 0, 0].any()
    graph.nodes["c"].weight = np.ones(3)
    with pytest.raises(ValueError, match=r"node c: weight has shape \[3\]; give \[out, in, rows, columns\]"):
        from_nir(graph, dt=1.0, T=2)
    for layers, message in (
        ([nn.MaxPool2d(2)], "conv1: NIR has no node for a pool of maxima; train with nn.AvgPool2d"),
        ([nn.AvgPool2d(2, ceil_mode=True)], "conv1: NIR has no node for pools with ceil_mode"),
        ([], "conv1 has kernels of 3 × 1 and 1 groups; the types of the package nir are those of square kernels"),
    ):
        kernel = 3 if layers else (3, 1)
        stack = SpikingStack(
            [(nn.Sequential(*layers, G2GConv2d(1, 2, kernel)), LIF(reset="zero"))], input_shape=(1, 9, 9)
        )
        with pytest.raises(ValueError, match=message):
            to_nir(stack)
