"""What asyncvarlink leaves to the event loop, and what its clients here do about that."""

from __future__ import annotations

import asyncio

from asyncvarlink import FileDescriptorArray, VarlinkClientProtocol
from asyncvarlink.types import JSONObject


class Client(VarlinkClientProtocol):
    """Keeps from the event loop, and so from a traceback, what asyncvarlink leaves to it.

    That is some answers that cannot be read, which become an error of the call, and a call that is cancelled while it
    is sent, whose future would be cancelled with it and yet be given a result.
    """

    def send_message(  # noqa: D102
        self, obj: JSONObject, fds: list[int] | None = None, autoclose: bool = True
    ) -> asyncio.Future[None]:
        return asyncio.shield(super().send_message(obj, fds, autoclose))

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:  # noqa: D102
        try:
            super().message_received(data, fds)
        except (ValueError, RecursionError) as error:  # it is not in UTF-8, or nested too deeply
            self.connection_lost(ValueError(str(error)))

    def request_received(self, obj: JSONObject, fds: FileDescriptorArray | None) -> None:  # noqa: D102
        if self._pending:  # else nothing was asked
            super().request_received(obj, fds)
