"""Typed wrappers, one for each kernel interface; the only part of the project that uses ctypes."""
