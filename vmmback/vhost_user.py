"""As much of vhost-user as shows whether a daemon can map a guest's RAM. Source: QEMU's docs/interop/vhost-user.rst."""

from __future__ import annotations

import array
import asyncio
import socket
import struct

_HEADER = struct.Struct("=III")  # request, flags, size of what follows in bytes
_VERSION, _NEED_REPLY = 1, 1 << 3

_GET_FEATURES, _SET_OWNER, _SET_MEM_TABLE = 1, 3, 5
_GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES = 15, 16
_REPLY_ACK = 1 << 3


async def give_memory(connection: socket.socket, memory: int, size: int) -> bool:
    """Hand a daemon a descriptor of `size` bytes as a guest's RAM, and tell whether it could map it.

    The connection must not block. Raises ConnectionError or EOFError when the daemon is gone.
    """
    await _ask(connection, _GET_FEATURES)
    if not await _ask(connection, _GET_PROTOCOL_FEATURES) & _REPLY_ACK:
        raise EOFError  # every virtiofsd tells whether a request was carried out
    await _send(connection, _SET_PROTOCOL_FEATURES, struct.pack("=Q", _REPLY_ACK))
    await _send(connection, _SET_OWNER)
    # One region: its guest address, size, address in this process (never used), offset in the descriptor.
    table = struct.pack("=IIQQQQ", 1, 0, 0, size, 0, 0)
    await _send(connection, _SET_MEM_TABLE, table, memory, flags=_VERSION | _NEED_REPLY)
    return await _receive(connection) == 0


async def _ask(connection: socket.socket, request: int) -> int:
    await _send(connection, request)
    return await _receive(connection)


async def _send(
    connection: socket.socket, request: int, data: bytes = b"", descriptor: int | None = None, flags: int = _VERSION
) -> None:
    """Send a message; it is far smaller than the socket's buffer, so it goes as a whole."""
    message = _HEADER.pack(request, flags, len(data)) + data
    if descriptor is None:
        await asyncio.get_running_loop().sock_sendall(connection, message)
    else:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
        connection.sendmsg([message], [rights])


async def _receive(connection: socket.socket) -> int:
    """Receive an answer of one number."""
    data = b""
    while len(data) < _HEADER.size + 8:
        if not (more := await asyncio.get_running_loop().sock_recv(connection, _HEADER.size + 8 - len(data))):
            raise EOFError
        data += more
    return int(struct.unpack_from("=Q", data, _HEADER.size)[0])
