"""A network of one's own: nothing of it is seen outside, and nothing of it stays."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from vmmback.linux.network import in_new_network


def namespace() -> str:
    return os.readlink("/proc/thread-self/ns/net")  # noqa: PTH115 (the link's text)


def test_the_function_runs_in_a_network_with_a_loopback_alone() -> None:
    def inside() -> tuple[str, list[tuple[int, str]]]:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2):
            return namespace(), socket.if_nameindex()

    before, threads = namespace(), threading.active_count()
    there, interfaces = in_new_network(inside)
    assert there != before
    assert [name for _, name in interfaces] == ["lo"]
    assert (namespace(), threading.active_count()) == (before, threads)


def test_what_it_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_new_network(lambda: 1 // 0)
