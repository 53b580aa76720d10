"""Training steps as CUDA graphs, as far as they can be tested without a GPU: refusal, purity, and what is replayed."""

import copy
import functools
import gc
import sys
import types
import warnings
import weakref

import graph_stand_in
import numpy as np
import pytest
import torch
from graph_stand_in import Graph
from helpers import seeded
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SMALL, TIMES, VARIANTS

import g2gnet
import train
from g2gnet import G2GNet
from g2gnet.cuda_graph import CapturedStep, _look
from g2gnet.data import load_dataset
from g2gnet.training import Machine, Trainer, TrainingError, TrainSettings
from g2gnet.training import trainer as trainer_module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_it_is_refused_before_anything_is_done(tmp_path, capsys):
    arguments = ["--dataset", "fashionmnist-mini", "--cuda_graph", "--checkpoint_dir", str(tmp_path / "out")]
    assert train.main(arguments) == 2
    assert "--cuda_graph needs a CUDA device, not cpu; leave it out, or give --device cuda" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, not cpu; leave `cuda_graph` out"):
        CapturedStep(lambda inputs: None, torch.device("cpu"), (), required=True)


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


#: an update that makes weights fewer needs their number, and the step is captured anew after it
SAME_SIZE = [name for name, changes in VARIANTS.items() if "final_density" not in changes]


@pytest.mark.parametrize("variant", SAME_SIZE)
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

CUDA = torch.device("cuda:1")


@pytest.fixture
def stand_ins(monkeypatch):
    graph_stand_in.install(monkeypatch)


def check(captured, step, x, calls=6):
    """Every call gives what ``step`` gives."""
    for number in range(calls):
        assert torch.equal(captured(x), step(x)), number


def test_calls_after_the_first_replay_what_was_captured_on_the_new_batch(stand_ins):
    total, direct, captures = torch.zeros(()), [], []

    def step(inputs, labels, factor):
        (captures if Graph.capturing else direct).append(factor)
        total.add_(inputs.sum())
        return factor * (inputs.sum() + labels.sum())

    captured = g2gnet.captured(step, CUDA, watch=())
    batches = [(torch.full((3,), float(k)), torch.tensor([k, k])) for k in range(12)]
    factors = 6 * [2] + 6 * [3]
    graphs = []
    for number, ((inputs, labels), factor) in enumerate(zip(batches, factors, strict=True)):
        assert captured(inputs, labels, factor).item() == factor * 5 * number
        graphs.append(len(Graph.captured))
    # with another constant everything is warmed up again before it is captured
    assert graphs == [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    assert (direct, captures) == ([2, 2, 2, 3, 3, 3], [2, 3])
    assert total == 3 * sum(range(12))  # each batch once: capturing itself does nothing
    assert [batch[0][0].item() for batch in batches] == list(range(12))  # the caller's tensors are left alone


def test_a_batch_of_another_size_runs_directly_and_the_graph_stays(stand_ins):
    calls = []

    def step(inputs):
        calls.append(Graph.capturing)
        return 2 * inputs.sum()

    captured = g2gnet.captured(step, CUDA, watch=())
    for number in range(14):
        size = 2 if number in (5, 7, 9, 11, 13) else 4
        assert captured(torch.full((size,), float(number))).item() == 2 * size * number
    assert calls == [False, False, False, True, False, False, False, False, False]


def test_everything_is_on_the_step_s_device_whatever_is_the_current_one(stand_ins):
    devices = []

    def step(inputs):
        devices.append(torch.cuda.current_device())
        return inputs + 1

    check(g2gnet.captured(step, CUDA, watch=()), lambda x: x + 1, torch.zeros(2))
    assert devices == [1] * (CapturedStep.WARM_UP + 1)
    assert [graph.stream.device for graph in Graph.captured] == [1]
    assert torch.cuda.current_device() == 0
    current = g2gnet.captured(step, "cuda", watch=())
    with torch.cuda.device(CUDA):
        current(torch.zeros(2))
    assert devices[-1] == 0  # the device that was current when the step was made


def test_arguments_may_be_named_and_nested_and_are_not_kept(stand_ins):
    def step(batch, *, scale):
        (x, (y,)), extra = batch
        return scale * (x.sum() + y.sum() + extra["z"].sum())

    captured, alive = g2gnet.captured(step, CUDA, watch=()), []
    for k in range(10):
        tensors = [torch.full((2,), float(k)) for _ in range(3)]
        batch = [(tensors[0], [tensors[1]]), {"z": tensors[2]}]
        assert captured(batch, scale=2).item() == 12 * k
        alive += map(weakref.ref, tensors)
        del tensors, batch
    gc.collect()
    assert len(Graph.captured) == 1
    assert not any(reference() is not None for reference in alive)


def test_constants_of_another_type_are_others_and_not_a_number_is_itself(stand_ins):
    captured = g2gnet.captured(lambda x, many: x + (2 if many is True else 3), CUDA, watch=())
    assert [captured(torch.zeros(()), many).item() for many in 5 * [1] + 5 * [True]] == 5 * [3.0] + 5 * [2.0]
    net = torch.nn.Identity()
    captured = g2gnet.captured(lambda x: x + (2 if net.many is True else 3), CUDA, watch=(net,))
    for net.many in 5 * [1] + 5 * [True]:
        assert captured(torch.zeros(())).item() == (2 if net.many is True else 3)
    captured = g2gnet.captured(lambda x, factor: factor * x, CUDA, watch=())
    assert all(captured(torch.ones(()), float("nan")).isnan() for _ in range(6))
    assert len(Graph.captured) == 5


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (np.zeros(2), TypeError, "of type ndarray, would be a constant of the CUDA graph"),
        (torch.zeros(2, requires_grad=True), ValueError, r"of shape \(2,\) is on cpu, with requires_grad=True"),
        (torch.zeros(2), ValueError, "arguments of the step are on cuda:1 .* of shape .* is on cpu, .* move"),
    ],
    ids=["array", "gradient", "device"],
)
def test_arguments_that_a_graph_cannot_take_are_refused(stand_ins, monkeypatch, argument, error, message):
    monkeypatch.setattr("g2gnet.cuda_graph._is_on", lambda tensor, device: tensor.requires_grad)
    with pytest.raises(error, match=message):
        g2gnet.captured(lambda x: x, CUDA, watch=())(argument)


@pytest.mark.parametrize("watch", [torch.nn.Sequential(), (torch.nn.Identity(), torch.zeros(2)), None])
def test_what_cannot_be_watched_is_refused(watch):
    with pytest.raises(TypeError, match=r"watch=(Sequential|Tensor|NoneType) is no tuple of modules and optimizers"):
        g2gnet.captured(lambda x: x, "cpu", watch)


# --- what is noticed ----------------------------------------------------------------------------------------------


ADAM = functools.partial(torch.optim.Adam, capturable=True, fused=True)


class Own:
    """A loop of one's own whose step is a method, of a network with dropout."""

    def __init__(self, device, lr=0.1, optimizer=ADAM):
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 6), torch.nn.Tanh()
        self.net = torch.nn.Sequential(*layers)
        self.net.register_buffer("scale", torch.ones(6))
        self.optimizer = optimizer(self.net.parameters(), lr)
        self.step = g2gnet.captured(self.learn, device, watch=(self.net, self.optimizer))

    def learn(self, x, labels):
        loss = F.cross_entropy(self.net(x) * self.net.scale, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train_alike(plain, graph, steps, before=lambda number, own: None):
    """Steps on the same batches give the same losses and weights."""
    for number in range(steps):
        x, labels, losses = torch.randn(5, 6), torch.randint(6, (5,)), []
        for own in (plain, graph):
            before(number, own)
            torch.manual_seed(number)  # dropout draws anew in replays
            losses.append(own.step(x, labels).item())
        assert losses[0] == losses[1]
        assert all(map(torch.equal, plain.net.parameters(), graph.net.parameters())), number


def test_a_loop_of_ones_own_trains_as_without_a_graph(stand_ins):
    train_alike(Own("cpu"), Own(CUDA), 10)
    assert len(Graph.captured) == 1


def exchanged(own):
    own.net[0].weight, own.net[2].weight = own.net[2].weight, own.net[0].weight


CHANGES = {
    "rate": lambda own: own.optimizer.param_groups[0].update(lr=0.0),
    "betas": lambda own: own.optimizer.param_groups[0].update(betas=(0.5, 0.5)),
    "frozen": lambda own: own.net[0].requires_grad_(False),
    "eval": lambda own: own.net.eval(),
    "attribute": lambda own: setattr(own.net[1], "p", 0.1),
    "loaded optimizer": lambda own: own.optimizer.load_state_dict(copy.deepcopy(own.optimizer.state_dict())),
    "moment": lambda own: own.optimizer.state[own.net[2].bias].update(exp_avg=torch.ones(6)),
    "data": lambda own: setattr(own.net[2].bias, "data", torch.zeros(6)),
    "strides": lambda own: setattr(own.net[2].weight, "data", own.net[2].weight.data.t()),
    "dtype": lambda own: setattr(own.net.scale, "data", own.net.scale.data.view(torch.int32)),
    "parameters exchanged": exchanged,
    "module": lambda own: own.net.__setitem__(3, torch.nn.Sigmoid()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_is_watched_is_followed(stand_ins, change):
    train_alike(Own("cpu"), Own(CUDA), 12, lambda number, own: change(own) if number == 6 else None)
    assert len(Graph.captured) == 2


def test_a_buffer_that_changes_its_place_is_noticed(stand_ins):
    net, x = torch.nn.Module(), torch.ones(2)
    net.register_buffer("factor", torch.tensor([2.0, 3.0]))
    net.register_buffer("summand", None)

    def step(x):
        return x * net.factor if net.summand is None else x + net.summand

    captured = g2gnet.captured(step, CUDA, watch=(net,))
    check(captured, step, x)
    net.summand, net.factor = net.factor, None
    check(captured, step, x)


def test_modes_of_pytorch_are_noticed(stand_ins):
    net = torch.nn.Linear(2, 1)
    captured, x = g2gnet.captured(lambda x: net(x), CUDA, watch=(net,)), torch.ones(3, 2)
    for _ in range(5):
        assert captured(x).requires_grad
    with torch.no_grad():
        assert not captured(x).requires_grad


class Counting(torch.optim.Optimizer):
    """Counts its steps where a graph does not: in an attribute, as Lookahead does, or in ``first`` in the state."""

    def __init__(self, parameters, lr, first=None):
        super().__init__(parameters, {"lr": lr})
        self.first = first

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            where = vars(self) if self.first is None else self.state[parameter]
            where["steps"] = where.get("steps", self.first or 0) + 1
            parameter -= 0.1 / where["steps"] * parameter.grad


@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (Counting, "'steps' changes"),
        (functools.partial(Counting, first=0), "'steps' changes"),
        (functools.partial(Counting, first=torch.ones(1)), "which tensors there are"),
        (functools.partial(torch.optim.Adagrad, lr_decay=0.1), "in those on the host changes"),
    ],
    ids=["attribute", "number", "new tensor", "Adagrad, on the host"],
)
def test_an_optimizer_whose_state_a_graph_cannot_change_trains_as_without_one(
    stand_ins, monkeypatch, caplog, optimizer, what
):
    monkeypatch.setattr("g2gnet.cuda_graph._is_on", lambda tensor, device: tensor.ndim > 0)
    train_alike(Own("cpu", 0.1, optimizer), Own(CUDA, 0.1, optimizer), CapturedStep.PATIENCE + 4)
    assert not Graph.captured
    (line,) = caplog.messages
    assert what in line
    assert "let the optimizer count on the device (capturable=True)" in line


def by_turns(net, x):
    net.phase = (net.phase + 1) % 2
    return x * net.phase


def swapping(net, x):
    with torch.no_grad():
        net.after.copy_(0.5 * net.before + 1)
    net.before, net.after = net.after, net.before
    return x * net.before


@pytest.mark.parametrize("step", [by_turns, swapping])
def test_what_a_step_itself_changes_of_what_is_watched_leaves_no_graph(stand_ins, step):
    def run(device):
        net = torch.nn.Module()
        net.phase = 0
        net.register_buffer("before", torch.zeros(1))
        net.register_buffer("after", torch.zeros(1))
        captured = g2gnet.captured(functools.partial(step, net), device, watch=(net,))
        return [captured(torch.full((3,), float(number))).sum().item() for number in range(30)]

    assert run("cpu") == run(CUDA)
    assert not Graph.captured


def test_what_the_loop_restores_before_the_next_step_does_no_harm(stand_ins, caplog):
    """As spikingjelly's ``reset_net`` after each step; the loop has batches of two sizes."""
    net = torch.nn.Linear(4, 1)

    def step(x):
        net.memory = net(x).detach()
        return net.memory

    captured, x = g2gnet.captured(step, CUDA, watch=(net,)), torch.ones(3, 4)
    for _ in range(12):
        for size in range(2):
            net.memory = 0.0
            assert torch.equal(captured(x[: 3 - size]), step(x[: 3 - size]))
    assert Graph.captured
    assert not caplog.messages


@pytest.mark.parametrize("make", [lambda: torch.eye(4).to_sparse().coalesce(), lambda: torch.ones(1)])
def test_a_buffer_that_is_sparse_or_on_the_host_is_noticed_when_it_is_written_to(stand_ins, monkeypatch, make):
    net = torch.nn.Linear(4, 1)
    net.register_buffer("kept", make())
    monkeypatch.setattr("g2gnet.cuda_graph._is_on", lambda tensor, device: tensor is not net.kept)

    calls = []

    def step(x):
        calls.append(x)
        return net(x) * (1 if net.kept.is_sparse else net.kept.item())

    captured, x = g2gnet.captured(step, CUDA, watch=(net,)), torch.rand(3, 4)
    for _ in range(6):
        captured(x)
    assert len(calls) == CapturedStep.WARM_UP + 1
    net.kept.zero_()
    assert torch.equal(captured(x), net(x) * net.kept.is_sparse)
    assert len(calls) == CapturedStep.WARM_UP + 2  # no replay, which would read a sparse tensor where it was


class Unreadable(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise OSError("the connection is closed")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_whatever_a_network_keeps_its_step_is_captured_unless_it_cannot_be_compared(stand_ins, caplog):
    net = torch.nn.Linear(4, 1)
    net.lazy, net.array, net.itself, net.nan = torch.nn.LazyLinear(2), np.ones(3), [], (float("nan"), np.float32("nan"))
    net.itself.append(net.itself)
    net.nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    net.csr, net.meta = torch.eye(4).to_sparse_csr(), torch.zeros(3, device="meta")
    captured, x = g2gnet.captured(net, CUDA, watch=(net,)), torch.rand(3, 4)
    check(captured, net, x)
    assert len(Graph.captured) == 1
    assert not caplog.messages
    graph = weakref.ref(Graph.captured.pop())
    net.unreadable = torch.ones(1).as_subclass(Unreadable)
    check(captured, net, x)
    (line,) = caplog.messages
    assert "what it watches cannot be compared (the connection is closed)" in line
    gc.collect()
    assert graph() is None  # its memory is free


@pytest.mark.parametrize("steps", [1, 4])
def test_what_changes_so_often_that_a_graph_does_not_pay_is_named(stand_ins, caplog, steps):
    net = torch.nn.Linear(2, 1)
    captured = g2gnet.captured(lambda x: net(x), CUDA, watch=(net,))
    for number in range(60):
        net.phase = number // steps
        captured(torch.rand(3, 2))
    (line,) = caplog.messages
    assert "since between them 'phase' changes" in line


def test_a_rate_that_changes_at_every_step_is_read_from_a_tensor(stand_ins):
    plain, tensor = Own("cpu", torch.tensor(0.1)), Own(CUDA, torch.tensor(0.1))
    for own in (plain, tensor):
        own.schedule = torch.optim.lr_scheduler.ExponentialLR(own.optimizer, 0.9)

    def before(number, own):
        own.optimizer._step_count = number  # as schedulers of older versions do
        if number:
            own.schedule.step()

    train_alike(plain, tensor, 14, before)
    assert len(Graph.captured) == 1


def test_a_comparison_takes_few_calls():
    """Python's, whose number is that of tensors; it takes some 80 microseconds of each step."""
    net = G2GNet(64, 64, 10, block_size=8, T=2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(4, 64)).sum().backward()
    optimizer.step()
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame) if event == "call" else None)
    try:
        _look((net, optimizer), torch.device("cpu"), None)
    finally:
        sys.setprofile(None)
    assert len(calls) < 200


# --- what is not noticed ------------------------------------------------------------------------------------------


def test_what_is_not_compared_is_read_after_recapture(stand_ins):
    net, factor = torch.nn.Linear(4, 1), [1.0]
    net.items = [1.0]

    def step(x):
        return net(x) * net.items[0] * factor[0]

    captured, x = g2gnet.captured(step, CUDA, watch=(net,)), torch.rand(3, 4)
    check(captured, step, x)
    changes = (
        lambda: factor.__setitem__(0, 2.0),
        lambda: net.items.__setitem__(0, 3.0),
        lambda: net.register_forward_hook(lambda module, inputs, output: -output),
    )
    for number, change in enumerate(changes, 2):
        change()
        assert not torch.equal(captured(x), step(x))  # else it should be in the contract
        captured.recapture()
        check(captured, step, x)
        assert len(Graph.captured) == number


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_recapture_may_be_called_on_any_device_and_at_any_time(stand_ins, device):
    captured, x = g2gnet.captured(lambda x: x + 1, device, watch=()), torch.zeros(2)
    check(captured, lambda x: x + 1, x, calls=2)
    captured.recapture()
    check(captured, lambda x: x + 1, x, CapturedStep.WARM_UP)
    assert not Graph.captured


@pytest.mark.parametrize(("other", "load"), [("random", False), ("random", True), ("index", True)])
def test_another_wiring_is_that_of_the_graph_after_recapture(stand_ins, other, load):
    """With contiguous groups operators do not read the permutation of neurons: the captured launches would not."""
    nets = [
        G2GNet(16, 16, 4, each, num_groups=4, block_size=4, T=3, p_inter=0.0, backend="torch", generator=seeded(number))
        for number, each in enumerate(("random", other))
    ]
    net, x = nets[0], 3 * torch.rand(5, 16, generator=seeded(3))
    captured = g2gnet.captured(lambda x: net(x), CUDA, watch=(net,))
    with torch.no_grad():
        check(captured, net, x)
        if load:
            net.load_state_dict(nets[1].state_dict())
        else:  # as DistributedDataParallel does
            for mine, theirs in zip(*([*each.parameters(), *each.buffers()] for each in nets), strict=True):
                mine.copy_(theirs)
        captured.recapture()
        check(captured, nets[1], x)
    assert len(Graph.captured) == 2


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("accumulated", [0, 1, 3])
def test_gradients_may_exist_when_a_step_begins(stand_ins, accumulated, set_to_none):
    """Those of ``accumulated`` steps, used by the loop; 0: of the last step, used by the next one."""

    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 3)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.5)
        net(torch.ones(1, 6)).sum().backward()

        def update():
            optimizer.step()
            optimizer.zero_grad(set_to_none)

        def step(x):
            if not accumulated:
                update()
            net(x).square().sum().backward()

        step, gradients = g2gnet.captured(step, device, watch=(net, optimizer)), []
        for number in range(18):
            step(torch.randn(5, 6))
            gradients.append(net.weight.grad.clone())
            if accumulated and number % accumulated == accumulated - 1:
                update()
        return [*net.parameters(), *gradients]

    assert all(map(torch.equal, trained("cpu"), trained(CUDA)))
    assert Graph.captured


def test_a_parameter_in_place_of_another_at_its_address_has_the_gradient(stand_ins):
    net = torch.nn.Linear(4, 1)

    def step(x):
        net.zero_grad(set_to_none=True)
        net(x).sum().backward()

    captured, x = g2gnet.captured(step, CUDA, watch=(net,)), torch.ones(3, 4)
    for _ in range(6):
        captured(x)
    net.weight = torch.nn.Parameter(net.weight.detach())
    net.weight.grad = torch.zeros(1, 4)  # as the other has one
    captured(x)
    assert torch.equal(net.weight.grad, torch.full((1, 4), 3.0))


# --- steps that cannot be captured --------------------------------------------------------------------------------


def forbidden(x):
    if Graph.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")
    return x + 1


def empty(x):
    if Graph.capturing:
        warnings.warn("The CUDA Graph is empty. This usually means …", stacklevel=1)
    return x + 1


def waiting(x):
    warnings.warn("of something else", stacklevel=1)
    graph_stand_in.wait()
    return x + 1


def changing(x):
    return x.add_(1).clone()


@pytest.mark.parametrize(
    ("step", "why", "captures"),
    [
        (forbidden, "operation not permitted when stream is capturing", 1),
        (empty, "The CUDA Graph is empty", 1),
        (waiting, r"it waits for the device in .*test_cuda_graph.py, line \d+", 0),  # PyTorch up to 2.11 may end there
        (changing, "it changes an argument in place", 1),
    ],
)
def test_a_step_that_cannot_be_captured_runs_directly_and_the_reason_is_said(stand_ins, caplog, step, why, captures):
    captured = g2gnet.captured(step, CUDA, watch=())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for number in range(8):
            x = torch.tensor(float(number))
            assert captured(x).item() == number + 1
            assert x == number + (step is changing)
    assert [str(each.message) for each in seen] == 7 * ["of something else"] * (step is waiting)
    assert len(Graph.captured) == captures
    (line,) = caplog.messages
    assert line.startswith("training steps are not replayed as a CUDA graph, but run directly: ")
    required = CapturedStep(step, CUDA, (), required=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: {why}"):
            [required(torch.zeros(())) for _ in range(6)]


def test_what_waits_at_the_first_call_alone_is_captured(stand_ins, caplog):
    """As kernels that are compiled then."""
    calls = []

    def step(x):
        if not calls:
            graph_stand_in.wait()
        calls.append(x)
        return x + 1

    check(g2gnet.captured(step, CUDA, watch=()), lambda x: x + 1, torch.zeros(2))
    assert len(Graph.captured) == 1
    assert not caplog.messages


def test_an_error_of_the_step_in_a_capture_is_the_users(stand_ins):
    net, calls = torch.nn.Linear(4, 1), []

    def step(x):
        net(x).sum().backward()
        calls.append(net.weight.grad)
        if len(calls) == 5:
            raise ValueError("mine")

    captured = g2gnet.captured(step, CUDA, watch=(net,))
    for _ in range(4):  # in the first there is no gradient yet
        captured(torch.ones(3, 4))
    kept, gradient = net.weight.grad, net.weight.grad.clone()
    with pytest.raises(ValueError, match="mine"):
        captured(torch.ones(3, 4))
    assert len(Graph.captured) == 1
    assert net.weight.grad is kept
    assert torch.equal(kept, gradient)


def test_the_memory_of_a_graph_is_given_to_the_next(stand_ins):
    net, alive = torch.nn.Linear(2, 1), []
    net.register_buffer("scale", torch.ones(1))
    captured = g2gnet.captured(lambda x: net(x).sum().backward(), CUDA, watch=(net,))
    for _ in range(6):
        captured(torch.rand(3, 2))
    weight, scale = weakref.ref(net.weight), weakref.ref(net.scale)
    net.scale = torch.ones(1)
    assert scale() is not None  # another tensor at its address would be taken for it
    net.weight = torch.nn.Parameter(torch.ones(1, 2))
    Graph.captured.clear()
    net.register_forward_pre_hook(lambda *_: alive.append(weight() is not None) if Graph.capturing else None)
    for _ in range(6):
        captured(torch.rand(3, 2))
    assert alive == [False]


# --- in the trainer -----------------------------------------------------------------------------------------------


@pytest.fixture
def trainer_of(stand_ins, monkeypatch):
    """Makes trainers whose steps are captured, on the CPU."""
    monkeypatch.setattr(trainer_module, "CapturedStep", lambda step, _, *others: CapturedStep(step, CUDA, *others))

    def make(backend="torch", cuda_graph=True, **changes):
        settings = TrainSettings(**{**SMALL, **changes})
        machine = Machine(torch.device("cpu"), backend, cuda_graph=cuda_graph)
        return Trainer(settings, load_dataset(settings.dataset), machine)

    return make


@pytest.mark.parametrize(
    ("variant", "more", "graphs"),
    [
        ("regularised", {}, 3),  # a target for each epoch
        ("dynamic", {}, 1),
        ("all schedules", {}, 1),
        ("pruned from a dense start", {"dst_interval": 6}, 3),  # two updates, each after a capture
    ],
)
def test_training_is_the_same_with_and_without_a_graph(trainer_of, variant, more, graphs):
    """Batches that are not full, masks that change, weights that become fewer, targets that change, dropout."""
    changes = {"batch_size": 32, **VARIANTS[variant], **more}
    graph, plain = trainer_of(**changes), trainer_of(cuda_graph=False, **changes)
    for _ in range(graph.settings.epochs):
        records = [trainer.train_epoch() for trainer in (graph, plain)]
        for record in records:
            for name in TIMES:
                del record[name]
        assert records[0] == records[1]
    assert len(Graph.captured) == graphs
    # a learning rate that falls is read from a float32 tensor
    rounding = 1e-6 if "lr_schedule" in changes else 0.0
    for name, value in plain.net.state_dict().items():
        torch.testing.assert_close(graph.net.state_dict()[name], value, rtol=rounding, atol=rounding)


def test_a_weight_that_is_not_finite_is_found_in_replays_after_a_batch_that_is_not_full(trainer_of):
    trainer = trainer_of()
    for _ in range(2):
        trainer.train_epoch()
    graphs = len(Graph.captured)
    assert graphs
    with torch.no_grad():
        trainer.net.fc2.values.view(-1)[0] = torch.nan
    with pytest.raises(TrainingError, match=r"in step 9 .* became non-finite"):
        trainer.train_epoch()
    assert len(Graph.captured) == graphs  # these were replays


def test_a_resumed_run_captures_the_loaded_state(trainer_of):
    through, first = trainer_of(), trainer_of()
    first.train_epoch()
    first.train_epoch()
    state = copy.deepcopy(first.state_dict())
    for _ in range(3):
        through.train_epoch()
    assert first._captured._graph
    first.load_state_dict(state)
    assert not first._captured._graph  # the trainer says that masks may be others
    first.train_epoch()
    assert all(map(torch.equal, through.net.state_dict().values(), first.net.state_dict().values()))


def test_whatever_is_captured_was_launched_before(trainer_of, monkeypatch):
    """A kernel that is first loaded while a graph is captured makes that fail."""
    pytest.importorskip("triton", minversion="3.3")
    from g2g_kernels.triton import runtime

    launched, captured = set(), set()
    launch = runtime.launch

    def noted(kernel, grid, **arguments):
        key = (
            kernel.fn.__name__,
            tuple(
                (name, getattr(value, "dtype", value))
                for name, value in arguments.items()
                if value is None or name.isupper() or isinstance(value, torch.Tensor)
            ),
        )
        (captured if Graph.capturing else launched).add(key)
        assert not Graph.capturing or key in launched, key
        launch(kernel, grid, **arguments)

    for operator in ("g2g_linear", "g2g_stack", "neurons"):
        monkeypatch.setattr(f"g2g_kernels.ops.{operator}.triton.launch", noted)
    size = {"batch_size": 4, "limit_train": 18, "limit_test": 4, "hidden_dim": 16, "T": 2, "num_groups": 2}
    trainer = trainer_of("triton", block_size=16, enforce_sparsity=True, warmup_epochs=1, **size)
    for _ in range(3):
        trainer.train_epoch()
    assert len(Graph.captured) >= 2  # a target for each epoch
    assert captured


def test_on_a_cuda_device_steps_are_captured_unless_said_otherwise():
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    world = types.SimpleNamespace(size=2)
    assert Machine(cuda).captures
    assert not Machine(cpu).captures
    assert not Machine(cuda, world=world).captures
    assert not Machine(cuda, cuda_graph=False).captures
    parse = train.build_parser().parse_args
    assert [parse(flags).cuda_graph for flags in ([], ["--cuda_graph"], ["--no_cuda_graph"])] == [None, True, False]
