"""Settings of the server. This is the one module that reads the environment (`LATTICE_*`)."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lattice_serve.engine import config as engine_config
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.processors import available_cpus
from lattice_serve.server.keys import read_keys
from lattice_serve.server.protocol import MAX_HEAD_BYTES

BUNDLED_MODEL = Path(engine_config.__file__).parent / "bundled"

_PREFIX = "LATTICE_"
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")


def _split(value: object) -> Any:
    """A string at its commas; anything else as it is."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


class Settings(EngineConfig, BaseSettings):
    """Everything `serve` is told: the engine's fields and the server's own.

    A keyword wins over the environment: `port=9000` over `LATTICE_PORT=9000`. Use `Settings.load`, which
    turns every fault into a `ConfigError`.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    model: Path = BUNDLED_MODEL
    served_model_name: str | None = None
    """What clients call the model. None: the name of its folder, "lattice" for the bundled one."""
    host: str = "127.0.0.1"
    """`::` is every address, of IPv4, too."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 lets the system choose."""
    api_key: SecretStr | None = None
    """One key, or several with commas between them."""
    api_key_file: Path | None = None
    """A key a line, besides those of `api_key`, perhaps with `weight=N` behind it: its share of what keys compete for,
    else 1. Lines that begin with `#` are comments. Read at start. Neither: no key is asked for."""
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    """Origins, such as `https://chat.example`, whose pages may send requests; `*`: any. In the environment with commas
    between them."""
    replicas: int = Field(default=1, ge=1)
    """Engines, each with all that the engine's fields say: with GPUs of their own, or sharing the processors."""
    prefix_cache_file: Path | None = None
    """Where cached states outlive the engine: read at its start, written at its end and from time to time. Of several
    replicas each has its own, the path with `.0`, `.1`, ... behind it."""
    prefix_cache_key_file: Path | None = None
    """The key that proves such a file to be a server's own: 32 bytes or more that nobody else can read. It is made when
    there is none. None: beside the file, with `.key` behind its name."""
    prefix_cache_save_seconds: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    """Between two saves of the cached states, where any have come. 0: they are saved at the engine's end alone."""
    step_seconds: float | None = Field(default=0.05, gt=0, allow_inf_nan=False)
    """As the engine's, but limited: a server's clients wait for their next tokens."""
    grace_period: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that running streams have to finish after SIGTERM."""
    watchdog_seconds: float = Field(default=12.0, ge=1, allow_inf_nan=False)
    """After which an engine that neither answers nor computes is killed, and started again; after half of it no more
    requests are sent to it. One that computes without an answer is given ten times as long."""
    max_body_bytes: int = Field(default=8 << 20, ge=1)
    request_memory: int = Field(default=512 << 20, ge=1)
    """Bytes that all requests together may hold in the server: bodies, prompts, and answers that are sent whole, of
    which one may take an eighth."""
    max_header_bytes: int = Field(default=64 << 10, ge=1, le=MAX_HEAD_BYTES)
    request_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """In which the head of a request has to come, then its body, and in which a client has to take what it streams."""
    keep_alive_seconds: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """Silence on a stream after which a comment is sent, so that proxies keep it open."""
    idle_connection_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """That a connection is kept for its client's next request. Longer than clients and proxies keep theirs (Go's, 90),
    so that they do not send into one that just closed."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def load(cls, **fields: Any) -> Settings:
        """Settings from `fields` (None: not given), then the environment, then the defaults.

        Raises `ConfigError` that names each wrong field, or the variable that it comes from.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
            text = "; ".join(_fault(name, message, given) for name, message in faults)
            raise ConfigError(text, param=faults[0][0] or None) from error
        except ConfigError as error:
            raise ConfigError(_fault(error.param or "", error.message, given, named=True), param=error.param) from error

    @model_validator(mode="after")
    def _check_exposure(self) -> Settings:
        # Always asked for: a file of keys that cannot be read must not wait for the first request.
        keys = self.api_keys
        if not _is_loopback(self.host) and not keys:
            raise ConfigError(
                f"host is {self.host!r}, which others can reach: set an API key (LATTICE_API_KEY, or api_key_file), "
                "or use 127.0.0.1",
                param="host",
            )
        return self

    @model_validator(mode="after")
    def _check_cache_file(self) -> Settings:
        path = self.prefix_cache_file
        if path is not None and ((path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK)):
            raise ConfigError(
                f"prefix_cache_file is {str(path)!r}: give a file in a folder that can be written",
                param="prefix_cache_file",
            )
        return self

    @model_validator(mode="after")
    def _check_device(self) -> Settings:
        if self.replicas > 1 and ":" in self.device:
            raise ConfigError(
                f"device is {self.device!r}, one for all replicas: give {self.device.split(':')[0]!r}",
                param="device",
            )
        return self

    @property
    def stream_seconds(self) -> dict[str, float]:
        """As `EventStream` takes them."""
        return {"keep_alive_seconds": self.keep_alive_seconds, "stall_seconds": self.request_seconds}

    @property
    def model_name(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        return "lattice" if self.model == BUNDLED_MODEL else self.model.resolve().name

    @property
    def api_keys(self) -> tuple[bytes, ...]:
        """Raises `ConfigError` when `api_key_file` cannot be read, or has no key in it."""
        return tuple(self.key_weights)

    @cached_property
    def key_weights(self) -> dict[bytes, int]:
        """The weight of each API key. Raises `ConfigError` as `api_keys` does."""
        secret = "" if self.api_key is None else self.api_key.get_secret_value()
        keys = dict.fromkeys(_split(secret), 1)
        if self.api_key_file is not None:
            try:
                text = self.api_key_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file: {error}: give a text file", param="api_key_file") from error
            from_file = read_keys(text)
            if not from_file:
                raise ConfigError("api_key_file has no key in it: write one a line", param="api_key_file")
            keys |= from_file
        return {key.encode(): weight for key, weight in keys.items()}

    def engine_configs(self) -> list[EngineConfig]:
        """One a replica: each with `tensor_parallel_size` GPUs of its own, from its device on, or with an even share of
        the processors unless `threads` says how many."""
        fields = {name: getattr(self, name) for name in EngineConfig.model_fields}
        if self.device == "cpu":
            threads = self.threads or max(1, available_cpus() // self.replicas)
            return [EngineConfig(**fields | {"threads": threads})] * self.replicas
        if ":" in self.device:
            return [EngineConfig(**fields)]
        first = range(0, self.replicas * self.tensor_parallel_size, self.tensor_parallel_size)
        return [EngineConfig(**fields | {"device": f"{self.device}:{i}"}) for i in first]

    def cache_options(self) -> list[list[str]]:
        """What the engine of each replica is told about its cache file."""
        path, key = self.prefix_cache_file, self.prefix_cache_key_file
        if path is None:
            return [[]] * self.replicas
        paths = [path]
        if self.replicas > 1:
            paths = [path.with_name(f"{path.name}.{i}") for i in range(self.replicas)]
        options = [f"--cache-save-seconds={self.prefix_cache_save_seconds}"]
        options += [] if key is None else [f"--cache-key-file={key}"]
        return [[f"--cache-file={each}", *options] for each in paths]


def _fault(name: str, message: str, given: Mapping[str, object], *, named: bool = False) -> str:
    """What is wrong with a field. named: whether the message names the field itself."""
    variables = {key.upper(): key for key in os.environ}
    variable = variables.get(f"{_PREFIX}{name.split('.')[0].upper()}")
    if not name or name.split(".")[0] in given or variable is None:
        return message if named or not name else f"{name}: {message}"
    if _SERVICE_LINK.match(os.environ[variable]):
        return (
            f"{variable} is {os.environ[variable]!r}, which Kubernetes sets for a Service of this name: rename the "
            "Service, or set enableServiceLinks: false in the pod"
        )
    return f"{variable}: {message}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
