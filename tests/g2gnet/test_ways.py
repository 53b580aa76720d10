"""Which way runs a network, and why none before it: ``net.explain(x)``, the log, and the cache of choices."""

import logging

import pytest
import torch
from helpers import seeded
from networks import small_net
from torch.utils._python_dispatch import TorchDispatchMode

from g2g_kernels import BackendError, BlockMask, GroupLayout, available_backends, dispatch
from g2g_kernels.cpu import plans
from g2g_kernels.ops.g2g_stack import WAYS, checks, ways
from g2gnet import LIF, G2GLinear, Projection, SpikingNetwork

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="the CPU kernels were not built")
X = torch.rand(5, 30, generator=seeded(1)) * 3
TURNS = (
    "comes back, but not by one recurrent connection in lists with one delay for all neurons: {} steps at a time take "
    "turns"
)

#: of each neuron of a
MANY = torch.arange(24) + 2


def graph(delay: int | torch.Tensor = 1, feedback: int = 0, lists: bool = False) -> SpikingNetwork:
    """Populations a and out; a reaches itself after ``delay`` steps, out reaches a after ``feedback`` (0: never)."""

    def joined(into: int, out: int, **options) -> G2GLinear:
        layouts = GroupLayout(out, 1), GroupLayout(into, 1)
        mask = BlockMask.sample(*layouts, 0.5, 0.5, block_size=1 if lists else 4, generator=seeded(into + out))
        return G2GLinear(mask, **options)

    projections = [Projection("input", "a", joined(30, 24)), Projection("a", "out", joined(24, 8))]
    projections.append(Projection("a", "a", joined(24, 24, bias=False), delay=delay))
    if feedback:
        projections.append(Projection("out", "a", joined(8, 24, bias=False), delay=feedback))
    return SpikingNetwork({"a": LIF(), "out": LIF()}, projections, "out", T=6)


def hooked(net):
    net.lif1.register_forward_hook(lambda *args: None)
    return net


def continued(net, **options):
    """A run that continues a state."""
    return net, {"state": net.simulate(X).state, **options}


NO_GRADIENT, NO_MEMBRANES = "gives spikes over time no gradient", "does not read 'membranes' of a population"
NO_MODULE = "no module has to be called"
HOOKS, IN_LISTS = "lif1 carries hooks", "the weights to population 0 lie in lists"
CARRIED = "the delayed spikes to population 1 that come from a state have no gradient"
KERNELS, TURN = ("cpu chain", "cpu graph", "cpu images", "cpu events", "cpu lists"), "operators in turn"
NO_LISTS = "no weights lie in lists"
NO_IMAGES = {"cpu images": "population 0 does not receive one convolution of what comes before it, and nothing else"}
GRADIENTS = {
    "cpu events": "computes no gradients of the model 'lif' (population 0); "
    "call under torch.no_grad() if none is needed"
}
LATE = "the populations are no chain: population 0 also receives population {}, up to {} steps later"
#: (network, or network and arguments), the way that runs, and why none before it but Triton's
CASES = {
    "chain": (lambda: small_net(), "cpu chain", {}),
    "recurrent": (lambda: small_net(recurrent=True), "cpu chain", {}),
    "delays": (lambda: small_net(delay=3), "cpu chain", {}),
    "delays from a state": (lambda: continued(small_net(delay=3)), "cpu graph", {"cpu chain": CARRIED}),
    "delays in chunks": (lambda: (small_net(delay=3), {"chunk": 2}), "cpu graph", {"cpu chain": CARRIED}),
    "cycle": (lambda: graph(feedback=3), "cpu graph", {"cpu chain": LATE.format(1, 3)}),
    "late recurrence": (lambda: graph(delay=18), "cpu graph", {"cpu chain": LATE.format(0, 18)}),
    "lists": (lambda: graph(lists=True), "cpu lists", {
        "cpu chain": IN_LISTS, "cpu graph": IN_LISTS, **NO_IMAGES, **GRADIENTS,
    }),
    "lists without gradients": (lambda: graph(delay=18, lists=True).requires_grad_(False), "cpu events", {
        "cpu chain": LATE.format(0, 18), "cpu graph": IN_LISTS, **NO_IMAGES,
    }),
    "lists with a delay": (lambda: graph(delay=18, lists=True), "cpu lists", {
        "cpu chain": LATE.format(0, 18), "cpu graph": IN_LISTS, **NO_IMAGES, **GRADIENTS,
    }),
    "lists with many delays": (lambda: graph(delay=MANY, lists=True), TURN, {
        "cpu chain": LATE.format(0, 25), "cpu graph": IN_LISTS, **NO_IMAGES, **GRADIENTS,
        "cpu lists": f"what population 0 sends {TURNS.format(2)}",
    }),
    "dropout": (lambda: small_net(dropout=0.3).train(), "cpu chain", {}),
    "state": (lambda: continued(small_net()), "cpu chain", {}),
    "hooks": (lambda: hooked(small_net()), "modules in turn", dict.fromkeys((*KERNELS, TURN), HOOKS)),
    "membranes": (lambda: (small_net(), {"membranes": True}), TURN, {
        **dict.fromkeys(KERNELS, NO_MEMBRANES), **NO_IMAGES, "cpu events": NO_LISTS,
    }),
    "spikes": (lambda: (small_net(), {"spikes": True}), TURN, dict.fromkeys(KERNELS, NO_GRADIENT)),
    "cpu": (lambda: small_net(backend="cpu"), "cpu chain", {}),
    "torch": (lambda: small_net(backend="torch"), "reference", {
        TURN: "those of backend torch are the reference", "modules in turn": NO_MODULE,
    }),
    "float64": (lambda: small_net().double(), "reference", {
        **dict.fromkeys(KERNELS, "needs float32 tensors, not torch.float64"), "cpu events": NO_LISTS,
        TURN: "no other backend serves them", "modules in turn": NO_MODULE,
    }),
}  # fmt: skip


@pytest.fixture
def few_lists(monkeypatch):
    """Single weights lie in lists, however few there are."""
    monkeypatch.setattr(plans, "IN_LISTS", {use: (1e9, 0) for use in plans.IN_LISTS})
    ways._chosen.clear()
    yield
    ways._chosen.clear()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_way_that_runs_and_the_reason_of_each_before_it(case, autocast, request, monkeypatch):
    make, way, reasons = CASES[case]
    if "lists" in case:
        request.getfixturevalue("few_lists")
    if autocast and case == "float64":
        pytest.skip("autocast leaves float64 alone")
    made = make()
    net, options = made if isinstance(made, tuple) else (made, {})
    x = X.to(next(net.parameters()).dtype)
    ran = []
    for name, own in WAYS.ways.items():
        spied = [each._replace(run=lambda call, each=each: ran.append(each.name) or each.run(call)) for each in own]
        monkeypatch.setitem(WAYS.ways, name, tuple(spied))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chosen = net.explain(x, **options)
        print(f"{case:20}", str(chosen).replace("\n", "\n" + " " * 21))
        assert not ran
        assert chosen.way.name == way
        found = {name: reason for name, reason in chosen.reasons.items() if name != "triton"}
        assert list(found) == list(reasons)
        assert all(reason.startswith(reasons[name]) for name, reason in found.items()), found
        net.simulate(x, **options)
    assert set(ran) == {way}


def test_a_forced_backend_keeps_its_ways_and_an_error_lists_the_reason_of_each():
    net = small_net(backend="cpu").double()
    needs = "needs float32 tensors, not torch.float64"
    of_events = f"cpu events: {NO_LISTS}; cpu lists: {needs}"
    with pytest.raises(
        BackendError, match=f"cpu chain, cpu graph, cpu images: {needs}; {of_events}; {TURN}: cpu: {needs}"
    ):
        net(X.double())


def test_a_slow_way_is_said_once(few_lists, caplog):
    dispatch._log_choice.cache_clear()
    caplog.set_level(logging.INFO, "g2g_kernels")
    for _ in range(2):
        graph(delay=MANY, lists=True)(X)
    slow = f"Backend of g2g_stack: {TURN}, which is slower"
    said = [each for each in caplog.messages if each.startswith(slow)]
    assert len(said) == 1
    assert TURNS.format(2) in said[0]


class NoValues(TorchDispatchMode):
    """Fails where the value of a tensor is read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [case for case in CASES if "lists" not in case])
def test_checks_and_choices_read_no_values_so_that_a_signature_has_all_that_they_depend_on(case):
    made = CASES[case][0]()
    net, options = made if isinstance(made, tuple) else (made, {})
    x = X.to(next(net.parameters()).dtype)
    dropped = net.drop(len(x)) if net.training and net.dropout else None
    chunk = options.pop("chunk", None)
    options = {"state": None, "spikes": False, "membranes": False} | options
    call = net._call(x, options["state"], chunk, dropped, options["spikes"], options["membranes"], None)
    with NoValues():
        checked = checks.checked(call)
        WAYS.choose(checked, backend=call.backend)


def test_a_mask_that_changed_in_place_is_checked_anew():
    """A recurrent connection that gets another order of neurons than the kernels of the chain need."""
    net = small_net(recurrent=True, block_size=4, T=3)
    net(X)
    assert net.explain(X).way.name == "cpu chain"
    other = GroupLayout(net.rec1.mask.shape[0], net.rec1.mask.rows.layout.num_groups, "random", seeded(5))
    net.rec1 = G2GLinear(BlockMask.sample(other, other, 1, 0.4, 4, seeded(3)), bias=False)
    counts = net(X)
    assert net.explain(X).way.name == "operators in turn"
    net.backend = "torch"
    assert torch.equal(net(X), counts)
