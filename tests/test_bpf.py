"""Loading programs, with the kernel's answers made up; integration/ has its own."""

import errno

import pytest

from vmmback.linux import bpf
from vmmback.linux import bpf_assembler as asm


def test_a_load_that_a_signal_interrupted_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times at most, like libbpf: a signal that comes again and again must not hold us for ever."""
    answers = iter([BlockingIOError(errno.EAGAIN, "a signal is pending")] * 4 + [7])

    def answer(*_: object) -> int:
        given = next(answers)
        if isinstance(given, int):
            return given
        raise given

    monkeypatch.setattr(bpf, "syscall", answer)
    assert bpf.Program([asm.leave()], "again").descriptor == 7


def test_a_load_that_signals_interrupt_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "a signal is pending")

    monkeypatch.setattr(bpf, "syscall", interrupted)
    with pytest.raises(BlockingIOError):
        bpf.Program([asm.leave()], "again")
