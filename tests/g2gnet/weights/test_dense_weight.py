"""The dense weight of a sparse layer, as code that was written for ``nn.Linear`` reads it, and tries to write it."""

import copy

import pytest
import torch
from helpers import saved_and_read, seeded
from torch import nn
from torch.nn import functional as F

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import G2GLinear, sparsify

X = torch.randn(5, 30, generator=seeded(1))


def layer():
    layouts = (GroupLayout(size, 4, "random", seeded(0)) for size in (24, 30))
    return G2GLinear(BlockMask.sample(*layouts, block_size=4, generator=seeded(0)), generator=seeded(2))


@pytest.mark.ci
def test_the_dense_product_with_the_weight_is_the_layers_own():
    sparse = layer()
    y = F.linear(X, sparse.weight, sparse.bias)
    torch.testing.assert_close(y, sparse(X))
    assert type(y) is torch.Tensor
    gradients = [torch.autograd.grad(each.square().sum(), [*sparse.parameters()]) for each in (y, sparse(X))]
    torch.testing.assert_close(*gradients)
    assert torch.equal(sparse.weight, sparse.dense_weight())
    assert "weight" not in sparse.state_dict()
    compiled = torch.compile(lambda x: F.linear(x, sparse.weight, sparse.bias), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), y)
    torch.testing.assert_close(torch.vmap(lambda x: F.linear(x, sparse.weight, sparse.bias))(X), y)


@pytest.mark.parametrize("no_grad", [False, True])
def test_an_encoder_in_evaluation_mode_runs_sparse(no_grad):
    """PyTorch's fast path reads the weights of the layers, and leaves them to themselves since they are no tensors."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0), 2)
    sparsify(encoder, block_size=2, generator=seeded(0))
    x = torch.randn(2, 5, 16, generator=seeded(1))
    called = []
    encoder.layers[0].linear1.register_forward_hook(lambda *_: called.append(1))
    expected = encoder(x)  # in training mode
    with torch.set_grad_enabled(not no_grad):
        torch.testing.assert_close(encoder.eval()(x), expected)
    assert len(called) == 2


WRITES = {
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(24, 30))),
    "tensor": lambda layer: setattr(layer, "weight", torch.zeros(24, 30)),
    "in place": lambda layer: layer.weight.mul_(2),
    "operator": lambda layer: exec("layer.weight *= 2"),
    "detached": lambda layer: layer.weight.detach().T.zero_(),
    "data itself": lambda layer: setattr(layer.weight, "data", torch.zeros(24, 30)),
    "nn.init": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "freezing": lambda layer: layer.weight.requires_grad_(False),
    "out": lambda layer: torch.zeros(24, 30, out=layer.weight.detach()),
}


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_writing_to_the_weight_is_refused_with_the_remedy(name):
    sparse, before = layer(), layer().state_dict()
    with pytest.raises((AttributeError, RuntimeError), match=r"of a sparse layer is computed from its packed values.*"):
        WRITES[name](sparse)
    torch.testing.assert_close(sparse.state_dict(), before, rtol=0, atol=0)
    # what it advises
    weight = torch.randn(24, 30, generator=seeded(3))
    sparse.values.data.copy_(sparse.mask.pack(weight))
    assert torch.equal(sparse.weight, weight * sparse.mask.to_dense())


def test_what_comes_of_the_weight_is_an_ordinary_tensor():
    sparse = layer()
    for tensor in (sparse.weight.clone(), sparse.weight + 0, copy.deepcopy(sparse.weight.detach())):
        assert type(tensor) is torch.Tensor
        tensor.detach().zero_()
    torch.zeros(24, 30).add_(sparse.weight.detach())
    loaded = saved_and_read({"weight": sparse.weight.detach()})["weight"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, sparse.weight)
