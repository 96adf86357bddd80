"""Making libvirt find us, and undoing it: all of it, or nothing where something goes wrong.

A manifest in LIBEXEC names all that may be there at any moment, so that also what was cut off is removed whole: before
anything else is written it has what was installed and what will be, and at the end the latter alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from vmmback.errors import HostUnfit, UsageError
from vmmback.libvirt import programs
from vmmback.libvirt.installed_files import Block, File, Host, blocks, files
from vmmback.libvirt.places import RUN, Places

_CAPABILITY = "security.capability"


class Manifest(NamedTuple):
    """What was installed: paths as they are below the root."""

    files: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    """Files of others with a block of ours in them."""
    made: tuple[str, ...] = ()
    """Folders, and files for what is others', that were not there before; they go if nothing is in them."""


def manifest(places: Places) -> Manifest:
    """Return what is installed; nothing is in it if nothing is. Raises UsageError."""
    try:
        found = json.loads(places.manifest.read_text())
        return Manifest(*(tuple(map(str, found[name])) for name in Manifest._fields))
    except FileNotFoundError:
        return Manifest()
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{places.manifest} is not as it was written", "remove by hand what docs/LIBVIRT.md lists, and that file"
        ) from error


def install(places: Places, host: Host) -> list[Path]:
    """Install what this host can use; return the files that changed. Raises HostUnfit, UsageError, OSError."""
    before = manifest(places)
    kept, wanted = _planned(places, before, files(places, host))
    inserted = blocks(places)
    folders = _missing_folders([places.manifest, *(file.path for file in wanted), *(block.path for block in inserted)])
    made = (*folders, *(block.path for block in inserted if not block.path.exists()))
    now = Manifest(
        tuple(sorted(_named(places, file.path) for file in (*kept, *wanted))),
        tuple(_named(places, block.path) for block in inserted),
        tuple(sorted({*before.made, *(_named(places, path) for path in made)})),
    )
    meanwhile = Manifest(*(tuple(sorted({*old, *new})) for old, new in zip(before, now, strict=True)))
    with ExitStack() as undo:
        for folder in folders:
            folder.mkdir()
            undo.callback(folder.rmdir)
            folder.chmod(0o755)
        _write_manifest(places, meanwhile, undo)
        for file in wanted:
            _write(file, undo)
        changed = [file.path for file in wanted]
        for block in (*inserted, *_former(places, before, now)):
            changed += _insert(block, undo)
        for name in sorted({*before.files} - {*now.files}):
            changed += _remove(places.below(name), undo)
        if places.emulator in changed:
            programs.verify(places.emulator, host.user)
        _write_manifest(places, now, undo)
        undo.pop_all()
    return changed


def _planned(places: Places, before: Manifest, all_files: Iterable[File]) -> tuple[list[File], list[File]]:
    """Return our files that are as they are to be, and those that are to be written. Raises UsageError."""
    kept, wanted = [], []
    for file in all_files:
        is_ours = _named(places, file.path) in before.files
        if not file.path.exists() or (is_ours and not _is_as_wanted(file)):
            wanted.append(file)
        elif is_ours:
            kept.append(file)
        # What is there already, and is not in our manifest, is somebody else's: it stays when we go.
        elif not _is_as_wanted(file):
            raise UsageError(f"{file.path} is there, and is not ours", "move it away, then install again")
    return kept, wanted


def _former(places: Places, before: Manifest, now: Manifest) -> list[Block]:
    """Return files of others in which no block of ours is to be any more."""
    return [Block(places.below(name), "") for name in sorted({*before.blocks} - {*now.blocks})]


def uninstall(places: Places) -> list[Path]:
    """Remove all that was installed; return what was changed. Raises UsageError, OSError."""
    found = manifest(places)
    with ExitStack() as undo:
        for path in (places.manifest, *map(places.below, (*found.files, *found.blocks))):
            _remove(_draft(path), undo)  # of an installation that was cut off
        changed = [path for name in found.files for path in _remove(places.below(name), undo)]
        for name in found.blocks:
            changed += _insert(Block(places.below(name), ""), undo)
        changed += _remove(places.manifest, undo)
        undo.pop_all()
    shutil.rmtree(places.below(RUN), ignore_errors=True)
    for name in sorted(found.made, reverse=True):
        path = places.below(name)
        with suppress(OSError):  # others have put something there since
            if path.is_dir():
                path.rmdir()
            elif path.stat().st_size == 0:
                path.unlink()
    return changed


def _named(places: Places, path: Path) -> str:
    return f"/{path.relative_to(places.root)}"


def _missing_folders(paths: Iterable[Path]) -> list[Path]:
    """Return the folders of files that are not there yet, outer ones first."""
    return sorted({folder for path in paths for folder in path.parents if not folder.exists()})


def _is_as_wanted(file: File) -> bool:
    try:
        status, content = file.path.stat(), file.path.read_bytes()
    except FileNotFoundError:
        return False
    there = (content, status.st_mode & 0o7777, status.st_mtime_ns if file.mtime_ns else 0)
    if there != (file.content, file.mode, file.mtime_ns):
        return False
    return file.gid is None or (status.st_gid, _attribute(file.path)) == (file.gid, file.capability)


def _attribute(path: Path) -> bytes:
    try:
        return os.getxattr(path, _CAPABILITY)
    except OSError:
        return b""


def _write_manifest(places: Places, what: Manifest, undo: ExitStack) -> None:
    text = json.dumps(what._asdict(), indent=2) + "\n"
    _write(File(places.manifest, text.encode(), 0o644), undo)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.vmmback")


def _write(file: File, undo: ExitStack) -> None:
    """Put a file in its place, whole or not at all. Raises HostUnfit."""
    undo.callback(_restorer(file.path))
    try:
        _put(file, 0)
    except OSError as error:
        raise HostUnfit(f"{file.path} cannot be written: {error.strerror}", "nothing was changed") from error


def _put(file: File, uid: int) -> None:
    """Put a file in the place of what may be executed meanwhile, which cannot be written to (ETXTBSY of open(2))."""
    draft = _draft(file.path)
    try:
        draft.write_bytes(file.content)
        if os.geteuid() == 0:
            os.chown(draft, uid, file.gid or 0)
        draft.chmod(file.mode)
        if file.mtime_ns:
            os.utime(draft, ns=(file.mtime_ns, file.mtime_ns))
        if file.capability:
            os.setxattr(draft, _CAPABILITY, file.capability)
        draft.replace(file.path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _remove(path: Path, undo: ExitStack) -> list[Path]:
    if not path.exists():
        return []
    undo.callback(_restorer(path))
    path.unlink()
    return [path]


def _restorer(path: Path) -> Callable[[], None]:
    """Return what puts a file back as it is now, also if it is not there now."""
    if not path.exists():
        return lambda: path.unlink(missing_ok=True)
    status = path.stat()
    former = File(path, path.read_bytes(), status.st_mode & 0o7777, status.st_gid, status.st_mtime_ns, _attribute(path))
    return lambda: _put(former, status.st_uid)


def _insert(block: Block, undo: ExitStack) -> list[Path]:
    """Have our block, or none, at the beginning of a file of others, which else stays byte for byte as it is."""
    now = block.path.read_bytes() if block.path.exists() else b""
    wanted = block.in_place_of_old(now)
    if wanted == now:
        return []
    mode = block.path.stat().st_mode & 0o7777 if block.path.exists() else 0o644
    _write(File(block.path, wanted, mode), undo)
    return [block.path]
