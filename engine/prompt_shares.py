"""In which order tenants have their prompts run in a step, and how many tokens each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lattice_serve.engine.shares import Shares


class PromptShares:
    """The prompt tokens of steps by fair shares. Where shares are too small to cut off a prompt, tenants take turns."""

    def __init__(self, shares: Shares, multiple: int) -> None:
        """multiple: prompts are cut at multiples of so many tokens."""
        self._shares, self._multiple = shares, multiple
        self._service: dict[str, float] = {}
        """Tokens run of each tenant by its weight, of those that had prompts in the step before."""
        self._chosen: dict[str, int] = {}
        """Tokens of the step that was chosen last."""

    def turn(self) -> None:
        """What was chosen last has run."""
        for tenant, tokens in self._chosen.items():
            self._service[tenant] += tokens / self._shares.weight(tenant)
        self._chosen = {}

    def budgets(self, left: int, demands: Mapping[str, int]) -> Iterator[tuple[str, int]]:
        """(tenant, tokens) until all have had their turn. `took` has to be told what a tenant took of them."""
        begin = min((self._service[tenant] for tenant in demands if tenant in self._service), default=0.0)
        # Who comes anew, or again, has no claim to what it did not ask for before.
        self._service = {tenant: self._service.get(tenant, begin) for tenant in demands}
        self._chosen = {}
        weight = self._shares.weight
        if left >= len(demands) * self._multiple:
            order = sorted(demands, key=lambda tenant: demands[tenant] / weight(tenant))
        else:
            order = sorted(demands, key=self._service.__getitem__)
        weights = sum(map(weight, order))
        for tenant in order:
            rest = left - sum(self._chosen.values())
            yield tenant, min(rest, max(self._multiple, rest * weight(tenant) // weights))
            weights -= weight(tenant)

    def took(self, tenant: str, tokens: int) -> None:
        self._chosen[tenant] = tokens
