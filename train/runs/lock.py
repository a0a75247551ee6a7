"""One writer of a directory at a time."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

_NAME = ".lock"
# What a disk without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class LockedError(Exception):
    """A directory that another process writes."""


@contextlib.contextmanager
def held(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a directory, which exists, for this process.

    The lock is `flock`'s: it ends with the process, however that ends, and holds on
    local disks, NFS 4 and other file systems that pass it on. Where there is none, a
    process that still runs on this host is noticed all the same, and one on another
    host is told of.

    Args:
      directory: what is written.
      say: is told if nothing keeps others away.

    Raises:
      LockedError: another process holds it; host and process are named.
      OSError: nothing can be written there.
    """
    path = directory / _NAME
    file = _opened(path)
    try:
        _take(file, path, say)
        while not _is_still(file, path):  # its holder ended, and took the file away
            os.close(file)
            file = _opened(path)
            _take(file, path, say)
        os.ftruncate(file, 0)
        os.pwrite(file, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _take(file: int, path: Path, say: Callable[[str], None]) -> None:
    host, process = _holder(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _locked(path, host, process) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if host == socket.gethostname() and _runs(process):
            raise _locked(path, host, process) from error
        of = f"; process {process} on {host} wrote last" if host else ""
        say(
            f"{path.parent} is on a disk without locks: nothing keeps another run from "
            f"writing there{of}."
        )


def _holder(file: int) -> tuple[str, int]:
    """The host and the process that wrote the file; "" and 0 if none did."""
    words = os.pread(file, 1000, 0).decode(errors="replace").split()
    if len(words) != 2 or not words[1].isdecimal():
        return "", 0
    return words[0], int(words[1])


def _locked(path: Path, host: str, process: int) -> LockedError:
    by = f"process {process} on {host}" if host else "another process"
    return LockedError(
        f"{path.parent} is being written by {by}: wait for it, stop it, or take "
        "another --workdir."
    )


def _is_still(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _runs(process: int) -> bool:
    """Returns whether another process of that number runs on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return process != os.getpid()
