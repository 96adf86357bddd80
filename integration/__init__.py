"""Tests against the real kernel and the real QEMU, and the guests that they boot."""
