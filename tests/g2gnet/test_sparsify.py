"""Other people's models made sparse, and rewired in their own training loops."""

import copy
import warnings

import pytest
import snntorch
import torch
from helpers import seeded
from networks import small_net
from torch import nn
from torch.nn.utils import prune

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, DSTScheduler, G2GConv2d, G2GLinear, SpikingStack, sparsify
from g2gnet.dst.rules import unit_correlation


def block_mask(out_size=24, in_size=30, seed=0):
    layouts = (GroupLayout(size, 4, "random", seeded(seed)) for size in (out_size, in_size))
    return BlockMask.sample(*layouts, block_size=3, generator=seeded(seed))


def linear(in_size=30, out_size=24, **options):
    torch.manual_seed(0)
    return nn.Linear(in_size, out_size, **options)


@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_a_layer_from_a_linear_one_computes_the_masked_product_and_becomes_one_again(bias, dtype):
    dense, mask = linear(bias=bias, dtype=dtype).eval(), block_mask()
    dense.weight.requires_grad_(False)
    draws = torch.get_rng_state()
    layer = G2GLinear.from_linear(dense, mask)
    masked, x = dense.weight * mask.to_dense(), torch.randn(5, 30, generator=seeded(1), dtype=dtype)
    assert torch.equal(layer.dense_weight(), masked)
    assert layer.values.dtype == dtype
    assert layer.mask is not mask, "a layer's mask is its own"
    again = layer.to_linear()
    assert type(again) is nn.Linear
    assert torch.equal(again.weight, masked)
    for each, weight in ((layer, layer.values), (again, again.weight)):
        torch.testing.assert_close(each(x), nn.functional.linear(x, masked, dense.bias))
        assert not weight.requires_grad
        assert each.bias.requires_grad if bias else each.bias is None
        assert not each.training
    assert torch.equal(torch.get_rng_state(), draws)
    for parameter in again.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, masked, dense.bias))


def test_the_mask_is_dense_or_that_of_a_pruned_layer_or_all():
    dense, kept = linear(), torch.rand(24, 30, generator=seeded(1)) < 0.3
    layer = G2GLinear.from_linear(dense, kept)
    assert layer.mask.block_size == 1
    assert torch.equal(layer.dense_weight(), dense.weight * kept)
    full = G2GLinear.from_linear(dense)
    assert full.mask.is_full
    assert torch.equal(full.dense_weight(), dense.weight)
    with pytest.raises(ValueError, match=r"mask describes \(24, 31\) weights, the linear layer has \(24, 30\)"):
        G2GLinear.from_linear(dense, block_mask(24, 31))
    prune.custom_from_mask(dense, "weight", kept)
    with torch.no_grad():
        dense.weight_orig += 1  # as an optimizer step would; dense.weight follows at the next forward pass
    layer = G2GLinear.from_linear(dense)
    assert torch.equal(layer.mask.to_dense(), kept)
    assert torch.equal(layer.dense_weight(), dense.weight_orig * kept)
    layer = G2GLinear.from_linear(dense, ~kept)
    assert not layer.dense_weight().any(), "a mask of one's own does not bring back what was pruned"
    prune.custom_from_mask(dense, "bias", kept[:, 0])
    with pytest.raises(ValueError, match="the bias of the Linear is pruned, and would train: a bias has no mask here"):
        G2GLinear.from_linear(dense)
    prune.remove(dense, "bias")
    assert torch.equal(G2GLinear.from_linear(dense).bias, dense.bias)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("dense", [nn.Linear(30, 24), nn.Conv2d(3, 4, 3)], ids=["linear", "convolution"])
def test_weights_are_those_of_the_next_forward_pass_or_refused(norm, dense):
    taken = G2GLinear.from_linear if isinstance(dense, nn.Linear) else G2GConv2d.from_conv2d
    x = torch.randn(2, 30) if isinstance(dense, nn.Linear) else torch.randn(2, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm, which PyTorch keeps for networks of before
        hooked = getattr(nn.utils, norm)(copy.deepcopy(dense))
    with pytest.raises(TypeError, match=r"weight of the (Linear|Conv2d) is no parameter.*Use torch.nn.utils.param"):
        taken(hooked)
    known = getattr(nn.utils.parametrizations, norm)(copy.deepcopy(dense)).eval()
    for parameter in known.parameters():
        parameter.data.mul_(2)
    with torch.no_grad():
        layer = taken(known)
    torch.testing.assert_close(layer(x), known(x))
    assert all(parameter.requires_grad for parameter in layer.parameters())


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Sequential(nn.Linear(40, 40), nn.ReLU()), nn.Linear(40, 10))


def test_linear_layers_anywhere_are_replaced_and_their_weights_kept():
    model, before = classifier(), classifier()
    assert sparsify(model, 0.2, "mixer", block_size=4, generator=seeded(0)) is model
    layers = [model[0], model[2][0], model[3]]
    assert [layer.mask.rows.layout.kind for layer in layers] == ["index", "interleaved", "index"]
    for layer, dense in zip(layers, (before[0], before[2][0], before[3]), strict=True):
        assert 0.2 < layer.mask.density < 0.45
        dense.weight.data *= layer.mask.to_dense()
    x = torch.randn(6, 30, generator=seeded(1))
    torch.testing.assert_close(model(x), before(x))


def test_skipped_and_foreign_layers_stay_and_shared_ones_stay_shared():
    model = classifier()
    model.add_module("again", model[0])
    model.add_module("attention", nn.MultiheadAttention(8, 2))
    sparsify(model, skip=["3"], num_groups=4)
    assert type(model[3]) is nn.Linear
    assert model.again is model[0]
    assert isinstance(model[0], G2GLinear)
    x = torch.randn(3, 2, 8)
    assert model.attention(x, x, x)[0].shape == (3, 2, 8)
    assert isinstance(sparsify(linear(), num_groups=4), G2GLinear)


def tied(model):
    model.decoder = nn.Linear(30, 40)
    model.decoder.weight = model[0].weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "ring"}, "pattern='ring' is unknown; choose one of index, random, mixer"),
        ({"p_inter": 2}, "p_inter=2 must be a number from 0 to 1"),
        ({"num_groups": 0}, "num_groups=0 must be a whole number of at least 1"),
        ({"skip": ["head"]}, "skip names head; the layers are 0, 2.0, 3"),
        ({"skip": ["0", "2.0", "3"]}, "model has no nn.Linear or nn.Conv2d to replace"),
        ({"skip": ["2.0", "3"], "prepare": tied},
         r"no nn.Linear or nn.Conv2d to replace; these stay dense: 0 \(shares weights with decoder\); decoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_sparse_is_named_and_the_model_stays(options, message):
    options, model = dict(options), classifier()
    options.pop("prepare", lambda model: None)(model)
    with pytest.raises(ValueError, match=message):
        sparsify(model, **options)
    assert not any(isinstance(module, G2GLinear) for module in model.modules())


def embedded(model):
    model.embedding = nn.Embedding(40, 30)
    model[0].weight = model.embedding.weight


#: what is done to layer 0 of a classifier, and what is said of it
LEFT_ALONE = {
    "tied": (tied, "0 (shares weights with decoder); decoder (shares weights with 0)"),
    "embedded": (embedded, "0 (shares weights with embedding)"),
    "normalised": (lambda model: nn.utils.parametrizations.weight_norm(model[0]), "0 (parametrized, as by weight_nor"),
    "spectral": (lambda model: nn.utils.spectral_norm(model[0]), "0 (with weight_orig, weight_u, weight_v of its own"),
    "pruned": (lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
               "0 (with weight_orig, weight_mask of its own; from_linear and from_conv2d keep a pruned mask)"),
    "hooked": (lambda model: model[0].weight.register_hook(torch.neg), "0 (with hooks on its weights)"),
    "saved otherwise": (lambda model: model[0].register_state_dict_pre_hook(print), "0 (with hooks; register"),
    "hooked calls": (lambda model: model[0].register_forward_hook(lambda *_: None), "0 (with hooks; register them aft"),
    "hooked backwards": (lambda model: model[0].register_full_backward_pre_hook(print), "0 (with hooks; register them"),
    "called otherwise": (lambda model: setattr(model[0], "forward", lambda x: x.new_ones(3, 40)),
                         "0 (with a custom forward)"),
    "of a class": (lambda model: model.__setitem__(0, type("Mine", (nn.Linear,), {})(30, 40)), "0 (of the class Mine)"),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "said"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_layers_that_would_lose_what_they_were_given_stay_and_are_named(prepare, said, caplog):
    model = classifier()
    prepare(model)
    model.eval()  # spectral normalisation changes what it has at every call in training mode
    state, x = model[0].state_dict(), torch.randn(3, 30, generator=seeded(1))
    expected = model[0](x)
    sparsify(model, block_size=4)
    assert f"these stay dense: {said}" in caplog.text
    assert all(torch.equal(tensor, state[key]) for key, tensor in model[0].state_dict().items())
    torch.testing.assert_close(model[0](x), expected)
    assert isinstance(model[2][0], G2GLinear)
    assert isinstance(model[3], G2GLinear)


# --- rewiring in anyone's loop ------------------------------------------------------------------------------------


class SpikingLoop(nn.Module):
    """A network as snnTorch's tutorials write it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(30, 40), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(40, 10), snntorch.Leaky(beta=0.9)

    def forward(self, x):
        mem1, mem2, spikes = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for _ in range(5):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
        return torch.stack(spikes).sum(0)


def stack():
    return SpikingStack([(G2GLinear(block_mask(40, 30)), LIF()), (G2GLinear(block_mask(10, 40)), LIF())], T=5)


MODELS = {
    "perceptron": lambda: sparsify(classifier(), block_size=4),
    "snnTorch loop": lambda: sparsify(SpikingLoop(), block_size=4),
    "stack": stack,
    "stack inside a model": lambda: nn.Sequential(nn.Linear(30, 30), nn.ReLU(), stack()),
}


@pytest.mark.parametrize("name", MODELS)
def test_three_lines_rewire_any_model_in_its_own_loop(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    dst = DSTScheduler(model, optimizer, interval=2, fraction=0.25)
    before = [set(layer.mask.flat_unit().tolist()) for layer in dst.layers]
    x, labels = torch.rand(8, 30, generator=seeded(1)) * 3, torch.arange(8)
    for due in (False, True, False, True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        assert dst.step() == due
    for layer, units in zip(dst.layers, before, strict=True):
        now = set(layer.mask.flat_unit().tolist())
        assert len(now) == len(units)
        assert now != units
    assert dst.pruned == dst.grown > 0
    assert not any(module._forward_hooks for module in model.modules()), "hooks stay only where they are needed"


def recorded_correlations(model, run, monkeypatch):
    """The samples that an update gets to see, from one step of ``run``."""
    seen = []

    def spy(pre, post, *rest):
        seen.append((pre.flatten(0, -2), post.flatten(0, -2)))
        return unit_correlation(pre, post, *rest)

    monkeypatch.setattr("g2gnet.dst.rules.unit_correlation", spy)
    dst = DSTScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), interval=1)
    run()
    dst.step()
    return seen


def test_the_activity_of_a_spiking_loop_is_its_inputs_and_spikes_at_every_step(monkeypatch):
    model, x = sparsify(SpikingLoop(), block_size=4), torch.rand(8, 30, generator=seeded(1)) * 3
    trains = [], []
    for cells, train in zip((model.lif1, model.lif2), trains, strict=True):
        cells.register_forward_hook(lambda _, __, out, train=train: train.append(out[0].detach()))

    def run():
        model.eval()(x * 2)  # an evaluation between the steps does not count
        for train in trains:
            train.clear()
        model.train()(x)

    (pre1, post1), (pre2, post2) = recorded_correlations(model, run, monkeypatch)
    hidden, output = map(torch.cat, trains)
    assert all(map(torch.equal, (pre1, post1, pre2, post2), (x.repeat(5, 1), hidden, hidden, output)))
    assert hidden.any()


def test_the_activity_of_two_batches_before_one_step_is_joined(monkeypatch):
    model, parts = stack(), (torch.rand(8, 30, generator=seeded(1)) * 3).split(4)
    hidden = torch.cat([model.simulate(part).spikes[0].dense().flatten(0, 1) for part in parts])
    (pre1, post1), (pre2, _) = recorded_correlations(model, lambda: [*map(model, parts)], monkeypatch)
    assert torch.equal(pre1, torch.cat([part.repeat(5, 1) for part in parts]))
    assert all(torch.equal(found, hidden) for found in (post1, pre2))


def test_the_last_layer_of_a_classifier_has_its_own_output_as_activity(monkeypatch):
    model, x = sparsify(classifier(), block_size=4), torch.randn(6, 30, generator=seeded(1))
    with torch.no_grad():  # before the update that follows the recording
        hidden, logits = model[:2](x), model(x)
    (_, post1), _, (_, post3) = recorded_correlations(model, lambda: model(x), monkeypatch)
    assert torch.equal(post1, hidden)
    assert torch.equal(post3, logits)


@pytest.mark.parametrize(("prune_rule", "grow"), [("hebb", "hebb"), ("hebb", "gradient"), ("set", "hebb")])
def test_a_network_is_rewired_alike_however_its_activity_is_seen(prune_rule, grow):
    """By the network, by its layers and what they did, of spikes with gradients, or of modules that are called."""
    states = []
    for how in ("network", "layers", "spikes", "called"):
        net = small_net(block_size=3, T=5, backend="torch")
        layers = list(net.connections().values())
        if how == "called":
            net.fc2.register_forward_hook(lambda *_: None)
            net.fc1 = nn.Sequential(net.fc1)
        optimizer = torch.optim.Adam(net.parameters())
        rules = {"interval": 1, "prune": prune_rule, "grow": grow}
        dst = DSTScheduler(layers if how == "layers" else net, optimizer, **rules)
        x = torch.rand(6, 30, generator=seeded(1)) * 3
        for _ in range(2):
            activity = net.simulate(x, spikes=how == "spikes")
            activity.counts.square().sum().backward()
            optimizer.step()
            dst.step(*((x, activity) if how == "layers" else ()))
        assert dst.pruned > 0
        states.append({name.replace("fc1.0.", "fc1."): tensor for name, tensor in net.state_dict().items()})
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-3, atol=1e-3)
        assert all(torch.equal(state[name], states[0][name]) for name in state if name.endswith("wiring"))
