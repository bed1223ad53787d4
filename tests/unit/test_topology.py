"""Nodes, peers, and the option `hierarchical`."""

import pytest

from lightning_accel.algorithms.common.option_checks import check_hierarchical
from lightning_accel.transport.topology import Topology

TWO_BY_TWO = Topology.from_names(["a", "a", "b", "b"])
INTERLEAVED = Topology.from_names(["a", "b", "a", "b"])
UNEVEN = Topology.from_names(["a", "a", "b"])
ONE_NODE = Topology.from_names(["a", "a"])
ONE_EACH = Topology.from_names(["a", "b", "c"])


def test_ranks_are_grouped_by_name_and_nodes_ordered_by_lowest_rank():
    """Catches grouping by neighbourhood in rank order, and nodes in the order of their names."""
    assert TWO_BY_TWO.nodes == ((0, 1), (2, 3))
    assert INTERLEAVED.nodes == ((0, 2), (1, 3))
    assert Topology.from_names(["z", "a", "z"]).nodes == ((0, 2), (1,))


def test_peers_have_the_same_local_rank():
    """Catches peers taken by rank modulo, which is right only when ranks of a node are consecutive."""
    assert [TWO_BY_TWO.peers_of(rank) for rank in range(4)] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [INTERLEAVED.peers_of(rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [INTERLEAVED.node_of(rank) for rank in range(4)] == [(0, 2), (1, 3), (0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [(TWO_BY_TWO, True), (INTERLEAVED, True), (UNEVEN, False), (ONE_NODE, False), (ONE_EACH, False)],
)
def test_auto_needs_several_even_nodes_with_several_ranks(topology, expected):
    """Catches an "auto" that is hierarchical where it gains nothing, or cannot work."""
    assert topology.use_hierarchy("auto") is expected


def test_true_and_false_are_taken_at_their_word():
    """Catches an option that is accepted and ignored."""
    for topology in (TWO_BY_TWO, INTERLEAVED, ONE_NODE, ONE_EACH):
        assert topology.use_hierarchy(True) is True
    for topology in (TWO_BY_TWO, UNEVEN, ONE_NODE):
        assert topology.use_hierarchy(False) is False


def test_true_on_uneven_nodes_names_the_sizes():
    """Catches a hang or a wrong sum where peers of a local rank are missing."""
    with pytest.raises(ValueError, match=r"equally many ranks on every node: got 2, 1\..*auto"):
        UNEVEN.use_hierarchy(True)


@pytest.mark.parametrize("value", [1, 0, 1.0, None, "Auto", "flat", ["auto"]])
def test_other_values_are_refused(value):
    """Catches numbers taken for booleans, and misspellings taken for True."""
    with pytest.raises(ValueError, match=r'hierarchical must be True, False or "auto": got'):
        check_hierarchical(value)
