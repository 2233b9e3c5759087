"""Odd connections: bytes that are no HTTP, heads and bodies that do not come, offers of other protocols."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import httpx
import pytest

from tests.server.harness import ServerProcess, events, wait_for

BODY = b'{"prompt": "hello", "max_tokens": 2}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)
OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=10)


def to_the_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def send_slowly(connection: socket.socket, data: bytes) -> None:
    for start in range(0, len(data), 1000):
        connection.sendall(data[start : start + 1000])
        time.sleep(0.01)


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer that tells its length."""
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        length = 0
        while (line := stream.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name == b"content-length" else length
        return status, stream.read(length)


def check_refusal(got: bytes, status: int, message: str) -> None:
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head.split(b"\r\n")
    error = json.loads(body)["error"]
    assert (error["code"], error["param"]) == (status, None)
    assert message in error["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"FOO / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
        POST + b"content-length: 99999999999999999999\r\n\r\n",
        POST + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_what_is_no_http_is_refused_as_all_else(server: ServerProcess, data: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(data)
        check_refusal(to_the_end(connection), 400, "not HTTP/1.1")


@pytest.mark.parametrize("offer", [OFFER, b"connection: upgrade\r\nupgrade: websocket\r\n"], ids=["h2c", "websocket"])
def test_another_protocol_is_declined(server: ServerProcess, offer: bytes) -> None:
    """Java's HTTP client makes such an offer with its first request, the body behind it or apart."""
    with connect(server) as connection:
        for pieces in ([POST + offer + LENGTH + BODY], [POST + offer + LENGTH, BODY], [POST, LENGTH + BODY]):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.02)
            status, body = answer(connection)
            assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 2)
        connection.sendall(POST + offer.replace(b"ion: ", b"ion: close, ") + LENGTH + BODY)
        assert to_the_end(connection).startswith(b"HTTP/1.1 200 ")


def test_many_offers_at_once_are_declined(server: ServerProcess) -> None:
    count = 1200
    with connect(server) as connection:
        connection.sendall((b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n") * count)
        got = b""
        while got.count(b"HTTP/1.1 200 ") < count:
            got += connection.recv(1 << 20)


def test_a_tunnel_is_refused(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n")
        check_refusal(to_the_end(connection), 400, "no proxy")


@pytest.mark.parametrize("size", [1 << 16, 500_000])
def test_a_path_that_is_too_long_for_the_parser(server: ServerProcess, size: int) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /" + b"a" * size + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        check_refusal(to_the_end(connection), 431, "the path has more than 65535 bytes")


def test_a_url_that_is_none(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n")
        check_refusal(to_the_end(connection), 400, "this is not HTTP/1.1: ")


def test_a_connection_for_each_file_that_the_system_allows(start_server: Callable[..., ServerProcess]) -> None:
    """Not for as many as programs with `select` begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        server = start_server()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(server))
        assert server.complete("a")


@pytest.mark.parametrize("keyed", [True, False])
def test_idle_connections_make_room_for_new_ones(start_server: Callable[..., ServerProcess], keyed: bool) -> None:
    """The oldest without a key first; who has shown one and has a request keeps its place."""
    server = start_server(prefix=("prlimit", "--nofile=128:128"), **({"api_key": "secret"} if keyed else {}))
    key = b"authorization: Bearer secret\r\n" * keyed
    body = b'{"prompt": "!slow", "max_tokens": 40}'
    with ExitStack() as stack:
        working, kept = (stack.enter_context(connect(server)) for _ in range(2))
        for connection, sent in ((kept, BODY), (working, body)):
            connection.sendall(POST + key + b"content-length: %d\r\n\r\n" % len(sent) + sent)
        assert answer(kept)[0] == 200
        idle = [stack.enter_context(connect(server)) for _ in range(300)]
        slow = [stack.enter_context(connect(server)) for _ in range(100)]
        for connection in slow:
            connection.sendall(POST + b"content-length: 100\r\n\r\n{")
        for _ in range(3):
            status, _ = post_with(server, key)
            assert status == 200
        os.kill(server.engine_pid, signal.SIGKILL)
        restarted = stack.enter_context(connect(server))
        restarted.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(restarted)[0] == 200
        assert answer(working)[0] == 500  # with its engine, and not before
        wait_for(lambda: post_with(server, key)[0] == 200)
        assert to_the_end(idle[0]) == b""


def post_with(server: ServerProcess, key: bytes) -> tuple[int, bytes]:
    """The answer to a request on a new connection."""
    with connect(server) as connection:
        connection.sendall(POST + key + LENGTH + BODY)
        return answer(connection)


@pytest.mark.parametrize(
    ("head", "status", "message"),
    [
        (b"POST /v1/completions HTTP/1.1\r\n", 400, "0 Host headers"),
        (POST + b"Host: x\r\n", 400, "2 Host headers"),
        (POST + b"transfer-encoding: gzip, chunked\r\n", 501, "other than chunked"),
        (POST + b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", 501, "other than chunked"),
        (POST + b"transfer-encoding: chunked, gzip\r\n", 400, ""),
        (POST + b"transfer-encoding: chunked, chunked\r\n", 400, ""),
        (b"POST /v1/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n", 400, "where the body ends"),
    ],
)
def test_a_head_that_can_be_read_in_two_ways_is_refused(
    server: ServerProcess, head: bytes, status: int, message: str
) -> None:
    with connect(server) as connection:
        connection.sendall(head + (b"\r\n" if b"transfer" in head else LENGTH + BODY))
        check_refusal(to_the_end(connection), status, message)


def test_http_1_0_needs_no_host(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /version HTTP/1.0\r\n\r\n")
        assert to_the_end(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("value", [b"chunked", b"Chunked"])
def test_chunks_are_read(server: ServerProcess, value: bytes) -> None:
    with connect(server) as connection:
        chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        connection.sendall(POST + b"Transfer-Encoding: " + value + b"\r\n\r\n" + chunk)
        assert answer(connection)[0] == 200


STREAM = b'{"prompt": "hello", "max_tokens": 3, "stream": true}'
STREAMED = b"content-length: %d\r\n\r\n" % len(STREAM) + STREAM


@pytest.mark.parametrize("head", [b"", b"connection: keep-alive\r\n"])
def test_a_stream_to_a_client_of_http_1_0_ends_with_its_connection(server: ServerProcess, head: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.0\r\nx-request-id: old\r\n" + head + STREAMED)
        got, _, body = to_the_end(connection).partition(b"\r\n\r\n")
    lines = got.lower().split(b"\r\n")
    assert lines[0].split()[1] == b"200"
    assert b"connection: close" in lines
    assert b"x-request-id: old" in lines
    assert not any(line.startswith((b"transfer-encoding", b"content-length")) for line in lines)
    *chunks, done = events(body.decode())
    assert (len(chunks), done) == (3, "[DONE]")


def test_other_answers_to_a_client_of_http_1_0(server: ServerProcess) -> None:
    for request, status in (
        (b"POST /v1/completions HTTP/1.0\r\n" + LENGTH + BODY, 200),
        (b"GET /nowhere HTTP/1.0\r\n\r\n", 404),
        (b"HEAD /health HTTP/1.0\r\n\r\n", 200),
    ):
        with connect(server) as connection:
            connection.sendall(request)
            got, _, body = to_the_end(connection).partition(b"\r\n\r\n")
            assert got.startswith(b"HTTP/1.1 %d" % status)
            assert b"connection: close" in got
            length = 0 if b"HEAD" in request else int(got.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            assert len(body) == length


def test_a_client_of_http_1_0_that_leaves_frees_its_row(server: ServerProcess) -> None:
    aborts = len(server.records("abort"))
    body = b'{"prompt": "!slow", "max_tokens": 1000, "stream": true}'
    with connect(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(1000)
    wait_for(lambda: len(server.records("abort")) == aborts + 1)


def test_a_client_that_closes_its_half_of_the_connection_counts_as_gone(server: ServerProcess) -> None:
    """There is no telling it from one that left: its row is wanted by others."""
    submits, aborts = len(server.records("submit")), len(server.records("abort"))
    body = b'{"prompt": "!stall"}'
    with connect(server) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: len(server.records("submit")) == submits + 1)
        connection.shutdown(socket.SHUT_WR)
        assert to_the_end(connection) == b""
        wait_for(lambda: len(server.records("abort")) == aborts + 1)


def test_every_address_is_every_address(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(host="::", api_key="k")
    port = httpx.URL(server.url).port
    for host in ("127.0.0.1", "[::1]"):
        assert httpx.get(f"http://{host}:{port}/health").status_code == 200


def test_how_long_an_idle_connection_is_kept(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(idle_connection_seconds=0.2)
    with connect(server) as connection:
        connection.sendall(POST + LENGTH + BODY)
        assert answer(connection)[0] == 200
        began = time.monotonic()
        assert to_the_end(connection) == b""
        assert 0.1 < time.monotonic() - began < 5


def test_requests_in_a_row_are_answered_in_order(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(
            b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
            + POST
            + LENGTH
            + BODY
            + b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\nGET"
        )
        got = b""
        while got.count(b"HTTP/1.1 200 ") < 3:
            got += connection.recv(65536)
        assert got.index(b'"version"') < got.index(b'"usage"') < got.rindex(b"content-length: 0")


class TestTime:
    @pytest.fixture
    def hasty(self, start_server: Callable[..., ServerProcess]) -> ServerProcess:
        return start_server(request_seconds=0.3)

    @pytest.mark.parametrize("data", [b"GET /vers", b"\r\n", POST, POST + LENGTH + BODY + b"GET /"])
    def test_a_head_has_to_come(self, hasty: ServerProcess, data: bytes) -> None:
        with connect(hasty) as connection:
            connection.sendall(data)
            if BODY in data:
                assert answer(connection)[0] == 200
            check_refusal(to_the_end(connection), 408, "did not come within 0.3 s")

    def test_a_connection_has_to_be_used(self, hasty: ServerProcess) -> None:
        with connect(hasty) as connection:
            assert to_the_end(connection) == b""

    @pytest.mark.parametrize("data", [POST + LENGTH + BODY[:5], POST + b"transfer-encoding: chunked\r\n\r\n3\r\n"])
    def test_a_body_has_to_come(self, hasty: ServerProcess, data: bytes) -> None:
        with connect(hasty) as connection:
            connection.sendall(data)
            check_refusal(to_the_end(connection), 408, "the body did not come within 0.3 s")

    def test_a_body_that_is_refused_has_to_end(self, hasty: ServerProcess) -> None:
        with connect(hasty) as connection:
            connection.sendall(POST + b"content-length: 100000000000\r\n\r\n")
            assert answer(connection)[0] == 413
            with pytest.raises(ConnectionError):
                send_slowly(connection, b" " * 1_000_000)

    def test_an_answer_may_take_longer(self, hasty: ServerProcess) -> None:
        body = b'{"prompt": "!slow", "max_tokens": 12}'
        with connect(hasty) as connection:
            # The next request waits behind it, half of it sent.
            connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body + b"GET /version HT")
            status, content = answer(connection)
            assert (status, json.loads(content)["usage"]["completion_tokens"]) == (200, 12)
            connection.sendall(b"TP/1.1\r\nhost: x\r\n\r\n")
            assert answer(connection)[0] == 200
