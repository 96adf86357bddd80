"""Tables that a user may look for and cannot have, each with the reason; docs/REFUSALS.md has the measurements."""

from __future__ import annotations

REFUSED_TABLES = {
    "balloon": "[balloon] is refused, for it would only take memory from the guest: secret RAM gives no page back to "
    "the host (fallocate(2) is EOPNOTSUPP on it); write [memory] size as the guest needs it, and remove [balloon]",
}
