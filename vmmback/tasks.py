"""Work beside other work: in a thread, where it would hold up the event loop, or in a task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

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
        raise


@asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Do `work` while the block runs, which takes its result; cancel it when the block fails before."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
