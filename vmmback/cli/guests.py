"""`vmmback ps`, `status` and `stop`: the live guests from outside. Nothing heavy is imported: `ps` must be quick."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from vmmback.cli.completion import GuestName
from vmmback.cli.output import EXIT_EXPOSED, print_result, show
from vmmback.cli.signals import stopped
from vmmback.errors import Interrupted, UsageError, VmmbackError

if TYPE_CHECKING:
    from vmmback.report import IsolationReport

# All are asked at once, and a healthy one answers in milliseconds.
_PS_TIMEOUT_S = 1.0
_STATUS_TIMEOUT_S = 5.0
# What comes after the patience with the power button: quit, kill, and the check of the former frames.
_AFTER_PATIENCE_S = 60.0
_RELEASE_TIMEOUT_S = 10.0
_DEFAULT_PATIENCE_S = 15.0
_NO_ANSWER = "no answer"
# Of control.GuestStatus, whose import would cost more than all else.
_SHOWN = {
    *("state", "verdict", "reasons", "validated_after", "unexamined", "secret_bytes", "ram_bytes", "prefaulted_bytes"),
    *("started_at", "uptime_s", "pid", "qemu_pid", "config_file", "folder", "console_logs"),
}


@click.command(epilog="Exit codes: 0, 2 wrong argument, 3 the runtime folder cannot be read.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with the status of each guest.")
def ps(as_json: bool) -> None:
    """List the guests that live, and remove what dead supervisors left behind.

    A supervisor that does not answer in a second is listed with "no answer".

    \b
    Examples:
      vmmback ps
      vmmback ps --json | jq -r '.[] | select(.verdict == "exposed") | .name'
    """
    from vmmback.ask import ask_all
    from vmmback.runtime import live_guests, runtime_folder

    names, base = live_guests(), runtime_folder()
    answers = ask_all([base / name for name in names], "Status", {}, _PS_TIMEOUT_S)
    guests = [
        {"name": name, "state": _NO_ANSWER, "problem": answer.message}
        if isinstance(answer := answered if isinstance(answered, VmmbackError) else _of(answered), VmmbackError)
        else answer
        for name, answered in zip(names, answers, strict=True)
    ]
    if as_json:
        print_result(json.dumps(guests, indent=2) + "\n")
    else:
        print_result(_table(["NAME", "STATE", "PID", "UPTIME", "SECRET", "VERDICT"], [_row(guest) for guest in guests]))


@click.command(epilog="Exit codes: 0, 2 wrong argument, 6 the supervisor does not answer, 7 no such guest.")
@click.argument("name", type=GuestName())
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON document.")
def status(name: str, as_json: bool) -> None:
    """Show how the guest NAME is; nothing is measured for that (see `vmmback audit`).

    \b
    Examples:
      vmmback status demo
      vmmback status demo --json | jq .qemu_pid
    """
    guest = _status(name)
    if as_json:
        print_result(json.dumps(guest, indent=2) + "\n")
        return
    shown = {
        "guest": name,
        "state": _state(guest),
        "verdict": guest["verdict"] or "not validated",
        **({"validated after": guest["validated_after"]} if guest["validated_after"] else {}),
        **({"not examined": guest["unexamined"]} if guest["unexamined"] else {}),
        "secret RAM": f"{_mib(guest['secret_bytes'])} of {_mib(guest['ram_bytes'])}",
        "running since": f"{guest['started_at']} ({_duration(guest['uptime_s'])})",
        "supervisor": f"pid {guest['pid']}",
        "QEMU": f"pid {guest['qemu_pid']}" if guest["qemu_pid"] else "not running",
        "guest file": guest["config_file"] or "-",
        "folder": guest["folder"],
    }
    lines = [*shown.items(), *(("console log", log) for log in guest["console_logs"])]
    text = "".join(f"{key + ':':<17}{value}\n" for key, value in lines)
    print_result(text + "".join(f"  {reason}\n" for reason in guest["reasons"]))


@click.command(
    epilog="Exit codes: 0 the guest is gone, 2 wrong argument, 5 it is gone, and its last verdict is exposed, "
    "6 the supervisor does not answer, or the guest is still there, 7 no such guest, 128 + signal when stopped."
)
@click.argument("name", type=GuestName())
@click.option("--timeout", "patience", metavar="DURATION", help='How long it may take to power off (default "15s").')
@click.option("--kill", is_flag=True, help="End it at once, without its power button.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the last report as one JSON document, null if it never ran."
)
def stop(name: str, patience: str | None, kill: bool, as_json: bool) -> None:
    """Stop the guest NAME, wait until it is gone, and show the last word on its isolation.

    Its power button is pressed; if that does not end it in time, QEMU is told to quit, and at last killed.

    \b
    Examples:
      vmmback stop demo
      vmmback stop demo --timeout 2min
      vmmback stop demo --kill --json | jq .verdict
    """
    from vmmback.ask import ask, folder_of
    from vmmback.runtime import released

    patience_s = 0.0 if kill else _patience_s(patience)
    folder = folder_of(name)
    how = "QEMU is killed" if kill else f"its power button is pressed, it has {patience_s:g} s"
    show(sys.stderr, f"vmmback: guest {name} is stopped: {how}\n")
    found: IsolationReport | None = None
    try:
        with stopped("before the guest was gone: it goes on ending"):
            answer = ask(folder, "Stop", {"timeout_s": patience_s, "kill": kill}, patience_s + _AFTER_PATIENCE_S)
    except Interrupted:
        raise
    except VmmbackError as error:  # it never ran, or somebody killed its supervisor
        if not released(folder, _RELEASE_TIMEOUT_S):
            raise
        show(sys.stderr, f"vmmback: guest {name} is gone without a report: {error.message}\n")
    else:
        found = _report(answer)
        if not released(folder, _RELEASE_TIMEOUT_S):
            show(sys.stderr, f"vmmback: guest {name} has ended; its supervisor still cleans up\n")
    if as_json:
        print_result(found.as_json() if found else "null\n")
    elif found:
        from vmmback.cli.tables import at_the_end, rendered

        print_result(rendered(*at_the_end(found, len(found.probes))))
    sys.exit(EXIT_EXPOSED if found and found.verdict == "exposed" else 0)


def _status(name: str) -> dict[str, Any]:
    from vmmback.ask import ask, folder_of

    guest = _of(ask(folder_of(name), "Status", {}, _STATUS_TIMEOUT_S))
    if isinstance(guest, VmmbackError):
        raise guest
    return guest


def _of(answer: dict[str, object]) -> dict[str, Any] | VmmbackError:
    """Return the status in an answer; an error if it lacks what is shown, as another version's may."""
    from vmmback.ask import unknown_answer

    status = answer.get("status")
    return status if isinstance(status, dict) and status.keys() >= _SHOWN else unknown_answer()


def _report(answer: dict[str, object]) -> IsolationReport:
    from vmmback.ask import unknown_answer
    from vmmback.report import IsolationReport

    try:
        return IsolationReport.of(answer.get("report"))
    except ValueError as error:
        raise unknown_answer() from error


def _patience_s(text: str | None) -> float:
    from vmmback.config.values import parse_duration

    if text is None:
        return _DEFAULT_PATIENCE_S
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}", "write for example --timeout 30s") from error


def _row(guest: dict[str, Any]) -> list[str]:
    if guest["state"] == _NO_ANSWER:
        return [guest["name"], _NO_ANSWER, "-", "-", "-", "-"]
    return [
        guest["name"],
        _state(guest),
        str(guest["pid"]),
        _duration(guest["uptime_s"]),
        _mib(guest["secret_bytes"]),
        guest["verdict"] or "-",
    ]


def _state(guest: dict[str, Any]) -> str:
    """Return the state, and how far the prefault is in one that starts."""
    state: str = guest["state"]
    if state == "starting" and guest["prefaulted_bytes"]:
        return f"{state} ({guest['prefaulted_bytes'] * 100 // guest['ram_bytes']} %)"
    return state


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Return columns as wide as they must be; rich would take longer to load than all guests to answer."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [headings, *rows]]
    return "".join("  ".join(line).rstrip() + "\n" for line in lines)


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}min"
    return f"{minutes}min {rest_s}s" if minutes else f"{rest_s}s"
