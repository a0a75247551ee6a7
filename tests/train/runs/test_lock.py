"""One writer of a directory, seen from others in this process and in another."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from tests.train import commands
from train.runs import lock

_HOLD = """
import sys
from pathlib import Path
from train.runs import lock
with lock.locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


class LockTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.said = []

    def _held(self):
        return lock.locked(self.directory, self.said.append)

    def _without_locks(self, number=errno.ENOLCK):
        return mock.patch.object(fcntl, "flock", side_effect=OSError(number, "no"))

    def test_a_second_one_is_told_who_holds_it(self):
        own = f"process {os.getpid()} on {socket.gethostname()}"
        with self._held():
            with pytest.raises(lock.LockedError, match=own) as error, self._held():
                pass
            self.assertStartsWith(str(error.value), f"{self.directory} is being writ")
        with self._held():  # and again, once it is let go
            pass
        self.assertEmpty(list(self.directory.iterdir()))
        self.assertEmpty(self.said)

    def test_it_ends_with_its_process(self):
        arguments = [sys.executable, "-c", _HOLD, str(self.directory)]
        with subprocess.Popen(
            arguments,
            cwd=commands.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            self.assertEqual(process.stdout.readline(), "held\n")
            with (
                pytest.raises(lock.LockedError, match=f"process {process.pid} on"),
                self._held(),
            ):
                pass
            process.kill()
        self.assertNotEmpty(list(self.directory.iterdir()))
        with self._held():
            pass
        self.assertEmpty(list(self.directory.iterdir()))

    def test_a_file_that_its_holder_takes_away_meanwhile(self):
        opened = lock._opened

        def late(path):
            file = opened(path)
            path.unlink()
            slow.side_effect = opened
            return file

        with mock.patch.object(lock, "_opened", side_effect=late) as slow:
            with self._held():
                self.assertNotEmpty(list(self.directory.iterdir()))
            self.assertEqual(slow.call_count, 2)

    @parameterized.parameters("ENOLCK", "ENOSYS", "ENOTSUP")
    def test_a_disk_without_locks_is_told(self, name):
        with self._without_locks(getattr(errno, name)), self._held():
            pass
        (line,) = self.said
        self.assertIn("on a disk without locks", line)

    @parameterized.parameters(
        (os.getppid, socket.gethostname, True),
        (os.getppid, lambda: "elsewhere", False),
        (lambda: 2**22 + 1, socket.gethostname, False),  # above Linux's largest
        (lambda: 10**30, socket.gethostname, False),
        (lambda: 0, socket.gethostname, False),  # the process group
        (os.getpid, socket.gethostname, False),  # of a container before
    )
    def test_without_locks_a_process_of_this_host_is_noticed(
        self, process, host, refused
    ):
        (self.directory / ".lock").write_text(f"{host()} {process()}\n")
        with self._without_locks():
            if not refused:
                with self._held():
                    pass
                self.assertIn(f"process {process()} on {host()}", self.said[0])
                return
            with (
                pytest.raises(lock.LockedError, match=f"process {process()} on"),
                self._held(),
            ):
                pass

    @parameterized.parameters(b"", b"x", b"a b c", b"host \xff", b"\0" * 5000)
    def test_a_file_of_something_else_is_no_holder(self, content):
        (self.directory / ".lock").write_bytes(content)
        with self._held():
            pass
        self.assertEmpty(self.said)

    def test_another_error_of_the_disk_is_raised(self):
        with (
            self._without_locks(errno.EIO),
            pytest.raises(OSError, match="no"),
            self._held(),
        ):
            pass


if __name__ == "__main__":
    absltest.main()
