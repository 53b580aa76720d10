"""Padding of packed weights is nobody's business: not of scores, of files, or of who loads them."""

import pytest
import torch
from helpers import seeded
from networks import small_net

from g2gnet import DSTScheduler
from g2gnet.base.tensor_files import read_tensors, write_tensors

X = torch.rand(6, 30, generator=seeded(0)) * 3


def network(fill=None):
    net = small_net(block_size=3)
    assert all(connection.mask.has_padding for connection, _ in net.layers())
    for connection, _ in net.layers() if fill is not None else ():
        connection.values.data.masked_fill_(~connection.mask.valid(), fill)
    return net


@pytest.mark.parametrize("fill", [5.0, torch.nan])
def test_it_is_zero_in_what_is_saved_and_loading_takes_anything(fill, tmp_path):
    clean, net = network(), network(fill)
    padded = {name: tensor.clone() for name, tensor in net.named_parameters()}
    file = tmp_path / "net.pth"
    write_tensors(file, net.state_dict())
    torch.testing.assert_close(read_tensors(file), dict(clean.state_dict()), rtol=0, atol=0)
    again = small_net(seed=1, block_size=3)
    again.load_state_dict({**clean.state_dict(), **padded})
    assert torch.equal(again(X), clean(X))
    assert torch.equal(again.state_dict()["fc2.values"], clean.state_dict()["fc2.values"])


@pytest.mark.parametrize("fill", [1e3, torch.nan])
def test_it_counts_in_no_score(fill):
    results = []
    for net in (network(), network(fill)):
        optimizer = torch.optim.Adam(net.parameters())
        dst = DSTScheduler(net, optimizer, interval=1, grow="gradient")
        net(X).square().sum().backward()
        optimizer.step()
        dst.step()
        assert dst.pruned > 0
        results.append(net.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)
