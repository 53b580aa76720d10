"""Training steps as CUDA graphs, as far as they can be tested without a GPU: refusal, purity, and what is replayed."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SMALL, VARIANTS

import train
from g2gnet import G2GNet
from g2gnet.data import load_dataset
from g2gnet.training import Machine, Trainer, TrainSettings
from g2gnet.training.cuda_graph import CapturedStep

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@no_cuda
def test_without_a_cuda_device_it_is_refused_before_anything_is_done(tmp_path, capsys):
    arguments = ["--dataset", "fashionmnist-mini", "--cuda_graph", "--checkpoint_dir", str(tmp_path / "out")]
    assert train.main(arguments) == 2
    assert "--cuda_graph needs a CUDA device, not cpu; leave it out, or give --device cuda" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device; leave out --cuda_graph"):
        CapturedStep(lambda inputs, labels, constants: None)


# --- nothing in a step waits for the device -----------------------------------------------------------------------

#: operations whose result the CPU has to know before it can go on, or whose result's shape depends on numbers
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave.Tensor", "bincount", "_assert_async",
}  # fmt: skip


class NeverWaiting(TorchDispatchMode):
    """Raises for an operation for which the CPU would have to wait for an accelerator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        indices = args[1] if name.startswith(("index.", "index_put")) else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if by_mask or name in WAITING or name.split(".")[0] in WAITING:
            raise AssertionError(f"{name} would wait for the device")
        return function(*args, **(kwargs or {}))


def test_waiting_is_noticed():
    with NeverWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense would wait"):
        torch.ones(1).item()
    with NeverWaiting(), pytest.raises(AssertionError, match=r"index.Tensor would wait"):
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_and_no_update_of_the_masks_waits_for_the_device(variant):
    settings = TrainSettings(**{**SMALL, **VARIANTS[variant]})
    trainer = Trainer(settings, load_dataset(settings.dataset), Machine(torch.device("cpu"), "torch"))
    trainer.epoch = settings.epochs
    for number in range(2):
        with NeverWaiting():
            trainer._train_step(torch.arange(64 * number, 64 * number + 64))
    assert trainer.step == 2
    assert trainer.dst is None or trainer.dst.grown > 0


@pytest.mark.parametrize(("model", "block_size"), [("random", 16), ("mixer", 1), ("dense", 64)])
def test_no_launch_of_the_triton_stack_depends_on_numbers_on_the_device(model, block_size):
    """Tensors on the ``meta`` device have none: reading one is an error."""
    pytest.importorskip("triton", minversion="3.3")
    from benchmarks.launches import training_step

    net = G2GNet(40, 96, 10, model, block_size=block_size, T=4)
    assert training_step(net, 6, 40, torch.bfloat16)


# --- what is replayed ---------------------------------------------------------------------------------------------


class Graph:
    """Stands in for a CUDA graph: replaying does what was captured, on the same tensors."""

    captured: "list[Graph]" = []  # noqa: RUF012  (emptied by the fixture)
    capturing = False

    def capture(self, work):
        self.work, self.result = work, torch.full((), torch.nan)
        return self.result

    def replay(self):
        self.result.copy_(self.work())


@pytest.fixture
def stand_ins(monkeypatch):
    @contextlib.contextmanager
    def capture(graph):
        Graph.captured.append(graph)
        Graph.capturing = True
        yield
        Graph.capturing = False

    class Stream:
        def wait_stream(self, other):
            pass

    Graph.captured.clear()
    for name, stand_in in {
        "is_available": lambda: True,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_calls_after_the_first_replay_what_was_captured_on_the_new_batch(stand_ins):
    ran = []

    def step(inputs, labels, factor):
        def work():
            ran.append(factor)
            return factor * (inputs.sum() + labels.sum())

        return Graph.captured[-1].capture(work) if Graph.capturing else work()

    captured = CapturedStep(step)
    batches = [(torch.full((3,), float(k)), torch.tensor([k, k])) for k in range(8)]
    factors = [2, 2, 2, 2, 2, 3, 3, 3]
    graphs = []
    for number, ((inputs, labels), factor) in enumerate(zip(batches, factors, strict=True)):
        assert captured(inputs, labels, factor).item() == factor * 5 * number
        graphs.append(len(Graph.captured))
    assert ran == factors  # each batch once: capturing itself does nothing
    assert graphs == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [batch[0][0].item() for batch in batches] == list(range(8))  # the caller's tensors are left alone
