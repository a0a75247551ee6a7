"""Locking of a directory, so that only one process writes to it at a time."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

_NAME = ".lock"
# Errors of `flock` on a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class LockedError(Exception):
    """Raised when another process is writing to the directory."""


@contextlib.contextmanager
def locked(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Locks an existing directory for this process while the context lasts.

    Uses `flock`, whose lock ends with the process, however that ends. It works on local
    disks, NFS 4 and other file systems that support it. On a disk without locks, the
    host and process ID in the lock file are read: a process that still runs on this
    host is an error, and one on another host only a warning.

    Args:
      directory: directory to lock.
      say: called with a warning if the disk has no locks.

    Raises:
      LockedError: another process holds the lock; the message names host and process.
      OSError: the directory cannot be written.
    """
    path = directory / _NAME
    file = _opened(path)
    try:
        _acquire(file, path, say)
        # The previous holder may have removed the file between opening and locking.
        while not _is_at(file, path):
            os.close(file)
            file = _opened(path)
            _acquire(file, path, say)
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


def _acquire(file: int, path: Path, say: Callable[[str], None]) -> None:
    host, process = _holder(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _locked_error(path, host, process) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if host == socket.gethostname() and _is_running(process):
            raise _locked_error(path, host, process) from error
        of = f"; process {process} on {host} wrote last" if host else ""
        say(
            f"{path.parent} is on a disk without locks: nothing keeps another run from "
            f"writing there{of}."
        )


def _holder(file: int) -> tuple[str, int]:
    r"""Returns host and process ID in the lock file, or "" and 0 if it has none.

    `b"gpu3 4711\n"` -> `("gpu3", 4711)`.
    """
    words = os.pread(file, 1000, 0).decode(errors="replace").split()
    if len(words) != 2 or not words[1].isdecimal():
        return "", 0
    return words[0], int(words[1])


def _locked_error(path: Path, host: str, process: int) -> LockedError:
    by = f"process {process} on {host}" if host else "another process"
    return LockedError(
        f"{path.parent} is being written by {by}: wait for it, stop it, or take "
        "another --workdir."
    )


def _is_at(file: int, path: Path) -> bool:
    """Returns whether the path still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _is_running(process: int) -> bool:
    """Returns whether a process ID is that of another running process on this host."""
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return process != os.getpid()
