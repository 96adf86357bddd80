"""The launch, where a real QEMU cannot be made to do what is asked: its end at one moment of the audit."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmmback import launch
from vmmback.errors import QemuFailed


@pytest.mark.parametrize(("status", "is_failure"), [(0, False), (1, True), (-9, True), (None, True)])
def test_a_guest_that_ends_by_itself_during_the_audit_is_not_measured_and_no_failure(
    status: int | None, is_failure: bool
) -> None:
    async def examine() -> None:
        raise QemuFailed("QEMU ended during the QMP proof")

    async def ended(timeout_s: float) -> None:
        if status is None:
            raise TimeoutError

    guest = SimpleNamespace(qemu=SimpleNamespace(status=status, ended=ended), examine=examine)
    measured = launch._examined(cast("Any", guest))
    if is_failure:
        with pytest.raises(QemuFailed, match="during the QMP proof"):
            asyncio.run(measured)
    else:
        assert asyncio.run(measured) is None
