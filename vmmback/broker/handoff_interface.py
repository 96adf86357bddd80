"""What is asked at the channel that `Serve` of service.py returns: Varlink, and answered by handoff_worker.py."""

# The annotations of the methods are the interface: asyncvarlink reads them, so they must not all be strings.
from dataclasses import dataclass
from typing import Literal

from asyncvarlink import FileDescriptor, VarlinkInterface, varlinkmethod

from vmmback.broker.service import Refused


@dataclass(frozen=True)
class Offer:
    """What one call is to be answered with: open(2) of the path `name`, or memfd_create(2) of that name."""

    call: Literal["open", "memfd_create"]
    name: str
    descriptor: FileDescriptor


class HandoffInterface(VarlinkInterface, name="org.vmmback.Handoff"):
    """What one process answers for one caller, once."""

    errors = (Refused,)

    @varlinkmethod
    def Answer(self, listener: FileDescriptor, offers: list[Offer], secret_memfds: bool) -> None:  # noqa: N802
        """Answer the calls that the filter of `listener` stops, as soon as this is answered.

        The caller's alone get a descriptor; with `secret_memfds` all memfds that it makes are secret.
        """
        raise NotImplementedError
