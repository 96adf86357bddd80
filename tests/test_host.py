"""Admission by the numbers of /proc/meminfo."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.errors import AdmissionRefused
from vmmback.host.memory import HostMemory

MIB = 1 << 20


def test_memory_is_read_from_meminfo_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       1024 kB\nMemFree:   16 kB\nMemAvailable:     512 kB\n")
    assert HostMemory.read(tmp_path) == HostMemory(total=1 << 20, available=512 << 10)


@pytest.mark.parametrize(
    ("total_mib", "available_mib", "reserve_mib", "largest_mib"),
    [
        (1000, 900, 128, 772),  # a small host keeps 128 MiB
        (6400, 6000, 128, 5872),
        (100_000, 90_000, 2000, 88_000),  # a large one a fiftieth
        (1000, 100, 128, 0),
        (1000, 128, 128, 0),
    ],
)
def test_the_host_keeps_its_reserve(total_mib: int, available_mib: int, reserve_mib: int, largest_mib: int) -> None:
    memory = HostMemory(total_mib * MIB, available_mib * MIB)
    assert memory.reserve == reserve_mib * MIB
    assert memory.largest_guest == largest_mib * MIB


@given(total=st.integers(0, 1 << 45), used=st.integers(0, 1 << 45), size=st.integers(MIB, 1 << 45))
def test_a_guest_is_admitted_only_if_the_reserve_stays(total: int, used: int, size: int) -> None:
    memory = HostMemory(total, max(0, total - used))
    try:
        memory.admit(size)
    except AdmissionRefused:
        assert memory.available - size < memory.reserve + MIB
    else:
        assert memory.available - size >= memory.reserve


def test_the_largest_guest_is_admitted_and_a_page_more_is_refused_with_the_numbers() -> None:
    memory = HostMemory(1000 * MIB, 900 * MIB)
    memory.admit(772 * MIB)
    with pytest.raises(AdmissionRefused) as refused:
        memory.admit(772 * MIB + 4096)
    assert refused.value.exit_code == 4
    for number in ("772 MiB", "900 MiB", "128 MiB"):
        assert number in refused.value.message
    assert "772MiB" in refused.value.hint


def test_where_no_guest_fits_the_hint_offers_none() -> None:
    with pytest.raises(AdmissionRefused) as refused:
        HostMemory(1000 * MIB, 100 * MIB).admit(MIB)
    assert "0MiB" not in refused.value.hint
