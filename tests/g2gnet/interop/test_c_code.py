"""Networks as C, compiled with every warning an error and run under both sanitizers: in integers they have the
membranes of :func:`quantize` to the bit, in floats those of the network."""

import copy
import functools
import os
import random
import re
import shlex
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import seeded
from torch.optim.swa_utils import AveragedModel

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, AdLIF, DSTScheduler, G2GLinear, G2GNet, Projection, SpikingNetwork, SpikingStack, Synaptic
from g2gnet.interop import quantize, to_c
from g2gnet.interop.c_code import bytes_of
from g2gnet.interop.plain import plain
from g2gnet.interop.quantized import QuantizedNetwork, in_integers, steps_of
from g2gnet.weights.few_bits import in_bits, scale_of

COMPILER = shlex.split(os.environ.get("CC", "cc"))
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C compiler")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
#: who else compiles a share of the thousand networks, with which options, and who runs them
OTHERS = {
    "clang": (["clang"], SANITIZED, []),
    "qemu-arm": (["arm-linux-gnueabihf-gcc"], ["-O2", "-static"], ["qemu-arm"]),
}
#: writes the states after each step of each sample, and the answer after the last one and that of a run
PROGRAM = """
#include <stdio.h>
#include "network.h"
static g2g_state s;
static g2g_input x[G2G_SAMPLE];
int main(void) {
    g2g_value answer[G2G_OUTPUTS];
    while (fread(x, sizeof *x, G2G_SAMPLE, stdin) == G2G_SAMPLE) {
        g2g_reset(&s);
        for (int t = 0; t < G2G_STEPS; t++) {
            g2g_step(&s, G2G_SAMPLE == G2G_INPUTS ? x : x + t * G2G_INPUTS);
            fwrite(s.states, sizeof s.states, 1, stdout);
        }
        fwrite(s.answer, sizeof s.answer, 1, stdout);
        g2g_run(&s, x, answer);
        fwrite(answer, sizeof answer, 1, stdout);
    }
    return 0;
}
"""


def compiled(folder, *options, compiler=COMPILER):
    (folder / "main.c").write_text(PROGRAM)
    command = [*compiler, *STRICT, *options, "network.c", "main.c", "-o", "net"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def run_in_c(folder, of, inputs, by=()):
    """Membranes [B, T, all neurons] and answers [B, 2, C], after single steps and of a run, of a compiled network."""
    done = subprocess.run([*by, folder / "net"], input=inputs.tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    second = sum(each.size for each in of.populations if each.model != "lif")
    neurons, outputs = sum(each.size for each in of.populations), of.populations[of.output].size
    found = np.frombuffer(done.stdout, np.int32 if inputs.dtype == np.int16 else np.float32).reshape(len(inputs), -1)
    states = found[:, : of.steps * (neurons + second)].reshape(len(inputs), of.steps, -1)
    assert found.shape[1] == states[0].size + 2 * outputs
    return states[:, :, :neurons], found[:, states[0].size :].reshape(len(inputs), 2, outputs)


def drawn(seed):
    """A random network, whether its samples are held, and the generators that it was drawn from."""
    choose, generator = random.Random(seed), seeded(seed)
    count, inputs = choose.randint(1, 4), choose.randint(1, 40)
    sizes = [choose.choice([1, 2, 3, 5, 17, 30, 300]) for _ in range(count)]
    names = ["p", "p-1", 'größe"', "2"][:count]

    def connection(into, out):
        sides = [GroupLayout(size, choose.choice([1, min(2, into, out)])) for size in (out, into)]
        sides[1] = GroupLayout(into, sides[0].num_groups)
        block_size, p_intra = choose.choice([1, 2, 4, 8]), choose.choice([0.3, 1.0])
        mask = BlockMask.sample(*sides, block_size=block_size, p_intra=p_intra, p_inter=0.3, generator=generator)
        layer = G2GLinear(mask, bias=choose.random() < 0.6, generator=generator)
        with torch.no_grad():
            layer.values.mul_(choose.choice([1, 3]))
        return layer

    def neurons(size):
        reset, beta = choose.choice(["subtract", "zero", "none"]), choose.choice([0.0, 0.5, 0.9, 1.0])
        kind, own = choose.choice([LIF, Synaptic, AdLIF]), choose.choice([None, size])
        made = kind(own, reset=reset, beta=beta, threshold=choose.uniform(0.1, 1))
        for parameter in made.parameters():
            if parameter.numel() > 1:
                parameter.data.add_(torch.rand(size, generator=generator) * 0.1)
        return made

    readout = choose.choice(["counts", "counts", "last", "max", "mean"])
    edges = [(choose.choice([-1, *range(n)]) if n else -1, n, choose.choice([0, 0, 1, 3])) for n in range(count)]
    for _ in range(choose.randint(0, 3)):
        source, target = choose.randrange(-1, count - (readout != "counts")), choose.randrange(count)
        edges.append((source, target, choose.randint(int(source >= target), 4)))
    projections = []
    for source, target, delay in edges:
        into = inputs if source < 0 else sizes[source]
        if choose.random() < 0.3:
            delay = torch.randint(min(1, delay), delay + 1, (into,), generator=generator)
        ends = "input" if source < 0 else names[source], names[target]
        projections.append(Projection(*ends, connection(into, sizes[target]), delay))
    populations = {name: neurons(size) for name, size in zip(names, sizes, strict=True)}
    net = SpikingNetwork(populations, projections, names[-1], choose.randint(1, 15), readout=readout, backend="torch")
    return net.eval(), choose.random() < 0.5, choose, generator


def check(seed, folder, *options, compiler=COMPILER, by=()):
    """One random network in C. Returns whether a spike was there."""
    net, held, choose, generator = drawn(seed)
    bits, inputs = choose.choice([8, 4, None]), net.sizes[-1]
    of, scale = plain(net, held), 0.01
    samples = torch.randint(0, 256, (3, inputs if held else net.T * inputs), generator=generator)
    if choose.random() < 0.3:  # spikes
        samples = (samples > 200).long()
    quantized = QuantizedNetwork(in_integers(of, bits, scale)) if bits else None
    to_c(quantized or net, folder / "network.c", bits, held=held)
    compiled(folder, *options, compiler=compiler)
    if quantized is not None:
        expected = torch.stack([torch.cat(step.membranes, 1) for step in steps_of(quantized.integers, samples)], 1)
        membranes, answers = run_in_c(folder, of, samples.numpy().astype(np.int16), by)
        np.testing.assert_array_equal(membranes, expected.numpy())
        expected = quantized.of_integers(samples)[:, None].expand(-1, 2, -1)
        np.testing.assert_array_equal(answers, expected.numpy())
        return bool((answers != 0).any())
    x = samples.float() * scale
    membranes, answers = run_in_c(folder, of, x.numpy(), by)
    over_time = x if held else x.view(3, net.T, inputs).transpose(0, 1)
    with torch.no_grad():
        activity = net.double().simulate(over_time.double(), membranes=True)
    expected = torch.cat([activity.membranes[each.name] for each in of.populations], 2).transpose(0, 1).numpy()
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(membranes, expected, rtol=0, atol=1e-4 * scale)  # no spike is flipped by rounding here
    np.testing.assert_array_equal(answers[:, 0], answers[:, 1])
    np.testing.assert_allclose(answers[:, 1], activity.output.numpy(), rtol=1e-3, atol=1e-4 * scale)
    return bool((answers != 0).any())


@needs_compiler
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 26))])
def test_the_membranes_of_random_networks_are_those_of_pytorch(seed, tmp_path):
    check(seed, tmp_path, *(SANITIZED if seed >= 6 else ()))


@needs_compiler
@pytest.mark.long
def test_so_are_those_of_a_thousand_more(tmp_path):
    """By gcc, and every fifth by those of the others that are here; prints how many there were."""
    counts, active = Counter(), 0
    for seed in range(100, 1100):
        active += check(seed, tmp_path, *SANITIZED)
        counts["gcc"] += 1
        for name, (compiler, options, by) in OTHERS.items():
            if seed % 5 == 0 and all(shutil.which(each[0]) for each in (compiler, by or compiler)):
                check(seed, tmp_path, *options, compiler=compiler, by=by)
                counts[name] += 1
    print(f"{active} of {counts['gcc']} networks spike or answer; compiled and run: {dict(counts)}")
    assert active > 600


OPTIONS = {
    "standardized": {"standardize": True, "enc_scale": 0.7, "enc_bias": 0.2},
    "permuted": {"T": 8, "sequence": "permuted"},
    "taps": {"T": 8, "sequence": "own", "input_taps": 2},
    "delays": {"delay": 3, "learn_delay": True, "recurrent": True},
}


@needs_compiler
@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_samples_are_encoded_as_in_training(options, bits, tmp_path):
    taps, steps = options.get("input_taps", 1), options.get("T", 5)
    net = G2GNet(10 * taps, [16, 12], 4, block_size=2, **({"T": 5} | options), generator=seeded(1)).eval()
    if net.standardize:
        net.input_mean.fill_(0.3)
        net.input_deviation.fill_(0.4)
    if options.get("sequence") == "permuted":
        net.input_order.copy_(torch.randperm(80, generator=seeded(2)).view(8, 10))
    samples = torch.randint(0, 256, (4, 10 if "sequence" not in options else 10 * steps), generator=seeded(3))
    of = plain(net)
    if bits is None:
        to_c(net, tmp_path / "network.c", bits=None)
        compiled(tmp_path)
        _, answers = run_in_c(tmp_path, of, (samples.float() / 255).numpy())
        assert torch.equal(torch.from_numpy(answers[:, 1].copy()), net.predict(samples.float() / 255).logits)
        return
    quantized = quantize(net, calibration=samples.byte())
    to_c(quantized, tmp_path / "network.c")
    compiled(tmp_path)
    _, answers = run_in_c(tmp_path, of, samples.numpy().astype(np.int16))
    assert torch.equal(torch.from_numpy(answers[:, 1].copy()).long(), quantized(samples.byte()))
    assert (quantized(samples.byte()) - net.predict(samples.float() / 255).logits).abs().mean() < 0.5


def test_single_weights_take_a_byte_for_their_place_and_blocks_less(tmp_path):
    for block_size, bound in ((1, 2.1), (8, 1.3)):
        mask = BlockMask.sample(
            GroupLayout(256), GroupLayout(784), block_size=block_size, p_inter=0.1, generator=seeded(1)
        )
        net = SpikingStack([(G2GLinear(mask), LIF())], T=10)
        code, header = to_c(net, tmp_path / f"of_{block_size}.c", input_scale=1 / 255)
        weights = net.connections()["fc1"].mask.num_weights
        # of each source its first weight, of each neuron a bias
        assert bytes_of(code.read_text()) <= bound * weights + 4 * (784 + 256) + 20
        assert bytes_of(header.read_text()) <= 256 * (5 * 4 + 2) + 8
        lines = [line for line in code.read_text().splitlines() if not re.match(r"    -?\d", line)]
        assert len(lines) <= 250
        assert "#define G2G_INPUT_SCALE 3.921568627e-03f " in header.read_text()


@needs_compiler
def test_one_program_has_several_networks(tmp_path):
    for name in ("first", "Second"):
        to_c(G2GNet(6, [8], 3, block_size=2, T=2), tmp_path / f"{name}.c", input_scale=1, prefix=name)
    (tmp_path / "main.c").write_text(
        '#include "first.h"\n#include "Second.h"\nstatic first_state a;\nstatic Second_state b;\n'
        "int main(void) { first_reset(&a); Second_reset(&b); return FIRST_STEPS - SECOND_STEPS; }\n"
    )
    command = [*COMPILER, *STRICT, "first.c", "Second.c", "main.c", "-o", "both"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "both"], check=False).returncode == 0


def by_hand(weights, bits):
    """The scale and the whole numbers with the least squared error, among 15 scales, in float64."""
    largest = 2 ** (bits - 1) - 1
    weights = np.concatenate([each.flatten() for each in weights])
    scales = np.abs(weights).max() / largest * np.arange(6, 21) / 20
    whole = [np.clip(np.rint(weights / scale), -largest, largest) for scale in scales]
    best = int(np.argmin([((scale * each - weights) ** 2).sum() for scale, each in zip(scales, whole, strict=True)]))
    return scales[best], whole[best]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_network_trained_in_few_bits_has_the_weights_that_quantize_gives_it(bits):
    """Groups of 64 in blocks of three are padded, recurrent and feedback connections share the scale of fc."""
    options = {"block_size": 3, "T": 6, "recurrent": True, "feedback": True, "enc_scale": 3, "generator": seeded(1)}
    net = G2GNet(30, [64, 40], 4, **options, quantize=bits)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    scheduler = DSTScheduler(net, optimizer, interval=2, fraction=0.2, grow="gradient")
    images, labels = torch.rand(50, 30, generator=seeded(2)), torch.arange(50) % 4
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.grown > 0
    groups = [["fc1"], ["rec1", "fb1"], ["fc2", "rec2"], ["fc3"]]  # what the input sends; and others to each population
    twin = copy.deepcopy(net)
    twin.quantize = None
    integers = quantize(net, bits, input_scale=1).integers
    of_connection = {each.name: each for each in integers.plain.connections}
    for names in groups:
        layers = [net.connections()[name] for name in names]
        trained = [layer.mask.edges(layer.values.detach()).weight.astype(np.float64) for layer in layers]
        scale, whole = by_hand(trained, bits)
        found = [layer.mask.edges(layer.weights()[0]).weight for layer in layers]
        np.testing.assert_allclose(np.concatenate(found), whole * scale, rtol=1e-6, atol=0)
        for name, layer in zip(names, layers, strict=True):
            place = [each.name for each in integers.plain.connections].index(name)
            numbers = np.zeros(layer.mask.shape)
            numbers[of_connection[name].targets, of_connection[name].sources] = integers.weights[place]
            np.testing.assert_allclose(numbers * scale, layer.dense_weight().detach(), rtol=1e-6, atol=0)
            twin.connections()[name].values.data.copy_(layer.weights()[0].detach())
    # gradients are those of the rounded weights, but 0 where a weight is clipped
    for each in (net, twin):
        each.zero_grad()
        torch.nn.functional.cross_entropy(each(images), labels).backward()
    clipped = 0
    for name, layer in net.connections().items():
        weights = layer.weights()[0].detach()
        together = [each.values.detach() for each in (layer, *layer.scaled_with)]
        inside = (layer.values / scale_of(together, bits)).round().abs() < 2 ** (bits - 1)
        clipped += int((~inside).sum())
        expected = twin.connections()[name].values.grad * inside * layer.mask.valid()
        torch.testing.assert_close(layer.values.grad, expected, rtol=1e-4, atol=1e-7)
        assert torch.equal(in_bits(weights, scale_of([weights], bits), bits), weights) or len(together) > 1
    assert clipped > 0 or bits == 8
    # called modules and single steps compute with the same weights
    handle = net.fc2.register_forward_hook(lambda *_: None)
    assert torch.equal(net(images), twin(images))
    handle.remove()
    state, counts = None, torch.zeros(50, 4)
    for _ in range(net.T):
        spikes, state = net.step(net.encode(images), state)
        counts += spikes
    assert torch.equal(counts, twin(images))


@pytest.mark.long
def test_weights_of_few_bits_are_part_of_one_graph():
    net = G2GNet(30, [32, 16], 4, block_size=4, T=4, recurrent=True, quantize=4, enc_scale=3, generator=seeded(1))
    images = torch.rand(5, 30, generator=seeded(2))
    assert torch.equal(torch.compile(net, fullgraph=True)(images), net(images))
    assert torch.equal(torch.export.export(net.eval(), (images,)).module()(images), net(images))


def test_a_layer_that_is_given_after_the_bits_is_refused_until_they_are_set_again():
    net, other = (G2GNet(30, 16, 4, block_size=4, T=4, quantize=bits, generator=seeded(1)) for bits in (4, None))
    images = torch.rand(5, 30, generator=seeded(2))
    before = other.simulate(other.encode(images)).states[-1]
    net.fc2 = other.fc2
    with pytest.raises(ValueError, match="fc2 computes with bits=None, and the network with quantize=4"):
        net(images)
    net.quantize = 4
    assert len(net.fc2.weights()[0].unique()) <= 15
    with pytest.raises(ValueError, match="fc2 computes with bits=4, and the network with quantize=None"):
        other(images)
    net.quantize = None
    assert torch.equal(other.simulate(other.encode(images)).states[-1], before)
    with pytest.raises(ValueError, match=r"quantize=8\.0 is not one of 8, 4"):
        net.quantize = 8.0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.rand(2, 31), r"samples are \[2, 31\]; this network takes \[B, 30\]"),
        (torch.rand(2, 29), r"samples are \[2, 29\]"),
        (torch.full((2, 30), float("nan")), "a sample is not finite"),
    ],
)
def test_samples_that_a_network_in_integers_does_not_take_are_refused(samples, message):
    in_bits = quantize(G2GNet(30, 16, 4, block_size=4, T=4, generator=seeded(1)), input_scale=1 / 255)
    with pytest.raises(ValueError, match=message):
        in_bits(samples)
    with pytest.raises(ValueError, match="beyond ±255"):
        in_bits.of_integers(torch.full((2, 30), 256))


def test_no_dense_matrix_is_made_and_distant_targets_have_gaps_of_two_bytes(tmp_path, monkeypatch):
    for name in ("to_dense", "unpack"):
        monkeypatch.setattr(BlockMask, name, lambda *_: pytest.fail("a dense matrix"))
    size = 3000
    ends = np.arange(2 * size) % size
    edges = Projection.from_edges("a", "a", ends, (7 * ends + 3) % size, 0.5, 1, (size, size))
    first = Projection.from_edges("input", "a", np.arange(9), np.arange(9), 1.0, 0, (9, size))
    net = SpikingNetwork({"a": LIF()}, [*first, *edges], "a", T=3)
    code, _ = to_c(net, tmp_path / "network.c", input_scale=1)
    assert bytes_of(code.read_text()) < 10 * size  # of each neuron a bias, first weight, weight, and gap of two bytes
    assert quantize(net, input_scale=1)(torch.ones(1, 9)).sum() == net(torch.ones(1, 9)).sum()


@needs_compiler
@pytest.mark.parametrize("weight", [1e-6, 1e-9, 0.0])
def test_tiny_weights_of_the_input_add_little(weight, tmp_path):
    net = SpikingStack([(G2GLinear(BlockMask.full(GroupLayout(4, 1), GroupLayout(6, 1))), LIF(threshold=0.4))], T=5)
    net.fc1.values.data.fill_(weight)
    net.fc1.bias.data.fill_(0.25)
    quantized = quantize(net, input_scale=1)
    to_c(quantized, tmp_path / "network.c")
    compiled(tmp_path, *SANITIZED)
    samples = torch.full((1, 6), 255)
    _, answers = run_in_c(tmp_path, plain(net), samples.numpy().astype(np.int16))
    np.testing.assert_array_equal(answers[:, 1], quantized.of_integers(samples).numpy())
    np.testing.assert_array_equal(answers[:, 1], net(samples.float()).detach().numpy())


def hooked():
    net = small()
    net.connections()["fc1"].register_forward_hook(lambda *_: None)
    return net


def silenced():
    net = small()
    net.lif1.threshold.data.fill_(float("inf"))
    return net


def of_weights(value):
    net = small().double()
    net.connections()["fc2"].values.data.fill_(value)
    net.connections()["fc2"].bias.data.fill_(1)
    return net


def standardized(deviation):
    net = small(standardize=True)
    net.input_deviation.fill_(deviation)
    return net


small = functools.partial(G2GNet, 6, [8], 3, block_size=2, T=2)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: small(enc="rate"), {}, "enc='rate' draws spikes at random; train the network with enc='current'"),
        (hooked, {}, "what calls of modules run .fc1 carries hooks.; remove it, pruning by"),
        (silenced, {}, "lif1 has a number that is not finite"),
        (lambda: small(enc_bias=0.1, delay=2), {}, "fc1 delays an input that is standardised"),
        (lambda: torch.nn.Linear(2, 2), {}, "the network is a Linear; give a SpikingNetwork"),
        (lambda: AveragedModel(small()), {}, "the network is a AveragedModel; give its .module"),
        (
            lambda: small().bfloat16(),
            {},
            "fc1.values is torch.bfloat16, whose rounding no C file repeats; give",
        ),
        (small, {"calibration": torch.zeros(0, 6), "input_scale": None}, r"calibration is \[0, 6\], without a number"),
        (
            lambda: quantize(small(), input_scale=1),
            {"held": False},
            "held=False, but",
        ),
        (lambda: of_weights(1e39), {"bits": None}, "fc2 has a number that is not finite in float32"),
        (lambda: standardized(0.0), {}, "the standardisation of the input has a number that is not finite"),
        (lambda: of_weights(1e-30), {}, "lif2.threshold: a value is too large beside the thresholds"),
        (small, {"bits": 3}, "bits=3 is not one of 8, 4"),
        (small, {"input_scale": 0.0}, "input_scale=0.0 must be"),
        (small, {"input_scale": None}, "the largest input is unknown; give calibration=samples, or input_scale"),
        (small, {"prefix": "2g"}, "prefix='2g' cannot begin names in C"),
        (lambda: small(T=4, sequence="own"), {"held": True}, "samples of this network unfold over time"),
    ],
)
def test_what_cannot_be_written_is_named_and_no_file_begins(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_c(make(), tmp_path / "network.c", **({"input_scale": 1.0} | options))
    with pytest.raises(ValueError, match=r"give a name that ends with .c"):
        to_c(small(), tmp_path / "network.h", bits=None)
    with pytest.raises(ValueError, match=r"which C cannot include; give letters"):
        to_c(small(), tmp_path / 'größe".c', bits=None)
    assert not list(tmp_path.iterdir())
