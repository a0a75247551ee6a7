"""Quick detection of a process that ended while others train with it.

JAX takes up to two minutes to notice a lost process, and then ends the others with a
page of output. Here every process holds a TCP connection to the first one. The
operating system closes the connection however a process ends, and the last message on
it says how the process ended.
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

from train.processes.collective import broadcast_from_first, is_first
from train.processes.interrupts import Interrupted, end_process

# Exit status of a process that cannot continue without a lost one.
_EXIT_STATUS = 2
# Seconds to connect, and for a process to end by itself after another failed.
_CONNECT_SECONDS = 10
_GRACE_SECONDS = 5
# A host that crashed closes no connection. TCP probes the connection after ten idle
# seconds, then every five, and gives up after four probes without an answer.
_KEEPALIVE_OPTIONS = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))

# A message is a line of JSON, [kind, text], of at most so many characters.
_MAX_CHARACTERS = 10_000
_WELCOME, _DONE, _FAILED, _LOST = "welcome", "done", "failed", "lost"


@dataclasses.dataclass
class _Peer:
    """Another process and the connection to it."""

    name: str
    connection: socket.socket

    def send(self, kind: str, text: str = "") -> None:
        with contextlib.suppress(OSError):  # the reader thread notices a lost peer
            self.connection.sendall(json.dumps([kind, text]).encode() + b"\n")

    def close(self) -> None:
        # Only a shutdown: it ends the reader thread, which closes the connection.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def ended_with_peers() -> Iterator[None]:
    """Ends this process with one line when another training process is lost.

    All processes must enter the context. It does nothing if the processes cannot open
    connections to each other; JAX's own, slower detection then remains.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch()
    if is_first():
        watch.listen()
    else:
        watch.connect(broadcast_from_first(None))
    try:
        yield
    except Interrupted:  # which all processes raise at the same step
        watch.leave(_DONE)
        raise
    except BaseException as error:
        if not type(error).__module__.startswith("train."):
            # An error of a library, such as JAX, may result from a lost process.
            watch.end_if_peer_lost()
        watch.leave(_FAILED)
        raise
    watch.leave(_DONE)


class _Watch:
    """Holds the connections of this process, each read by a thread."""

    def __init__(self) -> None:
        self._peers: list[_Peer] = []
        self._readers: list[threading.Thread] = []
        self._leaving = threading.Event()
        self._has_lost = threading.Event()
        self._loss_message = ""

    def listen(self) -> None:
        """Broadcasts the addresses; accepts connections for ten seconds at most."""
        token, name = secrets.token_hex(), _name()
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            broadcast_from_first(
                {"port": port, "token": token, "name": name, "hosts": _addresses()}
            )
            server.settimeout(0.1)
            deadline = time.monotonic() + _CONNECT_SECONDS
            others = jax.process_count() - 1
            while len(self._peers) < others and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    # One thread each, as a stranger may connect and send nothing.
                    threading.Thread(
                        target=self._welcome, args=(connection, token), daemon=True
                    ).start()

    def _welcome(self, connection: socket.socket, token: str) -> None:
        connection.settimeout(_CONNECT_SECONDS)
        stream = connection.makefile("r")
        given, name = _heard(stream)
        if not hmac.compare_digest(given.encode(errors="replace"), token.encode()):
            stream.close()
            connection.close()
            return
        peer = _Peer(name, connection)
        peer.send(_WELCOME, token)
        self._start_reader(peer, stream)

    def connect(self, server: dict[str, Any]) -> None:
        """Connects to the first process, at the first of its addresses that answers.

        Args:
          server: port, token, name and host addresses, as `listen` broadcasts them.
        """
        for host in server["hosts"]:
            with contextlib.suppress(OSError):
                connection = socket.create_connection(
                    (host, server["port"]), _CONNECT_SECONDS
                )
                hello = json.dumps([server["token"], _name()]).encode() + b"\n"
                connection.sendall(hello)
                stream = connection.makefile("r")
                if _heard(stream) == (_WELCOME, server["token"]):
                    self._start_reader(_Peer(server["name"], connection), stream)
                    return

    def _start_reader(self, peer: _Peer, stream: Any) -> None:
        connection = peer.connection
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE_OPTIONS:
            if hasattr(socket, option):  # some operating systems lack one
                connection.setsockopt(
                    socket.IPPROTO_TCP, getattr(socket, option), value
                )
        reader = threading.Thread(target=self._read, args=(peer, stream), daemon=True)
        reader.start()
        self._readers.append(reader)
        self._peers.append(peer)  # last, since `listen` waits for their number

    def _read(self, peer: _Peer, stream: Any) -> None:
        """Waits for the last message of a peer, and ends this process if it is lost."""
        with stream, peer.connection:
            kind, text = _heard(stream)
        if kind == _DONE:
            return
        failed = f"{peer.name} ended with an error"
        self._loss_message = {_FAILED: failed, _LOST: text}.get(
            kind, f"{peer.name} is gone"
        )
        self._has_lost.set()
        # This process may be failing as well: it has time to report its own error.
        if not self._leaving.wait(_GRACE_SECONDS if kind == _FAILED else 0):
            self._report_loss(self._loss_message)

    def end_if_peer_lost(self) -> None:
        """Ends this process if a peer is lost now or within the next five seconds."""
        if self._has_lost.wait(_GRACE_SECONDS):
            self._report_loss(self._loss_message)

    def _report_loss(self, text: str) -> None:
        for peer in self._peers:
            peer.send(_LOST, text)
        if is_first():
            # JAX ends the others with the first process: they need time to print.
            time.sleep(1)
        end_process(
            f"error: {text}. Start all processes again: the same command goes on from "
            "the last checkpoint.",
            _EXIT_STATUS,
        )

    def leave(self, kind: str) -> None:
        """Tells the peers that this process ends, and closes the connections.

        Args:
          kind: how it ends, `_DONE` or `_FAILED`.
        """
        self._leaving.set()
        for peer in self._peers:
            peer.send(kind)
        if kind == _FAILED and is_first():  # JAX ends the others with it, as above
            deadline = time.monotonic() + _GRACE_SECONDS + 2
            for reader in self._readers:
                reader.join(max(0.0, deadline - time.monotonic()))
        for peer in self._peers:
            peer.close()


def _heard(stream: Any) -> tuple[str, str]:
    """Returns the two texts of the next message, or two empty ones if it is invalid.

    `["failed", ""]` -> `("failed", "")`; `[1, 2]` or a closed connection -> `("", "")`.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        match json.loads(stream.readline(_MAX_CHARACTERS)):
            case [str(first), str(second)]:
                return first, second
    return "", ""


def _name() -> str:
    return f"process {jax.process_index()} ({socket.gethostname()})"


def _addresses() -> list[str]:
    """Returns this host's IP address and names for its peers, the likeliest first."""
    hosts = []
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        # An address of no host (RFC 5737). Connecting a datagram socket sends nothing,
        # but makes the system choose the local address of outgoing connections.
        probe.connect(("192.0.2.1", 9))
        hosts.append(probe.getsockname()[0])
    return [*hosts, socket.gethostname(), "localhost"]
