"""What a network or a run does not take is named, with the reason and a remedy, before any work is done."""

import functools
import logging

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn
from training_runs import run

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, G2GLinear, G2GNet, SpikingStack
from g2gnet.data import DataError, as_samples, dataset_name, load_dataset
from g2gnet.encoding import SampleForm
from g2gnet.network_settings import NetworkSettings


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.uint8, {}), (torch.int64, {"standardize": True}), (torch.bool, {"enc": "rate"})]
)
def test_samples_that_are_not_floats_are_refused_with_what_makes_them_so(options, dtype):
    net = G2GNet(784, 32, 10, T=3, block_size=8, **options)
    images = load_dataset("fashionmnist-mini").test_images[:2]
    with pytest.raises(TypeError, match=rf"samples are {dtype}, not floats; g2gnet.data.as_samples"):
        net(images.reshape(2, -1).to(dtype))
    assert net(as_samples(images)).shape == (2, 10)
    for x, call in ((None, net), ([[0.5] * 784], net.encode), (np.zeros((2, 784), np.float32), net.simulate)):
        with pytest.raises(TypeError, match=rf"the input is a {type(x).__name__}, not a tensor"):
            call(x)


def net_of(**options):
    return G2GNet(**{"input_dim": 30, "hidden_dim": 40, "num_classes": 10, "block_size": 4, **options})


def layer(out=4, into=3, **options):
    return G2GLinear(BlockMask.full(GroupLayout(out, 1), GroupLayout(into, 1)), **options)


MATRIX = scipy.sparse.coo_matrix(np.eye(4))
OWN = functools.partial(net_of, T=4, sequence="own")


def predict(samples, shape=(3, 2, 5), kind="uint8"):
    """Of a network that was trained on other samples."""
    net = net_of()
    net.trained_on = SampleForm(shape, kind)
    return net.predict(samples)


BETA, WHOLE = torch.tensor([0.1, 0.2, 0.3]), "T=.* must be a whole number of"
WRONG_VALUES = [
    # of networks
    (lambda: net_of(model="ring"), "model='ring' is unknown; choose one of dense, conv, index, random, mixer"),
    (lambda: net_of(neuron="if"), "neuron='if' is unknown; choose one of lif, synaptic, adlif"),
    (lambda: net_of(enc="latency"), "enc='latency' is unknown; choose one of current, rate"),
    (lambda: net_of(p_inter=1.5), "p_inter=1.5 must be a number from 0 to 1"),
    *((lambda steps=steps: net_of(T=steps), WHOLE) for steps in (-1, 2.5, np.float64(2), True, "3", 10**26)),
    (lambda: net_of(init_gain=1e-310), "init_gain=1e-310 must be"),  # numbers that no kernel can hold
    (lambda: net_of(enc_scale=1e300), r"enc_scale=1e\+300 must be a finite number"),
    (lambda: net_of(beta=float("nan")), "beta=nan must be a number"),
    (lambda: net_of(num_groups=10**26), "num_groups=1000.* must be a whole number"),
    (lambda: net_of(block_size=10**26), "block_size=1000.* must be a whole number"),
    (lambda: net_of(hidden_dim=10**12), r"hidden_dim=1000.* must be a whole number from 1 to 2147483647"),
    (lambda: net_of(hidden_dim=[256, 0]), "hidden_dim=0 must be a whole number from 1 to"),
    (lambda: net_of(hidden_dim=[]), "is empty; give at least one number"),
    (lambda: net_of(hidden_dim=[16], feedback=True), "feedback joins a hidden layer to the one below it"),
    (lambda: net_of(recurrent=[3]), "there are 2 hidden layers"),
    (lambda: net_of(recurrent=[1, 1]), "names a layer twice"),
    (lambda: net_of(recurrent="no"), "recurrent='no' must be True or False"),
    (lambda: net_of(standardize=1), "standardize=1 must be True or False"),
    (lambda: net_of(per_neuron=None), "per_neuron=None must be True or False"),
    (lambda: net_of(learn_beta="no"), "learn_beta='no' must be True or False"),
    (lambda: net_of(learn_delay=True), "learn_delay=True has no effect with delay=0"),
    (lambda: NetworkSettings(p_rec_inter=0.1), "p_rec_inter=0.1 has no effect without recurrent; give `recurrent`, or"),
    (lambda: NetworkSettings(rec_gain=0.5), "rec_gain=0.5 has no effect without recurrent; give `recurrent`, or leave"),
    (lambda: NetworkSettings(recurrent=True, model="dense", p_rec_inter=0.1), "no effect with model=dense; give `mod"),
    (lambda: NetworkSettings(recurrent=True, density="erk", p_rec_inter=0.1), "no effect with density=erk; give `dens"),
    (lambda: setattr(net_of(), "T", 0), WHOLE),
    (lambda: setattr(net_of(T=4, sequence="rows"), "T", 3), "T=3 would change nothing: .* over 4 steps"),
    # of samples
    (lambda: net_of().predict(torch.rand(3, 20)), r"are \[3, 20\]; this network takes \[N, …\] with 30 values each$"),
    (lambda: net_of().predict(np.zeros((5, 6))), r"\[5, 6\]; .* 30 values each \(one sample is samples\[None\]\)"),
    (lambda: net_of().predict(torch.rand(0, 30)), r"samples are \[0, 30\]"),
    (lambda: net_of().predict(torch.tensor(1.0)), r"samples are \[\]"),
    (lambda: net_of().predict(torch.tensor([1, 1, 1, torch.nan, 1])[:, None].expand(5, 30), 2), "sample 3 is not fin"),
    (lambda: net_of().predict(torch.rand(5, 30), batch_size=0), "batch_size=0 must be a whole number of at least 1"),
    (lambda: net_of(T=27, sequence="rows").predict(torch.rand(2, 28, 30)), "810 values each, 30 at each of T=27 "),
    (lambda: predict(torch.zeros(4, 2, 5, 3).byte()), r"\[4, 2, 5, 3\]; the network was trained on \[N, 3, 2, 5\]"),
    (lambda: predict(torch.zeros(4, 5, 6), (30,), "floats"), r"\[4, 5, 6\]; the network was trained on \[N, 30\]"),
    *((lambda shape=shape: OWN().predict(torch.rand(shape)), r"takes \[N, 4, …\] with 30 values at each of 4 steps")
      for shape in ((7, 30, 4), (4, 7, 30), (7, 2, 60))),
    (lambda: OWN()(torch.rand(7, 4, 30)), r"is \[7, 4, 30\], of 7 steps if time is .* have 4; give batch_first=True"),
    (lambda: OWN().simulate(torch.rand(7, 4, 30)), r"or call predict\(samples\), which standardises"),
    # of stacks
    (lambda: SpikingStack([]), "layers is empty"),
    (lambda: SpikingStack([(layer(), LIF()), (layer(), LIF())]), "fc2 has 3 inputs, but fc1 has 4 outputs; .* of lif1"),
    (lambda: SpikingStack([(layer(), LIF(), layer(4, 5, bias=False))]), "rec1 has 5 inputs, but fc1 has 4 outputs"),
    (lambda: SpikingStack([(layer(), LIF(), layer(4, 4))]), "rec1 has a bias"),
    (lambda: G2GLinear.from_scipy(MATRIX.astype(complex)), "complex"),
    (lambda: G2GLinear.from_scipy(MATRIX, bias=torch.zeros(3)), r"bias has shape \[3\], the layer 4 outputs"),
    (lambda: G2GLinear.from_scipy(MATRIX, bias=[0.0, float("nan"), 0, 0]), "bias has numbers that are .* not finite"),
    (lambda: G2GLinear.from_scipy(MATRIX, bias=np.full(4, 1e39)), "or that a float32 does not hold"),
    (lambda: layer(bias=[0.0] * 4), r"bias=\[0.0.* must be True or False"),
    (lambda: SpikingStack([(layer(), LIF(5))]), r"lif1 has 5 numbers beta, but 4 neurons; give LIF\(4, …\)"),
    # of neurons
    (lambda: LIF(reset="soft"), "reset='soft' is unknown; choose one of subtract, zero, none"),
    (lambda: LIF(surrogate="soft"), "surrogate='soft' is unknown; choose one of atan"),
    (lambda: LIF(beta=BETA), r"beta is a tensor \[3\]; give one number, or give the number of neurons first"),
    (lambda: LIF(4, beta=BETA), r"beta is a tensor \[3\]; give \[4\]"),
    (lambda: LIF(2, beta=torch.tensor([0.5, float("nan")])), "beta=nan must be a number"),
    (lambda: LIF(tau=0.0, dt=1.0), "tau=0.0 must be a number above 0"),
    (lambda: LIF(tau=BETA, dt=1.0), r"tau is a tensor \[3\]; give one number"),
    (lambda: LIF(tau=20.0, dt=-1.0), "dt=-1.0 must be"),
]  # fmt: skip
WRONG_TYPES = [
    (lambda: net_of(syn_decay=0.5), "syn_decay: unknown to lif neurons, which have beta, threshold"),
    (lambda: net_of().predict([[0.5] * 30]), "samples are a list; give an array or a tensor"),
    (lambda: net_of().predict(np.zeros((3, 30), int)), "samples are int64; give uint8 images, floats, or counts of ev"),
    (lambda: net_of().predict(torch.zeros(3, 30).bool()), "samples are bool"),
    (
        lambda: predict(np.float32([range(30)])),
        r"uint8 \[3, 2, 5\]: give .*x.astype\(np.uint8\) of them, times 255 before",
    ),
    (lambda: predict(torch.ones(2, 30).short()), r"int16 from 1 to 1; .* from 0 to 255, by x.to\(torch.uint8"),
    (lambda: predict(torch.ones(2, 30).byte(), (30,), "floats"), "floats scaled as those, by .*float32"),
    (lambda: predict(np.ones((2, 30)), (3, 10), "counts"), r"float64 .* counts of events, by x.astype\(np.int16"),
    (lambda: as_samples(np.array([[print]])), "samples are object"),
    (lambda: net_of().predict(np.ma.masked_greater(np.ones((2, 30)), 0.5)), r"masked array; give .* x\.filled"),
    (lambda: net_of().predict(torch.ones(2, 30).to_sparse()), r"torch\.sparse_coo; give x\.to_dense\(\)"),
    (lambda: LIF(tau_syn=5.0, dt=1.0), "tau_syn: unknown to lif"),
    (lambda: G2GLinear.from_scipy(torch.ones(4, 4)), "Tensor"),
    (lambda: BlockMask.from_dense(MATRIX), r"mask is a coo_matrix, not a tensor; .* G2GLinear\.from_scipy"),
    (lambda: G2GLinear.from_linear(nn.Linear(4, 4), np.ones((4, 4))), "mask is a ndarray, not a tensor; give torch"),
    (lambda: LIF(tau=20.0), "needs dt"),
    (lambda: LIF(dt=1.0), "dt=1.0 is the step of tau, tau_syn, tau_adapt, refractory; give one of these, or no dt"),
    (lambda: LIF(tau=20.0, dt=1.0, beta=0.9), "the same parameter"),
    (lambda: G2GLinear(784, 10), r"mask is int; give a BlockMask .*G2GLinear.from_linear\(nn.Linear\(in_features"),
    (lambda: SpikingStack([(nn.Conv2d(1, 8, 3), LIF())]), "layer 1 is a Conv2d; give G2GConv2d.from_conv2d"),
    (lambda: SpikingStack(layer()), "layers is a G2GLinear; give a list of"),
    (lambda: SpikingStack((layer(), LIF())), "layer 1 is a G2GLinear; give"),
    (lambda: SpikingStack([(layer(), LIF(), nn.Linear(4, 4))]), "rec1 is Linear; give one G2GLinear"),
    (lambda: SpikingStack([(layer(), LIF(), layer(4, 4), layer(4, 4))]), "rec1 is G2GLinear and G2GLinear"),
]


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [*((ValueError, *each) for each in WRONG_VALUES), *((TypeError, *each) for each in WRONG_TYPES)],
)
def test_what_nothing_can_be_made_of_is_named(error, make, message):
    with pytest.raises(error, match=message):
        make()


def save(path, images):
    labels = np.arange(len(images)) % 3
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return dataset_name(str(path))


def test_images_in_float64_become_float32(tmp_path):
    images = np.linspace(0, 1, 24).reshape(6, 4)
    data = load_dataset(save(tmp_path / "own.npz", images))
    assert data.train_images.dtype == torch.float32
    np.testing.assert_array_equal(data.train_images, images.astype(np.float32))
    with pytest.raises(DataError, match=r"float16 \[6, 4\]; give uint8, float32 or float64: \[N, D\]"):
        load_dataset(save(tmp_path / "half.npz", images.astype(np.float16)))
    with pytest.raises(DataError, match=r"train_images\[0\] is the first of 6; replace NaN"):
        load_dataset(save(tmp_path / "large.npz", images * 1e300))


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (2.0, True)])
def test_inputs_that_are_no_spike_probabilities_are_told(tmp_path, caplog, scale, warned):
    with caplog.at_level(logging.WARNING, "g2gnet"):
        run(tmp_path, enc="rate", enc_scale=scale, epochs=1, T=2)
    images = as_samples(load_dataset("fashionmnist-mini").train_images[:200])
    share = 100 * (scale * images > 1).double().mean().item()
    assert (f"{share:.3g} % of the inputs are below 0 or above 1 and are clipped" in caplog.text) == warned
