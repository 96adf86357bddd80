"""The broker's figures as text, and the dashboard that draws them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from vmmback.admission import Promise
from vmmback.broker import metrics
from vmmback.broker.config import MIB, BrokerConfig
from vmmback.broker.ledger import Lease
from vmmback.broker.lending import Broker
from vmmback.errors import HostUnfit

DASHBOARD = Path(__file__).parents[1] / "configs/broker/grafana.json"


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Broker:
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(tmp_path))
    config = BrokerConfig.of({"pool": [{"size": "64MiB", "count": 3}]})
    made = Broker(config, Promise(tmp_path, "secret"), lambda _: None)
    made.ledger.add(Lease(7, 64 * MIB, 1, 2, 1000, 100, 5, "a guest", "2026-01-01 00:00:00+00:00"), 0.0)
    made.denials, made.not_ready = 2, 5
    for seconds in (0.0004, 0.0005, 0.004, 7.0):
        made.waits.add(seconds)
    made.pool.filled_bytes, made.pool.fill_seconds = 128 * MIB, 0.5
    return made


def samples(text: str) -> dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def test_all_figures_are_told_in_bytes_and_seconds(broker: Broker) -> None:
    found = samples(asyncio.run(metrics.exposition(broker)).decode())
    assert found["vmmback_broker_pool_ready['67108864']"] == 0
    assert found["vmmback_broker_pool_wanted['67108864']"] == 3
    assert found["vmmback_broker_leases[]"] == 1
    assert found["vmmback_broker_lent_bytes[]"] == 64 * MIB
    assert found["vmmback_broker_lent_total[]"] == 1
    assert found["vmmback_broker_denied_total[]"] == 2
    assert found["vmmback_broker_not_ready_total[]"] == 5
    waits = "vmmback_broker_acquire_seconds"
    buckets = [found[f"{waits}_bucket['{bound}']"] for bound in ("0.0002", "0.0005", "0.002", "0.005", "1.0", "+Inf")]
    assert buckets == [0, 2, 2, 3, 3, 4]
    assert (found[f"{waits}_count[]"], found[f"{waits}_sum[]"]) == (4, 7.0049)
    assert found["vmmback_broker_filled_bytes_total[]"] == 128 * MIB
    assert found["vmmback_broker_fill_seconds_total[]"] == 0.5


def test_the_dashboard_draws_what_there_is_and_all_of_it(broker: Broker) -> None:
    text = asyncio.run(metrics.exposition(broker)).decode()
    families = [family.name for family in text_string_to_metric_families(text)]  # type: ignore[no-untyped-call]
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    ends = {"counter": "_total", "histogram": "_bucket"}
    there = {name + ends.get(kinds[name], "") for name in families}
    exprs = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    assert set(re.findall(r"vmmback_\w+", " ".join(exprs))) == there


async def fetched(place: Path | tuple[str, int], request: bytes) -> bytes:
    opened = asyncio.open_unix_connection(place) if isinstance(place, Path) else asyncio.open_connection(*place)
    reader, writer = await opened
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("kind", ["socket", "port"])
def test_they_are_served_over_http_and_nothing_else_is(broker: Broker, tmp_path: Path, kind: str) -> None:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()
    place = tmp_path / "metrics" if kind == "socket" else port

    async def scene() -> None:
        async with metrics.served(place, broker):
            answer = await fetched(place, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text")
            assert f"Content-Length: {len(body)}".encode() in head
            assert samples(body.decode())["vmmback_broker_leases[]"] == 1
            for request in (b"GET / HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"\xff\r\n\r\n"):
                assert (await fetched(place, request)).startswith(b"HTTP/1.1 404 ")
            assert await fetched(place, b"x" * 100_000) == b""

    asyncio.run(scene())
    assert not (tmp_path / "metrics").exists()


def test_a_place_that_cannot_be_had_is_one_error(broker: Broker, tmp_path: Path) -> None:
    async def scene() -> None:
        async with metrics.served(tmp_path / "nowhere/metrics", broker):
            pass

    with pytest.raises(HostUnfit, match="metrics cannot be served at "):
        asyncio.run(scene())
