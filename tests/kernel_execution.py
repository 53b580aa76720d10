"""A pytest plugin, ``-p kernel_execution``: Triton kernels are executed without a GPU, from the compiler's IR.

For ``tests/execute_kernels.sh``, whose environment has ``ttsem``. Tensors "on cuda" are on the CPU. A launch that reads
or writes outside of its tensors, whose programs race for an element or whose values are undefined fails its test, at
the kernel's line; a test that finds wrong values lists the lines at which its kernels store. Kernels are executed as
they are after the first passes, which know no GPU: for compute capability 8.0, 9.0 and 10.0 that has to be one text.
Under the marker ``passes`` a kernel is executed again as every pass receives it, down to the conversion to LLVM's
operations, for 9.0: a pass that changes values is named.
"""

import collections
import contextlib
import functools
import itertools
import re

import pytest
from triton.runtime.jit import JITFunction
from ttsem import harness, mlir, sanitize, validate

CAPABILITIES = 80, 90, 100
#: whose passes are executed
CAPABILITY = 90

RACES, OUTSIDE, UNDEFINED, WRONG = "races", "accesses out of bounds", "undefined values", "values wrong"
UNCHECKED, UNJUDGED = "launches too large to be checked for races", "launches not judged"
CHANGED = "passes that change values"
#: what there may be none of
COUNTED = RACES, OUTSIDE, UNDEFINED, WRONG, UNCHECKED, UNJUDGED, CHANGED
FAULTS = {"race": RACES, "oob_read": OUTSIDE, "oob_write": OUTSIDE, "poison": UNDEFINED}


class ChangedByPassError(Exception):
    """A pass of the compiler changes what a kernel computes, or it cannot be said whether."""


def _identity(record: harness.LaunchRecord, capability: int) -> str:
    """What a kernel is compiled for: launches of one identity run the same code."""
    options, *rest = harness._specialize(record.fn, record.args, record.kwargs, harness.target_for("cpu", capability))
    return repr((record.fn.fn.__module__, record.fn_name, capability, vars(options), rest))


#: the location of an operation of an inlined function, at the end of a line: first its own, then its callers'
INLINED = re.compile(r'(?m)^(?!\s*\^)(.*)loc\((?:"[^"]*"\()?(?:callsite\()+(?:"[^"]*"\()?("[^"]+":\d+:\d+).*$')
#: where a store is in the source
STORE = re.compile(r'(?m)"tt\.(?:store|atomic_rmw)".*loc\("(?:[^"]*/)?([^"/]+)":(\d+):\d+\)$')


def _first_ir(record: harness.LaunchRecord, capability: int) -> str:
    """The module of a launch after the first passes, those of Triton's own operations, each with one line of source."""
    text = harness._stage_text(record, "ttir", harness.target_for("cpu", capability))
    return INLINED.sub(r"\1loc(\2)", mlir.to_generic(text, None))


def compile_and_parse_once() -> None:
    """For every kernel, not for every launch, which would take most of the time."""
    texts: dict[str, str] = {}

    def ir_for_launch(record, stage, target):
        assert stage == "ttir"
        identity = _identity(record, CAPABILITY)
        if identity not in texts:
            text, *others = (_first_ir(record, capability) for capability in (CAPABILITY, *CAPABILITIES))
            if set(others) != {text}:
                raise sanitize.Unjudged("error", f"{record.fn_name}: the IR depends on the compute capability", [])
            texts[identity] = text
        return texts[identity]

    mlir.enable_generic_printing()
    harness.ir_for_launch = ir_for_launch
    mlir.parse = functools.lru_cache(maxsize=256)(mlir.parse)


class Execution:
    """Executes the launches of this process and counts them."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.stores: dict[str, set[str]] = {}  # of the test that runs: the lines that store, by kernel
        self.by_passes = False  # for the test that runs
        self.modules: dict[str, int] = {}  # executed of every kernel under ``passes``
        self.opened = contextlib.ExitStack()

    def open(self) -> None:
        compile_and_parse_once()
        self.session = self.opened.enter_context(sanitize.session(CAPABILITY))
        execute, ir_for_launch = JITFunction.run, harness.ir_for_launch

        def noted_ir(record, stage, target):
            text = ir_for_launch(record, stage, target)
            self.stores.setdefault(record.fn_name, set()).update(f"{file}:{line}" for file, line in STORE.findall(text))
            return text

        def run(kernel, *args, grid, warmup, **kwargs):
            if not self.by_passes:
                return execute(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            return self.validate(harness.record_launch(kernel, args, kwargs, grid, execute, "").record)

        JITFunction.run, harness.ir_for_launch = run, noted_ir
        self.opened.callback(setattr, JITFunction, "run", execute)

    def validate(self, record: harness.LaunchRecord) -> None:
        """Executes what every pass receives; the reference is what the test judges, the module of :func:`_first_ir`."""
        identity = _identity(record, CAPABILITY)
        if identity in self.modules:
            return
        stages = validate.split_dump(harness.dump_for_launch(record, harness.target_for("cpu", CAPABILITY)))
        changed = stages[:1] + [stage for last, stage in itertools.pairwise(stages) if stage[1] != last[1]]
        *results, end = validate.validate_stages(record, changed).passes
        assert end.unsupported == ["<llvm dialect>"], f"{record.fn_name} is not converted to LLVM: {end}"
        self.modules[identity] = len(results)
        culprit = validate.changed_by_index(results)
        if culprit is not None:
            raise ChangedByPassError(f"{results[culprit].pass_name} of {record.fn_name} changes values")
        for result in results:
            if result.verdict not in ("match", "approx"):
                raise ChangedByPassError(f"{record.fn_name}, {result.pass_name}: {result}")

    def summary(self) -> str:
        counts = self.counts
        faults = ", ".join(f"{counts[name]} {name}" for name in COUNTED)
        by_passes = f"{len(self.modules)} kernels pass by pass in {sum(self.modules.values())} modules"
        return f"{counts['launches']} launches executed, {by_passes}, {counts['skipped']} tests skipped: {faults}"

    # --- pytest -------------------------------------------------------------------------------------------------------

    def pytest_runtest_setup(self, item) -> None:
        self.stores.clear()
        self.by_passes = item.get_closest_marker("passes") is not None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.skipped:
            self.counts["skipped"] += 1
        elif report.failed:
            error = call.excinfo.value
            if isinstance(error, sanitize.KernelFault):
                self.counts[FAULTS[error.fault.kind]] += 1
            elif isinstance(error, sanitize.Unjudged):
                self.counts[UNJUDGED] += 1
            elif isinstance(error, ChangedByPassError):
                self.counts[CHANGED] += 1
            else:
                self.counts[WRONG] += 1
                stores = (f"{kernel}: {', '.join(sorted(lines))}" for kernel, lines in self.stores.items())
                report.sections.append(("stores of this test's kernels", "\n".join(stores)))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session) -> None:
        self.counts["launches"] += self.session.launches
        self.counts[UNCHECKED] += self.session.races_unchecked
        if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
            session.config.workeroutput["executed"] = dict(self.counts), self.modules
        elif session.exitstatus == 0 and (not self.counts["launches"] or any(self.counts[name] for name in COUNTED)):
            session.exitstatus = 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        counts, modules = getattr(node, "workeroutput", {}).get("executed", ({}, {}))
        self.counts.update(counts)
        self.modules |= modules

    def pytest_unconfigure(self, config) -> None:
        self.opened.close()
        if not hasattr(config, "workeroutput"):
            print(self.summary())


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config) -> None:
    """Before ``every_test.py`` asks whether there is a GPU."""
    execution = Execution()
    execution.open()
    early_config.pluginmanager.register(execution)
