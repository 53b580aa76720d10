"""Other people's models made sparse, and rewired in their own training loops."""

import pytest
import snntorch
import torch
from helpers import seeded
from networks import small_net
from torch import nn
from torch.nn.utils import prune

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, DSTScheduler, G2GLinear, SpikingStack, sparsify
from g2gnet.dst.scores import unit_correlation


def block_mask(out_size=24, in_size=30, seed=0):
    layouts = (GroupLayout(size, 4, "random", seeded(seed)) for size in (out_size, in_size))
    return BlockMask.sample(*layouts, block_size=3, generator=seeded(seed))


def linear(in_size=30, out_size=24, **options):
    torch.manual_seed(0)
    return nn.Linear(in_size, out_size, **options)


# --- one layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_from_a_linear_one_computes_the_masked_product(bias, dtype):
    dense, mask = linear(bias=bias, dtype=dtype), block_mask()
    layer = G2GLinear.from_linear(dense, mask)
    masked = dense.weight * mask.to_dense()
    assert torch.equal(layer.dense_weight(), masked)
    x = torch.randn(5, 30, generator=seeded(1), dtype=dtype)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, masked, dense.bias))
    assert layer.values.dtype == dtype
    assert layer.mask is not mask, "rewiring the layer must not rewire the caller's mask"


def test_a_dense_mask_is_taken_as_single_weights_and_no_mask_as_all():
    dense = linear()
    kept = torch.rand(24, 30, generator=seeded(1)) < 0.3
    layer = G2GLinear.from_linear(dense, kept)
    assert layer.mask.block_size == 1
    assert torch.equal(layer.dense_weight(), dense.weight * kept)
    full = G2GLinear.from_linear(dense)
    assert full.mask.is_full
    assert torch.equal(full.dense_weight(), dense.weight)


def test_the_mask_of_a_pruned_layer_is_found_and_later_training_too():
    dense = linear()
    kept = (torch.rand(24, 30, generator=seeded(1)) < 0.3).float()
    prune.custom_from_mask(dense, "weight", kept)
    with torch.no_grad():
        dense.weight_orig += 1  # as an optimizer step would; dense.weight follows at the next forward pass
    layer = G2GLinear.from_linear(dense)
    assert torch.equal(layer.mask.to_dense(), kept.bool())
    assert torch.equal(layer.dense_weight(), dense.weight_orig * kept)


def test_frozen_stays_frozen_and_random_numbers_are_not_used_up():
    dense = linear()
    dense.weight.requires_grad_(False)
    before = torch.get_rng_state()
    layer = G2GLinear.from_linear(dense.eval(), block_mask())
    assert torch.equal(torch.get_rng_state(), before)
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    assert not layer.training


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"mask describes \(24, 31\) weights, the linear layer has \(24, 30\)"):
        G2GLinear.from_linear(linear(), block_mask(24, 31))


# --- a whole model ------------------------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Sequential(nn.Linear(40, 40), nn.ReLU()), nn.Linear(40, 10))


def test_linear_layers_anywhere_are_replaced_and_their_weights_kept():
    model, before = classifier(), classifier()
    assert sparsify(model, 0.2, "mixer", block_size=4, generator=seeded(0)) is model
    layers = [model[0], model[2][0], model[3]]
    kinds = [layer.mask.rows.layout.kind for layer in layers]
    assert kinds == ["index", "interleaved", "index"]
    for layer, dense in zip(layers, (before[0], before[2][0], before[3]), strict=True):
        assert 0.2 < layer.mask.density < 0.45
        with torch.no_grad():
            dense.weight *= layer.mask.to_dense()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "ring"}, "pattern='ring' is unknown; choose one of index, random, mixer"),
        ({"p_inter": 2}, "p_inter=2 must be a number from 0 to 1"),
        ({"num_groups": 0}, "num_groups=0 must be a whole number of at least 1"),
        ({"skip": ["head"]}, "skip names head; the linear layers are 0, 2.0, 3"),
        ({"skip": ["0", "2.0", "3"]}, "model has no nn.Linear to replace"),
    ],
)
def test_what_cannot_be_made_sparse_is_named_and_the_model_stays(options, message):
    model = classifier()
    with pytest.raises(ValueError, match=message):
        sparsify(model, **options)
    assert not any(isinstance(module, G2GLinear) for module in model.modules())


# --- what somebody gave a layer -----------------------------------------------------------------------------------


def test_hooks_of_calls_go_on_and_their_handles_remove_them():
    model, seen = classifier(), []
    layer = model[0]
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append(("forward", module)) or output * 2),
        layer.register_forward_pre_hook(lambda module, *_: seen.append(("before", module)), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, *_: seen.append(("backward", module))),
    ]
    sparsify(model, block_size=4)
    x = torch.randn(3, 30, generator=seeded(1)).requires_grad_()
    y = model(x)
    y.sum().backward()
    assert seen == [("before", model[0]), ("forward", model[0]), ("backward", model[0])]
    for handle in handles:
        handle.remove()
    assert not torch.equal(model(x), y), "the hook doubled what the layer gave"
    assert len(seen) == 3


def tied(model):
    model.decoder = nn.Linear(30, 40)
    model.decoder.weight = model[0].weight


def embedded(model):
    model.embedding = nn.Embedding(40, 30)
    model[0].weight = model.embedding.weight


def on_layer_0(change):
    """What changes the first layer of a model."""
    return lambda model: change(model[0])


#: what is done to layer 0 of a classifier, and what is said of it
LEFT_ALONE = {
    "tied": (tied, "0 (shares weights with decoder); decoder (shares weights with 0)"),
    "embedded": (embedded, "0 (shares weights with embedding)"),
    "normalised": (on_layer_0(nn.utils.parametrizations.weight_norm), "0 (parametrized, as by weight_norm)"),
    "spectral": (on_layer_0(nn.utils.spectral_norm), "0 (with weight_orig, weight_u, weight_v of its own"),
    "pruned": (
        on_layer_0(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        "0 (with weight_orig, weight_mask of its own; G2GLinear.from_linear keeps a pruned mask)",
    ),
    "hooked": (on_layer_0(lambda layer: layer.weight.register_hook(torch.neg)), "0 (with hooks on its weights)"),
    "saved otherwise": (
        on_layer_0(lambda layer: layer.register_state_dict_pre_hook(lambda *_: None)),
        "0 (with hooks on its state_dict)",
    ),
    "called otherwise": (
        on_layer_0(lambda layer: setattr(layer, "forward", lambda x: x.new_ones(len(x), 40))),
        "0 (with a custom forward)",
    ),
    "of a class": (lambda model: model.__setitem__(0, type("Mine", (nn.Linear,), {})(30, 40)), "0 (of the class Mine)"),
}


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


def test_a_model_of_nothing_but_such_layers_is_refused_with_their_names():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"no nn.Linear to replace; these stay dense: 0 \(shares weights with 2\); 2"):
        sparsify(model)


# --- rewiring in anyone's loop ------------------------------------------------------------------------------------


def units_of(layer):
    return set(zip(layer.mask.unit_row.tolist(), layer.mask.unit_col.tolist(), strict=True))


class SpikingLoop(nn.Module):
    """A network as snnTorch's tutorials write it."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(30, 40)
        self.lif1 = snntorch.Leaky(beta=0.9)
        self.fc2 = nn.Linear(40, 10)
        self.lif2 = snntorch.Leaky(beta=0.9)

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

    before = [units_of(layer) for layer in dst.layers]
    x, labels = torch.rand(8, 30, generator=seeded(1)) * 3, torch.arange(8)
    updates = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates.append(dst.step())
    assert updates == [False, True, False, True]
    for layer, units in zip(dst.layers, before, strict=True):
        assert len(units_of(layer)) == len(units)
        assert units_of(layer) != units
    assert dst.pruned == dst.grown > 0
    assert not any(module._forward_hooks for module in model.modules()), "hooks stay only where they are needed"


def recorded_correlations(model, run, monkeypatch):
    """The samples that an update gets to see, from one step of ``run``."""
    seen = []

    def spy(pre, post, *rest):
        seen.append((pre.reshape(-1, pre.shape[-1]), post.reshape(-1, post.shape[-1])))
        return unit_correlation(pre, post, *rest)

    monkeypatch.setattr("g2gnet.dst.evidence.unit_correlation", spy)
    dst = DSTScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), interval=1)
    run()
    dst.step()
    return seen


def test_the_activity_of_a_spiking_loop_is_its_inputs_and_spikes_at_every_step(monkeypatch):
    model, x = sparsify(SpikingLoop(), block_size=4), torch.rand(8, 30, generator=seeded(1)) * 3
    spikes = {"lif1": [], "lif2": []}
    for name, train in spikes.items():
        model.get_submodule(name).register_forward_hook(lambda _, __, out, train=train: train.append(out[0].detach()))

    def run():
        model.eval()
        model(x * 2)  # an evaluation between the steps does not count
        model.train()
        for train in spikes.values():
            train.clear()
        model(x)

    (pre1, post1), (pre2, post2) = recorded_correlations(model, run, monkeypatch)
    hidden, output = (torch.cat(train) for train in spikes.values())
    assert all(map(torch.equal, (pre1, post1, pre2, post2), (x.repeat(5, 1), hidden, hidden, output)))
    assert hidden.any()


def test_the_activity_of_two_batches_before_one_step_is_joined(monkeypatch):
    model, x = stack(), torch.rand(8, 30, generator=seeded(1)) * 3
    activities = [model.simulate(x[:4]), model.simulate(x[4:])]

    def run():
        model(x[:4])
        model(x[4:])

    (pre1, post1), (pre2, _) = recorded_correlations(model, run, monkeypatch)
    assert torch.equal(pre1, torch.cat([x[:4].repeat(5, 1), x[4:].repeat(5, 1)]))
    hidden = torch.cat([activity.spikes[0].dense().flatten(0, 1) for activity in activities])
    assert all(torch.equal(found, hidden) for found in (post1, pre2))


def test_the_last_layer_of_a_classifier_has_its_own_output_as_activity(monkeypatch):
    model, x = sparsify(classifier(), block_size=4), torch.randn(6, 30, generator=seeded(1))
    with torch.no_grad():  # before the update that follows the recording
        hidden, logits = model[:2](x), model(x)
    (_, post1), _, (_, post3) = recorded_correlations(model, lambda: model(x), monkeypatch)
    assert torch.equal(post1, hidden)
    assert torch.equal(post3, logits)


def test_a_model_and_its_layers_are_rewired_alike():
    """Given the network or its layers with their activity, the scheduler does the same."""
    states = []
    for by_layers in (True, False):
        net = small_net(block_size=3, T=5)
        optimizer = torch.optim.Adam(net.parameters())
        dst = DSTScheduler([net.fc1, net.fc2, net.fc3] if by_layers else net, optimizer, interval=1, prune="hebb")
        x = torch.rand(6, 30, generator=seeded(1)) * 3
        for _ in range(2):
            activity = net.simulate(x)
            activity.counts.square().sum().backward()
            optimizer.step()
            dst.step(*((x, activity) if by_layers else ()))
        states.append(net.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
