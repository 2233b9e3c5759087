"""Token sequences and what is kept for them, found by their longest known prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

V = TypeVar("V")

Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"

_COMPARED = 1 << 14
"""Tokens at a time, so that what a comparison writes stays in a cache."""


class Node(Generic[V]):
    """The tokens on the way from its parent, and what is kept for the sequence that ends here."""

    __slots__ = ("children", "edge", "parent", "value")

    def __init__(self, edge: Ids, parent: Node[V] | None) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[int, Node[V]] = {}
        """By the first token of their edges."""
        self.value: V | None = None


class RadixTree(Generic[V]):
    """A radix tree: no node but the root is without a value and has fewer than two children."""

    def __init__(self) -> None:
        self.root: Node[V] = Node(np.empty(0, np.int32), None)
        self.tokens = 0
        """On all edges."""

    def path(self, ids: Ids) -> tuple[list[tuple[int, Node[V]]], int]:
        """(depth, node) of every node that has a value and whose sequence `ids` begins with, the shortest first; and
        how many tokens `ids` shares with what is known."""
        found = []
        node, depth = self.root, 0
        while True:
            if node.value is not None:
                found.append((depth, node))
            child = node.children.get(int(ids[depth])) if depth < len(ids) else None
            if child is None:
                return found, depth
            shared = _shared(child.edge, ids[depth:])
            depth += shared
            if shared < len(child.edge):
                return found, depth
            node = child

    def node(self, ids: Ids, after: Node[V] | None = None) -> Node[V]:
        """The node of this sequence, made if there is none. It must be given a value, or be removed.

        after: a node of the tree; `ids` are those that follow its sequence.
        """
        node, depth = after or self.root, 0
        while depth < len(ids):
            child = node.children.get(int(ids[depth]))
            if child is None:
                child = self._attach(Node(ids[depth:].copy(), node))
                self.tokens += len(child.edge)
                return child
            shared = _shared(child.edge, ids[depth:])
            node = child if shared == len(child.edge) else self._split(child, shared)
            depth += shared
        return node

    def remove(self, node: Node[V]) -> None:
        """Take away a node's value, and the tokens that nothing needs any more."""
        node.value = None
        self._prune(node)

    def __iter__(self) -> Iterator[Node[V]]:
        """Every node that has a value."""
        nodes = [self.root]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            if node.value is not None:
                yield node

    def _prune(self, node: Node[V]) -> None:
        """Mend the tree where a node may be one too many."""
        if node.parent is None or node.value is not None:
            return
        if not node.children:
            self.tokens -= len(node.edge)
            del node.parent.children[int(node.edge[0])]
            self._prune(node.parent)
        elif len(node.children) == 1:
            (child,) = node.children.values()
            child.edge = np.concatenate((node.edge, child.edge))
            child.parent = node.parent
            self._attach(child)

    def _split(self, child: Node[V], at: int) -> Node[V]:
        """A node in the middle of the edge to `child`."""
        middle = Node(child.edge[:at].copy(), child.parent)
        child.edge, child.parent = child.edge[at:].copy(), middle
        self._attach(middle)
        self._attach(child)
        return middle

    @staticmethod
    def _attach(node: Node[V]) -> Node[V]:
        assert node.parent is not None
        node.parent.children[int(node.edge[0])] = node
        return node


def _shared(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    for begin in range(0, length, _COMPARED):
        end = min(begin + _COMPARED, length)
        different = a[begin:end] != b[begin:end]
        first = int(different.argmax())
        if different[first]:
            return begin + first
    return length
