"""What holds for every test: fresh memory is poisoned, and hypothesis draws the same examples every time."""

import functools
import os

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in its interpreter (test_triton_*.py); that has to be said before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: nothing here is a timing assertion, and the first example of a test pays for imports.
settings.register_profile("g2g", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("g2g")

# The tensors here are small: sharing them among threads costs far more than it gains where other work runs beside the
# tests. test_*_with_several_threads raise the number for themselves.
torch.set_num_threads(1)


def _poisoned(allocate):
    """``allocate``, its result filled with NaN (floats) or the most negative value (integers, an index never valid)."""

    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def _poisoned_memory(request, monkeypatch):
    """Outputs start as NaN: an element that a kernel forgets to write cannot pass for a zero.

    A test that counts or lists operators asks for ``plain_memory`` instead, since each poisoning is one more; so does
    one that compiles, since PyTorch 2.4 cannot trace into it.
    """
    if "plain_memory" not in request.fixturenames:
        monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def plain_memory():
    """Asks for ``torch.empty`` as PyTorch has it."""
