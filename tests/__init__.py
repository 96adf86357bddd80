"""Unit tests: no root, no QEMU."""

from hypothesis import settings

# A host that is busy with other things makes no test wrong.
settings.register_profile("no-deadline", settings(), deadline=None)
settings.load_profile("no-deadline")
