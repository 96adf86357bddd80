"""Guest RAM that the host kernel itself cannot see, for unmodified QEMU, with a proof that it cannot."""

__version__ = "0.1.0"
