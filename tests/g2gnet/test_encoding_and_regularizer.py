"""Input encodings and the firing-rate regulariser against their formulas."""

import pytest
import torch
from helpers import seeded

from g2gnet import G2GNet
from g2gnet.encoding import encode
from g2gnet.training.regularizer import rate_penalty, rate_target


def test_rate_draws_spikes_with_the_clamped_value_as_probability_anew_at_each_step():
    x = torch.tensor([[-0.5, 0.0, 0.1, 0.5, 0.9, 1.0, 1.5]])
    spikes = encode(x, "rate", steps=4000, generator=torch.Generator().manual_seed(0))
    assert spikes.shape == (4000, 1, 7)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    p = x.clamp(0, 1)[0]
    # five standard errors of a Bernoulli mean
    assert ((spikes.mean((0, 1)) - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all()
    assert not torch.equal(spikes[0], spikes[1]) or not torch.equal(spikes[1], spikes[2])


@pytest.mark.parametrize(
    ("part", "dtype"),
    [(slice(None), torch.float32), (slice(0, 2), torch.float64), (slice(2, 5), torch.float32)],
    ids=str,
)
def test_a_part_of_the_samples_is_drawn_as_in_the_whole_batch(part, dtype):
    """The spikes of a batch are those of one call for all numbers, whoever computes which samples of it."""
    x = torch.rand(5, 301, generator=seeded(1), dtype=dtype)
    draws = torch.rand((7, 5, 301), generator=seeded(2), dtype=dtype)
    spikes = encode(x, "rate", 7, 2.0, -0.3, seeded(2), part)
    assert spikes.dtype == dtype
    assert torch.equal(spikes, (draws < 2.0 * x - 0.3).to(dtype)[:, part])
    assert torch.equal(encode(x, "current", 7, 2.0, -0.3, None, part), (2.0 * x - 0.3)[part])
    net = G2GNet(301, 16, 8, enc="rate", T=7)
    assert torch.equal(net.encode(spikes.float(), None, slice(0, 1)), spikes[:, :1].float())


def test_the_schedule_waits_for_the_warm_up_and_ends_at_its_final_values():
    first, last_of_it, middle, last = (rate_target(epoch, 20, 10) for epoch in (1, 10, 15, 20))
    assert first == last_of_it == (0, 0.25)
    assert middle == pytest.approx((1e-4 + 0.5 * (1e-2 - 1e-4), 0.17))
    assert last == pytest.approx((1e-2, 0.09))


def test_the_penalty_sums_squares_over_layers_and_neurons_and_is_differentiable():
    rates = [torch.tensor([0.1, 0.3], requires_grad=True), torch.tensor([0.2], requires_grad=True)]
    penalty = rate_penalty(rates, *rate_target(20, 20, 10))
    assert penalty.item() == pytest.approx(1e-2 * (0.01**2 + 0.21**2 + 0.11**2))
    penalty.backward()
    torch.testing.assert_close(rates[0].grad, 2e-2 * (rates[0].detach() - 0.09))
