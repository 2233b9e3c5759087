"""What the client raises.

ClientError
├── APIError           the server answered with an error, before or in the middle of a stream
└── ConnectionFailed   no answer, or one that broke off
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of the tree."""


class APIError(ClientError):
    """The server's own words. `param` is the request field at fault, if one is."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.param = param


class ConnectionFailed(ClientError):
    """The server could not be reached, or the connection ended before the answer did."""
