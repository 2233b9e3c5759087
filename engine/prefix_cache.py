"""States of prompts and answers that may come again: what a sequence remembers is of constant size, so one copy is all.

A snapshot is a state row and the tokens that it has seen. It has the bits that running them again would give, for a
row's bits do not depend on how its tokens were cut into steps. The least recently used go first, from the device to
host memory, and from there for good: those of the tenant that has most for its weight.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.radix_tree import Ids, RadixTree
from lattice_serve.engine.shares import Shares, tenant_of
from lattice_serve.engine.tier import Snapshot, Tier

FIRST_INTERVAL = 512
"""Snapshots of a long prompt lie at this many tokens, twice as many, four times as many and so on."""
_TOKEN_BYTES = 4

Outcome: TypeAlias = Literal["hit", "new", "no_snapshot", "bypass"]
"""Of a look-up. new: nothing known begins like it; no_snapshot: no state of that beginning is kept; bypass: every token
has to be run, for more than the state behind it was asked for."""


class PrefixCache:
    """Snapshots by the tokens that they have seen. Sequences with different salts never share one."""

    def __init__(self, budgets: Sequence[tuple[str, int]], multiple: int = 1, shares: Shares | None = None) -> None:
        """budgets: (device, bytes), the first to be filled first; what is pushed out of one goes to the next.

        multiple: a longer prompt goes on from snapshots after multiples of so many tokens only. shares: the weights of
        the tenants; None: all have the same.
        """
        self._shares = shares or Shares()
        self._multiple = multiple
        self._tiers = [Tier(device, budget) for device, budget in budgets]
        self._used: list[Counter[str]] = [Counter() for _ in self._tiers]
        """Bytes of each tenant's snapshots in each tier."""
        self._trees: dict[str, RadixTree[Snapshot]] = {}
        self.outcomes: defaultdict[str, int] = defaultdict(int)
        """Look-ups so far, by `Outcome`."""
        self.added = 0
        """Snapshots so far."""

    @property
    def enabled(self) -> bool:
        return any(tier.budget for tier in self._tiers)

    @property
    def budget(self) -> int:
        """Bytes, of all devices."""
        return sum(tier.budget for tier in self._tiers)

    @property
    def nbytes(self) -> int:
        return sum(tier.used for tier in self._tiers) + _TOKEN_BYTES * self._tokens

    def __len__(self) -> int:
        return sum(len(tier.snapshots) for tier in self._tiers)

    def find(self, salt: str, ids: Sequence[int], *, chooses: bool = True) -> tuple[Snapshot | None, int]:
        """The longest snapshot that a sequence of these tokens can go on from, and how many of them are known.

        chooses: whether it wants a token after them, and with it the logits of the last.
        """
        tree = self._trees.get(salt)
        path, shared = tree.path(_array(ids)) if tree is not None else ([], 0)
        for depth, node in reversed(path):
            snapshot = node.value
            assert snapshot is not None
            whole = depth == len(ids)
            if (whole and (not chooses or snapshot.logits is not None)) or (not whole and depth % self._multiple == 0):
                self.outcomes["hit"] += 1
                self.renew(snapshot)
                return snapshot, shared
        self.outcomes["no_snapshot" if shared else "new"] += 1
        return None, shared

    def put(
        self,
        salt: str,
        ids: Sequence[int],
        row: Tensor,
        logits: Tensor | None = None,
        *,
        lent: bool = False,
        after: Snapshot | None = None,
    ) -> Snapshot | None:
        """Keep `row` [row_size], the state after `ids`, and the logits [V] of the last of them: copies, or the row
        itself if it is lent, which then must stay as it is until `settle`.

        after: a snapshot that is kept; `ids` are those that follow its own. Returns the snapshot of all of them, new or
        known before; None where nothing is kept.
        """
        if not self.enabled or not (len(ids) or after):
            return None
        tree = self._trees.setdefault(salt, RadixTree())
        node = tree.node(_array(ids), None if after is None else after.node)
        first, copied = self._tiers[0], None
        if logits is not None and (node.value is None or node.value.logits is None):
            with suppress(MemoryError):  # then the state is kept without them
                copied = first.copy(logits)
        if node.value is not None and copied is None:
            self.renew(node.value)
            return node.value
        length = len(ids) + (0 if after is None else after.length)
        if node.value is not None:
            self._remove(self._tier(node.value), node.value)
        snapshot = node.value = Snapshot(row, length, copied, salt, node)
        self._add(first, snapshot)
        self.added += 1
        self._shrink()
        if not lent:
            self.settle(snapshot)
        return snapshot if snapshot in self else None

    def __contains__(self, snapshot: Snapshot) -> bool:
        return any(snapshot in tier for tier in self._tiers)

    def settle(self, snapshot: Snapshot) -> None:
        """Copy a row that was lent, if the snapshot is still there: its owner may do with it what it likes then. Where
        there is no memory for it, others that were not used for longer make room."""
        while snapshot.lent and snapshot in self:
            tier = self._tier(snapshot)
            try:
                tier.settle(snapshot)
            except MemoryError:
                oldest = next((each for each in tier.snapshots.values() if not each.lent), snapshot)
                self._remove(tier, oldest)
                self._drop(oldest)

    def ready(self, rows: int) -> bool:
        """Whether so many rows could be settled without new memory, as far as the budget goes."""
        return self._tiers[0].ready(rows)

    def prepare(self, nbytes: int) -> None:
        """Touch so many bytes for rows, where it is not `ready` for them."""
        self._tiers[0].prepare(nbytes)

    def snapshots(self) -> list[Snapshot]:
        """All of them, the least recently used first."""
        return [snapshot for tier in reversed(self._tiers) for snapshot in tier.snapshots.values()]

    def renew(self, snapshot: Snapshot) -> None:
        """Count a snapshot that is kept as used just now."""
        self._tier(snapshot).snapshots.move_to_end(id(snapshot))

    def discard(self, salt: str, ids: Sequence[int]) -> None:
        """Forget every snapshot that these tokens begin with: one of them has turned out to be no good."""
        tree = self._trees.get(salt)
        for _, node in tree.path(_array(ids))[0] if tree is not None else ():
            assert node.value is not None
            self._remove(self._tier(node.value), node.value)
            self._drop(node.value)

    def give_way(self) -> None:
        """Give all memory back, for what needs it more. What is lent is its owner's again."""
        self._forget_all()
        for tier in self._tiers:
            tier.give_way()

    def clear(self) -> None:
        self.outcomes.clear()
        self._forget_all()

    def _forget_all(self) -> None:
        self._trees.clear()
        for tier in self._tiers:
            for snapshot in list(tier.snapshots.values()):
                self._remove(tier, snapshot)

    def check(self) -> None:
        """Assert that the tiers hold exactly what the trees hold, within their budgets."""
        held = {id(snapshot) for tier in self._tiers for snapshot in tier.snapshots.values()}
        known = {id(node.value) for tree in self._trees.values() for node in tree}
        assert held == known, "a cached state is lost, or cannot be found"
        for tier, used in zip(self._tiers, self._used, strict=True):
            tier.check()
            assert used.total() == tier.used, "the cache has lost count of its tenants' bytes"

    @property
    def _tokens(self) -> int:
        return sum(tree.tokens for tree in self._trees.values())

    def _tier(self, snapshot: Snapshot) -> Tier:
        return next(tier for tier in self._tiers if snapshot in tier)

    def _shrink(self) -> None:
        for tier, following in zip_longest(self._tiers, self._tiers[1:]):
            # The tokens themselves are kept in host memory, and count there.
            while tier.snapshots and tier.used + (0 if following else _TOKEN_BYTES * self._tokens) > tier.budget:
                oldest = self._oldest(tier, last=following is None)
                if following:
                    with suppress(MemoryError):
                        self._move(tier, oldest, following)
                        continue
                self._remove(tier, oldest)
                self._drop(oldest)

    def _oldest(self, tier: Tier, *, last: bool) -> Snapshot:
        """What a tier is to lose next."""
        used = self._used[self._tiers.index(tier)]
        if len(used) > 1:
            held = Counter(used)
            if last:
                for salt, tree in self._trees.items():
                    held[tenant_of(salt)] += _TOKEN_BYTES * tree.tokens
            most = self._shares.most_over({tenant: held[tenant] for tenant in used})
            return next(each for each in tier.snapshots.values() if tenant_of(each.salt) == most)
        return next(iter(tier.snapshots.values()))

    def _add(self, tier: Tier, snapshot: Snapshot) -> None:
        tier.add(snapshot)
        self._used[self._tiers.index(tier)][tenant_of(snapshot.salt)] += snapshot.nbytes

    def _remove(self, tier: Tier, snapshot: Snapshot) -> None:
        self._uncount(tier, snapshot)
        tier.remove(snapshot)

    def _move(self, tier: Tier, snapshot: Snapshot, following: Tier) -> None:
        """Raises MemoryError where there is none in the following tier; then the snapshot stays."""
        tier.move(snapshot, following)
        self._uncount(tier, snapshot)
        self._used[self._tiers.index(following)][tenant_of(snapshot.salt)] += snapshot.nbytes

    def _uncount(self, tier: Tier, snapshot: Snapshot) -> None:
        tenant, used = tenant_of(snapshot.salt), self._used[self._tiers.index(tier)]
        used[tenant] -= snapshot.nbytes
        if not used[tenant]:
            del used[tenant]

    def _drop(self, snapshot: Snapshot) -> None:
        tree = self._trees[snapshot.salt]
        tree.remove(snapshot.node)
        if not tree.tokens:
            del self._trees[snapshot.salt]


def cache_budgets(config: EngineConfig) -> list[tuple[str, int]]:
    """Where an engine keeps snapshots: on its GPU first, if it has one, then in host memory."""
    host = [("cpu", config.prefix_cache_memory)]
    near = config.device != "cpu" and config.prefix_cache_memory and config.prefix_cache_device_memory
    return [(config.device, config.prefix_cache_device_memory), *host] if near else host


def intervals(start: int, end: int) -> list[int]:
    """Where a prompt of `end` tokens, known up to `start`, gets its snapshots on the way."""
    places = []
    place = FIRST_INTERVAL
    while place < end:
        if place > start:
            places.append(place)
        place *= 2
    return places


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)
