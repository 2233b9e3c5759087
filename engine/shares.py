"""Fair shares of what requests compete for: rows, queue places, prompt tokens, processor time, cache memory.

A tenant is whoever a share belongs to: an API key, by its salted hash. A server without keys has one tenant, "". Shares
are max-min fair by weight: nobody gets more than it asks for, and what one leaves goes to the others.
"""

from __future__ import annotations

from collections.abc import Mapping

SALT_SEPARATOR = "/"
_ROUNDING = 1e-9


class Shares:
    """The weights of the tenants, and what is fair by them. Deterministic."""

    def __init__(self) -> None:
        self._weights: dict[str, int] = {}

    def weigh(self, tenant: str, weight: int) -> None:
        """Give `tenant` a weight. One that has none yet has 1."""
        self._weights[tenant] = weight

    def weight(self, tenant: str) -> int:
        return self._weights.get(tenant, 1)

    def split(self, total: float, demands: Mapping[str, float]) -> dict[str, float]:
        """Each tenant's max-min fair share of `total`: its demand at the most."""
        shares = {}
        weights = sum(map(self.weight, demands))
        for tenant in sorted(demands, key=lambda tenant: demands[tenant] / self.weight(tenant)):
            weight = self.weight(tenant)
            shares[tenant] = min(demands[tenant], total * weight / weights)
            total -= shares[tenant]
            weights -= weight
        return shares

    def places(self, total: int, demands: Mapping[str, float]) -> dict[str, int]:
        """Whole places in the shares of `split`; fewer than `total` where shares have fractions."""
        return {tenant: int(share + _ROUNDING) for tenant, share in self.split(total, demands).items()}

    def allows(self, tenant: str, more: int, used: Mapping[str, int], total: int) -> bool:
        """Whether `tenant` may have `more` of `total` places: where there is room, or within its fair share."""
        if sum(used.values()) + more <= total:
            return True
        demand = used.get(tenant, 0) + more
        return demand <= self.places(total, {**used, tenant: demand})[tenant]

    def most_over(self, used: Mapping[str, float]) -> str:
        """The tenant that uses the most for its weight; the first of equals."""
        return max(used, key=lambda tenant: used[tenant] / self.weight(tenant))


def salted(tenant: str, salt: str) -> str:
    """Names what requests of one tenant with one `cache_salt` share."""
    return f"{tenant}{SALT_SEPARATOR}{salt}"


def tenant_of(salt: str) -> str:
    """The tenant of a name that `salted` made."""
    tenant, separator, _ = salt.partition(SALT_SEPARATOR)
    return tenant if separator else ""


ANYBODY = salted("", "")
"""Of requests without a key and without a salt."""
