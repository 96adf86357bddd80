"""Work that would hold up the event loop, in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[[], T], executor: Executor | None = None) -> T:
    """Run `function` in a thread. Unlike asyncio.to_thread, cancelling it waits for the thread's end.

    So no probe ever looks at a process that has ended, or at another one under its pid.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, function)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        future.exception()  # nobody else asks for it
        raise
