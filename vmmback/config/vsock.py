"""The table [vsock]."""

from typing import Annotated

from msgspec import Meta

from vmmback.toml_tables import Checked, Table

_LAST_CID = 0xFFFFFFFE  # the one above is VMADDR_CID_ANY: vsock(7)


def _cid(cid: int) -> int:
    if 0 <= cid < 3:
        raise ValueError(f"{cid} is the hypervisor's, the loopback's or the host's address (vsock(7)); write 3 or more")
    return cid


class Vsock(Table, frozen=True):
    """Sockets between the guest and the host, without a network."""

    cid: Annotated[
        int,
        Meta(
            ge=0,
            le=_LAST_CID,
            description="The guest's address (context identifier), 3 or more; no two live guests of a host have the "
            "same.",
            examples=[3],
        ),
        Checked(_cid, minimum=3),
    ]
