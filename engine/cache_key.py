"""The key that proves a file of cached states to be a server's own."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from lattice_serve.engine.errors import CacheFileError
from lattice_serve.engine.replacement import replacing

MIN_BYTES = 32
_MAX_BYTES = 1 << 16
_CODE_BYTES = 32
_OTHERS = stat.S_IWGRP | stat.S_IRWXO


class CacheKey:
    """Makes codes of what it is given: who has not the key can make none."""

    code_bytes = _CODE_BYTES

    def __init__(self, secret: bytes) -> None:
        self._key = hashlib.sha512(secret).digest()  # as long as the key of BLAKE2b may be

    def code(self, kind: bytes, data: bytes | bytearray | memoryview) -> bytes:
        """kind: at most 16 bytes; the code of one kind of data is none for another kind."""
        return hashlib.blake2b(data, key=self._key, person=kind, digest_size=_CODE_BYTES).digest()

    @classmethod
    def read(cls, path: Path) -> CacheKey:
        """Raises `CacheFileError` for a file that is not there, is too short, or that others can read or write."""
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                secret = file.read(_MAX_BYTES).strip()
        except OSError as error:
            raise CacheFileError(f"its key {path} cannot be read: {error.strerror}") from error
        if mode & _OTHERS:
            raise CacheFileError(f"its key {path} has mode {stat.S_IMODE(mode):04o}: set it to 0600")
        if len(secret) < MIN_BYTES:
            raise CacheFileError(f"its key {path} has {len(secret)} bytes: give at least {MIN_BYTES}")
        return cls(secret)

    @classmethod
    def read_or_make(cls, path: Path) -> CacheKey:
        """The same; where there is no file, a new key is put there. Raises `CacheFileError`."""
        try:
            while not path.exists():
                # Another engine may be at it, or be quicker: its key is the one.
                with suppress(FileExistsError, BlockingIOError), replacing(path) as file:
                    if path.exists():
                        raise FileExistsError
                    file.write(secrets.token_hex(MIN_BYTES).encode() + b"\n")
        except OSError as error:
            raise CacheFileError(f"its key {path} cannot be written: {error.strerror}") from error
        return cls.read(path)
