"""Networks from snnTorch with its spikes and its gradients, and recurrent ones to snnTorch and NIR."""

import pytest
import snntorch
import torch
from helpers import seeded
from networks import small_net
from snntorch import utils
from snntorch.export_nir import export_to_nir
from torch import nn
from torch.nn.utils import prune

from g2g_kernels import BlockMask
from g2gnet import LIF, Synaptic
from g2gnet.interop import from_nir, from_snntorch, to_snntorch

STEPS, INPUTS, HIDDEN, CLASSES = 12, 15, 20, 5
SAMPLES = torch.rand(STEPS, 4, INPUTS, generator=seeded(1), dtype=torch.float64) * 3


def fast_sigmoid(x):
    """snnTorch's, of slope 4, in any dtype: its own returns float32, which ``nn.Linear`` in float64 refuses."""
    smooth = x / (1 + 4 * x.abs())
    return (x > 0).to(x.dtype) + (smooth - smooth.detach())


class Theirs(nn.Module):
    """Neurons, recurrent or not, behind a linear layer and before a pruned one, as snnTorch's tutorials write them."""

    def __init__(self, kind, seed=0, bias=True, **options):
        super().__init__()
        torch.manual_seed(seed)
        if kind.endswith("Synaptic"):
            options = {"alpha": 0.4, **options}
        self.recurrent = kind.startswith("R")
        if self.recurrent:
            options["linear_features"] = HIDDEN
        self.fc1 = nn.Linear(INPUTS, HIDDEN, bias=bias)
        self.lif1 = getattr(snntorch, kind)(**{"beta": 0.8, "spike_grad": fast_sigmoid, **options})
        self.fc2 = nn.Linear(HIDDEN, CLASSES)
        prune.custom_from_mask(self.fc2, "weight", torch.rand(CLASSES, HIDDEN, generator=seeded(3)) < 0.7)
        self.lif2 = snntorch.Leaky(beta=0.7, threshold=0.3, spike_grad=fast_sigmoid)
        with torch.no_grad():
            for parameter in self.lif1.recurrent.parameters() if self.recurrent else ():
                parameter.mul_(3)
        self.double()

    def forward(self, x):
        state, mem2, spikes = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        state = [state] if isinstance(state, torch.Tensor) else state
        for x_t in x:
            spk1, *state = self.lif1(self.fc1(x_t), *state)
            state = [spk1, *state] if self.recurrent else state
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
        return torch.stack(spikes)


def output_spikes(stack):
    spikes = stack.simulate(SAMPLES.to(stack.fc1.values)).spikes[-1].dense()
    assert 0 < spikes.sum() < spikes.numel()
    return spikes


def assert_equal_gradients(ours, theirs):
    """After a loss of the counts, on both sides."""
    theirs(SAMPLES).sum(0).square().sum().backward()
    ours(SAMPLES).square().sum().backward()
    names, pairs = {"fc1": theirs.fc1, "fc2": theirs.fc2}, []
    if theirs.recurrent:
        names["rec1"] = theirs.lif1.recurrent
        pairs = [(ours.fc1.bias, theirs.lif1.recurrent.bias)]  # theirs has two that are always added
    for name, linear in names.items():
        layer = ours.get_submodule(name)
        gradient = (linear.weight_orig if prune.is_pruned(linear) else linear.weight).grad
        torch.testing.assert_close(layer.values.grad, layer.mask.pack(gradient), rtol=1e-9, atol=1e-9)
        assert layer.values.grad.abs().sum() > 0
        if name != "rec1" and linear.bias is not None:
            pairs.append((layer.bias, linear.bias))
    for their, our in {"alpha": "syn_decay", "beta": "beta", "threshold": "threshold"}.items():
        if isinstance(getattr(theirs.lif1, their, None), nn.Parameter):
            pairs.append((getattr(ours.lif1, our), getattr(theirs.lif1, their)))
    for one, other in pairs:
        assert other.grad.abs().sum() > 0
        torch.testing.assert_close(one.grad.view_as(other), other.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "reset", "parameters", "seed"),
    [
        ("Leaky", "subtract", "layer", 0), ("Leaky", "zero", "neuron", 1), ("Leaky", "none", "neuron", 0),
        ("Synaptic", "subtract", "neuron", 0), ("Synaptic", "zero", "layer", 1), ("Synaptic", "none", "neuron", 1),
        ("RLeaky", "subtract", "layer", 0), ("RLeaky", "none", "neuron", 1),
        ("RSynaptic", "subtract", "neuron", 0), ("RSynaptic", "zero", "layer", 1), ("RSynaptic", "none", "neuron", 0),
    ],
)  # fmt: skip
def test_neurons_of_snntorch_have_their_spikes_and_gradients(kind, reset, parameters, seed):
    options = {"learn_beta": True, "learn_threshold": True}
    if kind.endswith("Synaptic"):
        options["learn_alpha"] = True
    if parameters == "neuron":
        options |= {"beta": torch.linspace(0.4, 0.9, HIDDEN), "threshold": torch.linspace(1.2, 0.7, HIDDEN)}
        if kind.endswith("Synaptic"):
            options["alpha"] = torch.linspace(0.1, 0.7, HIDDEN)
    theirs = Theirs(kind, seed, bias=seed == 0, reset_mechanism=reset, **options)
    ours = from_snntorch(theirs, T=STEPS)
    assert torch.equal(output_spikes(ours), theirs(SAMPLES).detach())
    assert type(ours.lif1) is (Synaptic if kind.endswith("Synaptic") else LIF)
    assert torch.equal(ours.fc2.mask.to_dense(), theirs.fc2.weight_mask.bool())
    if theirs.recurrent:
        own = theirs.fc1.bias if seed == 0 else 0
        assert torch.equal(ours.fc1.bias, own + theirs.lif1.recurrent.bias)
        assert ours.rec1.bias is None
    assert_equal_gradients(ours, theirs)


def test_a_pruned_connection_or_a_mask_of_units_is_kept():
    theirs = Theirs("RLeaky")
    kept = torch.rand(HIDDEN, HIDDEN, generator=seeded(2)) < 0.3
    prune.custom_from_mask(theirs.lif1.recurrent, "weight", kept)
    ours = from_snntorch(theirs, T=STEPS)
    assert torch.equal(ours.rec1.mask.to_dense(), kept)
    assert torch.equal(output_spikes(ours), theirs(SAMPLES).detach())
    assert_equal_gradients(ours, theirs)

    units = BlockMask.from_dense(torch.eye(HIDDEN // 4, dtype=torch.bool).kron(torch.ones(4, 4, dtype=torch.bool)), 4)
    grouped = from_snntorch(Theirs("RLeaky"), masks={"lif1.recurrent": units}, T=STEPS)
    assert grouped.rec1.mask.block_size == 4
    assert torch.equal(grouped.rec1.mask.to_dense(), units.to_dense())
    with pytest.raises(ValueError, match=r"masks names lif1; the linear layers are fc1, fc2, lif1.recurrent"):
        from_snntorch(theirs, masks={"lif1": units}, T=STEPS)


def test_what_is_not_learned_there_is_not_learned_here():
    theirs = Theirs("RSynaptic", learn_recurrent=False)
    theirs.fc1.bias.requires_grad_(False)
    ours = from_snntorch(theirs, T=STEPS)
    assert not ours.rec1.values.requires_grad
    assert not ours.fc1.bias.requires_grad
    theirs.lif1.recurrent.bias.requires_grad_(True)
    assert from_snntorch(theirs, T=STEPS).fc1.bias.requires_grad


def test_a_recurrent_network_in_snntorch_stays_sparse_and_starts_anew():
    options = {"recurrent": True, "neuron": "synaptic", "threshold": 0.5}
    net = small_net("mixer", sizes=(INPUTS, HIDDEN, CLASSES), block_size=2, T=STEPS, **options)
    theirs = to_snntorch(net)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    first = [theirs(x_t) for x_t in SAMPLES.float()]
    sum(first).square().sum().backward()
    utils.reset(theirs)
    for layer in (theirs.lif1, theirs.lif2):
        layer.reset_mem()  # snnTorch's reset leaves the last spikes of RSynaptic
    assert torch.equal(torch.stack([theirs(x_t) for x_t in SAMPLES.float()]), torch.stack(first))
    optimizer.step()
    trained = from_snntorch(theirs, T=STEPS)
    for name, connection in net.connections().items():
        assert not torch.equal(trained.get_submodule(name).dense_weight(), connection.dense_weight())
        assert torch.equal(trained.get_submodule(name).dense_weight() != 0, connection.mask.to_dense())


@pytest.mark.skipif(snntorch.__version__.startswith("0."), reason="snnTorch before 1.0 writes no recurrent neurons")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("all_to_all", [True, False])
@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
def test_graphs_of_snntorch_are_read(kind, all_to_all):
    torch.manual_seed(0)
    options = {"beta": 0.75, "reset_mechanism": "zero", "init_hidden": True}
    own = {"linear_features": HIDDEN} if all_to_all else {"all_to_all": False, "V": torch.linspace(-2, 2, HIDDEN)}
    own |= {"alpha": 0.5} if kind == "RSynaptic" else {"reset_delay": False}
    output = snntorch.Leaky(threshold=torch.full((CLASSES,), 0.3), **{**options, "beta": torch.full((CLASSES,), 0.75)})
    hidden = getattr(snntorch, kind)(**options, **own)
    theirs = nn.Sequential(nn.Linear(INPUTS, HIDDEN), hidden, nn.Linear(HIDDEN, CLASSES), output)
    ours = from_nir(export_to_nir(theirs, torch.rand(INPUTS)), T=STEPS)
    if all_to_all:
        assert torch.equal(ours.rec1.dense_weight(), hidden.recurrent.weight)
        assert torch.equal(ours.fc1.bias, theirs[0].bias + hidden.recurrent.bias)
    else:
        assert torch.equal(ours.rec1.dense_weight(), hidden.V.diag())
    for layer in (hidden, output):
        layer.reset_mem()
    with torch.no_grad():
        spikes = torch.stack([theirs(x_t) for x_t in SAMPLES.float()])
    assert torch.equal(output_spikes(ours), spikes)
