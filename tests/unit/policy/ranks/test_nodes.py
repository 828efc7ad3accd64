"""Which rank runs on which node, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from services.policy.ranks.nodes import Nodes, address_for_nodes
from shared.config import RecipeError

SSH = "ssh -o BatchMode=yes {node}"


def test_without_nodes_all_ranks_are_here() -> None:
    nodes = Nodes.parse("", "", 4)
    assert nodes.far == frozenset() and nodes.there(3) == ()


@pytest.mark.parametrize("given", ["a:2,b:2", "a,b", " a , b:2"])
def test_ranks_follow_each_other_node_by_node_and_those_of_others_are_far(given: str) -> None:
    nodes = Nodes.parse(given, SSH, 4)
    assert nodes.names == ("a", "a", "b", "b") and nodes.far == {2, 3}
    assert nodes.there(1) == ()
    assert nodes.there(2) == ("ssh", "-o", "BatchMode=yes", "b")


def test_one_node_that_is_named_is_this_one() -> None:
    assert Nodes.parse("a", "", 4) == Nodes(("a",) * 4)


@pytest.mark.parametrize(
    ("nodes", "reach", "said"),
    [
        ("a,b", SSH, "as many nodes as divide the 3 ranks .* got 'a'"),
        ("a:2,b:2", SSH, "expected places for the 3 ranks of policy.parallel, got 4"),
        ("a:two,b:1", SSH, "expected NODE:RANKS.* got 'a:two'"),
        (":3", SSH, "got ':3'"),
        ("a:2,b:1", "", "expected a command with {node}"),
        ("a:2,b:1", "ssh b", "expected a command with {node}"),
    ],
)
def test_places_that_do_not_fit_are_refused_by_name(nodes: str, reach: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Nodes.parse(nodes, reach, 3)


def test_an_interface_that_other_nodes_cannot_reach_is_refused() -> None:
    with pytest.raises(RecipeError, match="weights.interface 'lo': expected one that other nodes reach"):
        address_for_nodes("lo")
    with pytest.raises(RecipeError, match="weights.interface 'nosuch0': expected an interface of this node"):
        address_for_nodes("nosuch0")
