"""`python -m vmmback`."""

from vmmback.cli import run

run()
