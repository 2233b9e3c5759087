"""Every error the engine and the server raise, as one tree; each leaf names its HTTP status.

LatticeError
├── ConfigError              500  a setting is wrong; the process does not start
│   └── CheckpointError      500  a model folder is missing something, or holds what it should not
├── RequestError             400  the request cannot be served as it is
│   ├── InvalidParameter     400  one field is wrong: names the field and the remedy
│   ├── ModelNotFound        404  no such model is served
│   └── ResponseNotFound     404  no such response is stored
├── CacheFileError           500  a file of cached states is not what it should be; the engine does without it
├── Overloaded               429  the waiting queue is full: come back after `retry_after` seconds
├── Draining                 503  the server is shutting down
├── EngineUnavailable        503  the engine is starting or being restarted
├── OutOfMemory              503  there is no memory for this request
├── EngineDied               500  the engine went away while it worked on the request
└── NumericalError           500  the logits of this request were not finite
"""

from __future__ import annotations


class LatticeError(Exception):
    """Base of the tree. `param` names the request field or setting at fault, if one is."""

    status = 500
    retry_after: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(LatticeError):
    status = 500


class CheckpointError(ConfigError):
    status = 500


class CacheFileError(LatticeError):
    status = 500


class RequestError(LatticeError):
    status = 400


class InvalidParameter(RequestError):
    status = 400


class ModelNotFound(RequestError):
    status = 404


class ResponseNotFound(RequestError):
    status = 404


class Overloaded(LatticeError):
    status = 429
    retry_after = 1


class Draining(LatticeError):
    status = 503
    retry_after = 5


class EngineUnavailable(LatticeError):
    status = 503
    retry_after = 2


class OutOfMemory(LatticeError):
    status = 503
    retry_after = 2


class EngineDied(LatticeError):
    status = 500


class NumericalError(LatticeError):
    status = 500
