"""How much of the direct map stays in huge pages once secret RAM was in use: an estimate, on the safe side."""

from __future__ import annotations

import math

from vmmback.linux.direct_map_use import REGION

# Regions of 2 MiB over the fewest that could be, for RAM that is prefaulted soon after the host's boot: at most 1.96
# was measured. Where free memory is in small pieces it is much larger (docs/DIRECT-MAP.md).
BOOTED_FACTOR = 2.0


def left_in_huge_pages(kernel_zones: int, secret_ever: int, factor: float = BOOTED_FACTOR) -> int:
    """Return the bytes of `kernel_zones` that pages of 2 MiB and more still map, if no region was split for others.

    `secret_ever` is the most bytes of frames that were secret RAM at one time or another since boot: what was split
    stays split. `factor` is the number of regions that they touch over the fewest in which they fit, at least 1.
    """
    split = math.ceil(max(0, secret_ever) / REGION * max(1.0, factor)) * REGION
    return max(0, kernel_zones - split) // REGION * REGION
