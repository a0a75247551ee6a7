"""What a checkpoint says of itself, held against every way to be something else."""

import itertools
import json
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from train.runs.checkpoints import checksums


class ChecksumsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        generator = np.random.default_rng(0)
        self.content = {
            "a/empty": b"",
            "a/small": b"content",
            "a/block": generator.bytes(2**20),
            "a/b/blocks": generator.bytes(2 * 2**20 + 3),
            "beside": b"text",
        }
        for name, content in self.content.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.file = self.root / "checksums.json"

    def _problem(self, step=7):
        return checksums.problem(self.root, step)

    def test_of_the_whole_content(self):
        checksums.write(self.root, 7)
        files = {name: zlib.crc32(content) for name, content in self.content.items()}
        expected = {"version": 1, "step": 7, "files": files}
        self.assertEqual(json.loads(self.file.read_text()), expected)
        self.assertEqual(self._problem(), "")
        found = {path for path in self.root.rglob("*") if path.is_file()}
        names = {*self.content, "checksums.json"}
        self.assertEqual(found, {self.root / name for name in names})

    @parameterized.product(
        name=["a/small", "a/block", "a/b/blocks"], place=["first", "middle", "last"]
    )
    def test_any_byte_counts(self, name, place):
        checksums.write(self.root, 7)
        content = bytearray(self.content[name])
        index = {"first": 0, "middle": len(content) // 2, "last": -1}[place]
        content[index] ^= 1
        (self.root / name).write_bytes(content)
        self.assertEqual(self._problem(), f"{name} has changed since it was written")

    def test_of_orbaxs_metadata_the_time_at_the_end_does_not_count(self):
        path = self.root / "_CHECKPOINT_METADATA"
        content = {"item_handlers": {"state": "a"}, "commit_timestamp_nsecs": None}
        path.write_text(json.dumps(content))
        checksums.write(self.root, 7)
        path.write_text(json.dumps(content | {"commit_timestamp_nsecs": 3}))
        (self.root / "commit_success.txt").write_text("")
        self.assertEqual(self._problem(), "")
        for text in (
            json.dumps(content | {"item_handlers": {"state": "b"}}),
            json.dumps(content | {"more": 1}),
            "[" * 100_000,
            "[]",
            "",
        ):
            path.write_text(text)
            self.assertIn("_CHECKPOINT_METADATA has changed", self._problem())

    @parameterized.parameters("", "{}", '{"item_handlers": null}', '{"item_h')
    def test_what_orbax_writes_meanwhile_is_waited_for(self, before):
        """From a thread of its own, in which it is not always done."""
        path, whole = self.root / "_CHECKPOINT_METADATA", {"item_handlers": {"a": "b"}}
        if before:
            path.write_text(before)
        looks = []

        def look(seconds):
            looks.append(seconds)
            if len(looks) == 3:
                path.write_text(json.dumps(whole))

        with mock.patch.object(checksums.time, "sleep", look):
            checksums.wait_for_orbax(self.root)
        self.assertLen(looks, 3)
        checksums.write(self.root, 7)
        path.write_text(json.dumps(whole | {"commit_timestamp_nsecs": 3}))
        self.assertEqual(self._problem(), "")

    def test_what_orbax_never_writes_is_not_waited_for_for_long(self):
        clock = itertools.count(0.0, 1.0)
        with (
            mock.patch.object(checksums.time, "monotonic", side_effect=clock),
            mock.patch.object(checksums.time, "sleep"),
        ):
            checksums.wait_for_orbax(self.root)
        self.assertLess(next(clock), 20)

    @parameterized.parameters("a/empty", "a/b/blocks")
    def test_a_file_that_is_missing(self, name):
        checksums.write(self.root, 7)
        (self.root / name).unlink()
        self.assertEqual(self._problem(), f"{name} is missing")

    def test_a_file_that_grew_and_one_that_shrank(self):
        for content in (b"content\0", b"conten", b""):
            checksums.write(self.root, 7)
            (self.root / "a/small").write_bytes(content)
            self.assertIn("a/small has changed", self._problem())
            (self.root / "a/small").write_bytes(b"content")

    def test_a_file_that_became_a_directory(self):
        checksums.write(self.root, 7)
        (self.root / "a/small").unlink()
        (self.root / "a/small").mkdir()
        self.assertIn("a/small", self._problem())

    def test_files_that_are_not_of_it_do_not_count(self):
        checksums.write(self.root, 7)
        (self.root / "a/new").write_bytes(b"new")
        self.assertEqual(self._problem(), "")

    def test_no_other_file_is_opened(self):
        """Such as a device that has no end."""
        files = {"/dev/zero": 1, "../../dev/zero": 1}
        for name in files:
            content = {"version": 1, "step": 7, "files": {name: 1}}
            self.file.write_text(json.dumps(content))
            self.assertEqual(self._problem(), f"{name} is missing")

    @parameterized.parameters(8, "7", None, True, ([7],))
    def test_another_step(self, step):
        checksums.write(self.root, 7)
        self.assertEqual(self._problem(8), "it was written as that of step 7")
        content = json.loads(self.file.read_text()) | {"step": step}
        self.file.write_text(json.dumps(content))
        self.assertNotEqual(self._problem(), "")

    def test_none_at_all(self):
        self.assertEqual(self._problem(), "checksums.json is missing")
        absent = checksums.problem(self.root / "absent", 7)
        self.assertStartsWith(absent, "it is gone")

    @parameterized.parameters(
        *("", "{", '{"a/small": 1', "[]", "1", '"text"', "null", "[1]", "{}"),
        *('{"version": 2, "step": 7, "files": {"a/small": 1}}', '{"version": 1}'),
        '{"version": 1, "step": 7, "files": 3}',
        "[" * 100_000,
    )
    def test_another_table_is_a_problem(self, text):
        self.file.write_text(text)
        problem = self._problem()
        self.assertNotEqual(problem, "")
        self.assertLen(problem.splitlines(), 1)

    def test_bytes_are_no_table(self):
        self.file.write_bytes(b"\xff")
        self.assertLen(self._problem().splitlines(), 1)

    @parameterized.parameters("null", '"1"', "[]", "1.5", "-1")
    def test_what_is_no_checksum_is_a_problem(self, value):
        self.file.write_text(f'{{"a/small": {value}}}')
        self.assertIn("a/small has changed", self._problem())

    def test_writing_again_replaces_them(self):
        checksums.write(self.root, 7)
        (self.root / "a/small").write_bytes(b"other")
        checksums.write(self.root, 7)
        self.assertEqual(self._problem(), "")


if __name__ == "__main__":
    absltest.main()
