"""The choice of QEMU and accelerator."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Literal

import pytest

from vmmback.errors import HostUnfit
from vmmback.host import qemu as host_qemu
from vmmback.host.qemu import AUX_RAM_BYTES, can_share_aux_ram, choose_accel, find_qemu
from vmmback.linux import arch, kvm, memlock
from vmmback.linux.kvm import KvmAnswer


@pytest.mark.parametrize(
    ("wanted", "usable", "expected"),
    [("tcg", True, "tcg"), ("tcg", False, "tcg"), ("auto", True, "kvm"), ("auto", False, "tcg"), ("kvm", True, "kvm")],
)
def test_kvm_is_chosen_only_where_the_experiment_shows_that_it_maps_secret_ram(
    monkeypatch: pytest.MonkeyPatch, wanted: Literal["auto", "tcg", "kvm"], usable: bool, expected: str
) -> None:
    monkeypatch.setattr(kvm, "can_map_secret_ram", lambda: KvmAnswer(usable, "because"))
    assert choose_accel(wanted) == expected


def test_kvm_that_cannot_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "KVM cannot map secret RAM: KVM_RUN gave EFAULT"
    monkeypatch.setattr(kvm, "can_map_secret_ram", lambda: KvmAnswer(False, reason))
    with pytest.raises(HostUnfit, match=reason) as refused:
        choose_accel("kvm")
    assert refused.value.exit_code == 3
    assert '"tcg"' in refused.value.hint


def test_tcg_makes_no_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> KvmAnswer:
        raise AssertionError

    monkeypatch.setattr(kvm, "can_map_secret_ram", never)
    assert choose_accel("tcg") == "tcg"


@pytest.mark.parametrize(
    ("machine", "package"), [("x86_64", "qemu-system-x86"), ("aarch64", "qemu-system-arm")], ids=str
)
def test_qemu_is_the_one_of_this_architecture_and_if_missing_its_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, package: str
) -> None:
    numbers = arch.KNOWN[machine]
    monkeypatch.setattr(arch, "current", lambda: numbers)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostUnfit, match=f"qemu-system-{machine} was not found") as missing:
        find_qemu()
    assert missing.value.hint.endswith(f"apt-get install {package}")
    program = tmp_path / f"qemu-system-{machine}"
    program.touch(mode=0o755)
    assert find_qemu() == program


def fake_qemu(folder: Path, script: str) -> Path:
    path = folder / "qemu-system-fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ('[ "$*" = "-machine q35,help" ] && echo "  aux-ram-share=<bool>   - Use anonymous shared memory"', True),
        ('echo "  append=<string>  - Linux kernel command line, not aux-ram-share"', False),
        ('echo "  aux-ram-share=<bool>"; exit 1', False),
        ("echo '  aux-ram-share=<bool>' >&2", False),
        ("exit 0", False),
    ],
    ids=["it can", "it lacks it", "it fails", "it complains", "it is silent"],
)
def test_whether_other_ram_blocks_can_be_secret_is_asked_of_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, answer: bool
) -> None:
    monkeypatch.setattr(memlock, "allows", lambda size: size == (16 << 20) + AUX_RAM_BYTES)
    assert can_share_aux_ram(fake_qemu(tmp_path, script), "q35", 16 << 20) is answer


def test_qemu_is_asked_without_the_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock, "allows", lambda _: True)
    monkeypatch.setenv("OF_THE_USER", "1")
    qemu = fake_qemu(tmp_path, '[ -z "$OF_THE_USER" ] && echo " aux-ram-share=<bool>"')
    assert can_share_aux_ram(qemu, "q35", 0)


@pytest.mark.parametrize("words", [b"..-machine..append..", b"..-machine..aux-ram-share.."])
def test_a_program_without_the_word_in_it_is_not_even_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    asked: list[object] = []

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(argv[-1])
        return subprocess.CompletedProcess(argv, 0, b"  aux-ram-share=<bool>\n", b"")

    monkeypatch.setattr(memlock, "allows", lambda _: True)
    monkeypatch.setattr(subprocess, "run", run)
    program = tmp_path / "qemu"
    program.write_bytes(b"\x7fELF" + bytes(5000) + words + bytes(5000))
    knows = b"aux-ram-share" in words
    assert can_share_aux_ram(program, "q35", 0) is knows
    assert asked == (["q35,help"] if knows else [])


@pytest.mark.parametrize("contents", [b"", b"\x7fE"])
def test_a_program_that_cannot_be_started_is_for_the_launch_to_complain_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: bytes
) -> None:
    monkeypatch.setattr(memlock, "allows", lambda _: True)
    program = tmp_path / "qemu"
    program.write_bytes(contents)
    assert not can_share_aux_ram(program, "q35", 0)
    program.unlink()
    assert not can_share_aux_ram(program, "q35", 0)


def test_where_other_ram_blocks_may_not_be_locked_qemu_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memlock, "allows", lambda _: False)
    qemu = fake_qemu(tmp_path, f"echo ' aux-ram-share=<bool>'; touch {tmp_path}/asked")
    assert not can_share_aux_ram(qemu, "q35", 0)
    assert not (tmp_path / "asked").exists()


def test_a_qemu_that_does_not_answer_is_ended_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memlock, "allows", lambda _: True)
    monkeypatch.setattr(host_qemu, "_QEMU_ANSWERS_S", 1.0)
    qemu = fake_qemu(tmp_path, f"echo ' aux-ram-share=<bool>'; echo $$ >{tmp_path}/pid; exec sleep 60")
    assert not can_share_aux_ram(qemu, "q35", 0)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
