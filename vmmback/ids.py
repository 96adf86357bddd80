"""The user ids that guests' QEMUs get by default."""

DEFAULT_UIDS = (1_900_000_000, 1_900_065_535)
"""Part of what systemd's list of uid ranges (UIDS-GIDS) leaves unused: no account and no container has one of them."""
