"""Tests of the connections between processes, and of strangers on their port."""

import io
import json
import socket
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from train.processes import peers


class HeardTest(parameterized.TestCase):
    @parameterized.parameters(
        "",
        "\n",
        "5\n",
        "null\n",
        '"ab"\n',
        "[1, 2]\n",
        '["a"]\n',
        '["a", 5]\n',
        '["a", "b", "c"]\n',
        '{"a": "b", "c": "d"}\n',
        "[" * 9000,
        "x" * 20_000,
    )
    def test_anything_else_is_nothing(self, line):
        self.assertEqual(peers._heard(io.StringIO(line)), ("", ""))

    def test_two_words(self):
        self.assertEqual(peers._heard(io.StringIO('["a", "b"]\nx')), ("a", "b"))


class ListenTest(parameterized.TestCase):
    def test_strangers_are_turned_away_and_a_peer_is_not(self):
        strangers = [b"5\n", b'["\xc3\xa9", "x"]\n', b"GET / HTTP/1.1\r\n\r\n", b""]
        strangers.append(b'["\\ud800", "x"]\n')
        open_ones = []

        def told(server):
            if server is None:
                return None
            for words in strangers:
                stranger = socket.create_connection(("localhost", server["port"]))
                stranger.sendall(words)
                open_ones.append(stranger)
            peer = socket.create_connection(("localhost", server["port"]))
            peer.sendall(
                json.dumps([server["token"], "process 1 (x)"]).encode() + b"\n"
            )
            open_ones.append(peer)
            return server

        watch = peers._Watch()
        with (
            mock.patch.object(peers, "broadcast_from_first", told),
            mock.patch.object(jax, "process_count", return_value=2),
        ):
            watch.listen()
        self.assertEqual([peer.name for peer in watch._peers], ["process 1 (x)"])
        self.assertIn(b"welcome", open_ones[-1].recv(1000))
        watch.leave("done")
        for connection in open_ones:
            connection.close()
        for reader in watch._readers:
            reader.join()


if __name__ == "__main__":
    absltest.main()
