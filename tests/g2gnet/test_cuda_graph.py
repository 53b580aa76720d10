"""Training steps as CUDA graphs, as far as they can be tested without a GPU: refusal, purity, and what is replayed."""

import copy
import functools
import gc
import types
import warnings
import weakref

import graph_stand_in
import numpy as np
import pytest
import torch
from graph_stand_in import Graph
from helpers import seeded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import SMALL, TIMES, VARIANTS

import g2gnet
import train
from g2gnet import G2GNet
from g2gnet.cuda_graph import CapturedStep, _check_device
from g2gnet.data import load_dataset
from g2gnet.training import Machine, Trainer, TrainingError, TrainSettings
from g2gnet.training import trainer as trainer_module

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@no_cuda
def test_without_a_cuda_device_it_is_refused_before_anything_is_done(tmp_path, capsys):
    arguments = ["--dataset", "fashionmnist-mini", "--cuda_graph", "--checkpoint_dir", str(tmp_path / "out")]
    assert train.main(arguments) == 2
    assert "--cuda_graph needs a CUDA device, not cpu; leave it out, or give --device cuda" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, not cpu; leave `cuda_graph` out"):
        CapturedStep(lambda inputs: None, torch.device("cpu"))


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


def counted(step):
    """``step``, and the list of the constants with which it ran: directly, and in captures."""
    direct, captures = [], []

    def noted(*arguments):
        (captures if Graph.capturing else direct).append(arguments[-1])
        return step(*arguments)

    return noted, direct, captures


def test_calls_after_the_first_replay_what_was_captured_on_the_new_batch(stand_ins):
    total = torch.zeros(())

    def step(inputs, labels, factor):
        total.add_(inputs.sum())
        return factor * (inputs.sum() + labels.sum())

    noted, direct, captures = counted(step)
    captured = CapturedStep(noted, CUDA)
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
    noted, direct, captures = counted(lambda inputs, number: 2 * inputs.sum())
    captured = CapturedStep(noted, CUDA)
    for number in range(12):
        size = 2 if number in (5, 9) else 4
        assert captured(torch.full((size,), float(number)), None).item() == 2 * size * number
    assert len(direct) == CapturedStep.WARM_UP + 2
    assert len(captures) == 1


def test_everything_is_on_the_step_s_device_whatever_is_the_current_one(stand_ins):
    devices = []

    def step(inputs):
        devices.append(torch.cuda.current_device())
        return inputs + 1

    captured = CapturedStep(step, CUDA)
    for _ in range(6):
        captured(torch.zeros(2))
    assert devices == [1] * (CapturedStep.WARM_UP + 1)
    assert [graph.stream.device for graph in Graph.captured] == [1]
    assert torch.cuda.current_device() == 0
    current = CapturedStep(step, torch.device("cuda"))
    with torch.cuda.device(CUDA):
        current(torch.zeros(2))
    assert devices[-1] == 0  # the device that was current when the step was made


def test_a_tensor_on_another_device_is_refused():
    with FakeTensorMode():
        tensor = torch.empty(3, device="cuda:0")
    with pytest.raises(ValueError, match="the step is captured on cuda:1, but a tensor is on cuda:0; move it there"):
        _check_device(tensor, CUDA)
    _check_device(tensor, torch.device("cuda:0"))


def waiting(inputs):
    if Graph.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")
    return inputs + 1


def empty(inputs):
    if Graph.capturing:
        warnings.warn("The CUDA Graph is empty. This usually means …", stacklevel=1)
    return inputs + 1


@pytest.mark.parametrize("step", [waiting, empty])
def test_a_step_that_cannot_be_captured_runs_directly_and_the_reason_is_logged(stand_ins, step, caplog):
    captured = CapturedStep(step, CUDA)
    assert [captured(torch.tensor(float(k))).item() for k in range(8)] == [float(k + 1) for k in range(8)]
    (line,) = caplog.messages
    assert line.startswith("training steps are not replayed as a CUDA graph, but run directly: ")
    assert "not permitted when stream is capturing" in line or "The CUDA Graph is empty" in line


def test_a_step_that_has_to_be_captured_and_cannot_be_is_an_error(stand_ins):
    captured = CapturedStep(waiting, CUDA, required=True)
    for _ in range(CapturedStep.WARM_UP):
        captured(torch.zeros(2))
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: operation not permitted"):
        captured(torch.zeros(2))


def test_a_loop_of_ones_own_trains_as_without_a_graph(stand_ins):
    """A dense network of snnTorch's kind, and none of our trainer."""

    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, capturable=True, fused=True)

        def step(x, labels):
            loss = F.cross_entropy(net(x), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = g2gnet.captured(step, device)
        losses = [step(torch.randn(5, 6), torch.randint(3, (5,))).item() for _ in range(10)]
        return losses, [parameter.detach().clone() for parameter in net.parameters()]

    plain, graph = trained("cpu"), trained(CUDA)
    assert len(Graph.captured) == 1
    assert plain[0] == graph[0]
    assert all(map(torch.equal, plain[1], graph[1]))


class Own:
    """A loop of one's own whose step is a method, of a network with dropout."""

    def __init__(self, device, lr=0.1):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr, capturable=True, fused=True)
        self.step = g2gnet.captured(self.learn, device)

    def learn(self, x, labels):
        loss = F.cross_entropy(self.net(x), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def with_another_rate(own, before):
    own.optimizer.param_groups[0]["lr"] = 0.0


def with_a_fixed_layer(own, before):
    own.net[0].requires_grad_(False)


def without_dropout(own, before):
    own.net.eval()


def with_a_loaded_state(own, before):
    own.optimizer.load_state_dict(before)


def with_another_parameter(own, before):
    own.net[2].bias.data = torch.zeros(3)


def with_another_optimizer(own, before):
    own.optimizer = torch.optim.Adam(own.net.parameters(), 0.01, capturable=True, fused=True)


def with_another_network(own, before):
    own.net = torch.nn.Sequential(own.net[0], own.net[1], copy.deepcopy(own.net[2]))


def with_another_layer(own, before):
    own.net[2] = copy.deepcopy(own.net[2])


def with_less_dropout(own, before):
    own.net[1] = torch.nn.Dropout(0.1)


def with_less_of_it(own, before):
    own.net[1].p = 0.1


def with_a_cleared_state(own, before):
    own.optimizer.state.clear()


def with_a_state_less(own, before):
    del own.optimizer.state[own.net[0].weight]


def with_another_moment(own, before):
    own.optimizer.state[own.net[2].bias]["exp_avg"] = torch.ones(3)


def with_another_parameter_at_the_same_address(own, before):
    own.net[2].bias = own.optimizer.param_groups[0]["params"][3] = torch.nn.Parameter(own.net[2].bias.detach())


def with_a_hook(own, before):
    own.net[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def with_a_hook_of_a_gradient(own, before):
    own.net[2].weight.register_hook(lambda gradient: -gradient)


def forget(parameter):
    parameter.grad.zero_()


def with_a_hook_after_the_gradient(own, before):
    own.net[2].weight.register_post_accumulate_grad_hook(forget)


def with_a_hook_of_the_optimizer(own, before):
    own.optimizer.register_step_pre_hook(lambda *_: forget(own.net[2].bias))


def with_another_function(own, before):
    own.net[1].forward = torch.nn.functional.silu


CHANGES = [with_another_rate, with_a_fixed_layer, without_dropout, with_a_loaded_state, with_another_parameter,
           with_another_optimizer, with_another_network, with_another_layer, with_less_dropout, with_less_of_it,
           with_a_cleared_state, with_a_state_less, with_another_moment,
           with_another_parameter_at_the_same_address, with_a_hook, with_a_hook_of_a_gradient,
           with_a_hook_after_the_gradient, with_a_hook_of_the_optimizer, with_another_function]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_that_a_graph_cannot_follow_is_followed_all_the_same(stand_ins, change):
    plain, graph = Own("cpu"), Own(CUDA)
    before = copy.deepcopy(plain.optimizer.state_dict())
    for number in range(12):
        if number == 6:
            assert len(Graph.captured) == 1
            for own in (plain, graph):
                change(own, copy.deepcopy(before))
        x, labels = torch.randn(5, 6), torch.randint(3, (5,))
        for own in (plain, graph):
            torch.manual_seed(number)
            own.step(x, labels)
        assert all(map(torch.equal, plain.net.parameters(), graph.net.parameters())), number
    assert len(Graph.captured) == 2


def captured_step(net, optimizer, device):
    """A whole training step, as a graph unless the device is the CPU."""

    def step(x, labels):
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return g2gnet.captured(step, device)


def test_parameters_that_change_places_are_noticed(stand_ins):
    """The optimizer has the same ones, in the same order."""

    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))
        step = captured_step(net, torch.optim.SGD(net.parameters(), 0.1, fused=True), device)
        for number in range(8):
            if number == 6:
                net[0].weight, net[2].weight = net[2].weight, net[0].weight
            step(torch.randn(5, 6), torch.randint(6, (5,)))
        return list(net.parameters())

    assert all(map(torch.equal, trained("cpu"), trained(CUDA)))
    assert len(Graph.captured) == 1


def test_a_momentum_that_is_forgotten_is_forgotten_by_the_graph(stand_ins):
    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        step = captured_step(net, optimizer, device)
        for number in range(14):
            if number == 8:
                assert len(Graph.captured) == (device != "cpu")
                optimizer.state.clear()
            step(torch.randn(5, 6), torch.randint(3, (5,)))
        return list(net.parameters())

    assert all(map(torch.equal, trained("cpu"), trained(CUDA)))
    assert len(Graph.captured) == 2


def shortened(layer):
    layer.weight.data, layer.bias.data = layer.weight.data[:2], layer.bias.data[:2]


def transposed(layer):
    layer.weight.data = layer.weight.data.t()


def of_another_dtype(layer):
    layer.scale.data = layer.scale.data.view(torch.int32)


@pytest.mark.parametrize("change", [shortened, transposed, of_another_dtype], ids=lambda change: change.__name__)
def test_a_tensor_that_is_read_otherwise_at_its_address_is_noticed(stand_ins, change):
    layer = torch.nn.Linear(4, 4)
    layer.register_buffer("scale", torch.ones(4))
    addresses = [tensor.data_ptr() for tensor in layer.state_dict().values()]

    def step(x):
        return layer(x).sum() * layer.scale.sum()

    captured, x = CapturedStep(step, CUDA), torch.rand(3, 4)
    for _ in range(5):
        captured(x)
    assert len(Graph.captured) == 1
    change(layer)
    assert [tensor.data_ptr() for tensor in layer.state_dict().values()] == addresses
    for _ in range(5):
        assert captured(x) == step(x)
    assert len(Graph.captured) == 2


class Rebinding(torch.optim.Optimizer):
    """Keeps momentum in a new tensor after each step, as many an optimizer of third parties does."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].get("momentum", 0)
                self.state[parameter]["momentum"] = 0.9 * momentum + parameter.grad
                parameter.data.add_(self.state[parameter]["momentum"], alpha=-group["lr"])


class Counting(Rebinding):
    """Keeps the number of its steps in Python."""

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                steps = self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1
                parameter.data.add_(parameter.grad, alpha=-group["lr"] / steps)


class Looking(torch.optim.SGD):
    """Counts in an attribute of its own, as Lookahead does."""

    calls = 0

    @torch.no_grad()
    def step(self):
        self.calls += 1
        for parameter in self.param_groups[0]["params"]:
            parameter -= 0.1 / self.calls * parameter.grad


DECAYING = functools.partial(torch.optim.Adagrad, lr_decay=0.1)


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (Rebinding, "change tensors in place"),
        (Counting, "counts on the CPU"),
        (Looking, "counts on the CPU"),
        (DECAYING, "`capturable=True`"),
    ],
    ids=["rebinding", "counting", "looking", "Adagrad"],
)
def test_an_optimizer_whose_state_a_graph_cannot_change_trains_as_without_one(
    stand_ins, monkeypatch, caplog, optimizer, why
):
    monkeypatch.setattr("g2gnet.watched._is_on", lambda tensor, device: tensor.ndim > 0)  # steps are on the CPU

    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 3)
        step = captured_step(net, optimizer(net.parameters(), lr=0.1), device)
        for _ in range(20):
            step(torch.randn(5, 6), torch.randint(3, (5,)))
        return list(net.parameters())

    assert all(map(torch.equal, trained("cpu"), trained(CUDA)))
    assert not Graph.captured
    (line,) = caplog.messages
    assert why in line


def test_a_state_that_a_module_keeps_in_a_new_tensor_leaves_no_graph(stand_ins):
    """As those of snnTorch with ``init_hidden``."""

    def run(device):
        net = torch.nn.Module()
        net.register_buffer("membrane", torch.zeros(3))

        def step(x):
            net.membrane = 0.5 * net.membrane + x
            return net.membrane.sum()

        step = g2gnet.captured(step, device)
        return [step(torch.full((3,), float(number))).item() for number in range(30)]

    assert run("cpu") == run(CUDA)


@pytest.mark.parametrize(
    "others",
    [
        np.arange(1.0, 3.0), [[1.0], [2.0]], [{"a": 1.0}, {"a": 2.0}], [{1.0}, {2.0}],
        list(torch.tensor([[1.0], [2.0]])), [[[1.0]], [[2.0]]], [{"a": {"b": 1.0}}, {"a": {"b": 2.0}}], [[1], [1.0]],
        [np.float64(1.0), (1.0, 2.0)],
    ],
    ids=["numpy", "list", "dictionary", "set", "tensor", "nested", "nested dictionaries", "type", "numpy and tuple"],
)  # fmt: skip
def test_an_attribute_that_a_graph_cannot_change_is_noticed(stand_ins, others):
    net = torch.nn.Linear(2, 1)

    def step(x):
        factors = np.array(tree_leaves(list(net.factor) if isinstance(net.factor, set) else net.factor))
        return net(x) * factors.sum().item() * (2 if factors.dtype.kind == "i" else 1)

    net.factor = others[0]
    captured, x = CapturedStep(step, CUDA), torch.rand(3, 2)
    for _ in range(6):
        assert torch.equal(captured(x), step(x))
    assert len(Graph.captured) == 1
    net.factor = others[1]
    assert torch.equal(captured(x), step(x))


def test_what_is_changed_in_place_is_noticed(stand_ins):
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["factors"] = [1.0, {"last": np.ones(2)}]
    net.factors = [[1.0]]

    def step(x):
        first, last = optimizer.param_groups[0]["factors"]
        return net(x) * net.factors[0][0] * first * float(last["last"].sum())

    captured, x = CapturedStep(step, CUDA), torch.rand(3, 2)

    def check(graphs):
        for _ in range(6):
            assert torch.equal(captured(x), step(x))
        assert len(Graph.captured) == graphs

    check(1)
    net.factors[0][0] = 2.0
    check(2)
    optimizer.param_groups[0]["factors"][0] = 3.0
    check(3)
    optimizer.param_groups[0]["factors"][1]["last"] = np.full(2, 2.0)
    check(4)


def with_a_buffer(tensor):
    net = torch.nn.Linear(4, 1)
    net.register_buffer("adjacency", tensor)
    return net


class Incomparable:
    def __eq__(self, other):
        raise ValueError("of elements there are several")

    def __bool__(self):
        raise ValueError("of an array")

    __hash__ = None


def with_an_attribute(value):
    net = torch.nn.Linear(4, 1)
    net.kept = value
    return net


class Other(torch.Tensor):
    def tolist(self):
        raise RuntimeError("not of this class")


def itself():
    items = []
    items.append(items)
    return items


ODD = {
    "COO": lambda: with_a_buffer(torch.eye(4).to_sparse()),
    "CSR": lambda: with_a_buffer(torch.eye(4).to_sparse_csr()),
    "nested": lambda: with_an_attribute(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "array": lambda: with_an_attribute(np.ones(3)),
    "objects": lambda: with_an_attribute([np.array([None, Incomparable()]), Incomparable()]),
    "itself": lambda: with_an_attribute(itself()),
    "meta": lambda: with_an_attribute(torch.zeros(3, device="meta")),
    "quantized": lambda: with_an_attribute(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    "lazy": lambda: with_an_attribute([torch.nn.UninitializedParameter()]),
    "subclass": lambda: with_an_attribute(torch.ones(3).as_subclass(Other)),
    "not a number": lambda: with_an_attribute([float("nan"), np.float32("nan"), torch.tensor(torch.nan)]),
    "many": lambda: with_an_attribute(list(range(100_000))),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_whatever_a_network_keeps_its_step_is_captured(stand_ins, monkeypatch, caplog, make):
    net = make()
    monkeypatch.setattr("g2gnet.watched._is_on", lambda tensor, device: tensor.ndim > 0)
    captured, x = CapturedStep(lambda x: net(x), CUDA), torch.rand(3, 4)
    for _ in range(6):
        captured(x)
    assert len(Graph.captured) == 1
    assert not caplog.messages
    if isinstance(getattr(net, "kept", None), np.ndarray):
        net.kept = (0.5, 0.5)
    net.weight.data = torch.ones(1, 4)
    assert torch.equal(captured(x), net(x))


def test_a_sparse_buffer_that_is_written_to_is_noticed(stand_ins):
    net = with_a_buffer(torch.eye(4).to_sparse().coalesce())
    captured, x = CapturedStep(lambda x: net(torch.sparse.mm(net.adjacency, x.T).T), CUDA), torch.rand(3, 4)
    for _ in range(5):
        captured(x)
    net.adjacency.zero_()
    assert torch.equal(captured(x), net(torch.zeros(3, 4)))


def test_a_buffer_that_is_learned_from_now_on_is_noticed(stand_ins):
    net = with_a_buffer(torch.ones(4))
    captured = CapturedStep(lambda x: net(x * net.adjacency), CUDA)
    for _ in range(5):
        captured(torch.ones(3, 4))
    net.adjacency.requires_grad_()
    captured(torch.ones(3, 4)).sum().backward()
    assert torch.equal(net.adjacency.grad, 3 * net.weight[0])


def test_a_set_is_compared_without_its_order(stand_ins):
    net = with_an_attribute({8, 0})
    captured = CapturedStep(lambda x: net(x), CUDA)
    for number in range(6):
        net.kept = {0, 8} if number % 2 else {8, 0}  # in other orders
        captured(torch.rand(3, 4))
    assert len(Graph.captured) == 1


class Unreadable:
    def __getattribute__(self, name):
        raise OSError("the connection is closed")

    __getattr__ = __len__ = __getattribute__


class UnreadableList(list):
    def __len__(self):
        raise OSError("the connection is closed")


def test_what_cannot_be_looked_at_is_passed_over(stand_ins, caplog):
    own = types.SimpleNamespace(net=torch.nn.Linear(4, 1), other=Unreadable(), list=UnreadableList())
    captured = CapturedStep(lambda x: own.net(x), CUDA)
    for _ in range(6):
        captured(torch.ones(3, 4))
    assert len(Graph.captured) == 1
    assert not caplog.messages


def test_a_network_that_cannot_be_compared_leaves_no_graph_and_a_reason(stand_ins, caplog):
    net = with_an_attribute([1])
    captured = CapturedStep(lambda x: net(x), CUDA)
    for number in range(12):
        if number == 6:
            net.kept = UnreadableList()
            graph = weakref.ref(Graph.captured.pop())
        assert torch.equal(captured(torch.ones(3, 4)), net(torch.ones(3, 4)))
    (line,) = caplog.messages
    assert "what it refers to cannot be compared (the connection is closed)" in line
    gc.collect()
    assert graph() is None  # its memory is free
    with pytest.raises(RuntimeError, match="cannot be compared"):
        CapturedStep(lambda x: net(x), CUDA, required=True)(torch.ones(3, 4))


def test_objects_that_a_network_kept_are_not_kept_alive(stand_ins):
    class Loss:
        pass

    net, alive = torch.nn.Linear(2, 1), []

    def step(x):
        net.loss = Loss()
        net.loss.value = net(x).mean()
        alive.append(weakref.ref(net.loss))
        return net.loss.value.detach()

    captured = CapturedStep(step, CUDA)
    for _ in range(30):
        captured(torch.rand(3, 2))
    gc.collect()
    assert sum(each() is not None for each in alive) == 1


@pytest.mark.parametrize(("steps", "graphs"), [(2, 0), (4, 15)])
def test_an_attribute_that_changes_every_few_steps_is_named(stand_ins, caplog, steps, graphs):
    net = torch.nn.Linear(2, 1)
    captured = CapturedStep(lambda x: net(x), CUDA)
    for number in range(60):
        net.phase = number // steps
        captured(torch.rand(3, 2))
    assert len(Graph.captured) == graphs
    (line,) = caplog.messages
    assert "the last two differ in the attribute 'phase' of Linear" in line


class Slots:
    __slots__ = ("__net",)

    def __init__(self, net):
        self.__net = net

    def learn(self, x):
        return self.__net(x)

    def __call__(self, x):
        return GLOBAL["net"](x)


GLOBAL = {}


def in_a_partial(net):
    return functools.partial(lambda net, x: net(x), net)


def by_name_in_a_partial(net):
    return functools.partial(lambda x, net: net(x), net=net)


def in_a_partial_of_a_method(net):
    return functools.partial(types.MethodType(lambda own, x: own.inner.net(x), holding(net)))


def in_a_list(net):
    nets = [net]
    return lambda x: sum(each(x) for each in nets)


def in_a_dictionary_of_tuples(net):
    nets = {"first": (net,)}
    return lambda x: nets["first"][0](x)


def in_an_attribute_of_an_attribute(net):
    return types.MethodType(lambda own, x: own.inner.net(x), holding(net))


def in_a_helper(net):
    def helper(x):
        return net(x)

    return lambda x: helper(x) + 0


def in_a_global_of_a_generator(net):
    variables = {"nets": [net], "parts": [1.0]}
    exec("def step(x):\n    return sum(nets[0](part * x) for part in parts)", variables)
    return variables["step"]


def in_a_default(net):
    return lambda x, own=net: own(x)


def in_a_named_default(net):
    return lambda x, *, own=net: own(x)


def in_a_set(net):
    nets = {net}
    return lambda x: sum(each(x) for each in nets)


def in_a_class(net):
    return classmethod(lambda cls, x: cls.net(x)).__get__(None, type("Own", (), {"net": net}))


def in_a_slot(net):
    return Slots(net).learn


def in_a_global_of_a_callable_object(net):
    GLOBAL["net"] = net
    return Slots(None)


def behind_a_weak_reference(net):
    net = weakref.ref(net)
    return lambda x: net()(x)


def behind_a_proxy(net):
    own = types.SimpleNamespace(net=weakref.proxy(net))
    return lambda x: own.net(x)


def in_a_list_of_a_module(net):
    """As networks keep others that they do not train."""
    outer = torch.nn.Sequential(torch.nn.Identity())
    outer[0].others = [net]
    outer.forward = lambda x: outer[0].others[0](x)
    return lambda x: outer(x)


def holding(net):
    return types.SimpleNamespace(inner=types.SimpleNamespace(net=net))


def behind_a_weak_method(net):
    method = weakref.WeakMethod(net.forward)
    return lambda x: method()(x)


def in_two_ways(net):
    own = types.SimpleNamespace(net=net)
    return lambda x: (net, own.net(x))[1]


WAYS = [in_a_partial, by_name_in_a_partial, in_a_partial_of_a_method, in_a_list, in_a_dictionary_of_tuples,
        in_an_attribute_of_an_attribute, in_a_helper, in_a_global_of_a_generator, in_a_default, in_a_named_default,
        in_a_set, in_a_class, in_a_slot, in_a_global_of_a_callable_object, behind_a_weak_reference, behind_a_proxy,
        in_a_list_of_a_module, behind_a_weak_method, in_two_ways]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_network_is_found_wherever_the_step_has_it(stand_ins, caplog, way):
    net = torch.nn.Linear(4, 1)
    step = way(net)
    captured, x = CapturedStep(step, CUDA), torch.rand(3, 4)
    for _ in range(5):
        captured(x)
    assert len(Graph.captured) == 1
    assert not caplog.messages
    net.weight.data = torch.ones(1, 4)
    assert torch.equal(captured(x), step(x))


def test_a_proxy_of_what_is_gone_is_passed_over(stand_ins, caplog):
    own = types.SimpleNamespace(net=torch.nn.Linear(2, 1), gone=weakref.proxy(torch.nn.Linear(2, 1)))
    owner = torch.nn.Identity()
    own.net.owner = weakref.proxy(owner)
    captured = CapturedStep(lambda x: own.net(x), CUDA)
    for _ in range(10):
        captured(torch.rand(3, 2))
    del owner
    captured(torch.rand(3, 2))
    assert len(Graph.captured) == 1
    assert not caplog.messages


def test_each_of_several_ways_to_a_network_is_followed(stand_ins):
    own = types.SimpleNamespace(net=torch.nn.Linear(2, 1))
    own.state = types.SimpleNamespace(net=own.net)
    captured, x = CapturedStep(types.MethodType(lambda own, x: own.state.net(x), own), CUDA), torch.rand(3, 2)
    for _ in range(5):
        captured(x)
    own.state.net = torch.nn.Linear(2, 1)
    assert torch.equal(captured(x), own.state.net(x))


class Placed(torch.nn.Module):
    """Has modules and buffers at places that they may exchange."""

    def __init__(self):
        super().__init__()
        self.layer, self.relu, self.tanh = torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Tanh()
        self.first, self.second = (
            torch.nn.ModuleList([torch.nn.Sigmoid()]),
            torch.nn.ModuleList([torch.nn.Linear(4, 4)]),
        )
        self.act = self.relu
        self.register_buffer("factor", torch.arange(4.0))
        self.register_buffer("summand", None)

    def forward(self, x):
        y = self.act(self.layer(x)) if self.factor is None else self.layer(x) * self.factor
        y = self.tanh(y) if self.summand is None else y + self.summand
        for layer in self.first:
            y = layer(y)
        return self.act(y) + sum(layer(x) for layer in self.second)


def with_another_act(net):
    net.act = net.tanh


def with_a_buffer_elsewhere(net):
    net.summand, net.factor = net.factor, None


def with_a_layer_elsewhere(net):
    net.first.append(net.second[0])
    del net.second[0]


@pytest.mark.parametrize("change", [with_another_act, with_a_buffer_elsewhere, with_a_layer_elsewhere])
def test_what_changes_its_place_in_a_network_is_noticed(stand_ins, change):
    net = Placed()
    captured, x = CapturedStep(lambda x: net(x), CUDA), torch.randn(3, 4, generator=seeded(0))
    for number in range(12):
        if number == 6:
            change(net)
        assert torch.equal(captured(x), net(x))
    assert len(Graph.captured) == 2


def test_which_of_several_networks_and_optimizers_is_meant_is_noticed(stand_ins):
    nets = [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]
    optimizers = [torch.optim.SGD(nets[0].parameters(), rate) for rate in (0.1, 1.0)]
    own = types.SimpleNamespace(nets=[*nets, nets[0]], active=optimizers[0], optimizers=optimizers)
    before = copy.deepcopy(nets[0].state_dict())

    def step(x):
        nets[0].load_state_dict(before)
        output = own.nets[2](x).sum()
        (nets[0](x).sum() + output).backward()
        own.active.step()
        own.active.zero_grad()
        return torch.cat([output.detach()[None], nets[0].bias.detach()])

    captured, x = CapturedStep(step, CUDA), torch.randn(3, 4, generator=seeded(0))
    for number in range(18):
        if number == 6:
            own.active = optimizers[1]
        if number == 12:
            own.nets[2] = own.nets[1]
        assert torch.equal(captured(x).clone(), step(x)), number
    assert len(Graph.captured) == 3


class Scaling(torch.optim.Optimizer):
    """Has numbers that Python reads, as an attribute and in its state."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.scale = 1.0

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= 0.1 * self.scale * self.state[parameter].setdefault("scale", 1.0) * parameter.grad


def with_another_attribute(optimizer, other):
    optimizer.scale = 0.1


def with_another_state(optimizer, other):
    for state in optimizer.state.values():
        state["scale"] = 0.1


def with_another_step(optimizer, other):
    optimizer.step = lambda: None


def with_the_parameters_of_another(optimizer, other):
    optimizer.param_groups[0]["params"] = other.param_groups[0]["params"]


@pytest.mark.parametrize(
    "change", [with_another_attribute, with_another_state, with_another_step, with_the_parameters_of_another]
)
def test_what_an_optimizer_has_for_python_to_read_is_noticed(stand_ins, change):
    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 2)
        optimizers = [Scaling([parameter]) for parameter in net.parameters()]

        def step(x):
            net.zero_grad()
            net(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()

        step, seen = g2gnet.captured(step, device), []
        for number in range(12):
            if number == 6:
                change(*optimizers)
            step(torch.randn(3, 4, generator=seeded(number)))
            seen.append(torch.cat([each.detach().flatten() for each in net.parameters()]))
        return torch.stack(seen)

    assert torch.equal(trained("cpu"), trained(CUDA))
    assert len(Graph.captured) == 2


def counted_by_twos(net):
    net.phase = (net.phase + 1) % 2
    return 1 + net.phase


def exchanged(net):
    with torch.no_grad():
        net.after.copy_(0.5 * net.before + 1)
    net.before, net.after = net.after, net.before
    return net.before


@pytest.mark.parametrize(
    ("change", "what"), [(counted_by_twos, "attribute 'phase' of Linear"), (exchanged, "buffers and modules a module")]
)
def test_what_a_step_itself_changes_in_python_leaves_no_graph(stand_ins, caplog, change, what):
    def run(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 1)
        net.phase = 0
        net.register_buffer("before", torch.zeros(1))
        net.register_buffer("after", torch.zeros(1))
        step = g2gnet.captured(lambda x: net(x) * change(net), device)
        return [step(torch.ones(3, 4)).sum().item() for _ in range(20)]

    assert run("cpu") == run(CUDA)
    assert not Graph.captured
    (line,) = caplog.messages
    assert what in line
    assert "which a graph does not repeat" in line


@pytest.mark.parametrize("calls", [1, 2])
def test_what_the_loop_restores_before_the_next_step_does_no_harm(stand_ins, caplog, calls):
    """As spikingjelly's ``reset_net`` after each step, or networks that are frozen by turns."""
    net = torch.nn.Linear(4, 1)

    def step(x):
        net.memories = [net(x).detach()]
        return net.memories[0]

    captured, x = CapturedStep(step, CUDA), torch.ones(3, 4)
    for _ in range(12):
        for size in range(calls):  # the loop calls it with batches of two sizes
            net.memories = []
            assert torch.equal(captured(x[: 3 - size]), step(x[: 3 - size]))
    assert Graph.captured
    assert not caplog.messages


@pytest.mark.parametrize(
    ("nets", "exchange"),
    [
        ({"a": 0, "b": 1}, lambda nets: nets.update(a=nets["b"], b=nets["a"])),
        ({"a": None, "b": 0}, lambda nets: nets.update(a=nets["b"], b=None)),
        ([0, None], list.reverse),
    ],
    ids=["dictionary", "with None", "list"],
)
def test_networks_that_exchange_their_names_are_noticed(stand_ins, nets, exchange):
    made = [torch.nn.Linear(4, 1) for _ in range(2)]
    items = nets.items() if isinstance(nets, dict) else enumerate(nets)
    own = types.SimpleNamespace(nets=type(nets)(nets))
    for key, number in items:
        own.nets[key] = None if number is None else made[number]

    def step(x):
        of = own.nets.values() if isinstance(own.nets, dict) else own.nets
        return sum((place + 1) * net(x) for place, net in enumerate(of) if net is not None)

    captured, x = CapturedStep(step, CUDA), torch.ones(3, 4)
    for number in range(12):
        if number == 6:
            exchange(own.nets)
        assert torch.equal(captured(x), step(x)), number
    assert len(Graph.captured) == 2


def test_a_container_of_networks_that_is_made_anew_keeps_the_graph(stand_ins):
    own = types.SimpleNamespace(net=torch.nn.Linear(4, 1))
    captured, x = CapturedStep(lambda x: own.net(x), CUDA), torch.ones(3, 4)
    for number in range(12):
        own.checkpoint = {"net": own.net, "step": number}
        if number == 2:
            own.evaluator = types.SimpleNamespace(net=own.net)
        assert torch.equal(captured(x), own.net(x))
    assert len(Graph.captured) == 1


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_with_a_history_are_kept_without_it(stand_ins):
    net = torch.nn.Linear(4, 1)

    def step(x):
        net.zero_grad(set_to_none=True)
        net(x).square().sum().backward(create_graph=True)

    def history():
        nodes, queue = set(), [net.weight.grad.grad_fn]
        while queue:
            node = queue.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                queue += [each for each, _ in node.next_functions]
        return len(nodes)

    captured, found = CapturedStep(step, CUDA), []
    for _ in range(12):
        captured(torch.ones(3, 4))
        found.append(history())
    assert len(Graph.captured) == 1
    assert len(set(found)) == 1


def test_a_step_that_fails_before_the_capture_is_looked_at_again(stand_ins, caplog):
    calls = []

    def step(x):
        graph_stand_in.wait()
        calls.append(x)
        if len(calls) == 3:
            raise ValueError("mine")

    captured = CapturedStep(step, CUDA)
    for _ in range(2):
        captured(torch.ones(3))
    with pytest.raises(ValueError, match="mine"):
        captured(torch.ones(3))
    captured(torch.ones(3))
    assert not Graph.captured
    (line,) = caplog.messages
    assert "it waits for the device" in line


def test_a_step_that_begins_with_the_gradients_of_the_last_reads_these(stand_ins):
    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        net(torch.ones(1, 4)).sum().backward()

        def step(x):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            net(x).square().sum().backward()

        step = g2gnet.captured(step, device)
        for number in range(12):
            step(torch.randn(3, 4, generator=seeded(number)))
        return [*net.parameters(), *(parameter.grad for parameter in net.parameters())]

    assert all(map(torch.equal, trained("cpu"), trained(CUDA)))
    assert len(Graph.captured) == 1


@pytest.mark.parametrize("kept", [torch.nn.Module.register_buffer, setattr], ids=["buffer", "attribute"])
def test_a_tensor_that_is_learned_but_no_parameter_has_its_gradient(stand_ins, kept):
    net = torch.nn.Linear(4, 4)
    kept(net, "scale", torch.ones(4, requires_grad=True))

    def step(x):
        (net(x) * net.scale).square().sum().backward()

    captured = CapturedStep(step, CUDA)

    def gradient_of(step, x):
        net.zero_grad()
        net.scale.grad = None
        step(x)
        return net.scale.grad.clone()

    for number in range(12):
        if number == 8:
            net.scale.register_hook(lambda gradient: 2 * gradient)
        x = torch.randn(3, 4, generator=seeded(number))
        assert torch.equal(gradient_of(captured, x), gradient_of(step, x)), number
    assert len(Graph.captured) == 2


learned, optimizer = None, None


class Learner(torch.nn.Module):
    """Reads an optimizer and a network that are variables of its module."""

    def forward(self, x):
        return learned(x) * optimizer.param_groups[0]["lr"]


def test_variables_of_a_networks_forward_are_searched(stand_ins, monkeypatch):
    monkeypatch.setitem(globals(), "learned", torch.nn.Linear(4, 1))
    monkeypatch.setitem(globals(), "optimizer", torch.optim.SGD(learned.parameters(), 0.5))
    step = Learner()
    captured, x = CapturedStep(step, CUDA), torch.ones(3, 4)
    for number in range(18):
        if number == 6:
            optimizer.param_groups[0]["lr"] = 0.25
        if number == 12:
            monkeypatch.setitem(globals(), "learned", torch.nn.Linear(4, 1))
        assert torch.equal(captured(x), step(x)), number
    assert len(Graph.captured) == 3


def test_numbers_of_a_buffer_on_the_host_are_noticed(stand_ins, monkeypatch):
    net = torch.nn.Linear(4, 1)
    net.register_buffer("scale", torch.tensor([2.0]))
    monkeypatch.setattr("g2gnet.watched._is_on", lambda tensor, device: tensor is not net.scale)
    captured, x = CapturedStep(lambda x: net(x) * net.scale.item(), CUDA), torch.ones(3, 4)
    for number in range(12):
        if number == 6:
            net.scale.fill_(3.0)
        assert torch.equal(captured(x), net(x) * net.scale.item()), number
    assert len(Graph.captured) == 2


def test_tensors_may_be_swapped(stand_ins):
    """PyTorch swaps none to which there is a weak reference. (The stand-in's graph has tensors of its own.)"""
    net, other = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    captured, x = CapturedStep(lambda x: net(x), CUDA), torch.ones(3, 4)
    with torch.no_grad():
        for number in range(12):
            if number == 1:
                torch.utils.swap_tensors(net.weight, other.weight)
            assert torch.equal(captured(x), net(x)), number
    assert len(Graph.captured) == 1


def tensors_of(net):
    return [*net.parameters(), *net.buffers()]


def test_a_wiring_that_is_written_into_the_buffers_is_that_of_the_graph(stand_ins):
    """DistributedDataParallel writes it there."""
    net, other = (
        G2GNet(16, 16, 4, "random", num_groups=4, block_size=4, T=3, p_inter=0, backend="torch", generator=seeded(each))
        for each in range(2)
    )
    captured, x = CapturedStep(lambda x: net(x), CUDA), 3 * torch.rand(5, 16, generator=seeded(3))
    with torch.no_grad():
        for number in range(12):
            if number == 6:
                for mine, theirs in zip(tensors_of(net), tensors_of(other), strict=True):
                    mine.copy_(theirs)
            assert torch.equal(captured(x), (net if number < 6 else other)(x)), number


def test_a_step_that_refers_to_its_captured_self_keeps_no_replaced_network(stand_ins, monkeypatch):
    own = types.SimpleNamespace(net=torch.nn.Linear(4, 1))
    own.step = CapturedStep(lambda x: own.net(x), CUDA)
    old = []
    for _ in range(4):
        old.append(weakref.ref(own.net))
        own.net = torch.nn.Linear(4, 1)
        for _ in range(6):
            own.step(torch.ones(3, 4))
    gc.collect()
    assert [each() for each in old] == 4 * [None]


def test_an_error_of_the_step_in_a_capture_is_the_users(stand_ins):
    net, calls = torch.nn.Linear(4, 1), []

    def step(x):
        net(x).sum().backward()
        calls.append(net.weight.grad)
        if len(calls) == 5:
            raise ValueError("mine")

    captured = CapturedStep(step, CUDA)
    for _ in range(4):  # in the first there is no gradient yet
        captured(torch.ones(3, 4))
    gradient = net.weight.grad.clone()
    with pytest.raises(ValueError, match="mine"):
        captured(torch.ones(3, 4))
    assert len(Graph.captured) == 1
    assert torch.equal(net.weight.grad, gradient)


@pytest.mark.parametrize(("model", "other"), [("index", "random"), ("random", "index"), ("random", "random")])
def test_a_loaded_wiring_is_that_of_the_graph(stand_ins, model, other):
    """With contiguous groups operators do not read the permutation of neurons: the captured launches would not."""
    nets = [
        G2GNet(16, 16, 4, each, num_groups=4, block_size=4, T=3, p_inter=0.0, backend="torch", generator=seeded(number))
        for number, each in enumerate((model, other))
    ]
    net, x = nets[0], 3 * torch.rand(5, 16, generator=seeded(3))
    captured = CapturedStep(lambda x: net(x), CUDA)
    with torch.no_grad():
        for number in range(10):
            if number == 6:
                net.load_state_dict(nets[1].state_dict())
            assert torch.equal(captured(x), net(x))
    assert len(Graph.captured) == (1 if model == other else 1 + (number - 6 >= 3))


def test_the_memory_of_a_graph_is_given_to_the_next(stand_ins):
    net = torch.nn.Linear(2, 1)

    def step(x):
        net(x).sum().backward()

    captured = CapturedStep(step, CUDA)
    for _ in range(6):
        captured(torch.rand(3, 2))
    weight = weakref.ref(net.weight)
    net.weight = torch.nn.Parameter(torch.ones(1, 2))
    Graph.captured.clear()
    for _ in range(3):
        captured(torch.rand(3, 2))
    alive = []
    net.register_forward_pre_hook(lambda *_: alive.append(weight() is not None) if Graph.capturing else None)
    for _ in range(4):
        captured(torch.rand(3, 2))
    assert alive == [False]


def test_networks_that_are_added_and_objects_that_are_replaced_are_noticed(stand_ins):
    own = types.SimpleNamespace(nets=[torch.nn.Linear(4, 1)], inner=types.SimpleNamespace(net=torch.nn.Linear(4, 1)))

    def step(x):
        return sum(net(x) for net in own.nets) + own.inner.net(x)

    captured, x = CapturedStep(step, CUDA), torch.rand(3, 4)
    for number in range(15):
        if number == 5:
            own.nets.append(torch.nn.Linear(4, 1))
        if number == 10:
            own.inner = types.SimpleNamespace(net=torch.nn.Linear(4, 1))
        assert torch.equal(captured(x), step(x))
    assert len(Graph.captured) == 3


def test_networks_are_looked_for_until_the_capture(stand_ins):
    first, late = torch.nn.Linear(4, 1), []

    def step(x):
        return first(x) + sum(net(x) for net in late)

    captured, x = CapturedStep(step, CUDA), torch.rand(3, 4)
    captured(x)
    late.append(torch.nn.Linear(4, 1))
    for _ in range(5):
        captured(x)
    assert len(Graph.captured) == 1
    late[0] = torch.nn.Linear(4, 1)
    assert torch.equal(captured(x), step(x))


def test_a_step_without_a_network_is_warned_of_once(stand_ins, caplog):
    far, loss = types.SimpleNamespace(inner=holding(holding(torch.nn.Linear(2, 1)))), torch.nn.Identity()
    captured = CapturedStep(lambda x: loss(far.inner.inner.net.inner.net(x)), CUDA)
    for size in 5 * [3] + 5 * [4]:
        captured(torch.zeros(size, 2))
    assert len(Graph.captured) == 2
    (line,) = caplog.messages
    assert line.startswith("no parameter and no optimizer was found to which the training step refers")


def test_numbers_that_change_at_every_step_are_read_from_tensors_or_leave_no_graph(stand_ins, caplog):
    plain, number, tensor = Own("cpu"), Own(CUDA), Own(CUDA, torch.tensor(0.1))
    owns = plain, number, tensor
    schedules = [torch.optim.lr_scheduler.ExponentialLR(own.optimizer, 0.9) for own in owns]
    for step in range(14):
        x, labels = torch.randn(5, 6), torch.randint(3, (5,))
        for own, schedule in zip(owns, schedules, strict=True):
            torch.manual_seed(step)
            own.step(x, labels)
            schedule.step()
    assert len(Graph.captured) == 1
    assert all(map(torch.equal, plain.net.parameters(), number.net.parameters()))
    for one, other in zip(plain.net.parameters(), tensor.net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # a rate of float32
    (line,) = caplog.messages
    assert "of 9 calls no four could share one, the last two differ in the setting 'lr' of an optimizer" in line
    assert "lr=torch.tensor(0.001, device='cuda:1')" in line


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_used_and_reset_outside_the_step(stand_ins, accumulated, set_to_none):
    def trained(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 3)
        optimizer = torch.optim.Adam(net.parameters(), 0.1)

        def step(x, labels):
            loss = F.cross_entropy(net(x), labels)
            loss.backward()
            return loss.detach()

        step = g2gnet.captured(step, device)
        for number in range(18):
            step(torch.randn(5, 6), torch.randint(3, (5,)))
            if number % accumulated == accumulated - 1:
                optimizer.step()
                optimizer.zero_grad(set_to_none)
        return list(net.parameters())

    assert all(map(torch.equal, trained("cpu"), trained(CUDA)))


def test_a_step_that_changes_an_argument_in_place_runs_directly(stand_ins, caplog):
    def step(x, total):
        total += x.sum()
        return total

    total, captured = torch.zeros(()), CapturedStep(step, CUDA)
    for _ in range(6):
        captured(torch.ones(2), total)
    assert total == 12
    assert "changes an argument in place" in caplog.text


def test_arguments_may_be_named_and_nested_and_are_not_kept(stand_ins):
    def step(batch, *, scale):
        (x, (y,)), extra = batch
        return scale * (x.sum() + y.sum() + extra["z"].sum())

    captured = CapturedStep(step, CUDA)
    alive = []
    for k in range(10):
        tensors = [torch.full((2,), float(k)) for _ in range(3)]
        batch = [(tensors[0], [tensors[1]]), {"z": tensors[2]}]
        assert captured(batch, scale=2).item() == 12 * k
        alive += map(weakref.ref, tensors)
        del tensors, batch
    gc.collect()
    assert len(Graph.captured) == 1
    assert not any(reference() is not None for reference in alive)


def test_an_argument_that_is_not_a_number_is_itself(stand_ins):
    captured = CapturedStep(lambda x, factor: factor * x, CUDA)
    assert all(captured(torch.ones(()), float("nan")).isnan() for _ in range(6))
    assert len(Graph.captured) == 1


def test_constants_of_another_type_are_others(stand_ins):
    captured = CapturedStep(lambda x, many: x + (2 if many is True else 3), CUDA)
    assert [captured(torch.zeros(()), many).item() for many in 5 * [1] + 5 * [True] + 5 * [1.0]] == (
        5 * [3.0] + 5 * [2.0] + 5 * [3.0]
    )


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (np.zeros(2), TypeError, "of type ndarray, would be a constant of the CUDA graph"),
        (torch.nn.Linear(2, 2), TypeError, "of type Linear, would be .* let the step refer by variables"),
        (torch.zeros(2, requires_grad=True), ValueError, r"of shape \(2,\), needs a gradient, which its copy"),
    ],
    ids=["array", "network", "gradient"],
)
def test_arguments_that_a_graph_cannot_take_are_refused(stand_ins, argument, error, message):
    with pytest.raises(error, match=message):
        CapturedStep(lambda x: x, CUDA)(argument)


def test_a_step_that_waits_for_the_device_is_not_captured_at_all(stand_ins, caplog):
    """PyTorch up to 2.11 may end the process where a capture fails."""

    def step(x):
        warnings.warn("of something else", stacklevel=1)
        graph_stand_in.wait()
        return x + 1

    captured = CapturedStep(step, CUDA)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [captured(torch.tensor(float(k))).item() for k in range(8)] == [float(k + 1) for k in range(8)]
    assert {str(each.message) for each in seen} == {"of something else"}
    assert not Graph.captured
    (line,) = caplog.messages
    assert "it waits for the device in " in line
    assert "test_cuda_graph.py, line " in line


def test_a_step_that_waits_and_has_to_be_captured_is_an_error(stand_ins):
    captured = CapturedStep(lambda x: graph_stand_in.wait(), CUDA, required=True)
    for _ in range(CapturedStep.WARM_UP - 1):
        captured(torch.zeros(()))
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: it waits for the device in"):
        captured(torch.zeros(()))


# --- in the trainer -----------------------------------------------------------------------------------------------


@pytest.fixture
def trainer_of(stand_ins, monkeypatch):
    """Makes trainers whose steps are captured, on the CPU."""
    monkeypatch.setattr(
        trainer_module, "CapturedStep", lambda step, device, required: CapturedStep(step, CUDA, required)
    )

    def make(backend="torch", cuda_graph=True, **changes):
        settings = TrainSettings(**{**SMALL, **changes})
        machine = Machine(torch.device("cpu"), backend, cuda_graph=cuda_graph)
        return Trainer(settings, load_dataset(settings.dataset), machine)

    return make


@pytest.mark.parametrize(
    ("variant", "more", "graphs"),
    [
        ("static", {}, 1),
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
    first.load_state_dict(state)  # into a trainer that has a graph
    first.train_epoch()
    assert all(map(torch.equal, through.net.state_dict().values(), first.net.state_dict().values()))


@pytest.mark.parametrize("changes", [{}, {"enforce_sparsity": True, "warmup_epochs": 1}], ids=["static", "regularised"])
def test_whatever_is_captured_was_launched_before(trainer_of, monkeypatch, changes):
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
    trainer = trainer_of("triton", block_size=16, **size, **changes)
    for _ in range(3):
        trainer.train_epoch()
    assert len(Graph.captured) >= 1 + bool(changes)
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
