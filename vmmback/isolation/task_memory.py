"""A BPF program reads a live guest's RAM out of QEMU's address space. QEMU is neither stopped nor changed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from vmmback.isolation.access import ReadProbe
from vmmback.isolation.probe import Reading, Target
from vmmback.isolation.throwaway import naming_what_is_missing
from vmmback.linux.user_reader import TaskReader

Sample = tuple[int, Sequence[int]]


class BpfCopyFromUserTaskProbe(ReadProbe):
    """bpf_copy_from_user_task() in an iterator over tasks (Linux 6.1, with BTF)."""

    name = "bpf-copy-from-user-task"
    vector = "bpf_copy_from_user_task() in a sleepable BPF program: the same pages as proc-mem"
    control_is = "QEMU's heap and stack"
    source = "kernel/bpf/helpers.c, bpf_copy_from_user_task; mm/gup.c, check_vma_flags: EFAULT for secretmem"
    refusal = errno.EFAULT

    def attempt(self, place: Sample) -> Reading:
        with TaskReader.open() as self._reader:
            return super().attempt(place)

    def read(self, pid: int, address: int) -> bytes:
        return self._reader.read(pid, address)

    def _try(self, locate: Callable[[Target], Sample], target: Target) -> Reading:
        with naming_what_is_missing():
            return super()._try(locate, target)
