"""The graph of a mask in the forms of other libraries, against its dense matrix; and in notebooks."""

import html
import importlib
import re

import networkx
import numpy as np
import pytest
import torch
from helpers import MASK_CASES, packed_randn, seeded

from g2g_kernels import BlockMask, GroupLayout

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture(params=MASK_CASES.values(), ids=MASK_CASES.keys())
def mask(request) -> BlockMask:
    return request.param.mask()


def whole_units(kind="index"):
    layouts = GroupLayout(16, 4, kind), GroupLayout(24, 4, kind)
    return BlockMask.sample(*layouts, p_inter=0.4, block_size=2, generator=seeded(0))


def values_of(mask):
    """Packed weights whose padding is no number, and one weight that exists and is zero."""
    values = packed_randn(mask, 1).masked_fill(~mask.valid(), torch.nan)
    values[0, 0, 0] = 0
    return values


def dense(mask, values):
    return torch.where(mask.to_dense(), mask.unpack(values.nan_to_num(0)), 0)


def test_edges_are_the_entries_of_the_dense_matrix_row_by_row(mask):
    values = values_of(mask)
    edges = mask.edges(values)
    target, source = mask.to_dense().nonzero(as_tuple=True)
    assert edges.source.tolist() == source.tolist()
    assert edges.target.tolist() == target.tolist()
    assert edges.weight.tolist() == dense(mask, values)[target, source].tolist()
    assert edges.source_group.tolist() == mask.cols.layout.group_of[source].tolist()
    assert edges.target_group.tolist() == mask.rows.layout.group_of[target].tolist()
    assert mask.edges().weight is None


def test_the_matrix_of_scipy_is_the_dense_one_and_keeps_weights_that_are_zero(mask):
    values = values_of(mask)
    matrix, graph = mask.to_scipy(values), mask.to_scipy()
    assert np.array_equal(matrix.toarray(), dense(mask, values).numpy())
    assert np.array_equal(graph.toarray(), mask.to_dense().numpy())
    assert (matrix.dtype, graph.dtype) == (np.float32, bool)
    assert matrix.nnz == graph.nnz == mask.num_weights
    assert matrix.has_canonical_format
    for dtype, theirs in ((torch.float64, np.float64), (torch.bfloat16, np.float32)):
        rounded = mask.to_scipy(values.to(dtype))
        assert rounded.dtype == theirs
        assert np.array_equal(rounded.toarray(), dense(mask, values.to(dtype)).double().numpy())


def test_the_csr_tensor_is_the_dense_weight_with_its_gradient(mask):
    values, x = values_of(mask).requires_grad_(), torch.randn(mask.shape[1], 3, generator=seeded(2))
    matrix = mask.to_csr(values)
    assert matrix.layout == torch.sparse_csr
    assert torch.equal(matrix.to_dense(), dense(mask, values))
    (matrix @ x).square().sum().backward()
    (expected,) = torch.autograd.grad((dense(mask, values) @ x).square().sum(), values)
    torch.testing.assert_close(values.grad[mask.valid()], expected[mask.valid()])


@pytest.mark.parametrize(("kind", "order"), [("index", "neuron"), ("interleaved", "group"), ("random", "group")])
def test_the_bsr_tensor_has_the_units_as_blocks(kind, order):
    mask = whole_units(kind)
    values = packed_randn(mask, 1)
    matrix = mask.to_bsr(values, order)
    assert matrix.values().shape == values.shape
    weight = mask.unpack(values)
    if order == "group":
        weight = weight[mask.rows.order][:, mask.cols.order]
    assert torch.equal(matrix.to_dense(), weight)


def test_what_cannot_be_converted_is_refused_with_the_remedy():
    for kind in ("interleaved", "random"):
        mask = whole_units(kind)
        with pytest.raises(ValueError, match=f"{kind} groups are not blocks .* give order='group'"):
            mask.to_bsr(packed_randn(mask, 1))
        with pytest.raises(ValueError, match="order='rows' is unknown; choose neuron or group"):
            mask.to_bsr(packed_randn(mask, 1), "rows")
    mask = BlockMask.full(GroupLayout(10, 4), GroupLayout(24, 4), 2)
    with pytest.raises(ValueError, match=r"units of 2 × 2 do not fill every group.*use to_csr"):
        mask.to_bsr(packed_randn(mask, 1))
    for convert in (mask.edges, mask.to_scipy, mask.to_csr, mask.to_bsr, mask.to_networkx):
        with pytest.raises(ValueError, match="values have shape"):
            convert(torch.zeros(mask.num_units + 1, *mask.unit_shape))
    with pytest.raises(ValueError, match="source='rec' is also the target, but 24 inputs are not 16"):
        whole_units().to_networkx(source="rec", target="rec")


def test_the_graph_of_networkx_has_all_neurons_once_and_the_weights():
    mask = MASK_CASES["ten outputs"].mask()
    values = values_of(mask)
    graph = mask.to_networkx(values, source="hidden", target="class")
    outputs, inputs = mask.shape
    nodes = [("hidden", j) for j in range(inputs)] + [("class", i) for i in range(outputs)]
    assert list(graph) == nodes
    assert [group for _, group in graph.nodes(data="group")][inputs:] == mask.rows.layout.group_of.tolist()
    matrix = networkx.to_numpy_array(graph, nodes)[:inputs, inputs:].T
    assert np.array_equal(matrix.astype(np.float32), dense(mask, values).numpy())
    degrees = [degree for _, degree in mask.to_networkx().in_degree([("out", i) for i in range(outputs)])]
    assert degrees == mask.fan_in().tolist()
    mask = BlockMask.sample(GroupLayout(12, 3), GroupLayout(12, 3), p_inter=0.5, block_size=2, generator=seeded(0))
    graph = mask.to_networkx(source="rec", target="rec")
    assert len(graph) == 12
    assert graph.number_of_edges() == mask.num_weights


@pytest.mark.parametrize(
    ("name", "convert"), [("pandas", lambda mask: mask.edges().to_frame()), ("networkx", BlockMask.to_networkx)]
)
def test_a_library_that_is_absent_is_named_with_the_remedy(name, convert, monkeypatch):
    load = importlib.import_module

    def without(wanted, *rest):
        if wanted == name:
            raise ModuleNotFoundError(name)
        return load(wanted, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=f"{name} is not installed, .*pip install {name}"):
        convert(whole_units())


def test_a_notebook_shows_the_mask_and_its_picture():
    single_weights = BlockMask.sample(GroupLayout(200, 4), GroupLayout(130, 2), block_size=1, generator=seeded(0))
    for mask in (whole_units(), single_weights):
        page, picture = mask._repr_html_(), mask.to_string().splitlines()
        assert html.escape(repr(mask)) in page
        drawn = [["░"] * len(line) for line in picture]
        for character, path in zip("▒▓█", re.findall(r'd="([^"]*)"', page), strict=True):
            for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1H\1z", path):
                drawn[int(y)][int(x) : int(x) + int(run)] = character * int(run)
        assert ["".join(line) for line in drawn] == picture
