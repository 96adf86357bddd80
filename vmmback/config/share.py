"""The tables [[share]]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from vmmback.config.tables import Conflict, Table
from vmmback.config.values import InputFolder, ShareTag


class Share(Table):
    """A folder of the host that the guest can mount (virtiofs)."""

    path: InputFolder = Field(
        description="The folder: absolute, or relative to the guest file's folder; without what is mounted below it.",
        examples=["shared"],
    )
    tag: ShareTag = Field(description="The name by which the guest mounts it: mount -t virtiofs TAG /mnt.")
    plaintext: Literal["allowed"] | None = Field(
        default=None, description="That what the guest writes may lie on the host in the clear; needed for writing."
    )
    read_only: bool = Field(
        default=True, alias="read-only", description="Whether the guest can only read it; false needs plaintext."
    )

    @field_validator("read_only")
    @classmethod
    def _knows_what_is_written(cls, read_only: bool, info: ValidationInfo) -> bool:
        if not read_only and not info.data.get("plaintext"):
            raise ValueError(
                "is false, and what the guest writes there lies in the host's page cache and file system in the clear; "
                'write plaintext = "allowed" if it may, or remove read-only'
            )
        return read_only


def share_conflicts(shares: Sequence[Share]) -> Iterator[Conflict]:
    """Compare a guest's shares with each other."""
    tags: dict[str, int] = {}
    for number, share in enumerate(shares):
        if (first := tags.setdefault(share.tag, number)) != number:
            yield ("share", number, "tag"), f'"{share.tag}" is that of share[{first}] already; write another one'
