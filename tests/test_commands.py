"""Every command of the documentation is run by something, and the quick lane is there.

Commands of ``train.py``, ``crossval.py`` and ``g2g-pretrain`` are run by ``test_readme.py``, blocks of Python by
``test_docs.py``.
"""

import re

from helpers import ROOT
from quick import QUICK

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
#: what runs a command, by how the command begins; "by hand" is for what needs hours, other machines or the network
RUN_BY = {
    r"python (train|crossval)\.py|g2g-(pretrain|analyze|report)": "tests/test_readme.py",
    r"python -m g2gnet$": "tests/g2gnet/programs/test_programs.py",
    r"g2g-sweep": "tests/g2gnet/programs/test_sweep.py",
    r"python -m g2g_kernels\.doctor": "tests/g2g_kernels/test_doctor.py",
    r"torchrun": "tests/g2gnet/training/test_distributed.py",
    r"python -m benchmarks\.throughput": "tests/benchmarks/test_benchmarks.py",
    r"python -m benchmarks\.study": "tests/benchmarks/test_studies.py",
    r"python -m benchmarks\.chunks": "tests/benchmarks/test_measurements.py",
    r"python -m benchmarks\.brain": "tests/benchmarks/test_brain.py",
    r"python -m benchmarks\.first_run": "tests/benchmarks/test_first_run.py",
    r"pip install -e \"\.\[test\]\" && pytest$": ".ci/run",
    r"pip install -e \"\.\[(dev|docs|bench)\]\"( && .*)?$": ".ci/run",
    r"pip install -e \.$|pip wheel|python -m build|python -m venv \.venv": "tests/test_packaging.py",
    r"pip install -e \. && python train\.py": "tests/test_packaging.py",
    r"pip install uv && uv pip install --torch-backend cpu": "by hand",
    r"tests/(sanitize|clang)\.sh": ".ci/run",
    r"pytest -m quick": "tests/test_commands.py",
    r"pytest( |$)|\.ci/run": ".ci/run",
    r"tests/(versions|clients|execute_kernels)\.sh|python tests/golden_bits": "by hand",
    r"py -3\.12|g2g-environment|pip install -e \"\.\[directml\]\"": "by hand",
}


def commands():
    for page in PAGES:
        for block in re.findall(r"^```(?:sh|bat)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in re.sub(r"\\\n *", "", block).splitlines():
                yield page.name, line.partition("  #")[0].strip()


def test_every_documented_command_is_run_by_something():
    found = list(commands())
    assert len(found) > 40
    for page, command in found:
        runners = [runner for begin, runner in RUN_BY.items() if re.match(begin, command)]
        assert runners, f"nothing runs {command} of {page}"
        assert runners[0] == "by hand" or (ROOT / runners[0]).is_file()
    for begin in RUN_BY:
        assert any(re.match(begin, command) for _, command in found), f"no page has {begin}"


def test_the_quick_lane_lists_tests_that_there_are():
    for name in QUICK:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name
    assert len(set(QUICK)) == len(QUICK)
