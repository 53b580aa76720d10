"""How the site is built: ``sphinx-build -W -c docs . build/docs``, from the root of the repository.

Its pages lie where a reader of the repository looks for them (``README.md``, ``docs/``, the operators' own READMEs) and
link to one another and to source files relatively, so that all of it reads as well on a git host. ``nitpicky`` and
``-W`` make a failure of every link that leads nowhere, in docstrings too.
"""

import functools
import importlib
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.transforms import Transform
from sphinx.addnodes import desc_signature, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # documents this copy, whichever is installed

import g2gnet  # noqa: E402

project = "g2g"
version = release = g2gnet.__version__
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/api/**.rst",
    "docs/notebooks/*.ipynb",
    "g2g_kernels/ops/*/README.md",
    "g2g_kernels/csrc/PERFORMANCE.md",
    "g2g_kernels/triton/CHECKS.md",
    "benchmarks/*.md",
    "benchmarks/results/*.md",
]
#: of kernels that no GPU has run: links lead to these pages, the menu does not
OUTSIDE_THE_MENU = (
    "g2g_kernels/triton/CHECKS",
    "docs/first-run",
    "benchmarks/results/aot",
)
exclude_patterns = [".*", "build", "data"]  # folders that need not be searched
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
smartquotes_action = "qe"  # quotation marks and dots: a dash of two hyphens is the begin of a flag

# Notebooks are kept without outputs, which could go stale, and executed here.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# Commands and programs are copied, without prompts; outputs are not.
copybutton_selector = ", ".join(
    f"div.highlight-{language} pre" for language in ("python", "py", "py3", "sh", "bat", "toml", "ipython3", "default")
)
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def names_of(module: str) -> list[str]:
    """The classes and functions of a module's page: those of its ``__all__`` that it or a module below it defines, or
    all that it defines, except those on the page of the library's top. (Each has one page, as source code has links to
    one.)"""
    top = module.partition(".")[0]
    shown = {} if module == top else dict.fromkeys(sys.modules[top].__all__)
    offered = vars(importlib.import_module(module))
    names = offered.get("__all__") or [
        name for name, each in offered.items() if getattr(each, "__module__", None) == module and name[0] != "_"
    ]
    own = [name for name in names if getattr(offered[name], "__module__", "").startswith(module)]
    return [name for name in own if hasattr(offered[name], "__qualname__") and name not in shown]


def data_of(module: str) -> list[str]:
    """The constants that it defines with a comment and that ``__all__`` of it or of its package names."""
    named = {name for of in (module, module.rpartition(".")[0]) for name in getattr(sys.modules.get(of), "__all__", ())}
    return [name for space, name in ModuleAnalyzer.for_module(module).find_attr_docs() if not space and name in named]


# a page of its own for each module, class and function, in docs/api/objects
autosummary_generate = ["docs/api/g2g_kernels.rst", "docs/api/g2gnet.rst"]
autosummary_context = {"names_of": names_of, "data_of": data_of}
suppress_warnings = ["config.cache"]  # of these functions
templates_path = [str(ROOT / "docs" / "site" / "templates")]  # autosummary looks for another path elsewhere

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # else PyTorch's own text for every method that overrides one of nn.Module
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"
nitpicky = True
# other projects' names, which only a connection could look up
nitpick_ignore_regex = [("py:.*", r"(?!g2g)\w+\..*")]

html_theme = "furo"
html_title = f"g2g {version}"
html_static_path = ["site/wide.css", "site/few-results.js"]
html_css_files = ["wide.css"]
html_js_files = ["few-results.js"]
html_extra_path = ["site/index.html"]  # leads from the top of the site to the front page
html_copy_source = False
html_show_copyright = False


class FoldersAsText(Transform):
    """Leaves the words of links to folders, which have a page on a git host but none here."""

    default_priority = 1

    def apply(self) -> None:
        here = Path(self.document["source"]).parent
        for link in list(self.document.findall(pending_xref)):
            if link["reftype"] == "myst" and (here / link["reftarget"]).is_dir():
                link.replace_self(link.children)


def find_by_last_name(
    app: Sphinx, env: BuildEnvironment, link: pending_xref, text: nodes.Element
) -> nodes.Element | None:
    """Resolves a name to the one documented object that ends with it; one of ours without a page stays text.

    A class is documented under its package (``g2g_kernels.BlockMask``), while annotations have the module in which it
    is defined, and docstrings its bare name.
    """
    if link.get("refdomain") != "py":
        return None
    python = env.domains["py"]
    kinds = python.objtypes_for_role(link["reftype"]) or []
    last = link["reftarget"].rpartition(".")[2]
    found = [
        entry
        for name, entry in python.objects.items()
        if name.rpartition(".")[2] == last and entry.objtype in kinds and not entry.aliased
    ]
    if len(found) != 1:
        return text if last in _names() else None
    return make_refnode(app.builder, link["refdoc"], found[0].docname, found[0].node_id, [text])


@functools.cache
def _names() -> set[str]:
    """Every name in our modules, and in their classes."""
    spaces = [vars(module) for name, module in sys.modules.items() if name.startswith(("g2g_kernels", "g2gnet"))]
    spaces += [vars(each) for space in spaces for each in space.values() if isinstance(each, type)]
    return set().union(*spaces)


def add_names_under_modules(app: Sphinx, doctree: nodes.document) -> None:
    """Gives what is documented a place under the module that defines it, and under the packages above, too.

    The pages of source code lead back to one of them for all of a module, whichever came first.
    """
    for signature in doctree.findall(desc_signature):
        name = signature.get("fullname", "")
        for module in _modules_of(signature.get("module", ""), name) if signature["ids"] else ():
            while module:
                if (place := f"{module}.{name}") not in signature["ids"]:
                    signature["ids"].append(place)
                module = module.rpartition(".")[0]


def _modules_of(documented: str, name: str) -> tuple[str, str]:
    """The module under which an object is documented, and the one that defines it."""
    thing = getattr(sys.modules.get(documented), name.partition(".")[0], None)
    return documented, getattr(thing, "__module__", documented)


def skip_field(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Leaves out "Alias for field number 0" of named tuples, whose fields their docstrings tell."""
    return True if type(member).__name__ == "_tuplegetter" else None


def mark_code(app: Sphinx, doctree: nodes.document) -> None:
    """Marks flags, which stay on one line, and code with long names, which tables break anywhere."""
    for code in doctree.findall(nodes.literal):
        words = code.astext().split()
        if re.fullmatch(r"--?\w+( [^-\s]{1,12})?", code.astext()):
            code["classes"].append("flag")
        elif max(map(len, words), default=0) > 24:
            code["classes"].append("long")


def leave_out_of_the_menu(app: Sphinx, doctree: nodes.document) -> None:
    """Marks a page that is on purpose in no menu."""
    if app.env.docname in OUTSIDE_THE_MENU:
        app.env.metadata[app.env.docname]["orphan"] = "true"


def setup(app: Sphinx) -> None:
    app.add_transform(FoldersAsText)
    app.connect("missing-reference", find_by_last_name)
    app.connect("doctree-read", add_names_under_modules)
    app.connect("doctree-read", mark_code)
    app.connect("doctree-read", leave_out_of_the_menu)
    app.connect("autodoc-skip-member", skip_field)
