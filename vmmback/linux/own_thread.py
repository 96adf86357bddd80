"""A thread for one call: what the call makes the thread's own, such as namespaces and seccomp filters, ends with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def begin(function: Callable[[], T]) -> Callable[[], T]:
    """Call `function` in a thread that ends with it; return what waits for its result, and raises what it raised.

    The pools of concurrent.futures take 9 ms to import, which commands that an operator waits for can do without.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 (it is raised where the result is awaited)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> T:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return result


def in_own_thread(function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own. Raises what it does."""
    return begin(function)()
