"""Training steps as CUDA graphs, as far as they can be tested without a GPU: refusal, purity, and what is replayed."""

import copy
import functools
import gc
import types
import weakref

import graph_stand_in
import numpy as np
import pytest
import torch
from graph_stand_in import Graph
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SMALL, VARIANTS, assert_equal

import g2gnet
import train
from g2gnet.data import load_dataset
from g2gnet.training import Machine, Trainer, TrainingError, TrainSettings
from g2gnet.training import trainer as trainer_module
from g2gnet.training.captured_step import CapturedStep


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_it_is_refused_before_anything_is_done(tmp_path, capsys):
    assert train.main(["--cuda_graph", "--checkpoint_dir", str(tmp_path / "out")]) == 2
    assert "--cuda_graph needs a CUDA device, not cpu; leave it out, or give --device cuda" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, not cpu; leave `cuda_graph` out"):
        CapturedStep(lambda inputs: None, torch.device("cpu"), (), required=True)


#: operations whose result the CPU has to know before it can go on, or whose result's shape depends on numbers
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave.Tensor", "bincount", "_assert_async",
}  # fmt: skip


class NeverWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        indices = args[1] if name.startswith(("index.", "index_put")) else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if by_mask or name in WAITING or name.split(".")[0] in WAITING:
            raise AssertionError(f"{name} would wait for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["rate, bf16", "permuted pixels, chunks", "regularised", "all schedules"])
def test_no_step_and_no_update_of_the_masks_waits_for_the_device(variant):
    settings = TrainSettings(**{**SMALL, **VARIANTS[variant]})
    trainer = Trainer(settings, load_dataset(settings.dataset), Machine(torch.device("cpu"), "torch"))
    trainer.epoch = settings.epochs
    for wait in (torch.Tensor.item, lambda one: one[one > 0]):
        with NeverWaiting(), pytest.raises(AssertionError, match="would wait for the device"):
            wait(torch.ones(1))
    for images in torch.arange(128).split(64):
        with NeverWaiting():
            trainer._train_step(images)
    assert trainer.step == 2
    assert trainer.dst is None or trainer.dst.grown > 0


CUDA = torch.device("cuda:1")


@pytest.fixture
def stand_ins(monkeypatch):
    graph_stand_in.install(monkeypatch)


def check(captured, step, *args, calls=6):
    """Every call gives what ``step`` gives."""
    for number in range(calls):
        assert torch.equal(captured(*args), step(*args)), number


def test_the_fourth_call_is_captured_and_replayed_on_new_arguments(stand_ins):
    total, runs, alive = torch.zeros(()), [], []

    def step(batch, *, factor):
        if len(runs) < CapturedStep.WARM_UP:
            graph_stand_in.wait()  # as for kernels that are compiled at first
        runs.append((Graph.capturing, torch.cuda.current_device()))
        (x, (y,)), extra = batch
        total.add_(x.sum())
        return (2 if factor is True else 3) * (x + y + extra.get("z", x)).sum()

    with torch.cuda.device(CUDA):
        captured = g2gnet.captured(step, "cuda", watch=())  # the device that is current
    for k in range(18):
        factor, name, times = [(1, "z", 24), (True, "z", 16), (True, "w", 12)][k // 6]  # another constant, another form
        x, y, z = (torch.full((2,), float(each)) for each in (k, k, 2 * k))
        assert captured([(x, [y]), {name: z}], factor=factor) == times * k
        assert [x[0], y[0], z[0]] == [k, k, 2 * k]  # the caller's tensors are left alone
        alive += map(weakref.ref, (x, y, z))
    assert runs == 3 * [(False, 1), (False, 1), (False, 1), (True, 1)]
    assert torch.cuda.current_device() == 0
    assert total == 2 * sum(range(18))  # each batch once: capturing itself does nothing
    del x, y, z
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_a_batch_of_another_size_runs_directly_and_the_graph_stays(stand_ins, caplog):
    captured = g2gnet.captured(lambda x: 2 * x.sum(), CUDA, watch=())
    for number in range(120):
        size = 4 if number % 3 else 2
        assert captured(torch.full((size,), float(number))) == 2 * size * number
    assert len(Graph.captured) == 1
    assert not caplog.messages  # though many calls are direct


def test_what_a_graph_cannot_read_or_watch_is_refused(stand_ins, monkeypatch):
    monkeypatch.setattr("g2gnet.training.captured_step._is_on", lambda tensor, device: tensor.requires_grad)
    for argument, message in (
        (np.zeros(2), "an argument of the step is a ndarray, and a graph reads copies of tensors on cuda:1"),
        (torch.zeros(2, requires_grad=True), "is a Tensor on cpu with requires_grad=True"),
        (torch.zeros(2), "is a Tensor on cpu with requires_grad=False.* move or detach it"),
    ):
        with pytest.raises(ValueError, match=message):
            g2gnet.captured(lambda x: x, CUDA, watch=())(argument)
    for watch in (nn.Sequential(), (nn.Identity(), torch.zeros(2)), None):
        with pytest.raises(TypeError, match=r"watch=(Sequential|tuple|NoneType) must be a tuple of all modules"):
            g2gnet.captured(lambda x: x, "cpu", watch)


ADAM = functools.partial(torch.optim.Adam, capturable=True, fused=True)


class Own:
    """A loop of one's own whose step is a method, of a network with dropout."""

    def __init__(self, device, optimizer=ADAM):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Tanh())
        self.net.register_buffer("scale", torch.full((6,), 2.0))
        self.net[2].bias.requires_grad_(False)
        self.optimizer = optimizer(self.net.parameters(), torch.tensor(0.1))
        self.step = g2gnet.captured(self.learn, device, watch=(self.net, self.optimizer))

    def learn(self, x, labels):
        loss = F.cross_entropy(self.net(x) * self.net.scale, labels)
        if torch.is_grad_enabled():
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train_alike(steps, change=lambda own: None, **options):
    """Steps with and without a graph give the same losses and weights, also after a change."""
    plain, graph = Own("cpu", **options), Own(CUDA, **options)
    for number in range(steps):
        x, labels, losses = torch.randn(5, 6), torch.randint(6, (5,)), []
        for own in (plain, graph):
            if number == 6:
                change(own)
            torch.manual_seed(number)  # dropout draws anew in replays
            losses.append(own.step(x, labels).item())
        assert losses[0] == losses[1], number
        assert all(map(torch.equal, plain.net.parameters(), graph.net.parameters())), number


def test_a_loop_of_ones_own_trains_as_without_a_graph(stand_ins):
    train_alike(10, lambda own: own.optimizer.param_groups[0]["lr"].fill_(0.05))
    assert len(Graph.captured) == 1  # also with another learning rate in the same tensor


CHANGES = {
    "rate": lambda own: own.optimizer.param_groups[0].update(lr=0.0),
    "betas": lambda own: own.optimizer.param_groups[0].update(betas=(0.5, 0.5)),
    "frozen": lambda own: (own.net[0].bias.requires_grad_(False), own.net[2].bias.requires_grad_(True)),
    "eval": lambda own: own.net.eval(),
    "attribute": lambda own: setattr(own.net[1], "p", 0.1),
    "type": lambda own: own.optimizer.param_groups[0].update(weight_decay=0.0),
    "moment": lambda own: own.optimizer.state[own.net[0].bias].update(exp_avg=torch.ones(6)),
    "address": lambda own: setattr(own.net[2].bias, "data", torch.zeros(6)),
    "shape": lambda own: setattr(own.net.scale, "data", own.net.scale.data[:1]),
    "strides": lambda own: setattr(own.net[2].weight, "data", own.net[2].weight.data.t()),
    "dtype": lambda own: setattr(own.net.scale, "data", own.net.scale.data.view(torch.int32)),
    "parameter at its address": lambda own: setattr(own.net[0], "bias", nn.Parameter(own.net[0].bias.detach())),
    "order": lambda own: own.net._modules.update({"0": own.net[2], "2": own.net[0]}),
    "module": lambda own: own.net.__setitem__(3, nn.Sigmoid()),
    "no_grad": lambda own: setattr(own, "step", torch.no_grad()(own.step)),
    "autocast": lambda own: setattr(own, "step", torch.autocast("cuda", torch.float16)(own.step)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_followed(stand_ins, change):
    train_alike(12, change)
    assert len(Graph.captured) == 2


def test_what_is_again_as_it_was_replays_the_graph_of_then(stand_ins):
    net, x = nn.Linear(4, 1), torch.rand(3, 4)
    captured = g2gnet.captured(net, CUDA, watch=(net,))
    check(captured, net, x)
    net.eval()
    captured(x)
    net.train()
    check(captured, net, x)
    assert len(Graph.captured) == 1


class Counting(torch.optim.Optimizer):
    """Counts its steps where a graph does not: in an attribute, or from ``first`` in the state."""

    def __init__(self, parameters, lr, first=None):
        super().__init__(parameters, {"lr": lr})
        self.first = first

    @torch.no_grad()
    def step(self):
        for parameter in (each for each in self.param_groups[0]["params"] if each.grad is not None):
            where = vars(self) if self.first is None else self.state[parameter]
            where["steps"] = where.get("steps", self.first or 0) + 1
            parameter -= 0.1 / where["steps"] * parameter.grad


OPTIMIZERS = {
    "attribute": Counting,
    "number": functools.partial(Counting, first=0),
    "new tensor": functools.partial(Counting, first=torch.ones(1)),
    "on the host": functools.partial(torch.optim.Adagrad, lr_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_whose_state_a_graph_cannot_change_trains_directly(stand_ins, monkeypatch, caplog, optimizer):
    monkeypatch.setattr("g2gnet.training.captured_step._is_on", lambda tensor, device: tensor.ndim > 0)
    train_alike(CapturedStep.PATIENCE + 4, optimizer=optimizer)
    assert not Graph.captured
    (line,) = caplog.messages
    assert line.startswith("training steps are seldom replayed as a CUDA graph, since what is compared changes")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("error:The .grad attribute of a Tensor:UserWarning")
def test_a_tensor_without_an_address_is_compared_by_how_often_it_was_written_to(stand_ins):
    net, x = nn.Linear(4, 1), torch.rand(3, 4)
    net.lazy, net.nested = nn.LazyLinear(2), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    net.register_buffer("adjacency", torch.eye(4).to_sparse().coalesce())
    net.state = net(x)  # whose gradient is not asked for
    captured = g2gnet.captured(net, CUDA, watch=(net,))  # the stand-in knows no sparse operations
    check(captured, net, x)
    replays = captured._replays
    assert replays
    net.adjacency.zero_()  # which gives it other values and indices
    captured(x)
    assert captured._replays == replays


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_what_is_not_compared_is_read_after_recapture(stand_ins, device):
    net, factor, x = nn.Linear(4, 1), [1.0], torch.rand(3, 4)
    net.items = [1.0]
    step = lambda x: net(x) * net.items[0] * factor[0]  # noqa: E731
    captured = g2gnet.captured(step, device, watch=(net,))
    captured.recapture()  # at any time
    check(captured, step, x)
    hook = functools.partial(net.register_forward_hook, lambda module, inputs, output: -output)
    for change in (lambda: factor.__setitem__(0, 2.0), lambda: net.items.__setitem__(0, 3.0), hook):
        change()
        assert torch.equal(captured(x), step(x)) == (device == "cpu")  # else it should be in the contract
        captured.recapture()
        check(captured, step, x)
    assert len(Graph.captured) == 4 * (device != "cpu")


@pytest.mark.parametrize(("accumulated", "set_to_none"), [(0, True), (3, False)])
def test_gradients_may_exist_when_a_step_begins(stand_ins, accumulated, set_to_none):
    """Those of ``accumulated`` steps, used by the loop; 0: of the last step, used by the next one."""

    def trained(device):
        torch.manual_seed(0)
        net, gradients = nn.Linear(6, 3), []
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.5)
        net(torch.ones(1, 6)).sum().backward()

        def update():
            optimizer.step()
            optimizer.zero_grad(set_to_none)

        def step(x):
            if not accumulated:
                update()
            net(x).square().sum().backward()

        captured = g2gnet.captured(step, device, watch=(optimizer,))
        for number in range(18):
            captured(torch.randn(5, 6))
            gradients.append(net.weight.grad.clone())
            if accumulated and number % accumulated == accumulated - 1:
                update()
        return [*net.parameters(), *gradients]

    assert all(map(torch.equal, trained("cpu"), trained(CUDA)))
    assert Graph.captured


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda x: x.mul_(1) + 1, "it changes an argument in place"),
        (lambda x: graph_stand_in.wait() or x + 1, "operation not permitted when stream is capturing"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_directly_and_the_reason_is_said(stand_ins, caplog, step, why):
    captured, stream = g2gnet.captured(step, CUDA, watch=()), torch.cuda.current_stream()
    check(captured, lambda x: x + 1, torch.zeros(2))
    assert torch.cuda.current_stream() is stream
    assert len(Graph.captured) == 1
    (line,) = caplog.messages
    assert line.startswith(f"training steps are not replayed as a CUDA graph, but run directly: {why}")
    with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: {why}"):
        check(CapturedStep(step, CUDA, (), required=True), lambda x: x + 1, torch.zeros(2))


def test_an_error_of_the_step_in_a_capture_is_the_users(stand_ins):
    net, x = nn.Linear(4, 1), torch.ones(3, 4)

    def step(x):
        net(x).sum().backward()
        if Graph.capturing:
            raise ValueError("mine")

    captured = g2gnet.captured(step, CUDA, watch=(net,))
    for _ in range(4):  # the first one without a gradient
        captured(x)
    gradient = net.weight.grad
    with pytest.raises(ValueError, match="mine"):
        captured(x)
    assert net.weight.grad is gradient
    assert torch.equal(gradient, torch.full((1, 4), 12.0))


def test_the_memory_of_a_graph_is_free_when_the_next_is_captured(stand_ins):
    net, alive, graphs = nn.Identity(), [], []
    net.register_buffer("scale", torch.ones(1))

    def step(x):
        if Graph.capturing:
            alive.append([graph() for graph in graphs])
        return x + 1

    captured = g2gnet.captured(step, CUDA, watch=(net,))
    for size in (2, 3):
        check(captured, step, torch.zeros(size))
        graphs.append(weakref.ref(Graph.captured.pop()))
    assert alive == [[], [None]]
    scale, net.scale = weakref.ref(net.scale), None
    assert scale() is not None  # another tensor at its address would be taken for it


@pytest.fixture
def trainer_of(stand_ins, monkeypatch):
    monkeypatch.setattr(trainer_module, "CapturedStep", lambda step, _, *others: CapturedStep(step, CUDA, *others))

    def make(cuda_graph=True, **changes):
        settings = TrainSettings(**{**SMALL, **changes})
        machine = Machine(torch.device("cpu"), "torch", cuda_graph=cuda_graph)
        return Trainer(settings, load_dataset(settings.dataset), machine)

    return make


@pytest.mark.parametrize(
    ("variant", "more", "graphs"),
    [
        ("regularised", {}, 3),  # a target for each epoch
        ("all schedules", {}, 1),
        ("pruned from a dense start", {"dst_interval": 6}, 3),  # two updates, each after a capture
    ],
)
def test_training_is_the_same_with_and_without_a_graph(trainer_of, variant, more, graphs):
    """Batches that are not full, masks that change, weights that become fewer, targets that change, dropout."""
    changes = {"batch_size": 32, **VARIANTS[variant], **more}
    graph, plain = trainer_of(**changes), trainer_of(cuda_graph=False, **changes)
    for _ in range(graph.settings.epochs):
        assert_equal(graph.train_epoch(), plain.train_epoch())
    assert len(Graph.captured) == graphs
    # a learning rate that falls is read from a float32 tensor
    rounding = 1e-6 if "lr_schedule" in changes else 0.0
    torch.testing.assert_close(dict(graph.net.state_dict()), dict(plain.net.state_dict()), rtol=rounding, atol=rounding)


def test_a_resumed_run_captures_the_loaded_state_and_replays_find_a_weight_that_is_not_finite(trainer_of):
    trainer, states = trainer_of(epochs=4), []
    for _ in range(3):
        trainer.train_epoch()
        states.append(copy.deepcopy(trainer.state_dict()))
    assert trainer._captured._replay
    trainer.load_state_dict(states[1])
    assert not trainer._captured._replay  # the trainer says that masks may be others
    trainer.train_epoch()
    assert_equal(dict(trainer.net.state_dict()), dict(states[2]["model"]))
    trainer.net.fc2.values.data.view(-1)[0] = torch.nan
    with pytest.raises(TrainingError, match=r"in step 13 .* became non-finite"):  # after a batch that is not full
        trainer.train_epoch()
    assert len(Graph.captured) == 2  # these were replays


def test_on_a_cuda_device_steps_are_captured_unless_said_otherwise():
    cpu, cuda, two = torch.device("cpu"), torch.device("cuda:0"), types.SimpleNamespace(size=2)
    machines = Machine(cuda), Machine(cpu), Machine(cuda, world=two), Machine(cuda, cuda_graph=False)
    assert [machine.captures for machine in machines] == [True, False, False, False]
    parse = train.build_parser().parse_args
    assert [parse(flags).cuda_graph for flags in ([], ["--cuda_graph"], ["--no_cuda_graph"])] == [None, True, False]
