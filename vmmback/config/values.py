"""What the values of a guest file may be: sizes, durations, paths, names, commands; each with what to write instead."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from vmmback.errors import UsageError
from vmmback.qmp_policy import ALLOW_PATTERN, check_entry
from vmmback.toml_errors import a_string, ascii_path, open_regular, quote, why, wrong_type
from vmmback.toml_tables import Checked, Parsed

GRAIN_BYTES = 8192  # QEMU rounds -m up to it (softmmu/vl.c, later system/vl.c: set_memory_options)
# Linux on x86 plugs RAM in whole blocks of at least so much (arch/x86/mm/init_64.c, probe_memory_block_size).
DIMM_GRAIN_BYTES = 128 << 20
MIN_MEMORY_BYTES = 1 << 20
MAX_MEMORY_BYTES = 16 << 40
MAX_DURATION_S = 24 * 3600
MIN_WATCH_S = 1.0
MAX_CMDLINE_BYTES = 2047  # COMMAND_LINE_SIZE of Linux on x86 is 2048, with the NUL: arch/x86/include/asm/setup.h

_SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE_PATTERN = "([0-9]{1,15})(KiB|MiB|GiB|TiB)"
_DURATION_PATTERN = "([0-9]{1,15})(ms|s|min|h)"
_NAME_PATTERN = r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{0,62}"
_TAG_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.-]{0,35}"  # a virtiofs device has room for 36 bytes (linux/virtio_fs.h)
# A comma only adds CPU properties ("max,-avx"): the whole text stays one argument of QEMU's.
_CPU_MODEL_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.,+=-]{0,254}"


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as "256MiB". Raises ValueError unless it is 1MiB to 16TiB."""
    found = re.fullmatch(_SIZE_PATTERN, text)
    if not found:
        raise ValueError(f'{quote(text)} is not a size; write it like "256MiB" (KiB, MiB, GiB or TiB)')
    size_bytes = int(found[1]) * _SIZE_UNITS[found[2]]
    if not MIN_MEMORY_BYTES <= size_bytes <= MAX_MEMORY_BYTES:
        raise ValueError(f'{quote(text)} is out of range; write "1MiB" to "16TiB"')
    return size_bytes


def parse_size(text: str) -> int:
    """Return the bytes of RAM of a size such as "256MiB". Raises ValueError unless it is whole 8KiB, 1MiB to 16TiB."""
    size_bytes = parse_bytes(text)
    if size_bytes % GRAIN_BYTES:
        raise ValueError(f"{quote(text)} is not a multiple of 8KiB, as QEMU rounds RAM sizes; write whole 8KiB")
    return size_bytes


def shown_size(size: int) -> str:
    """Return a size in bytes, a multiple of 1 KiB, as a guest file writes it, in the largest unit that is whole."""
    unit = max((unit for unit, factor in _SIZE_UNITS.items() if size % factor == 0), key=_SIZE_UNITS.__getitem__)
    return f"{size // _SIZE_UNITS[unit]}{unit}"


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as "500ms" or "2min". Raises ValueError unless it is 1ms to 24h."""
    found = re.fullmatch(_DURATION_PATTERN, text)
    if not found:
        raise ValueError(f'{quote(text)} is not a duration; write it like "60s" (ms, s, min or h)')
    seconds = int(found[1]) * _DURATION_UNITS_S[found[2]]
    if not 0 < seconds <= MAX_DURATION_S:
        raise ValueError(f'{quote(text)} is out of range; write "1ms" to "24h"')
    return seconds


def _size(value: object, _: Path | None) -> int:
    return parse_size(a_string(value, 'a size in quotes, like "256MiB"'))


def _duration(value: object, _: Path | None) -> float:
    return parse_duration(a_string(value, 'a duration in quotes, like "60s"'))


def given_path(value: object, folder: Path | None) -> Path:
    """Return a path, resolved from the guest file's folder. Raises ValueError."""
    text = a_string(value, 'a path in quotes, like "vmlinuz"')
    if not text or "\0" in text:
        raise ValueError(f"{quote(text)} is not a path; write the path of a file")
    return Path(text) if folder is None else folder / text


def _input_file(value: object, folder: Path | None) -> Path:
    """Return the path of a file that the guest needs; it must be regular and readable."""
    path = given_path(value, folder)
    if folder is None:
        return path
    try:
        open_regular(path).close()
    except (OSError, ValueError) as error:
        advice = "write the path of a file that you may read, absolute or from the guest file's folder"
        raise ValueError(f"{ascii_path(path)}: {why(error)}; {advice}") from error
    return path


def _input_folder(value: object, folder: Path | None) -> Path:
    """Return the path of a folder that is there, absolute."""
    path = given_path(value, folder)
    if folder is None:
        return path
    try:
        if path.is_dir():
            return path.absolute()
        path.stat()
        problem = "is not a folder"
    except OSError as error:
        problem = why(error)
    raise ValueError(f"{ascii_path(path)}: {problem}; write the path of a folder, absolute or from the guest file's")


def _output_file(value: object, folder: Path | None) -> Path:
    """Return the path of a file that is going to be written; its folder must be there."""
    path = given_path(value, folder)
    if folder is None:
        return path
    try:
        if path.is_dir():
            raise ValueError(f"{ascii_path(path)}: is a folder; write the path of a file in it")
        has_folder = path.parent.is_dir()
    except OSError as error:
        raise ValueError(f"{ascii_path(path)}: {why(error)}; write the path of a file that you may write") from error
    if not has_folder:
        raise ValueError(f"{ascii_path(path)}: its folder does not exist; make the folder, or write another path")
    return path


def matching(pattern: str, wanted: str) -> Callable[[str], str]:
    """Return a check of text against a pattern, whose error says what was `wanted`."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{quote(text)} is not {wanted}")
        return text

    return check


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{quote(text)} has characters that are not printable; write it as one line of plain text")
    return text


def _ready_text(text: str) -> str:
    if not text.strip():
        raise ValueError(
            "is blank, which any output matches; write text that the guest prints once, or leave ready out"
        )
    return _one_line(text)


def _not_too_often(seconds: float) -> float:
    if seconds < MIN_WATCH_S:
        raise ValueError(f'is more often than every {MIN_WATCH_S:g} s; write "1s" to "24h"')
    return seconds


def _cmdline(text: str) -> str:
    if len(text.encode()) > MAX_CMDLINE_BYTES:
        raise ValueError(f"is longer than {MAX_CMDLINE_BYTES} bytes, of which Linux cuts the rest; write a shorter one")
    return _one_line(text)


_guest_name = matching(
    _NAME_PATTERN,
    'a guest name; write 1 to 63 of a-z, 0-9, "." and "-", starting with a letter or a digit, without ".."',
)


def check_name(name: str) -> str:
    """Return the name of a guest as it is. Raises UsageError unless a guest may have it."""
    try:
        return _guest_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_size(text: str) -> int:
    """Return the bytes of a size. Raises UsageError as parse_size does ValueError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _allowed_commands(value: object, _: Path | None) -> tuple[str, ...]:
    if not isinstance(value, list):
        wanted = 'a list of commands in quotes, like ["device_del", "job-*"]'
        raise ValueError(wrong_type(value, wanted))  # noqa: TRY004 (of what a file says every problem is a ValueError)
    for entry in value:
        text = a_string(entry, "its entries as commands in quotes")
        try:
            check_entry(text)
        except ValueError as error:
            raise ValueError(f"{quote(text)} {error}") from None
    return tuple(value)


GuestName = Annotated[str, Checked(_guest_name, pattern=f"^{_NAME_PATTERN}$")]
ShareTag = Annotated[
    str,
    Checked(
        matching(_TAG_PATTERN, 'a tag; write 1 to 36 of A-Z, a-z, 0-9, "_", "." and "-", like "shared"'),
        pattern=f"^{_TAG_PATTERN}$",
    ),
]
CpuModel = Annotated[
    str,
    Checked(
        matching(_CPU_MODEL_PATTERN, 'a CPU model; write it like "max", with features like "max,-avx"'),
        pattern=f"^{_CPU_MODEL_PATTERN}$",
    ),
]
Size = Annotated[int, Parsed(_size, type="string", pattern=f"^{_SIZE_PATTERN}$")]
Seconds = Annotated[float, Parsed(_duration, type="string", pattern=f"^{_DURATION_PATTERN}$")]
InputFolder = Annotated[Path, Parsed(_input_folder, type="string", minLength=1)]
InputFile = Annotated[Path, Parsed(_input_file, type="string", minLength=1)]
OutputFile = Annotated[Path, Parsed(_output_file, type="string", minLength=1)]
AllowedCommands = Annotated[
    tuple[str, ...], Parsed(_allowed_commands, type="array", items={"type": "string", "pattern": f"^{ALLOW_PATTERN}$"})
]
CommandLine = Annotated[str, Checked(_cmdline)]
ReadyText = Annotated[str, Checked(_ready_text)]
WatchPeriod = Annotated[Seconds, Checked(_not_too_often)]
