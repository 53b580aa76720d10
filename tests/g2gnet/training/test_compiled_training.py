"""Rewiring models that torch.compile has compiled, and schedulers that are copied and saved at any step."""

import copy
import functools

import pytest
import torch
from helpers import saved_and_read, seeded
from networks import small_net
from torch import nn

from g2gnet import DSTScheduler, sparsify

X = torch.rand(8, 30, generator=seeded(1)) * 3
LABELS = torch.arange(8)
RULES = [("hebb", "hebb"), ("set", "gradient")]


pickled = functools.partial(saved_and_read, weights_only=False)


def spiking():
    return small_net(block_size=3, T=4)


def perceptron():
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10)), block_size=4, generator=seeded(0))


class Counting:
    """A backend of torch.compile that counts what it compiles, and the runs of that."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*inputs):
            self.runs += 1
            return graph(*inputs)

        return run


whole = functools.partial(torch.compile, fullgraph=True)


def in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


def a_function(model, backend):
    return torch.compile(lambda x: model(x), backend=backend)


def train(parts, run, steps):
    _, optimizer, dst = parts
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(X), LABELS).backward()
        optimizer.step()
        dst.step()


def parts(make, rules, interval, **options):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, DSTScheduler(model, optimizer, interval, 0.3, *rules, **options)


# PyTorch 2.12 says so of whatever is told to run uncompiled
pytestmark = pytest.mark.filterwarnings("ignore:torch.compile with fullgraph=True found no compiled:UserWarning")
needs_stance = pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="PyTorch before 2.6")


@pytest.mark.ci
@needs_stance
@pytest.mark.parametrize(
    ("make", "compiled", "rules"),
    [(spiking, whole, RULES[0]), (spiking, in_place, RULES[1]), (perceptron, whole, RULES[1]),
     (perceptron, in_place, RULES[0]), (perceptron, a_function, RULES[0])],
)  # fmt: skip
def test_a_compiled_model_is_rewired_as_any_other(make, compiled, rules, plain_memory):
    plain, others, backend = parts(make, rules, interval=3), parts(make, rules, interval=3), Counting()
    train(plain, plain[0], 7)
    train(others, compiled(others[0], backend=backend), 7)
    # compiled once (in place by two frames), and run so in all but the steps of two updates
    assert (backend.graphs, backend.runs) in ((1, 5), (2, 10))
    assert others[2].pruned == plain[2].pruned > 0
    torch.testing.assert_close(others[0].state_dict(), plain[0].state_dict(), rtol=0, atol=0)


@pytest.mark.ci
@needs_stance
def test_a_scheduler_may_be_made_of_the_compiled_model_while_another_records(plain_memory):
    """And what is compiled runs as compiled again once both have what they need, or are gone."""
    models, backend = [spiking(), spiking()], Counting()
    compiled = whole(models[0], backend=backend)
    first, second = (
        DSTScheduler(of, torch.optim.SGD(model.parameters(), lr=0.1), interval=interval, grow="hebb")
        for of, model, interval in ((compiled, models[0], 1), (models[1], models[1], 2))
    )
    compiled(X).square().sum().backward()
    first.step()
    assert first.pruned > 0
    second.step()  # the next one is an update
    del first
    compiled(X)
    assert backend.runs == 0
    del second
    compiled(X)
    assert backend.runs == backend.graphs in (1, 2)  # in place by two frames


def test_without_a_way_to_run_it_uncompiled_a_compiled_model_is_refused(monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].compile(backend="eager")
    for of, name in ((model, "0"), (torch.compile(model, backend="eager"), "the model")):
        with pytest.raises(ValueError, match=rf"activity of {name} cannot be recorded, because it is compiled .* 2.6"):
            DSTScheduler(of, optimizer)
        DSTScheduler(of, optimizer, grow="random")


@pytest.mark.parametrize(("duplicate", "rules"), [(copy.deepcopy, RULES[0]), (pickled, RULES[1])])
def test_model_optimizer_and_scheduler_are_copied_together_at_any_step(duplicate, rules):
    """Between steps, while an update is due or not: the copies go on as the originals do."""
    originals = parts(spiking, rules, interval=2, final_density=0.1, total_steps=8)
    for step in range(4):
        model, _, dst = originals
        copies = duplicate(originals)
        for each in (originals, copies):
            train(each, each[0], 1)
        torch.testing.assert_close(copies[0].state_dict(), model.state_dict(), rtol=0, atol=0)
        assert copies[2].state_dict() == dst.state_dict()
        originals = [originals, copies][step % 2]
    assert originals[2].pruned > 0
