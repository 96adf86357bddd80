"""The broker's figures as OpenMetrics, over HTTP at a Unix socket or on this host's own network. docs/BROKER.md."""

from __future__ import annotations

import asyncio
import errno
import math
import stat
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from vmmback.ask import ask_all
from vmmback.broker.config import Address
from vmmback.broker.lending import Broker
from vmmback.errors import HostUnfit, VmmbackError
from vmmback.linux import direct_map_use
from vmmback.runtime import live_guests, runtime_folder

_PATIENCE_S = 5.0
_MOST_HEAD_BYTES = 8192
_MOST_CLIENTS = 16  # of a port that every user of the host can reach
_OF_ITS_USER_ALONE = 0o600


class Figures(Collector):
    """What a scrape is told; `verdicts` counts guests of this runtime folder by their last one."""

    def __init__(self, broker: Broker, verdicts: Mapping[str, int]) -> None:
        self._broker, self._verdicts = broker, verdicts

    def collect(self) -> Iterator[Metric]:
        """Yield all of it; sizes in bytes, times in seconds."""
        pool, ledger = self._broker.pool, self._broker.ledger
        ready = GaugeMetricFamily("vmmback_broker_pool_ready", "Files that are ready, by size", labels=["size"])
        wanted = GaugeMetricFamily("vmmback_broker_pool_wanted", "Files that are to be ready, by size", labels=["size"])
        for size, count in sorted(pool.wanted.items()):
            ready.add_metric([str(size)], pool.ready[size])
            wanted.add_metric([str(size)], count)
        yield from (ready, wanted)
        yield GaugeMetricFamily("vmmback_broker_leases", "Leases that have not ended", len(list(ledger)))
        lent = sum(lease.size for lease in ledger)
        yield GaugeMetricFamily("vmmback_broker_lent_bytes", "Secret RAM of these leases", lent)
        for name, told, total in (
            ("lent", "Leases since the start", ledger.lent),
            ("not_ready", "Calls for a size of which none was ready", self._broker.not_ready),
            ("denied", "Calls that the broker's file does not allow", self._broker.denials),
            ("filled_bytes", "Secret RAM that was prefaulted for the pool", pool.filled_bytes),
            ("fill_seconds", "Time that this took", pool.fill_seconds),
        ):
            yield CounterMetricFamily(f"vmmback_broker_{name}", told, total)
        waits, count, buckets = self._broker.waits, 0, []
        for bound, more in zip(waits.BOUNDS, waits.counts, strict=True):
            count += more
            buckets.append(("+Inf" if bound == math.inf else str(bound), float(count)))
        yield HistogramMetricFamily(
            "vmmback_broker_acquire_seconds", "From the arrival of a call to its lease", buckets, waits.total_s
        )
        splits = CounterMetricFamily(
            "vmmback_host_direct_map_splits", "Pages of the direct map that were split since boot", labels=["page"]
        )
        use = direct_map_use.of()
        for page, split in (("2M", use.splits_2m), ("1G", use.splits_1g)):
            if split is not None:
                splits.add_metric([page], split)
        yield splits
        guests = GaugeMetricFamily("vmmback_guests", "Guests that live, by their last verdict", labels=["verdict"])
        for verdict, count in sorted(self._verdicts.items()):
            guests.add_metric([verdict], count)
        yield guests


async def exposition(broker: Broker) -> bytes:
    """Return all figures as OpenMetrics text."""
    registry = CollectorRegistry()
    registry.register(Figures(broker, await asyncio.to_thread(_verdicts)))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return text


def _verdicts() -> Counter[str]:
    """Ask all supervisors; one that does not answer in time counts as `unknown`, as does a guest without a verdict."""
    try:
        folders = [runtime_folder() / name for name in live_guests()]
        answers = ask_all(folders, "Status", {}, _PATIENCE_S)
    except (VmmbackError, OSError):
        return Counter()
    found = Counter[str]()
    for answer in answers:
        status = {} if isinstance(answer, VmmbackError) else answer.get("status")
        verdict = status.get("verdict") if isinstance(status, dict) else None
        found[verdict if isinstance(verdict, str) else "unknown"] += 1
    return found


def _make_room(place: Path) -> None:
    """Remove the socket of a broker that was killed. Raises FileExistsError for what is none."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(place.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "there is something else than a socket")
        place.unlink()


@asynccontextmanager
async def served(address: Address | None, broker: Broker) -> AsyncIterator[None]:
    """Answer `GET /metrics` at an address while the block runs; at None nowhere. Raises HostUnfit."""
    if address is None:
        yield
        return

    clients = set[asyncio.StreamWriter]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(clients) < _MOST_CLIENTS:
            clients.add(writer)
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(2 * _PATIENCE_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(await _answer(head, broker))
                    await writer.drain()
            clients.remove(writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    try:
        if isinstance(address, Path):
            _make_room(address)
            server = await asyncio.start_unix_server(answer, address, limit=_MOST_HEAD_BYTES)
            address.chmod(_OF_ITS_USER_ALONE)
        else:
            server = await asyncio.start_server(answer, *address, limit=_MOST_HEAD_BYTES)
    except OSError as error:
        place = address if isinstance(address, Path) else "{}:{}".format(*address)
        raise HostUnfit(f"metrics cannot be served at {place}: {error.strerror}", "choose another place") from error
    try:
        yield
    finally:
        server.close()
        if isinstance(address, Path):
            address.unlink(missing_ok=True)


async def _answer(head: bytes, broker: Broker) -> bytes:
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method != b"GET" or path != b"/metrics":
        status, kind, body = "404 Not Found", "text/plain", b"GET /metrics is all that is here\n"
    else:
        status, kind, body = "200 OK", CONTENT_TYPE_LATEST, await exposition(broker)
    lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", "", "")
    return "\r\n".join(lines).encode() + body
