"""The pages for neuroscientists with what they need: Brian2, and the worm's connectome.

``PYTHONPATH=.:tests python tests/clients/test_neuroscience.py`` records Brian2's spikes for tests without it.
"""

import re

import matplotlib
import numpy as np
from code_blocks import ROOT, run_blocks

RECORDED = ROOT / "tests" / "brian2_spikes.npz"


def with_brian2():
    """The names that docs/brian2.md defines, its code for Brian2 included."""
    names = {}
    for code in re.findall(r"^```py(?:thon)?\n(.*?)^```", (ROOT / "docs" / "brian2.md").read_text(), re.S | re.M):
        exec(code, names)
    return names


def test_brian2_and_g2g_have_the_same_spikes():
    names = with_brian2()
    with np.load(RECORDED) as recorded:
        for reset in ("subtract", "zero"):
            theirs = names["in_brian2"](reset)
            np.testing.assert_array_equal(theirs, recorded[reset])
            np.testing.assert_array_equal(theirs, names["in_g2g"](reset))
        theirs = names["current_based_in_brian2"]()
        np.testing.assert_array_equal(theirs, recorded["current_based"])
        np.testing.assert_array_equal(theirs, names["current_based_in_g2g"]())


def test_the_page_on_connectomes_trains_the_worm():
    matplotlib.use("Agg")
    assert run_blocks(ROOT / "docs" / "connectome.md")["after"] > 0.95


if __name__ == "__main__":
    names = with_brian2()
    spikes = {reset: names["in_brian2"](reset) for reset in ("subtract", "zero")}
    spikes["current_based"] = names["current_based_in_brian2"]()
    np.savez_compressed(RECORDED, **{name: each.astype(np.uint16) for name, each in spikes.items()})
