"""Settings of the server. This is the one module that reads the environment (`LATTICE_*`)."""

from __future__ import annotations

import ipaddress
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lattice_serve.engine import config as engine_config
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.processors import available_cpus
from lattice_serve.server.protocol import MAX_HEAD_BYTES

BUNDLED_MODEL = Path(engine_config.__file__).parent / "bundled"


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

    model_config = SettingsConfigDict(env_prefix="LATTICE_", env_ignore_empty=True, extra="forbid", frozen=True)

    model: Path = BUNDLED_MODEL
    served_model_name: str | None = None
    """What clients call the model. None: the name of its folder, "lattice" for the bundled one."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 lets the system choose."""
    api_key: SecretStr | None = None
    """One key, or several with commas between them."""
    api_key_file: Path | None = None
    """A key a line, besides those of `api_key`. Read at start. Neither: no key is asked for."""
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    """Origins, such as `https://chat.example`, whose pages may send requests; `*`: any. In the environment with commas
    between them."""
    replicas: int = Field(default=1, ge=1)
    """Engines, each with all that the engine's fields say: with GPUs of their own, or sharing the processors."""
    prefix_cache_file: Path | None = None
    """Where cached states outlive the engine: read at its start, written at its end. Of several replicas each has its
    own, the path with `.0`, `.1`, ... behind it."""
    step_seconds: float | None = Field(default=0.05, gt=0, allow_inf_nan=False)
    """As the engine's, but limited: a server's clients wait for their next tokens."""
    grace_period: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that running streams have to finish after SIGTERM."""
    watchdog_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Silence of an engine that has work after which it is killed, and started again."""
    max_body_bytes: int = Field(default=8 << 20, ge=1)
    request_memory: int = Field(default=512 << 20, ge=1)
    """Bytes that all requests together may hold in the server: bodies, prompts, and answers that are sent whole, of
    which one may take an eighth."""
    max_header_bytes: int = Field(default=64 << 10, ge=1, le=MAX_HEAD_BYTES)
    request_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """In which the head of a request has to come, then its body, and in which a client has to take what it streams."""
    keep_alive_seconds: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """Silence on a stream after which a comment is sent, so that proxies keep it open."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def load(cls, **fields: Any) -> Settings:
        """Settings from `fields` (None: not given), then the environment, then the defaults.

        Raises `ConfigError` that names each wrong field.
        """
        try:
            return cls(**{name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
            text = "; ".join(f"{name}: {message}" if name else message for name, message in faults)
            raise ConfigError(text, param=faults[0][0] or None) from error

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

    @cached_property
    def api_keys(self) -> tuple[bytes, ...]:
        """Raises `ConfigError` when `api_key_file` cannot be read, or has no key in it."""
        secret = "" if self.api_key is None else self.api_key.get_secret_value()
        keys = _split(secret)
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file: {error}: give a text file", param="api_key_file") from error
            from_file = tuple(line.strip() for line in lines if line.strip())
            if not from_file:
                raise ConfigError("api_key_file has no key in it: write one a line", param="api_key_file")
            keys += from_file
        return tuple(key.encode() for key in keys)

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

    def cache_files(self) -> list[Path | None]:
        """One a replica."""
        path = self.prefix_cache_file
        if path is None or self.replicas == 1:
            return [path] * self.replicas
        return [path.with_name(f"{path.name}.{i}") for i in range(self.replicas)]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
