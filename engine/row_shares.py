"""How many state rows each tenant has in a step, where there are not enough for all that want one."""

from __future__ import annotations

from collections.abc import Mapping

from lattice_serve.engine.shares import Shares

_SMALLEST = 1e-6


class RowShares:
    """Rows by max-min fair shares. Where shares are no whole numbers, the rows left over go round among tenants."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._credits: dict[str, float] = {}
        """Steps for which a tenant should have had one of the rows left over, and had none; negative: had too many."""

    def assign(self, rows: int, held: Mapping[str, int], wanted: Mapping[str, int], quantum: int) -> dict[str, int]:
        """Rows of each tenant in the next step.

        held: rows it has now; wanted: rows it could use, those included. A row left over changes hands when another
        tenant is `quantum` steps further behind.
        """
        if sum(wanted.values()) <= rows:
            self._credits.clear()
            return dict(wanted)
        exact = self._shares.split(rows, wanted)
        whole = self._shares.places(rows, wanted)
        parts = {tenant: exact[tenant] - whole[tenant] for tenant in exact if exact[tenant] - whole[tenant] > _SMALLEST}
        chosen = self._choose(rows - sum(whole.values()), parts, held, whole, quantum)
        self._credits = {
            tenant: self._credits.get(tenant, 0.0) + part - (tenant in chosen) for tenant, part in parts.items()
        }
        return {tenant: count + (tenant in chosen) for tenant, count in whole.items()}

    def _choose(
        self, rows: int, parts: Mapping[str, float], held: Mapping[str, int], whole: Mapping[str, int], quantum: int
    ) -> list[str]:
        """The tenants, among those with a part of a row, that have one more row than their whole ones."""

        def credit(tenant: str) -> float:
            return self._credits.get(tenant, 0.0)

        by_credit = sorted(parts, key=credit, reverse=True)
        # Who has one keeps it for a while: every change of hands moves a state.
        has = [tenant for tenant in by_credit if held.get(tenant, 0) > whole[tenant]]
        others = [tenant for tenant in by_credit if tenant not in has]
        chosen = has[:rows] + others[: max(0, rows - len(has))]
        behind = has[rows:] + others[max(0, rows - len(has)) :]
        chosen.sort(key=credit, reverse=True)
        behind.sort(key=credit, reverse=True)
        while behind and chosen and credit(behind[0]) - credit(chosen[-1]) >= quantum:
            chosen.pop()
            chosen.insert(0, behind.pop(0))
        return chosen
