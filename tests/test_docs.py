"""The documentation is true and whole: its code prints what it says, its site builds strictly and stands alone."""

import doctest
import importlib
import importlib.util
import inspect
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from code_blocks import BLOCK, cells, run_blocks, run_cells
from helpers import ROOT
from PIL import Image

import g2gnet.inspect
from g2g_kernels import dispatch
from g2g_kernels.ops.g2g_linear import operator
from g2gnet.programs import train

#: pages whose code needs more than a directory to run in, and the tests that give it that
ELSEWHERE = {"README.md": "test_readme.py", "docs/other-libraries.md": "g2gnet/training/test_logging.py"}
ELSEWHERE |= {"docs/data.md": "g2gnet/data/test_data.py", "docs/brian2.md": "test_docs.py"}
ELSEWHERE |= {"docs/connectome.md": "clients/test_neuroscience.py"}
PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("g2g_kernels/ops/*/README.md"))
}
WITH_CODE = [name for name, page in PAGES.items() if BLOCK.search(page.read_text(encoding="utf-8"))]

#: packages whose every public name has an entry in the reference
PACKAGES = ("g2g_kernels", "g2gnet", "g2gnet.interop", "g2gnet.data", "g2gnet.data.features", "g2gnet.training")
PACKAGES += ("g2gnet.inspect", "g2gnet.programs.sweep")


#: the page that users begin with; the others run with ``pytest -m ci``
FIRST = "docs/tutorial.md"


@pytest.mark.parametrize(
    "name",
    [FIRST, *(pytest.param(name, marks=pytest.mark.ci) for name in WITH_CODE if name not in (FIRST, *ELSEWHERE))],
)
def test_the_code_of_a_page_prints_what_the_page_says(name, tmp_path, monkeypatch, plain_memory):
    # backends that a page registers are gone afterwards
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
    monkeypatch.setattr(operator, "ways", dict(operator.ways))
    monkeypatch.chdir(tmp_path)
    run_blocks(PAGES[name])


def test_every_page_with_code_is_run():
    assert {"docs/tutorial.md", "docs/concepts.md", "docs/backends.md", *ELSEWHERE} <= set(WITH_CODE)
    for page, test in ELSEWHERE.items():
        assert "run_blocks(" in (ROOT / "tests" / test).read_text(encoding="utf-8"), page


def test_a_page_that_says_something_else_than_its_code_prints_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\nand\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page.md says\n3\nbut its code prints\n2\n"):
        run_blocks(page)
    assert run_blocks(page, {"x + 1": "x + 2"})["x"] == 1


@pytest.mark.ci
def test_the_network_that_the_page_also_gives_to_brian2_has_the_spikes_that_brian2_had(plain_memory):
    """tests/clients/test_neuroscience.py runs Brian2 itself."""
    page = run_blocks(PAGES["docs/brian2.md"])
    with np.load(ROOT / "tests" / "brian2_spikes.npz") as recorded:
        for reset in ("subtract", "zero"):
            np.testing.assert_array_equal(page["in_g2g"](reset), recorded[reset])
        np.testing.assert_array_equal(page["current_based_in_g2g"](), recorded["current_based"])


@pytest.mark.ci
@pytest.mark.parametrize("name", ["draw_groupings", "draw_concepts", "draw_result"])
def test_the_pictures_can_be_drawn_again(name, tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.draw(tmp_path)
    drawn = list(tmp_path.iterdir())
    assert drawn
    for path in drawn:
        with Image.open(path) as picture, Image.open(ROOT / "docs" / path.name) as committed:
            # text is laid out in whole pixels, which differ with the fonts' version
            assert all(abs(a - b) < 30 for a, b in zip(picture.size, committed.size, strict=True)), path.name


#: packages of which each public class and function has an example
WITH_EXAMPLES = (*PACKAGES, "g2gnet.inspect.figures")
WITH_EXAMPLES += ("g2gnet.weights.densities", "g2gnet.weights.patterns")


def public(package):
    """The public classes and functions of a package by name, but for errors."""
    module = importlib.import_module(package)
    own = [name for name, each in vars(module).items() if name[0] != "_" and getattr(each, "__module__", "") == package]
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, BaseException)):
            yield f"{package}.{name}", value


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A folder in which train.py has left a small run."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--dataset fashionmnist-mini --model mixer --hidden_dim 32 --block_size 8 --T 5 --epochs 1"
    small = f"--limit_train 128 --limit_test 64 --checkpoint_dir {folder}/checkpoints"
    assert train.main([*flags.split(), *small.split()]) == 0
    return folder


@pytest.mark.ci
@pytest.mark.parametrize("package", WITH_EXAMPLES)
def test_each_public_class_and_function_has_an_example_that_is_true(package, trained_run, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 20)  # few dots are drawn sooner
    monkeypatch.chdir(trained_run)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names = {"torch": torch, **vars(importlib.import_module(package))}
    if package.startswith("g2gnet.inspect"):  # whose own example begins all others
        begin = parser.get_doctest(inspect.getdoc(g2gnet.inspect), vars(g2gnet.inspect) | names, package, None, None)
        assert runner.run(begin, clear_globs=False).failed == 0, capsys.readouterr().out
        names |= begin.globs
    for name, value in public(package):
        text = inspect.getdoc(value)
        assert "\nExample:\n" in text, f"{name} has no example"
        result = runner.run(parser.get_doctest(text, dict(names), name, None, None))
        assert result.failed == 0, capsys.readouterr().out


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.ci
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_and_shows_pictures(notebook):
    matplotlib = pytest.importorskip("matplotlib")
    if notebook.stem == "from-snntorch":
        pytest.importorskip("snntorch")
    matplotlib.use("Agg")
    shown = run_cells(notebook, {"range(1, 4)": "range(1, 2)", "epochs=2": "epochs=1"})
    assert {"Figure", "BlockMask"} <= {type(value).__name__ for value in shown}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_kept_without_outputs_which_could_be_stale(notebook):
    """The site executes it, and so does its reader."""
    assert notebook.stem in PAGES["docs/index.md"].read_text(encoding="utf-8")
    for cell in cells(notebook):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


class Links(HTMLParser):
    """What one page of the site refers to, and the places in it that can be referred to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []  # a browser gets these by itself
        self.followed: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.places |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if "src" in attributes:
            self.loaded.append(attributes["src"])
        if "href" in attributes:
            (self.followed if tag == "a" else self.loaded).append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built by the README's command elsewhere."""
    for package in ("sphinx", "myst_nb", "sphinx_copybutton", "sphinx_design", "furo"):
        pytest.importorskip(package, reason="the generator is not installed (pip install -e '.[docs]')")
    folder = tmp_path_factory.mktemp("docs")
    command = "sphinx-build -W -c docs . build/docs"
    assert command in PAGES["README.md"].read_text(encoding="utf-8")
    arguments = command.replace("build/docs", str(folder / "site")).split()[1:]
    build = [sys.executable, "-m", "sphinx", "-q", "-d", str(folder / "read"), *arguments]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {page: Links(page) for page in site.rglob("*.html")}


@pytest.mark.long
def test_the_site_has_every_page_every_public_name_executed_notebooks_and_a_search(site, pages):
    for name in PAGES:
        assert (site / name).with_suffix(".html").exists(), name
    reference = site / "docs" / "api"
    described = set().union(*(links.places for page, links in pages.items() if reference in page.parents))
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            assert f"{package}.{name}" in described
    objects = {page.stem for page in pages if page.parent.name == "objects"}  # a page for each class and function
    assert {"g2g_kernels.BlockMask", "g2gnet.G2GNet", "g2gnet.interop.from_snntorch"} <= objects
    assert len(objects) > 100
    for notebook in NOTEBOOKS:
        page = (site / notebook.relative_to(ROOT)).with_suffix(".html")
        assert any("_images" in address for address in pages[page].loaded), notebook.name
    # the search has the function whose results are shortened
    few, search = ((site / "_static" / f"{name}.js").read_text("utf-8") for name in ("few-results", "searchtools"))
    assert "_performSearch" in few
    assert "[docname, title, anchor, descr, score, filename" in search
    assert "Search._performSearch(" in search


@pytest.mark.long
def test_the_site_loads_nothing_from_elsewhere_and_its_links_lead_somewhere(site, pages):
    assert len(pages) > len(PAGES)
    for page, links in pages.items():
        for address in links.loaded:
            assert not urlsplit(address).netloc, f"{page.name} loads {address}"
        for address in {*links.loaded, *links.followed}:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.name} refers to {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].places, f"{page.name} refers to {address}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert "@import" not in text
        assert "url(http" not in text.replace('"', "").replace("'", "")
