"""What a guest file may say: `load` reads one, `guest.py` has its top, `tables.py` and the other modules its tables."""

from vmmback.config.guest import GuestConfig, load

__all__ = ["GuestConfig", "load"]
