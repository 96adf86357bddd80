"""`python -m vmmback`."""

from vmmback.cli import main

main()
