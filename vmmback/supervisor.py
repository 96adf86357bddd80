"""A guest's life as others see it, from the moment that its name is held until it is gone."""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from vmmback.config import GuestConfig
from vmmback.control import GuestInterface, GuestStatus
from vmmback.errors import QemuFailed, VmmbackError
from vmmback.lifecycle import State, Stop
from vmmback.notify import notify
from vmmback.report import Drift, IsolationReport
from vmmback.runtime import SERIAL_LOG, SUPERVISOR_LOG

if TYPE_CHECKING:
    from vmmback.guest import Guest, Watcher

_UNTIL_THE_POWER_BUTTON_WORKED_S = 15.0
_HUNDREDTHS = 100


class Life:
    """One guest's life. It shows a watcher what the watcher is to see, and answers whoever asks (control.py).

    A context manager: what the block raises, or the report that `ended` was told, is the answer to who waits for the
    guest's end.
    """

    def __init__(self, config: GuestConfig, file: Path | None, folder: Path, watcher: Watcher, stop: Stop) -> None:
        self.state = State.STARTING
        self.interface = GuestInterface(self)
        self._config, self._file, self._folder = config, file, folder
        self._watcher, self._stop = watcher, stop
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._started = time.monotonic()
        self._prefaulted = 0
        self._stands_still = False
        self._guest: Guest | None = None
        self._seen: Guest | None = None
        self._end: asyncio.Future[IsolationReport] = asyncio.get_running_loop().create_future()
        self._log: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._log = (self._folder / SUPERVISOR_LOG).open("ab", buffering=0)
        notify(f"STATUS=guest {self._config.name} starts")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.entered(State.ENDED)
        if not self._end.done():
            said = error if isinstance(error, VmmbackError) else QemuFailed(f"the guest has ended: {error}")
            self._end.set_exception(said)
            self._end.exception()  # it is no mistake that nobody waits for it
        if self._log:
            self._log.close()
            self._log = None

    def ended(self, report: IsolationReport) -> IsolationReport:
        """Take the last word on the guest, and return it."""
        self._end.set_result(report)
        return report

    @asynccontextmanager
    async def of(self, guest: Guest) -> AsyncIterator[None]:
        """Let others ask for what only a guest that is up can answer, while the block runs; it ends what they began."""
        self._guest = self._seen = guest
        try:
            with guest.monitor.listen(self._qemu_told):
                yield
        finally:
            self._guest = None
            await self.interface.end()

    # What a watcher is shown

    def console(self, data: bytes | memoryview) -> None:
        """See Watcher."""
        self._watcher.console(data)

    def note(self, message: str) -> None:
        """See Watcher; it goes to the log in the guest's folder, too."""
        self._write(message)
        self._watcher.note(message)

    def prefaulted(self, done: int, size: int) -> None:
        """See Watcher."""
        if done * _HUNDREDTHS // size != self._prefaulted * _HUNDREDTHS // size:
            notify(f"STATUS=prefault: {done * _HUNDREDTHS // size} % of {size >> 20} MiB")
        self._prefaulted = done
        self._watcher.prefaulted(done, size)

    def validated(self, report: IsolationReport) -> None:
        """See Watcher."""
        self._write(f"the guest is {report.verdict.value} while it runs")
        self._watcher.validated(report)

    def drifted(self, drift: Drift) -> None:
        """See Watcher."""
        self._write(f"drift: {drift.probe}: {drift.detail}")
        notify(f"STATUS=exposed: {drift.probe}: {drift.detail}")
        self._watcher.drifted(drift)

    def entered(self, state: State) -> None:
        """See Watcher."""
        if state is self.state:
            return
        self.state = state
        self._write(f"the guest is {state.value}")
        ready = {State.RUNNING: ["READY=1"], State.STOPPING: ["STOPPING=1"], State.ENDED: ["STOPPING=1"]}
        verdict = self._seen.found.verdict.value if self._seen and self._seen.found else "not validated"
        notify(*ready.get(state, []), f"STATUS={state.value}, {verdict}")
        self._watcher.entered(state)

    # What others ask for

    async def examine(self) -> IsolationReport:
        """Audit the guest. Raises QemuFailed before it is up, and after its end."""
        return await self._up().examine()

    async def frames(self) -> array[int]:
        """Return the pagemap entry of each page of its RAM. Raises QemuFailed, OSError."""
        return await self._up().frames()

    def canary_halves(self) -> tuple[bytes, bytes] | None:
        """Return two halves whose XOR is the guest's canary. Raises QemuFailed."""
        return self._up().canary_halves()

    async def grow(self, size: int, progress: Callable[[int, int], None]) -> IsolationReport:
        """Add `size` bytes of RAM, audit the guest, and report it. Raises VmmbackError."""
        from vmmback.grow import grow

        return await grow(self._up(), size, progress)

    def attach_console(self, *, scrollback: bool) -> int:
        """Return the descriptor of a stream socket at its console. Raises QemuFailed, OSError."""
        return self._up().console.attach_client(scrollback=scrollback)

    def status(self) -> GuestStatus:
        """Return how the guest is. It asks nobody, so that a QEMU that hangs holds up nothing."""
        guest, found = self._seen, self._seen.found if self._seen else None
        paused = self._stands_still and self.state in {State.BOOTING, State.RUNNING}
        logs = [self._folder / SERIAL_LOG, *([self._config.console.log] if self._config.console.log else [])]
        return GuestStatus(
            name=self._config.name,
            state=(State.PAUSED if paused else self.state).value,
            pid=os.getpid(),
            qemu_pid=guest.qemu.pid if guest and guest.qemu.status is None else None,
            started_at=self._started_at,
            uptime_s=round(time.monotonic() - self._started, 3),
            ram_bytes=sum(memory.size for memory in guest.ram) if guest else self._config.memory.size,
            prefaulted_bytes=self._prefaulted,
            secret_bytes=guest.proof.secret if guest else 0,
            verdict=found.verdict.value if found else None,
            reasons=list(found.reasons) if found else [],
            validated_after=found.validated_after if found else None,
            unexamined=(guest.unexamined or None) if guest else None,
            config_file=str(self._file.absolute()) if self._file else None,
            folder=str(self._folder),
            console_logs=[str(log) for log in logs],
        )

    async def stop(self, timeout_s: float | None, *, kill: bool) -> IsolationReport:
        """End the guest, and return the last word on it once it is gone. Raises VmmbackError if it never ran.

        Its power button is pressed; if it does not end within `timeout_s`, QEMU is told to quit, and at last killed;
        with `kill` at once. Whoever asks while it ends already waits with the first; the shorter patience counts.
        """
        patience_s = _UNTIL_THE_POWER_BUTTON_WORKED_S if timeout_s is None else timeout_s
        first = self._stop.times == 0
        if first:
            self._stop.patience_s = patience_s
        self._stop.insist(3 if kill else 1)
        if not first and not kill:
            await asyncio.wait({self._end}, timeout=patience_s)
            if not self._end.done():
                self._stop.insist(2)
        return await asyncio.shield(self._end)

    def _up(self) -> Guest:
        if self._guest is None:
            raise QemuFailed(f"the guest is {self.state.value}: that can be asked of it while it runs", "")
        return self._guest

    def _qemu_told(self, event: Mapping[str, object]) -> None:
        if event.get("event") in {"STOP", "RESUME"}:
            self._stands_still = event["event"] == "STOP"

    def _write(self, message: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if self._log is None:
            return
        with suppress(OSError):  # a full disk must not end the guest
            self._log.write(f"{now} {message}\n".encode(errors="replace"))
