"""Puts this process under a seccomp filter that another one has made, with as few imports as that takes.

For programs that hold up another hypervisor's start (libvirt/emulator.py), which are copied without the rest of this
package; seccomp.py makes the filter. Sources: seccomp(2), prctl(2), include/uapi/linux/seccomp.h.
"""

import ctypes
import os

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_INSTRUCTION_BYTES = 8  # struct sock_filter


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def listener_of(program: bytes) -> int:
    """Put this thread, and what it will execute, under the filter; return its listener, close-on-exec.

    Sets no_new_privs. Raises OSError; KeyError on an architecture that is not known.
    """
    number = _SECCOMP[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program)
    structure = _SockFprog(len(program) // _INSTRUCTION_BYTES, ctypes.addressof(code))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    listener = libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(structure))
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(listener)
