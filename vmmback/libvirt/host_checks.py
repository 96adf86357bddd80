"""What an installation for libvirt asks of a host, and what is left for its administrator to do."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from vmmback.errors import HostUnfit
from vmmback.libvirt import qemu_user
from vmmback.libvirt.installed_files import Host, qemu_of
from vmmback.libvirt.places import Places

# The daemon, or of its parts the one for QEMU.
_DAEMONS = ("/usr/sbin/libvirtd", "/usr/sbin/virtqemud")
# It gives QEMU 6.0 and later their -object as JSON since then (commit f763b6e4390 of libvirt); qemu.d is older, of 6.5.
_FIRST_WITH_JSON_OBJECTS = (7, 2)
_ANSWERS_S = 20.0
_UNITS = ("vmmback-broker.socket", "vmmback-broker.service")


def host(places: Places, emulators: Sequence[Path]) -> Host:
    """Return what there is on this host. Raises HostUnfit."""
    _see_libvirt()
    # Of two of one name the one that was named counts, now or earlier.
    qemus = {path.name: path for path in (*_found_qemus(places), *_wrapped(places), *map(_absolute, emulators))}
    if not qemus:
        raise HostUnfit(
            "no QEMU is in /usr/bin", "install one (apt-get install qemu-system-x86), or name it: --emulator"
        )
    # By its interpreter: which vmmback this is does not depend on anybody's PATH.
    program = [sys.executable, "-I", "-m", "vmmback"]
    return Host(list(qemus.values()), program, qemu_user.of_host(places))


def next_steps(places: Places) -> list[str]:
    """Return what is to be done after an installation; call it before, as it looks at what is there."""
    steps = []
    if not _has_hook(places):
        steps.append("systemctl restart libvirtd (or virtqemud): it had no hook of QEMU's yet; domains live on")
    if places.below("/run/systemd/system").is_dir():
        steps += ["systemctl daemon-reload", "systemd-tmpfiles --create vmmback-libvirt.conf"]
        steps.append("systemctl enable --now vmmback-broker.socket vmmback-broker.service")
    else:
        steps.append("vmmback broker FILE: it has to run while domains do (docs/BROKER.md)")
    if (places.apparmor / "abstractions/libvirt-qemu").exists():
        steps.append("systemctl reload apparmor: domains get their new profiles when they start")
    return steps


def doubts(program: Sequence[str]) -> list[str]:
    """Return what is not as safe as it should be: libvirt's hook executes us as root, so nobody else may change us."""
    for path in (Path(program[0]), Path(__file__)):
        for place in (path.absolute(), *path.absolute().parents):
            status = place.stat()
            in_others_hands = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
            if status.st_uid != 0 or in_others_hands:
                return [f"{place} is not for root alone to change, and libvirt's hook executes {path} as root"]
    return []


def steps_after(places: Places, removed: Collection[Path]) -> list[str]:
    """Return what is to be done after these files were removed, or changed."""
    steps = []
    if any(places.units / unit in removed for unit in _UNITS):
        steps.append("systemctl daemon-reload")
    if any(places.apparmor in path.parents for path in removed):
        steps.append("systemctl reload apparmor: domains get their new profiles when they start")
    return steps


def stop_units(places: Places, ours: Collection[str]) -> None:
    """Stop and disable the broker's units, as far as they are among the files that are ours. Raises HostUnfit."""
    named = {places.below(name) for name in ours}
    units = [unit for unit in _UNITS if (path := places.units / unit) in named and path.exists()]
    if not units or not places.below("/run/systemd/system").is_dir():
        return
    try:
        subprocess.run(
            ["systemctl", "disable", "--now", *units], capture_output=True, text=True, timeout=_ANSWERS_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise HostUnfit(f"the broker's units cannot be stopped: {said.strip()}", "stop them, then try again") from error


def _see_libvirt() -> None:
    daemon = next((path for path in _DAEMONS if os.access(path, os.X_OK)), None)
    if not daemon:
        raise HostUnfit("libvirt's daemon is not installed", "install it: apt-get install libvirt-daemon-system")
    answer = subprocess.run([daemon, "--version"], capture_output=True, text=True, timeout=_ANSWERS_S, check=False)
    found = re.search(r"\b(\d+)\.(\d+)\.\d+\s*$", answer.stdout)
    if not found or (int(found[1]), int(found[2])) < _FIRST_WITH_JSON_OBJECTS:
        said = answer.stdout.strip() or answer.stderr.strip()
        raise HostUnfit(f"{daemon} is {said!r}, which describes no memory to QEMU in JSON", "libvirt 7.2 and later do")


def _absolute(path: Path) -> Path:
    if not os.access(path, os.X_OK) or path.is_dir():
        raise HostUnfit(f"{path} is no program", "name a QEMU: --emulator /usr/bin/qemu-system-x86_64")
    return path.absolute()


def _found_qemus(places: Places) -> list[Path]:
    found = sorted(path for path in places.below("/usr/bin").glob("qemu-system-*") if os.access(path, os.X_OK))
    return [Path("/usr/bin") / path.name for path in found]


def _wrapped(places: Places) -> list[Path]:
    """Return the QEMUs that have a wrapper already, and are still there."""
    found = [qemu_of(path.read_text()) for path in sorted(places.libexec.glob("qemu*"))]
    return [qemu for qemu in found if qemu and os.access(places.below(qemu), os.X_OK)]


def _has_hook(places: Places) -> bool:
    folder = places.hooks / "qemu.d"
    return any(os.access(path, os.X_OK) for path in (places.hooks / "qemu", *folder.glob("*")))
