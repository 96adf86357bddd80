"""What a guest's devices need of the host: opened here, and handed to QEMU by descriptor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from vmmback import disks, shares, vsock
from vmmback.command import Device
from vmmback.config import GuestConfig


async def open_devices(
    config: GuestConfig, ids: tuple[int, int] | None, folder: Path, stack: AsyncExitStack, inherited: ExitStack
) -> tuple[list[Device], list[shares.Daemon]]:
    """Open all but the nics, whose time comes later: return the devices, and the daemons behind some of them.

    `ids` are QEMU's uid and gid, if not ours. `inherited` closes what QEMU inherits, `stack` all else. Raises
    VmmbackError.
    """
    opened = disks.open_disks(config, inherited, ids)
    if config.vsock:
        opened.append(inherited.enter_context(vsock.opened(config.vsock.cid)))
    daemons = await _serve_shares(config, folder, stack, inherited)
    return opened + [daemon.device for daemon in daemons], daemons


async def _serve_shares(
    config: GuestConfig, folder: Path, stack: AsyncExitStack, inherited: ExitStack
) -> list[shares.Daemon]:
    """Start a daemon for each share; `stack` holds them. Raises HostUnfit where none can map its RAM."""
    if not config.share:
        return []
    size = config.memory.largest
    program = await shares.usable_program(config.share[0], folder, config.memory.backing, size)
    return [
        await stack.enter_async_context(shares.serve(share, number, program, folder, size, inherited))
        for number, share in enumerate(config.share)
    ]


def import_network() -> None:
    """Import what only guests with a nic need: pyroute2 takes 110 ms, more than QMP, msgspec and asyncio together."""
    from vmmback import network  # noqa: F401


async def attach_nics(
    config: GuestConfig, stack: AsyncExitStack, inherited: ExitStack, note: Callable[[str], None]
) -> list[Device]:
    """See network.attach."""
    from vmmback import network

    return await network.attach(config, stack, inherited, note)
