"""How much of the direct map stays in huge pages once secret RAM was in use: an estimate, on the safe side."""

from __future__ import annotations

from vmmback.linux.direct_map_use import REGION, ideal_regions

# Regions of 2 MiB over the fewest that could be, for RAM that is prefaulted soon after the host's boot: at most 1.96
# was measured. Where free memory is in small pieces it is much larger (docs/DIRECT-MAP.md).
_BOOTED_FACTOR = 2


def left_in_huge_pages(kernel_zones: int, secret_ever: int) -> int:
    """Return the bytes of `kernel_zones` that pages of 2 MiB and more still map, if no region was split for others.

    `secret_ever` is the most bytes of frames that were secret RAM at one time or another since boot: what was split
    stays split.
    """
    split = ideal_regions(max(0, secret_ever)) * _BOOTED_FACTOR * REGION
    return max(0, kernel_zones - split) // REGION * REGION
