"""G2GConv2d in place of nn.Conv2d, and with a mask: its weights, state, rewiring and averages."""

import copy
import pickle

import pytest
import torch
from helpers import compiles_whole, saved_and_read, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, DSTScheduler, G2GConv2d, G2GLinear, sparsify, tie_wiring
from g2gnet.dst.gradual_pruning import mean_density

SPIKES = (torch.rand(5, 12, 9, 8, generator=seeded(0)) < 0.2).float()


def mask_of(out: int = 20, into: int = 12, block_size: int = 3, p_inter: float = 0.4) -> BlockMask:
    """A mask whose units have padding."""
    layouts = (GroupLayout(size, min(4, size), "random", seeded(1)) for size in (out, into))
    return BlockMask.sample(*layouts, block_size=block_size, p_inter=p_inter, generator=seeded(2))


def layer_of(**options) -> G2GConv2d:
    return G2GConv2d(12, 20, (3, 2), padding=1, **{"mask": mask_of(), "generator": seeded(3), **options})


@pytest.mark.parametrize(
    "options",
    [
        {}, {"stride": (2, 1), "padding": (1, 2), "dilation": 2, "bias": False}, {"groups": 4}, {"padding": "same"},
        {"padding": "valid"}, {"kernel_size": 1},
    ],
)  # fmt: skip
def test_without_a_mask_it_is_nn_conv2d_in_values_state_and_gradients(options):
    options = {"kernel_size": 3, **options}
    torch.manual_seed(0)
    theirs, ours = nn.Conv2d(12, 20, **options), G2GConv2d(12, 20, **options)
    assert isinstance(ours, nn.Conv2d)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for each in (ours, G2GConv2d.from_conv2d(theirs)):
        assert list(each.state_dict()) == list(theirs.state_dict())
        for x in (SPIKES, SPIKES[0], torch.stack([SPIKES, SPIKES.flip(0)])):
            y = each(x)
            expected = theirs(x.flatten(0, -4)).unflatten(0, x.shape[:-3]) if x.dim() == 5 else theirs(x)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        found, wanted = (
            torch.autograd.grad(layer(SPIKES).square().sum(), [*layer.parameters()]) for layer in (each, theirs)
        )
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_mask_says_which_kernels_exist(groups):
    dense, mask = nn.Conv2d(12, 20, 3, padding=1, groups=groups).eval(), mask_of(20, 12 // groups)
    layer = G2GConv2d.from_conv2d(dense, mask)
    weight = (dense.weight * mask.to_dense()[:, :, None, None]).detach().double().requires_grad_()
    assert torch.equal(layer.weight.double(), weight)
    assert (type(layer.weight.clone()), layer.training) == (torch.Tensor, False)
    assert layer.values.shape == (mask.num_units, *mask.unit_shape, 3, 3)
    y, x = layer(SPIKES), SPIKES.double()
    expected = F.conv2d(x, weight, dense.bias.double(), padding=1, groups=groups)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.values.grad.double(), mask.pack(weight.grad), atol=1e-3, rtol=1e-5)
    with pytest.raises(AttributeError, match=r"G2GConv2d\.from_conv2d"):
        layer.weight = dense.weight
    dense_mask = G2GConv2d.from_conv2d(dense, mask.to_dense())
    torch.testing.assert_close(dense_mask(SPIKES), y, atol=1e-5, rtol=1e-5)


def test_initial_weights_are_uniform_within_the_bound_of_existing_weights():
    layer = G2GConv2d(64, 96, 3, mask=mask_of(96, 64, 4))
    fan_in = layer.mask.to_dense().sum(1) * 9
    bound = fan_in.double().clamp(min=1).rsqrt()[:, None, None, None]
    scaled = (layer.weight.detach() / bound)[layer.mask.to_dense()]
    assert 0.999 < scaled.abs().max() <= 1
    assert scaled.var() == pytest.approx(1 / 3, abs=0.02)
    empty = G2GConv2d(12, 20, 3, mask=mask_of().with_units(torch.zeros(0).long(), torch.zeros(0).long()))
    assert torch.equal(empty(SPIKES), empty.bias[None, :, None, None].expand(5, 20, 7, 6))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each)), saved_and_read])
def test_duplicates_and_states_of_other_units_are_equal_and_apart(duplicate):
    layer = layer_of()
    before = layer(SPIKES).detach()
    if duplicate is saved_and_read:
        other = layer_of(mask=mask_of(p_inter=0.2))
        other.load_state_dict(duplicate(layer.state_dict()))
    else:
        other = duplicate(layer)
    assert torch.equal(other(SPIKES), before)
    other.values.data.zero_()
    assert torch.equal(layer(SPIKES), before)
    assert (repr(other), type(other)) == (repr(layer), type(layer))


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_whole_kernels_are_pruned_and_grown_in_averages_too(grow):
    layer = layer_of()
    average = copy.deepcopy(layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer(SPIKES).square().sum().backward()
    optimizer.step()
    scheduler = DSTScheduler(layer, optimizer, interval=1, fraction=0.3, grow=grow, averages=[average])
    strength, before = layer.weight.detach().abs().sum((2, 3)), layer.mask.present()
    # the gradient of all kernels, by PyTorch
    weight = layer.dense_weight().detach().requires_grad_()
    kept = layer.dense_weight().detach()
    F.conv2d(SPIKES, weight, layer.bias.detach(), padding=1).square().sum().backward()
    optimizer.zero_grad()
    layer(SPIKES).square().sum().backward()  # the step that the scheduler observes
    assert scheduler.step()
    after = layer.mask.present()
    assert scheduler.pruned == scheduler.grown == (before & ~after).sum() > 0
    assert average.mask.equals(layer.mask)

    def of_units(kernels: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        rows, cols = layer.mask.rows, layer.mask.cols
        sums = torch.zeros(layer.mask.grid)
        sums.index_put_((rows.unit_of[:, None], cols.unit_of[None, :]), kernels, accumulate=True)
        return sums / (rows.lengths[:, None] * cols.lengths)

    sizes = of_units(strength, before)
    assert sizes[before & ~after].max() <= sizes[before & after].min()
    grown = layer.mask.unpack(torch.ones_like(layer.values))[..., 0, 0] > 0
    new = grown & (kept.abs().sum((2, 3)) == 0)
    assert not layer.weight[new].any()
    assert not optimizer.state[layer.values]["exp_avg"][(layer.values == 0).flatten(3).all(3)].any()
    if grow == "gradient":
        squares = of_units(weight.grad.square().mean((2, 3)), before)
        assert squares[~before & after].min() >= squares[~before & ~after].max()


def test_gradual_pruning_counts_the_weights_of_kernels():
    model = nn.Sequential(layer_of(), LIF(), nn.Flatten(), G2GLinear(mask_of(10, 20 * 9 * 9)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = DSTScheduler(
        model, optimizer, interval=1, fraction=0.1, grow="random", total_steps=3, final_density=0.2, schedule="cosine"
    )
    layers = [model[0], model[3]]
    possible = 20 * 12 * 6 + 10 * 20 * 9 * 9
    dense = sum(int((layer.weight != 0).sum()) for layer in layers)
    assert mean_density(layers) == pytest.approx(dense / possible)
    for _ in range(3):
        optimizer.zero_grad()
        model(SPIKES).sum().backward()
        optimizer.step()
        scheduler.step()
    largest = max(3 * 3 * 6, 3 * 3)
    assert 0 <= 0.2 * possible - mean_density(layers) * possible < largest


def test_what_a_convolution_cannot_have_is_refused():
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for call, message in (
        (
            lambda: G2GConv2d(12, 20, 3, mask=mask_of(21)),
            r"mask describes \(21, 12\) kernels, the layer has \(20, 12\)",
        ),
        (lambda: G2GConv2d(12, 20, 3, groups=5), "groups=5 must divide in_channels=12"),
        (lambda: G2GConv2d(12, 20, 2, padding="same"), "padding='same' of a kernel .* differs between both sides"),
        (lambda: G2GConv2d(12, 20, 3, padding="reflect"), "padding='reflect' is unknown"),
        (lambda: G2GConv2d(12, 20, 0), "kernel_size=0 must be"),
        (
            lambda: G2GConv2d.from_conv2d(nn.Conv2d(12, 20, 3, padding_mode="circular")),
            "padding_mode='circular' is not",
        ),
        (lambda: setattr(G2GConv2d(12, 20, 3), "padding_mode", "circular"), "padding_mode='circular' is not"),
        (lambda: layer(SPIKES.double()), "^x is torch.float64 and the weights are torch.float32; give x.to"),
        (lambda: layer(SPIKES[:, :5]), r"x has shape \[5, 5, 9, 8\]; give \[N, 12, H, W\]"),
        (lambda: DSTScheduler(layer, optimizer), "a correlation is of neurons, and layer 0 joins channels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        layer_of().load_state_dict({**layer.state_dict(), "values": layer.values[..., :1]})

    class Own(G2GConv2d):
        pass

    class Halved(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) / 2

    hooked = nn.Conv2d(12, 12, 3)
    hooked.register_forward_hook(lambda *arguments: None)
    for call, message in (
        (lambda: G2GConv2d.from_conv2d(nn.ConvTranspose2d(12, 12, 3)), "conv is ConvTranspose2d; give an nn.Conv2d"),
        (lambda: G2GConv2d.from_conv2d(Halved(12, 12, 3)), "the Halved has a forward of its own, which a"),
        (lambda: G2GConv2d.from_conv2d(hooked), "the Conv2d carries hooks, which a layer made of it would"),
        (lambda: G2GLinear.from_linear(layer), "linear is MaskedConv2d; give an nn.Linear"),
        (lambda: G2GConv2d(12, 20, 3, mask=torch.ones(20, 12)), "mask is Tensor; give a BlockMask"),
        (lambda: Own(12, 20, 3, mask=mask_of()), "Own has no masks; derive it from g2gnet.convolution.MaskedConv2d"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert Own(12, 20, 3, padding=1)(SPIKES).shape == (5, 20, 9, 8)


def test_conversions_keep_backend_memory_and_the_global_generator():
    conv = nn.Conv2d(12, 20, (3, 2)).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    layer = G2GConv2d.from_conv2d(conv, backend="torch")
    assert torch.equal(torch.rand(1), drawn)
    assert layer(SPIKES).is_contiguous(memory_format=torch.channels_last)
    assert G2GConv2d.from_conv2d(layer, mask_of()).backend == "torch"
    masked = layer_of()
    again = G2GConv2d.from_conv2d(masked)
    assert torch.equal(again.weight, masked.weight)
    assert again.mask.num_units == masked.mask.num_units
    one, other = (layer_of(mask=None, generator=seeded(7)) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    model = nn.Sequential(nn.Conv2d(12, 12, 1), layer_of())
    y = model(SPIKES)
    values = model[1].values.detach().clone()
    model.to(memory_format=torch.channels_last)  # PyTorch asks this of every tensor of five dimensions
    assert torch.equal(model[1].values, values)
    torch.testing.assert_close(model(SPIKES), y)
    assert model(SPIKES).is_contiguous(memory_format=torch.channels_last)


def test_sparsify_takes_convolutions_and_pruned_ones_keep_their_kernels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(12, 16, 3),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 8, 1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(72, 10),
    )
    before = model[0].weight.detach()
    x = SPIKES
    sparsify(model, 0.2, block_size=2, generator=seeded(0))
    assert [type(each).__name__ for each in model] == ["MaskedConv2d", "MaxPool2d", "Conv2d", "Flatten", "G2GLinear"]
    assert torch.equal(model[0].weight, before * model[0].mask.to_dense()[:, :, None, None])
    assert model(x).shape == (5, 10)
    again = sparsify(nn.Sequential(G2GConv2d(12, 16, 3)), 0.2, block_size=2)
    assert again[0].mask.density < 1
    uneven = sparsify(nn.Sequential(nn.Conv2d(12, 16, 3), nn.Conv2d(16, 8, 2, padding="same")), block_size=2)
    assert [type(each).__name__ for each in uneven] == ["MaskedConv2d", "Conv2d"]
    conv = prune.ln_structured(nn.Conv2d(12, 16, 3), "weight", 0.5, 2, dim=1)
    layer = G2GConv2d.from_conv2d(conv)
    assert layer.mask.density == 0.5
    torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)


def test_tied_averages_follow_a_load_of_other_slots():
    layer = layer_of()
    average = copy.deepcopy(layer)
    tie_wiring(layer, average)
    state = layer.state_dict()
    order = torch.randperm(layer.mask.num_units, generator=seeded(5))
    other = layer_of(mask=layer.mask.with_units(layer.mask.unit_row[order], layer.mask.unit_col[order]))
    other.values.data.copy_(state["values"][order])
    y = average(SPIKES).detach()
    layer.load_state_dict(other.state_dict())
    assert average.mask.equals(layer.mask)
    torch.testing.assert_close(average(SPIKES), y)


@pytest.mark.ci
@compiles_whole
@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_and_exports_whole(masked, plain_memory):
    layer = layer_of() if masked else G2GConv2d(12, 20, 3)
    expected = layer(SPIKES)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(SPIKES)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    program = torch.export.export(layer, (SPIKES,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(SPIKES[:3]), expected[:3])
