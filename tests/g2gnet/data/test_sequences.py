"""Samples that unfold over time: which value comes when, and how data of one's own say that they are sequences."""

import functools

import pytest
import torch
from helpers import seeded
from networks import small_net

from g2gnet.sequences import input_order, unfold

GREY, COLOUR = (6, 4), (3, 6, 4)


def images(*shape, count=5):
    return torch.rand(count, *shape, generator=seeded(0))


def sequences(given, sequence, values=1, seed=0):
    return unfold(given.flatten(1), input_order(sequence, given.shape[1:], values, seed))


network = functools.partial(small_net, sizes=(4, 20, 3), num_groups=2)


def test_a_step_receives_a_row():
    """Of every channel, or some rows; or pixels of all channels; of sequences of one's own, a step."""
    grey, colour, frames = images(*GREY), images(*COLOUR), images(7, 2, 3, 3)
    assert torch.equal(sequences(grey, "rows"), grey.transpose(0, 1))
    assert torch.equal(sequences(colour, "rows"), colour.permute(2, 0, 1, 3).flatten(2))
    assert torch.equal(sequences(grey, "rows", 3)[1], grey[:, 3:].flatten(1))
    assert torch.equal(sequences(frames, "own"), frames.transpose(0, 1).flatten(2))
    for values in (1, 4, 8):
        expected = colour.view(5, 3, 24 // values, values).permute(2, 0, 1, 3).flatten(2)
        assert torch.equal(sequences(colour, "pixels", values), expected)


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_the_permuted_pixels_are_all_pixels_in_an_order_of_its_seed(shape):
    given = images(*shape)
    pixels, permuted = sequences(given, "pixels"), sequences(given, "permuted", 1, 7)
    assert torch.equal(permuted, sequences(given, "permuted", 1, 7))
    assert not any(torch.equal(permuted, other) for other in (pixels, sequences(given, "permuted", 1, 8)))
    # the channels of a pixel stay together: there is one place in the image for each step
    places = [next(p for p in range(24) if torch.equal(step, pixels[p])) for step in permuted]
    assert sorted(places) == list(range(24))
    # in steps of four, it is the same order
    of_four = sequences(given, "permuted", 4, 7).view(6, 5, -1, 4)
    assert torch.equal(of_four, permuted.view(6, 4, 5, -1).permute(0, 2, 3, 1))


def test_what_has_no_such_steps_is_refused():
    for arguments, message in (
        (("rows", GREY, 4), "sequence_step=4 does not divide the 6 rows of an image; give a divisor of it"),
        (("pixels", COLOUR, 5), "sequence_step=5 does not divide the 24 pixels"),
        (("permuted", (24,)), r"sequence=permuted needs images .* but samples are \[24\]"),
        (("rows", (7, 2, 3, 3)), r"sequence=rows needs images .* but samples are \[7, 2, 3, 3\]"),
        (("own", (24,)), r"sequence=own needs sequences \[N, T, ...\], but samples are \[24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            input_order(*arguments)
    with pytest.raises(ValueError, match=r"\[5, 4\], not \[B, 24\]: 6 steps of 4 inputs each; .* \[6, B, input_dim\]"):
        network(sequence="rows")(torch.rand(5, 4))
    with pytest.raises(ValueError, match="input_dim=4 is no multiple of input_taps=3"):
        network(sequence="rows", input_taps=3)


def test_a_network_unfolds_samples_after_standardising_and_scaling_them():
    net = network(sequence="permuted", standardize=True, enc_scale=2.0, enc_bias=0.5)
    net.input_mean.fill_(0.25)
    net.input_deviation.fill_(0.5)
    order = input_order("permuted", GREY, 4, 3)
    net.input_order.copy_(order)
    given = images(24)
    expected = torch.stack([2 * (given[:, order[t]] - 0.25) / 0.5 + 0.5 for t in range(6)])
    assert torch.equal(net.encode(given), expected)
    assert torch.equal(net.encode(given, part=slice(1, 3)), expected[:, 1:3])
    assert net.encode(expected) is expected  # [T, B, D] is what fc1 receives
    assert torch.equal(net(given), net(expected))


def test_each_step_of_a_sequence_has_its_own_rates():
    net, given = network(sequence="rows", enc="rate"), torch.tensor([0.0, 1.0]).repeat_interleave(12).expand(5, 24)
    spikes = net.encode(given, seeded(1))
    assert torch.equal(spikes, torch.tensor([0.0, 1.0]).repeat_interleave(3)[:, None, None].expand(6, 5, 4))
    whole = net.encode(0.5 * given, seeded(1))
    assert 0 < whole[3:].mean() < 1
    assert torch.equal(net.encode(0.5 * given, seeded(1), slice(2, 4)), whole[:, 2:4])


@pytest.mark.parametrize("enc", ["current", "rate"])
def test_taps_are_the_inputs_of_earlier_steps(enc):
    """After scaling, and the same spikes; 0 before the first step."""
    net, tapped = (network(sequence="rows", enc=enc, enc_bias=0.5, input_taps=taps) for taps in (1, 2))
    assert (tapped.fc1.in_features, tapped.input_order.shape) == (4, (6, 2))
    given, net.input_order = images(12), tapped.input_order
    now = net.encode(given, seeded(1))
    expected = torch.cat([now, torch.cat([torch.zeros(3, 5, 2), now[:3]])], 2)
    assert torch.equal(tapped.encode(given, seeded(1)), expected)
    assert torch.equal(tapped.encode(given, seeded(1), slice(2, 4)), expected[:, 2:4])
    assert tapped.encode(expected) is expected


def test_the_order_is_saved_with_the_network_and_checked():
    net, other = network(sequence="permuted"), network(sequence="permuted")
    net.input_order.copy_(input_order("permuted", GREY, 4, 3))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(images(24)), other(images(24)))
    for value in (-1, 24, 5):
        order = net.input_order.clone().index_fill_(0, torch.tensor(0), value).long()  # as it was saved before
        with pytest.raises(RuntimeError, match="input_order does not have each value of a sample once"):
            other.load_state_dict({**net.state_dict(), "input_order": order})
