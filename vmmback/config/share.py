"""The tables [[share]]."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from vmmback.config.values import InputFolder, ShareTag
from vmmback.toml_errors import Problem
from vmmback.toml_tables import Table


class Share(Table, frozen=True):
    """A folder of the host that the guest can mount (virtiofs)."""

    path: Annotated[
        InputFolder,
        Meta(
            description="The folder: absolute, or relative to the guest file's folder; without what is mounted below "
            "it.",
            examples=["shared"],
        ),
    ]
    tag: Annotated[
        ShareTag,
        Meta(description="The name by which the guest mounts it: mount -t virtiofs TAG /mnt.", examples=["shared"]),
    ]
    plaintext: Annotated[
        Literal["allowed"] | None,
        Meta(description="That what the guest writes may lie on the host in the clear; needed for writing."),
    ] = None
    read_only: Annotated[bool, Meta(description="Whether the guest can only read it; false needs plaintext.")] = True

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell whether the guest may write without saying that it knows where."""
        if good.get("read_only") is False and not good.get("plaintext"):
            yield (
                ("read-only",),
                "is false, and what the guest writes there lies in the host's page cache and file system in the clear; "
                'write plaintext = "allowed" if it may, or remove read-only',
            )


def share_conflicts(shares: Sequence[Share]) -> Iterator[Problem]:
    """Compare a guest's shares with each other."""
    tags: dict[str, int] = {}
    for number, share in enumerate(shares):
        if (first := tags.setdefault(share.tag, number)) != number:
            yield ("share", number, "tag"), f'"{share.tag}" is that of share[{first}] already; write another one'
