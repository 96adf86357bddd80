"""Whether KVM can be used. Alone in its module, because its experiment takes longest and so starts first."""

from __future__ import annotations

from vmmback.doctor.finding import Finding
from vmmback.linux.kvm import can_map_secret_ram


def experiment() -> Finding:
    """Run a guest of a few instructions on ordinary memory and on secret memory."""
    answer = can_map_secret_ram()
    if answer.usable:
        return Finding("ok", answer.reason)
    return Finding("note", f"{answer.reason}; guests are emulated (TCG)", 'leave [machine] accel at "auto" or "tcg"')
