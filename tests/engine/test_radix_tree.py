"""The radix tree against a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lattice_serve.engine.radix_tree import Ids, Node, RadixTree

keys = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


def array(key: tuple[int, ...]) -> Ids:
    return np.array(key, dtype=np.int32)


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[str] = RadixTree()
        self.known: dict[tuple[int, ...], Node[str]] = {}

    @rule(key=keys)
    def put(self, key: tuple[int, ...]) -> None:
        node = self.tree.node(array(key))
        assert node is self.known.get(key, node)
        node.value = str(key)
        self.known[key] = node

    @rule(data=st.data(), following=keys)
    def put_after(self, data: st.DataObject, following: tuple[int, ...]) -> None:
        """From a known sequence on: the same node as from the root."""
        if self.known:
            before = data.draw(st.sampled_from(sorted(self.known)))
            node = self.tree.node(array(following), self.known[before])
            assert node is self.tree.node(array(before + following))
            node.value = str(before + following)
            self.known[before + following] = node

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.known:
            self.tree.remove(self.known.pop(data.draw(st.sampled_from(sorted(self.known)))))

    @rule(key=keys)
    def find(self, key: tuple[int, ...]) -> None:
        path, shared = self.tree.path(array(key))
        begins = sorted((known for known in self.known if key[: len(known)] == known), key=len)
        assert [(depth, node.value) for depth, node in path] == [(len(known), str(known)) for known in begins]
        assert shared == max(n for n in range(len(key) + 1) if n == 0 or any(k[:n] == key[:n] for k in self.known))

    @invariant()
    def is_compact(self) -> None:
        assert {node.value for node in self.tree} == {str(known) for known in self.known}
        tokens, nodes = 0, [self.tree.root]
        while nodes:
            node = nodes.pop()
            tokens += len(node.edge)
            nodes += node.children.values()
            if node is not self.tree.root:
                assert len(node.edge) > 0
                assert node.value is not None or len(node.children) > 1
            assert all(child.parent is node and child.edge[0] == first for first, child in node.children.items())
        assert tokens == self.tree.tokens


TestTree = TreeMachine.TestCase
