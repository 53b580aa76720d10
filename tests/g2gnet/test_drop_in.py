"""G2GLinear, LIF and whole networks inside other people's modules, loops and tools."""

import copy
import io
import pickle

import pytest
import torch
from helpers import backends_of, compiles_whole, saved_and_read, seeded
from networks import small_net

from g2g_kernels.ops.g2g_stack import WAYS
from g2gnet import LIF, G2GNet

STACK_BACKENDS = backends_of(WAYS)
SAMPLES = torch.rand(5, 30, generator=seeded(1)) * 3


@torch.no_grad()
def test_steps_without_gradients_and_in_half_precision_give_the_same_spikes():
    neurons = LIF(neurons=7)
    current = torch.randn(9, 4, 7, generator=seeded(0)) * 1.5
    for dtype in (torch.float32, torch.bfloat16):
        state, spikes = None, []
        for current_t in current.to(dtype):
            s, state = neurons.step(current_t, state)
            spikes.append(s)
        assert (state.dtype, spikes[0].dtype) == (torch.float32, dtype)
        assert torch.equal(torch.stack(spikes), neurons(current.to(dtype)))


def through_state(net):
    other = G2GNet(30, 40, 10, "random", block_size=4, T=6, p_inter=0.5)
    other.load_state_dict(saved_and_read(net.state_dict()))
    return other


DUPLICATES = copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: saved_and_read(net, False)


@pytest.mark.parametrize("duplicate", [*DUPLICATES, through_state])
def test_duplicates_of_a_network_in_use_are_equal_and_apart(duplicate):
    net = small_net()
    net(SAMPLES).sum().backward()  # whatever a first run leaves behind goes along
    before = net(SAMPLES).detach()
    other = duplicate(net)
    assert torch.equal(other(SAMPLES), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(net(SAMPLES), before)
    assert before.sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_cast_network_computes_in_its_type(dtype):
    net = small_net()
    cast = copy.deepcopy(net).to(dtype)
    x = SAMPLES.to(dtype)
    counts = cast(x)
    counts.sum().backward()
    assert all(parameter.grad.dtype == parameter.dtype == dtype for parameter in cast.parameters())
    assert cast.fc1.mask.unit_row.dtype == torch.int32
    # the same values in double precision: few spikes are as near to the threshold as half precision's rounding
    reference = copy.deepcopy(cast).double()(x.double())
    tolerance = 0 if dtype == torch.float64 else 0.05 * reference.sum()
    assert (counts.double() - reference).abs().sum() <= tolerance
    assert reference.sum() > 0


def test_frozen_networks_and_layers_get_no_gradients():
    net, x = small_net().requires_grad_(False), SAMPLES.clone().requires_grad_()
    assert not net(SAMPLES).requires_grad
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.parameters())
    net.requires_grad_(True)
    net.fc2.requires_grad_(False)
    net(SAMPLES).sum().backward()
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert without == {"fc2.values", "fc2.bias"}


# Dynamo itself makes an object of torch.autograd.Function, which PyTorch deprecates
dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


#: networks that run on each of the ways of a backend: chain, graph, chain with delays; and the lane of each
COMPILED = [
    ("triton", {}, "ci"), ("cpu", {}, "ci"), ("cpu", {"feedback": True}, "ci"), ("cpu", {"delay": 1}, "long"),
    ("torch", {}, "ci"), ("torch", {"feedback": True}, "long"),
]  # fmt: skip


@compiles_whole
@dynamo
@pytest.mark.filterwarnings("error:.*lru_cache")
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param(backend, options, marks=getattr(pytest.mark, lane), id=f"{backend} {options}")
        for backend, options, lane in COMPILED
        if backend in STACK_BACKENDS
    ],
)
def test_a_compiled_network_is_one_graph_with_equal_results(backend, options, plain_memory):
    torch.compiler.reset()  # what it has compiled of other networks counts, too
    sizes = 30, [16, 12] if options else [16], 10
    net, plain = (small_net(sizes=sizes, backend=backend, T=2 + len(options), threshold=0.3, **options) for _ in "ab")
    # the graph and its gradients without the minutes of generating code for it
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    counts, expected = compiled(SAMPLES), plain(SAMPLES)
    assert torch.equal(counts, expected)
    assert expected.sum() > 0
    counts.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(*([each.grad for each in of.parameters()] for of in (net, plain)))
    with torch.no_grad():
        assert torch.equal(compiled(SAMPLES), expected)


@pytest.mark.ci
@compiles_whole
@dynamo
def test_compiled_runs_and_steps_take_and_give_states_in_one_graph(plain_memory):
    net = small_net(backend="torch")

    def run(x, state):
        activity = net.simulate(x, state)
        return activity.counts, activity.state

    with torch.no_grad():
        state = net.step(SAMPLES)[1]
        for function in (net.step, run):
            counts, after = torch.compile(function, backend="eager", fullgraph=True)(SAMPLES, state)
            expected, expected_after = function(SAMPLES, state)
            assert torch.equal(counts, expected)
            assert all(map(torch.equal, after, expected_after))


def exports(test):
    """Marks a test that exports: PyTorch 2.4 warns of every custom operator, and of how it loads by itself."""
    for message in ("At pre-dispatch tracing.*:UserWarning", "You are using `torch.load`.*:FutureWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return compiles_whole(dynamo(test))


@pytest.mark.ci
@exports
@pytest.mark.parametrize("backend", STACK_BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"sequence": "own", "standardize": True}, {"sequence": "own", "input_taps": 2, "enc": "rate"}],
    ids=str,
)
def test_an_exported_network_is_saved_and_takes_other_batches(backend, options, plain_memory):
    inputs = 15 * options.get("input_taps", 1) if options else 30
    net = small_net(sizes=(inputs, [16], 10), backend=backend, T=2, threshold=0.3, **options)
    with torch.no_grad():  # with gradients on, PyTorch 2.13 cannot load what it exports of an autograd.Function
        program = torch.export.export(net, (SAMPLES,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (SAMPLES, SAMPLES[:3]):
        counts = []
        for network in (loaded, net):
            torch.manual_seed(0)  # of rates
            counts.append(network(x))
        assert torch.equal(*counts)
    assert net(SAMPLES).sum() > 0
