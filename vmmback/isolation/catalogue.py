"""Every vector that vmmback knows, in the order in which they are tried and documented."""

from __future__ import annotations

from typing import Any

from vmmback.isolation import access, holders
from vmmback.isolation.direct_map import DirectMapProbe
from vmmback.isolation.probe import Probe

ACCESS_PROBES: tuple[type[Probe[Any]], ...] = (
    access.ProcMemProbe,
    access.ProcessVmReadvProbe,
    access.FdReopenProbe,
    access.MapFilesProbe,
    access.VmaFlagsProbe,
)
"""Read-only looks at a live guest through the doors that the kernel gives to debuggers and to root."""

HOLDER_PROBES: tuple[type[Probe[Any]], ...] = (holders.HoldersProbe, holders.TracerProbe)
"""Who is at a live guest's RAM already. Of ordinary RAM, too, nobody else should be."""

LIVE_PROBES: tuple[type[Probe[Any]], ...] = ()
"""More looks that leave a live guest alone, for which a host may lack what they need."""

DISTURBING_PROBES: tuple[type[Probe[Any]], ...] = ()
"""What would disturb a guest: `vmmback selftest` tries it on throwaway memory and children."""

CATALOGUE: tuple[type[Probe[Any]], ...] = (
    DirectMapProbe,
    *ACCESS_PROBES,
    *HOLDER_PROBES,
    *LIVE_PROBES,
    *DISTURBING_PROBES,
)
