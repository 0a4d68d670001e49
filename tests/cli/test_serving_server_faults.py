"""What a server survives: slow and vanishing clients, floods of connections, garbage, killed workers."""

import contextlib
import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_server import PATIENCE_S, Reply, Server, request_of, scores, serving, wait_until

INFER = "/v2/models/tightrec/infer"
MOST = 24


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serving_made import write_two_paths

    return write_two_paths(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(file: Path) -> Iterator[Server]:
    limits = ("head_timeout_s=1", "body_timeout_s=1", "write_timeout_s=1", f"max_connections={MOST}")
    with serving(file, *limits, "max_held_mb=1", "follow=false") as started:
        yield started
        assert started.stop() == 0, started.lines


@contextlib.contextmanager
def frozen_worker(server: Server) -> Iterator[None]:
    """The one worker stands still: what comes waits."""
    (pid,) = server.workers()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection, which it must."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            found += part
    return found


def assert_serves(server: Server) -> None:
    assert len(scores(server.infer(request_of(3)))) == 3


@pytest.mark.parametrize("sent", [b"", b"POST /v2/mod", b"POST / HTTP/1.1\r\nHost: x\r\nX-Long: "])
def test_a_connection_without_a_whole_head_is_closed(server: Server, sent: bytes):
    with server.connect() as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""
    assert_serves(server)


def test_a_head_that_trickles_in_gains_no_time(server: Server):
    closed = threading.Event()
    with server.connect() as connection, ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read_all, connection)
        reading.add_done_callback(lambda _: closed.set())
        connection.sendall(b"GET / HTTP/1.1\r\nX-Long: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(int(PATIENCE_S / 0.1)):
                connection.sendall(b"x")
                if closed.wait(0.1):
                    break
        assert reading.result(PATIENCE_S) == b""


def test_a_body_that_stalls_is_answered_408_and_closed(server: Server):
    with server.connect() as connection:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(head.encode() + b'{"inputs"')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b"not complete" in answer
    assert_serves(server)


def kernel_connections() -> set[tuple[int, int]]:
    """Local and remote port of every TCP socket of this machine that still has a connection."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    pairs = ((line.split()[1], line.split()[2]) for line in lines)
    return {(int(local[-4:], 16), int(remote[-4:], 16)) for local, remote in pairs}


def test_a_client_that_reads_nothing_is_cut_off(server: Server):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(20_000):
                connection.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        own = connection.getsockname()[1]
        assert (server.port, own) in kernel_connections()
        # The kernel need not tell the client: what counts is that the server's end is gone.
        wait_until(lambda: (server.port, own) not in kernel_connections())
    assert_serves(server)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(5000)) + b"\r\n",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST "
        + INFER.encode()
        + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_closed(server: Server, sent: bytes):
    with server.connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        answer = read_all(connection)
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert_serves(server)


def test_a_body_without_a_length_is_411_and_a_chunked_one_is_read(server: Server):
    with server.connect() as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b"HTTP/1.1 411" in read_all(connection)
    body = json.dumps(request_of(3)).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
    with server.connect() as connection:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + chunks)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_connections_beyond_the_limit_are_told_so(server: Server):
    with contextlib.ExitStack() as held:
        connections = [held.enter_context(server.connect()) for _ in range(MOST + 3)]
        # All are closed, those within the limit for saying nothing.
        answers = [read_all(connection) for connection in connections]
    refused = [answer for answer in answers if answer]
    assert 1 <= len(refused) < MOST
    assert all(a.startswith(b"HTTP/1.1 503") and b"X-Shed: full" in a for a in refused)
    wait_until(lambda: server.ask("GET", "/v2/health/live").status == 200)


def test_bodies_beyond_the_memory_are_shed(server: Server):
    with contextlib.ExitStack() as held:
        for _ in range(3):
            connection = held.enter_context(server.connect())
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
            connection.sendall(head.encode() + b"{")
        reply = None

        def is_full() -> bool:
            nonlocal reply
            reply = server.ask("POST", INFER, b" " * 900_000)
            return reply.headers.get("X-Shed") == "full"

        wait_until(is_full)
        assert reply is not None and reply.status == 503
    wait_until(lambda: server.infer(request_of(3)).status == 200)


def test_a_client_that_goes_takes_its_waiting_query_along(server: Server):
    def queries() -> int:
        return server.get("/api/status")["queue"]["queries"]

    body = json.dumps(request_of(3)).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with frozen_worker(server), ThreadPoolExecutor(1) as threads:
        first = threads.submit(server.infer, request_of(4))
        wait_until(lambda: 'tightrec_slots_busy{device="cpu"} 1.0' in metrics(server))
        with server.connect() as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: queries() == 1)
        wait_until(lambda: queries() == 0)
        os.kill(server.workers()[0], signal.SIGCONT)
        assert len(scores(first.result(PATIENCE_S))) == 4


def metrics(server: Server) -> str:
    return server.ask("GET", "/metrics").body.decode()


def test_a_killed_worker_costs_its_batch_alone_and_is_replaced(server: Server):
    (pid,) = server.workers()
    replies: list[Reply] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            replies.append(server.infer(request_of(3, target_ms=3_000)))

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        wait_until(lambda: len(replies) > 20)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: server.get("/api/status")["queue"]["queries"] > 0)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.get("/api/status")["restarts"] == 1 and server.workers() not in ([], [pid]))
        wait_until(lambda: server.get("/api/status")["ready"])
        before = len(replies)
        wait_until(lambda: len(replies) > before + 20)
        ended.set()
        for one in asking:
            one.result(PATIENCE_S)
    counts = Counter(reply.status for reply in replies)
    assert set(counts) <= {200, 500, 503} and counts[200] > 40
    failed = [reply.error for reply in replies if reply.status == 500]
    assert 1 <= len(failed) <= 3 and all("worker cpu-1-0 died" in sentence for sentence in failed)
    reasons = {reply.headers["X-Shed"] for reply in replies if reply.status == 503}
    assert reasons <= {"late", "unavailable"}
    assert "tightrec_worker_restarts 1.0" in metrics(server)


def test_sigterm_answers_what_is_in_flight_and_refuses_what_comes(file: Path):
    with serving(file) as server, frozen_worker(server), ThreadPoolExecutor(4) as threads:
        (worker,) = server.workers()
        asked = [threads.submit(server.infer, request_of(3, seed)) for seed in range(4)]
        wait_until(lambda: server.get("/api/status")["queue"]["queries"] == 3)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.ask("GET", "/v2/health/ready").status == 503)
        refused = server.infer(request_of(3))
        assert refused.status == 503 and refused.headers["X-Shed"] == "draining"
        assert server.ask("GET", "/v2/health/live").status == 200
        os.kill(worker, signal.SIGCONT)
        assert [len(scores(one.result(PATIENCE_S))) for one in asked] == [3] * 4
        assert server.ended() == 0 and server.lines[-1] == "drained"
        assert not Path(f"/proc/{worker}").exists()


def test_a_second_signal_ends_at_once_and_says_so_by_its_status(file: Path):
    with serving(file) as server, frozen_worker(server), ThreadPoolExecutor(1) as threads:
        (worker,) = server.workers()
        asked = threads.submit(server.infer, request_of(3))
        wait_until(lambda: 'tightrec_slots_busy{device="cpu"} 1.0' in metrics(server))
        server.process.send_signal(signal.SIGINT)
        server.wait_for("draining")
        assert server.stop() == 1
        assert isinstance(asked.exception(PATIENCE_S), OSError) or asked.result().status >= 500
        assert not Path(f"/proc/{worker}").exists()
