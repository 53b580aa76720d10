"""A whole network as one graph, and its table for notebooks."""

import functools

import networkx
import numpy as np
from networks import small_net

from g2gnet import graphs

network = functools.partial(small_net, sizes=(20, 16, 5), p_inter=0.3, block_size=2, num_groups=4, T=50)


def test_the_graph_of_a_network_is_the_chain_of_its_layers():
    net = network()
    graph = net.to_networkx()
    sizes = {"input": 20, "lif1": 16, "lif2": 16, "lif3": 5}
    nodes = [(name, neuron) for name, size in sizes.items() for neuron in range(size)]
    assert list(graph) == nodes
    expected, row = np.zeros((len(nodes), len(nodes))), 0
    for connection, _ in net.layers():
        weight = connection.dense_weight().detach().numpy()
        col = row + weight.shape[1]
        expected[row:col, col : col + weight.shape[0]] = weight.T
        row = col
    assert np.array_equal(networkx.to_numpy_array(graph, nodes), expected)
    # hidden neurons keep their groups as outputs: contiguous in fc1, although fc2 interleaves its inputs
    groups = [graph.nodes["lif1", neuron]["group"] for neuron in range(16)]
    assert groups == net.fc1.mask.rows.layout.group_of.tolist()
    assert groups != net.fc2.mask.cols.layout.group_of.tolist()


def test_recurrent_connections_are_edges_among_the_neurons_of_a_layer_with_a_row_and_a_picture():
    net = network(recurrent=True)
    graph, forward = net.to_networkx(), network().to_networkx()
    assert list(graph.nodes(data=True)) == list(forward.nodes(data=True))
    for name, recurrent in (("lif1", net.rec1), ("lif2", net.rec2)):
        nodes = [(name, neuron) for neuron in range(16)]
        weight = networkx.to_numpy_array(graph, nodes).T  # [target, source]
        assert np.array_equal(weight, recurrent.dense_weight().detach().numpy())
        assert weight.any()
        assert {delay for *_, delay in graph.subgraph(nodes).edges(data="delay")} == {1}
        graph.remove_edges_from(list(graph.subgraph(nodes).edges))
    assert set(graph.edges(data="weight")) == set(forward.edges(data="weight"))
    rows = net._repr_html_().split("<tr>")[2:]
    assert [row[4 : row.index("</td>")] for row in rows] == ["fc1, lif1", "rec1", "fc2, lif2", "rec2", "fc3, lif3"]
    for row, connection in zip(rows, net.connections().values(), strict=True):
        assert f"{connection.mask.num_units} of {connection.mask.grid[0] * connection.mask.grid[1]}" in row
        assert graphs.picture(connection.mask) in row
    assert "lif1, 1 step later" in rows[1]
    assert all(text in rows[2] for text in ("16 → 16", "4 (interleaved)", "LIF("))
