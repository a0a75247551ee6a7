"""Word of a process that went, to those that train with it.

JAX notices within two minutes, and then ends a process with a page of its own. Here
every process holds a connection to the first one: the system closes it when a process
ends, however it ends, and what was said before tells how.
"""

import contextlib
import dataclasses
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from train.processes.collective import from_first, is_first
from train.processes.interrupts import Interrupted, end_process

# Exit status of a process that cannot go on without another.
_STATUS = 2
# Seconds for a connection, and for a process to end by itself after another failed.
_CONNECT = 10
_GRACE = 5
# A host that is gone closes no connection: it is asked after ten seconds without word,
# and given up after four answers that do not come.
_PROBES = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))

# Characters of a message, and its kinds.
_LONGEST = 10_000
_WELCOME, _DONE, _FAILED, _LOST = "welcome", "done", "failed", "lost"


@dataclasses.dataclass
class _Peer:
    """Another process, at the other end of a connection."""

    name: str
    connection: socket.socket

    def send(self, kind: str, text: str = "") -> None:
        with contextlib.suppress(OSError):  # it is gone, which its reader notices
            self.connection.sendall(json.dumps([kind, text]).encode() + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # its reader then ends, and closes it
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends this process with one line when one that it trains with is gone.

    All processes enter it. Where they do not reach each other beside JAX, it does
    nothing, and JAX's own word comes later.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch()
    if is_first():
        watch.listen()
    else:
        watch.connect(from_first(None))
    try:
        yield
    except Interrupted:  # as all are
        watch.leave(_DONE)
        raise
    except BaseException as error:
        if not type(error).__module__.startswith("train."):
            watch.blame()  # of JAX, for instance, where a process is gone
        watch.leave(_FAILED)
        raise
    watch.leave(_DONE)


class _Watch:
    """The connections of this process, each read by a thread."""

    def __init__(self) -> None:
        self._peers: list[_Peer] = []
        self._readers: list[threading.Thread] = []
        self._leaving = threading.Event()
        self._has_lost = threading.Event()
        self._lost = ""

    def listen(self) -> None:
        """Has the other processes connect to this one."""
        token, name = secrets.token_hex(), _name()
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            from_first(
                {"port": port, "token": token, "name": name, "hosts": _addresses()}
            )
            server.settimeout(0.1)
            deadline = time.monotonic() + _CONNECT
            others = jax.process_count() - 1
            while len(self._peers) < others and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    # Beside each other: strangers may say nothing.
                    threading.Thread(
                        target=self._welcome, args=(connection, token), daemon=True
                    ).start()

    def _welcome(self, connection: socket.socket, token: str) -> None:
        connection.settimeout(_CONNECT)
        stream = connection.makefile("r")
        given, name = _heard(stream)
        if not hmac.compare_digest(given.encode(), token.encode()):
            stream.close()
            connection.close()
            return
        peer = _Peer(name, connection)
        peer.send(_WELCOME, token)
        self._watch(peer, stream)

    def connect(self, server: dict[str, Any]) -> None:
        """Connects to the first process."""
        for host in server["hosts"]:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, server["port"]), _CONNECT)
                hello = json.dumps([server["token"], _name()]).encode() + b"\n"
                connection.sendall(hello)
                stream = connection.makefile("r")
                if _heard(stream) == (_WELCOME, server["token"]):
                    self._watch(_Peer(server["name"], connection), stream)
                    return

    def _watch(self, peer: _Peer, stream: Any) -> None:
        connection = peer.connection
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            if hasattr(socket, option):  # not on every system
                connection.setsockopt(
                    socket.IPPROTO_TCP, getattr(socket, option), value
                )
        reader = threading.Thread(target=self._read, args=(peer, stream), daemon=True)
        reader.start()
        self._readers.append(reader)
        self._peers.append(peer)  # at last: `listen` counts them

    def _read(self, peer: _Peer, stream: Any) -> None:
        """Reads what a peer says until it goes, and ends this process if it is lost."""
        with stream, peer.connection:
            kind, text = _heard(stream)
        if kind == _DONE:
            return
        failed = f"{peer.name} ended with an error"
        self._lost = {_FAILED: failed, _LOST: text}.get(kind, f"{peer.name} is gone")
        self._has_lost.set()
        # Those that fail at the same have their own word.
        if not self._leaving.wait(_GRACE if kind == _FAILED else 0):
            self._end(self._lost)

    def blame(self) -> None:
        """Ends this process if a peer is lost, or is in a moment."""
        if self._has_lost.wait(_GRACE):
            self._end(self._lost)

    def _end(self, text: str) -> None:
        for peer in self._peers:
            peer.send(_LOST, text)
        if is_first():
            time.sleep(1)  # JAX ends the others once this one is gone
        end_process(
            f"error: {text}. Start all processes again: the same command goes on from "
            "the last checkpoint.",
            _STATUS,
        )

    def leave(self, kind: str) -> None:
        """Says that this process ends, and how."""
        self._leaving.set()
        for peer in self._peers:
            peer.send(kind)
        if kind == _FAILED and is_first():  # as above
            deadline = time.monotonic() + _GRACE + 2
            for reader in self._readers:
                reader.join(max(0.0, deadline - time.monotonic()))
        for peer in self._peers:
            peer.close()


def _heard(stream: Any) -> tuple[str, str]:
    """The next two words of a connection; empty ones if it has none, or others."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        match json.loads(stream.readline(_LONGEST)):
            case [str(first), str(second)]:
                return first, second
    return "", ""


def _name() -> str:
    return f"process {jax.process_index()} ({socket.gethostname()})"


def _addresses() -> list[str]:
    """Where others may reach this host, the likeliest first."""
    hosts = []
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect(("192.0.2.1", 9))  # of no host (RFC 5737); nothing is sent
        hosts.append(probe.getsockname()[0])
    return [*hosts, socket.gethostname(), "localhost"]
