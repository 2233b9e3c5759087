"""API keys: how a file of them is read, and the tenant that each stands for."""

from __future__ import annotations

import hashlib
import re

from lattice_serve.engine.errors import ConfigError

MAX_WEIGHT = 1000

_OPTION = re.compile(r"\s+weight=(\S*)$")


def tenant_of(key: bytes) -> str:
    """Names the tenant in the engine and in files, where the key itself must not be."""
    return hashlib.sha256(key).hexdigest()


def read_keys(text: str) -> dict[str, int]:
    """Keys and their weights, of lines `KEY` or `KEY weight=N`. Empty lines and those that begin with # are left out.

    Raises `ConfigError`, which names the line and not the key, for a wrong weight.
    """
    keys = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, weight = line.strip(), "1"
        if not key or key.startswith("#"):
            continue
        if option := _OPTION.search(key):
            key, weight = key[: option.start()], option[1]
        if not (weight.isascii() and weight.isdigit() and 1 <= int(weight) <= MAX_WEIGHT):
            raise ConfigError(
                f"api_key_file: line {number}: weight must be a whole number from 1 to {MAX_WEIGHT}",
                param="api_key_file",
            )
        keys[key] = int(weight)
    return keys
