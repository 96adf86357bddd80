"""The broker's life: its folder and socket, its pool, until a signal ends it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from pathlib import Path

from asyncvarlink.util import get_listen_fd

from vmmback.admission import Promise
from vmmback.broker import metrics
from vmmback.broker.client import socket_path
from vmmback.broker.config import BrokerConfig
from vmmback.broker.journal import Journal
from vmmback.broker.lending import Broker
from vmmback.broker.pool import Ready
from vmmback.broker.server import Interfaces, serve
from vmmback.errors import GuestNameTaken, HostUnfit, UsageError
from vmmback.linux import capabilities, dumpable
from vmmback.notify import notify, stored
from vmmback.runtime import BROKER, guest_folder, socket_address

# What the broker keeps of root's rights. configs/systemd/vmmback-broker.service has the same.
RIGHTS = (
    "CAP_IPC_LOCK",  # map secret RAM beyond RLIMIT_MEMLOCK, to touch it
    "CAP_SYS_ADMIN",  # see in which frames pages lie (/proc/PID/pagemap), and the kernel's image (/proc/iomem)
    "CAP_SYS_PTRACE",  # see what other users' processes map, which admission counts; read a path in their memory
    "CAP_DAC_READ_SEARCH",  # enter the folders of these processes in /proc
    "CAP_SYS_RESOURCE",  # raise RLIMIT_MEMLOCK of who borrows
)

Extension = Callable[[Broker], AbstractAsyncContextManager[Interfaces]]

_BACKLOG = 128
_JOURNAL = f"{BROKER}-leases"
_NOT_EXECUTABLE = 0o111  # else for all: who may borrow is for the broker to say, which knows its callers


async def run(config: BrokerConfig, note: Callable[[str], None], more: Extension | None = None) -> None:
    """Lend until SIGTERM or SIGINT; `note` is told what goes wrong. Raises HostUnfit, UsageError.

    `more` serves one more interface beside the broker's own, as long as it is open.

    What is lent lives on: its borrowers have it, and the next broker counts it. What is ready goes back to the kernel,
    unless a service manager keeps it for the next broker.
    """
    if os.geteuid() != 0:
        raise UsageError("the broker runs as root: it makes secret RAM for other users", "sudo vmmback broker")
    dumpable.forbid()
    capabilities.keep(RIGHTS)  # while there is no other thread or process
    ended = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, ended.set)
    try:
        with guest_folder(BROKER) as folder, _listening() as listening:
            broker = Broker(config, Promise(folder, "secret"), note)
            broker.recover(Journal(folder.with_name(_JOURNAL)), Ready.kept(stored()))
            async with AsyncExitStack() as stack:
                interfaces = await stack.enter_async_context(more(broker)) if more else None
                tasks = await stack.enter_async_context(serve(listening, broker, interfaces))
                await stack.enter_async_context(metrics.served(config.metrics, broker))
                gc.freeze()  # a look through all that was imported would keep callers waiting (gc.freeze)
                notify("READY=1")
                # Without one of its tasks it would look alive, and lend nothing.
                told = asyncio.create_task(ended.wait())
                await asyncio.wait({told, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                told.cancel()
                notify("STOPPING=1")
    except GuestNameTaken as error:
        raise HostUnfit("another broker runs on this host, with this runtime folder", "end it first") from error


@contextmanager
def _listening() -> Iterator[socket.socket]:
    """Give the socket that systemd listens at for us (sd_listen_fds(3)), or one of our own, gone on exit."""
    if passed := get_listen_fd("broker"):
        with passed, socket.socket(fileno=os.dup(passed.fileno())) as given:
            yield given
        return
    path = socket_path()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            if not path.parent.exists():
                path.parent.mkdir()
                path.parent.chmod(0o755)  # whatever the umask
            _check_folder(path.parent)
            _remove_stale(path)
            umask = os.umask(_NOT_EXECUTABLE)  # chmod(2) would come too late, and follow a link
            try:
                with socket_address(path) as address:
                    listening.bind(address)
            finally:
                os.umask(umask)
        except OSError as error:
            raise HostUnfit(
                f"the broker's socket {path} cannot be made: {error.strerror}",
                "set VMMBACK_BROKER to a path in a folder of root's",
            ) from error
        listening.listen(_BACKLOG)
        try:
            yield listening
        finally:
            path.unlink(missing_ok=True)


def _check_folder(folder: Path) -> None:
    """Raise HostUnfit where others could put a socket of their own, or a link, in the place of the broker's."""
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise HostUnfit(
            f"the folder of the broker's socket, {folder}, belongs to another user, or others may write to it",
            "set VMMBACK_BROKER to a path in a folder of root's (mode 0755)",
        )


def _remove_stale(path: Path) -> None:
    """Remove the socket of a broker that was killed. Raises HostUnfit where somebody listens at it: systemd, say."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX) as connection, socket_address(path) as address:
            connection.setblocking(False)
            if connection.connect_ex(address) == errno.ECONNREFUSED:
                path.unlink()
                return
        raise HostUnfit(
            f"another process listens at {path}",
            "end it first: `systemctl stop vmmback-broker.socket`, if it is systemd",
        )
