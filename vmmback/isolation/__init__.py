"""Probes: attempts to read a guest's RAM from the host, each with the same attempt on ordinary memory beside it."""
