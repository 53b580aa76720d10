"""What holds for every test: poisoned memory, the same examples from hypothesis, one thread, nothing left behind.
``conftest.py`` loads this in each process that runs tests."""

import functools
import gc
import importlib
import importlib.util
import multiprocessing.util
import os
import signal
import tempfile

import pytest
import torch
from hypothesis import settings

# A shell starts background jobs with SIGINT ignored, and so would be the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU, Triton kernels run in its interpreter (test_triton_*.py); that has to be said before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        import triton_interpreter

        triton_interpreter.accept_any_numpy()
        triton_interpreter.quicken()

# Machine code that the compiler keeps lies in a folder that is removed when this process ends.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(multiprocessing.util.get_temp_dir(), "inductor"))
# The compiler, which optimizers import, notes which functions are PyTorch's own: before any is poisoned.
importlib.import_module("torch._dynamo.trace_rules")

# No deadline: nothing here is a timing assertion, and the first example of a test pays for imports.
settings.register_profile("g2g", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("g2g")

# The tensors here are small: sharing them among threads costs far more than it gains where other work runs beside the
# tests. Tests of several threads raise the number for themselves.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for programs that tests start


@pytest.fixture(autouse=True, scope="session")
def _collected_garbage_is_that_of_tests():
    """Modules and tests, millions of objects, are not looked through again and again: a twentieth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _no_file_waits_for_the_disk():
    """No test cuts the power: what is written is read from memory, and a run of a second writes thirty times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _temporary_files_go_when_the_tests_have_passed(tmp_path_factory):
    """Locks, caches and logs of what tests start, too (``torchrun`` leaves a folder in the temporary directory)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        patch.setenv("TMPDIR", tempfile.tempdir)
        yield


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
    """Outputs start as NaN: an element that a kernel forgets to write cannot pass for a zero. A test that counts or
    lists operators asks for ``plain_memory`` instead, since each poisoning is one more; so does one that compiles,
    since PyTorch 2.4 cannot trace into it."""
    if "plain_memory" not in request.fixturenames:
        monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def _one_thread():
    """However many the test before took."""
    torch.set_num_threads(1)


@pytest.fixture
def plain_memory():
    """Asks for ``torch.empty`` as PyTorch has it."""
