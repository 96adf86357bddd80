"""What a self-test makes of a probe that could not be tried; on real memory it is run in integration/."""

from __future__ import annotations

import pytest

from vmmback import selftest
from vmmback.errors import AdmissionRefused, HandoffFailed, HostUnfit, QemuFailed
from vmmback.isolation.file_calls import FileReadProbe
from vmmback.isolation.probe import Target
from vmmback.report import Observation, Verdict


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (HostUnfit("no such thing"), "no such thing"),
        (AdmissionRefused("not enough memory"), "not enough memory"),
        (QemuFailed("it did not answer"), ""),
        (HandoffFailed("it was never taken"), ""),
        (OSError(5, "Input/output error"), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_the_host_lacks_is_missing(monkeypatch: pytest.MonkeyPatch, error: Exception, missing: str) -> None:
    def fail(_: FileReadProbe, __: Target) -> Observation:
        raise error

    monkeypatch.setattr(FileReadProbe, "observe", fail)
    seen = selftest._alone(FileReadProbe())
    assert (seen.target, seen.control, seen.missing) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE, missing)
    assert seen.detail.startswith("not tried: ")
