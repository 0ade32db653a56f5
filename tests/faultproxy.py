"""A loopback HTTP proxy that breaks what passes through it, for tests of the store."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

BLOCK = 1 << 16


@dataclass
class Fault:
    """What happens to the next `times` requests whose first line matches.

    kind   hang         no answer
           reset        the connection is reset, at byte `at` of the body on `side` (a side of "" means before any byte)
           cut          the same with an ordinary end of the connection
           flip         byte `at` of the body on `side` arrives inverted
           slow         the body on `side` moves at `bytes_per_s`
           answer       the server is not asked: `status` with an S3 error of `code`
           lose_answer  the server does it, but its answer is lost: the connection is reset
           call         `call` is called at byte `at` of the body on `side`
    side   "up" the request's body, "down" that of the answer
    """

    kind: str
    side: str = ""
    at: int = 0
    times: int = 1
    match: str = ""
    status: int = 503
    code: str = "SlowDown"
    bytes_per_s: int = 1 << 20
    call: Callable[[], object] = lambda: None
    met: int = 0


class FaultProxy:
    """Forwards to a port of this machine; each request takes a connection of its own.

    requests  the first lines of all requests, in the order they came
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def inject(self, kind: str, **settings: object) -> Fault:
        """Adds a fault; the first that matches and is not used up happens."""
        self.faults.append(fault := Fault(kind, **settings))
        return fault

    def heal(self) -> None:
        """Takes all faults away."""
        self.faults.clear()

    def close(self) -> None:
        """Refuses connections from now on."""
        self._closed.set()
        with suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _take(self, line: str) -> Fault | None:
        with self._lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.met < fault.times and re.search(fault.match, line):
                    fault.met += 1
                    return fault
        return None

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, _EndError), client:
            head, rest = _head(client)
            line = head.split(b"\r\n")[0].decode("latin-1")
            length = int(found[1]) if (found := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)) else 0
            fault = self._take(line)
            self._forward(client, head, _body(client, rest, length), fault or Fault("none"))

    def _forward(self, client: socket.socket, head: bytes, body: Iterator[bytes], fault: Fault) -> None:
        if fault.kind == "hang":
            self._closed.wait()
            return
        if fault.kind in ("reset", "cut") and not fault.side:
            _end(client, fault)
        if fault.kind == "answer":
            for _ in body:
                pass
            text = f'<?xml version="1.0"?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>'.encode()
            text = b"" if head.startswith(b"HEAD") else text
            client.sendall(b"HTTP/1.1 %d Injected\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
                fault.status, len(text), text))
            return
        with socket.create_connection(("127.0.0.1", self.target_port)) as server:
            server.sendall(re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head).replace(
                b"\r\n", b"\r\nConnection: close\r\n", 1))
            _relay(body, server, client, fault, "up")
            head, rest = _head(server)
            if fault.kind == "lose_answer":
                for _ in _body(server, rest, None):
                    pass
                _end(client, fault)
            client.sendall(head)
            _relay(_body(server, rest, None), client, client, fault, "down")


class _EndError(Exception):
    """The connection was ended on purpose."""


def _head(source: socket.socket) -> tuple[bytes, bytes]:
    """The head with its empty line, and what of the body came with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (block := source.recv(BLOCK)):
            raise _EndError
        data += block
    head, rest = data.split(b"\r\n\r\n", 1)
    return head + b"\r\n\r\n", rest


def _body(source: socket.socket, rest: bytes, length: int | None) -> Iterator[bytes]:
    """The body in blocks: `length` bytes, or all until the end."""
    left = float("inf") if length is None else length
    while left > 0 and (block := rest or source.recv(BLOCK)):
        rest = b""
        yield block
        left -= len(block)


def _relay(blocks: Iterator[bytes], to: socket.socket, client: socket.socket, fault: Fault, side: str) -> None:
    """Passes blocks on, with the fault where it belongs to this side."""
    passed = 0
    for block in blocks:
        here = fault.at - passed if fault.side == side and passed <= fault.at < passed + len(block) else None
        passed += len(block)
        if here is not None and fault.kind == "flip":
            block = block[:here] + bytes([block[here] ^ 0xFF]) + block[here + 1:]
        elif here is not None and fault.kind in ("cut", "reset"):
            to.sendall(block[:here])
            _end(client, fault)
        elif here is not None and fault.kind == "call":
            fault.call()
        elif fault.side == side and fault.kind == "slow":
            time.sleep(len(block) / fault.bytes_per_s)
        to.sendall(block)


def _end(client: socket.socket, fault: Fault) -> None:
    if fault.kind != "cut":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
    client.close()
    raise _EndError


@contextmanager
def fault_proxy(target_port: int) -> Iterator[FaultProxy]:
    """A proxy before a port of this machine."""
    proxy = FaultProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()
