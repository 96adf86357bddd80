"""What passes to QEMU and what does not, whatever a guest file allows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmback.qmp_commands import DEFAULT, NEVER_ALLOWED, ON_REQUEST
from vmmback.qmp_policy import Denial, Policy, check_entry, is_known

EVERYTHING = Policy(["*"])


def denied(policy: Policy, command: str, **arguments: object) -> str:
    """The description of a denial, "" if the command passes. Arguments are written with _ for -."""
    denial = policy.check(command, {name.replace("_", "-"): value for name, value in arguments.items()})
    return denial.desc if denial else ""


@pytest.mark.parametrize(
    "command",
    [
        "stop",
        "cont",
        "system_powerdown",
        "system_reset",
        "quit",
        "query-status",
        "query-block",
        "query-balloon",
        "query-commands",
        "query-qmp-schema",
    ],
)
def test_passes_by_default(command: str) -> None:
    assert Policy().check(command, {}) is None


@pytest.mark.parametrize("command", ["device_del", "set_link", "eject", "job-cancel", "query-sev-capabilities"])
def test_passes_on_request_only(command: str) -> None:
    denial = Policy().check(command, {})
    assert denial == Denial(
        "CommandNotFound", f"Command {command} has been disabled: the guest file's [qmp] allow does not name it"
    )
    for allow in ([command], [command[:3] + "*"], ["*"], ["stop", command]):
        assert Policy(allow).check(command, {}) is None
    for allow in ([command[:-1]], [command + "x"], [command.upper()], [f" {command}"], ["." * len(command)]):
        assert Policy(allow).check(command, {}) is not None


# The ways out of secret RAM that were tried on a real guest, and the ways to take its protection off.
@pytest.mark.parametrize(
    "command",
    [
        "memsave",
        "pmemsave",
        "dump-guest-memory",
        "migrate",
        "migrate-incoming",
        "snapshot-save",
        "snapshot-load",
        "human-monitor-command",
        "qom-set",
        "object-add",
        "object-del",
        "chardev-add",
        "chardev-change",
        "getfd",
        "add-fd",
        "netdev_add",
        "blockdev-add",
        "blockdev-backup",
        "drive-mirror",
        "nbd-server-start",
        "block-export-add",
        "transaction",
        "screendump",
        "calc-dirty-rate",
        "trace-event-set-state",
        "query-firmware-log",
        "yank",
        "x-query-virtio-queue-element",
        "x-anything-that-qemu-may-add",
    ],
)
def test_nothing_widens_what_is_never_allowed(command: str) -> None:
    for policy in (Policy(), EVERYTHING, Policy([command]), Policy([command, command + "*", "x-*", "query-*"])):
        denial = policy.check(command, {})
        assert denial
        assert denial.error_class == "CommandNotFound"
        assert denial.desc.startswith(f"Command {command} has been disabled: it ")


@settings(max_examples=300, deadline=None, database=None)
@given(
    allow=st.lists(
        st.one_of(
            st.sampled_from(sorted(NEVER_ALLOWED)),
            st.sampled_from(sorted(NEVER_ALLOWED)).map(lambda name: name[:4] + "*"),
            st.sampled_from(["*", "**", "", "x-*", "*-*", ".*", "query-*"]),
            st.text(max_size=12),
        )
    ),
    command=st.one_of(st.sampled_from(sorted(NEVER_ALLOWED)), st.text(max_size=12).map("x-".__add__)),
    arguments=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
def test_never_means_never(allow: list[str], command: str, arguments: dict[str, object]) -> None:
    policy = Policy(allow)
    policy.deny(command, "for now")
    policy.permit(command)
    assert policy.check(command, arguments) is not None


@settings(max_examples=300, deadline=None, database=None)
@given(allow=st.lists(st.text(max_size=12)), command=st.text(max_size=40))
def test_what_is_unknown_is_denied_even_if_it_is_allowed(allow: list[str], command: str) -> None:
    denial = Policy([*allow, command, "*"]).check(command, {})
    known = command in DEFAULT or command in ON_REQUEST
    assert known == (denial is None or denial.error_class == "GenericError")  # some need arguments
    assert denial is None or (denial.desc.isascii() and denial.desc.isprintable())


@settings(max_examples=300, deadline=None, database=None)
@given(
    command=st.sampled_from(sorted(DEFAULT | ON_REQUEST)),
    arguments=st.dictionaries(
        st.sampled_from(["path", "property", "driver", "id", "model", "name", "type", "target", "x"]) | st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
            max_leaves=4,
        ),
        max_size=4,
    ),
)
def test_any_arguments_are_judged(command: str, arguments: dict[str, Any]) -> None:
    denial = EVERYTHING.check(command, arguments)
    assert denial is None or (denial.error_class == "GenericError" and denial.desc.isprintable())


def test_a_name_that_a_terminal_would_obey_is_not_shown() -> None:
    assert "Command ?[31mstop? has been disabled" in denied(Policy(), "\x1b[31mstop\n")
    assert "'\\x1b[31m'" in denied(Policy(), "stop", **{"\x1b[31m": 1})


def test_a_name_without_end_is_cut() -> None:
    assert len(denied(Policy(), "a" * 100_000, **{"b" * 100_000: 1})) < 200
    assert len(denied(Policy(), "stop", **{"b" * 100_000: 1})) < 200


# Arguments


@pytest.mark.parametrize("command", ["stop", "quit", "query-block", "query-migrate"])
def test_what_takes_no_argument_gets_none(command: str) -> None:
    assert denied(Policy(), command, x=1) == (
        f"Command {command} is denied with these arguments: it takes no argument 'x' here"
    )


@pytest.mark.parametrize(
    ("command", "arguments", "problem"),
    [
        ("query-blockstats", {"query_nodes": True}, ""),
        ("query-blockstats", {"query_nodes": 1}, "its argument 'query-nodes' must be of type boolean here"),
        ("balloon", {"value": 1}, ""),
        ("balloon", {"value": True}, "its argument 'value' must be of type integer here"),
        ("announce-self", {"anything": [{}]}, ""),
        ("query-cpu-model-expansion", {"type": "full", "model": {"name": "max"}}, ""),
        (
            "query-cpu-model-expansion",
            {"type": "full", "model": {"name": "max", "props": {"memory": "/x"}}},
            "nothing but its name",
        ),
        ("query-cpu-model-expansion", {"type": "full", "model": {"name": {}}}, "nothing but its name"),
        ("query-cpu-model-expansion", {"type": "full", "model": "max"}, "must be of type object"),
        ("qom-get", {"path": "/machine/peripheral/balloon0", "property": "guest-stats"}, ""),
        ("qom-get", {"path": "/machine/peripheral-anon/device[0]", "property": "type"}, ""),
        ("qom-get", {"path": "/objects/key0", "property": "data"}, "its path must be that of a device"),
        ("qom-get", {"path": "/machine/peripheral/disk0/key", "property": "type"}, "its path must be that of a device"),
        ("qom-get", {"path": "/machine/peripheral/a\n", "property": "type"}, "its path must be that of a device"),
        ("qom-get", {"path": "ram0", "property": "type"}, "its path must be that of a device"),
        ("qom-get", {"path": "/machine/peripheral/disk0", "property": "drive"}, "its property must be one of type,"),
        ("qom-get", {"path": "/machine/peripheral/disk0"}, "its property must be one of"),
        ("qom-get", {"property": "type"}, "its path must be that of a device"),
        ("qom-get", {"path": ["/objects"], "property": "type"}, "must be of type string"),
        ("device_add", {"driver": "virtio-blk-pci", "id": "a", "drive": "b", "bus": "rp0", "bootindex": 1}, ""),
        ("device_add", {"driver": "virtio-net-pci", "netdev": "n0", "mac": "52:54:00:00:00:01"}, ""),
        *[
            ("device_add", {"driver": driver}, "its driver must be one that brings no memory and shares none")
            for driver in (
                "pc-dimm",
                "nvdimm",
                "virtio-mem-pci",
                "virtio-pmem-pci",
                "ivshmem-plain",
                "VGA",
                "vhost-user-blk-pci",
                "vfio-pci",
                "nvme",
                "loader",
                "edu",
                "virtio-blk-pci,x-y=1",
                ["virtio-blk-pci"],
                None,
            )
        ],
        ("device_add", {}, "its driver must be one"),
        ("device_add", {"driver": "pc-dimm", "id": "dimm1"}, "its driver must be one that brings no memory"),
        ("device_del", {"id": "disk1"}, ""),
        ("device_del", {"id": "dimm"}, ""),
        ("device_del", {"id": "dimm1"}, "it is a part of the guest's RAM"),
        ("device_del", {"id": "/machine/peripheral/dimm12"}, "it is a part of the guest's RAM"),
        ("device_del", {"id": "peripheral/dimm2/"}, "it is a part of the guest's RAM"),
        ("device_del", {"id": 1}, "its argument 'id' must be of type string"),
        ("device_add", {"driver": "virtio-blk-pci", "romfile": "/etc/shadow"}, "it takes no property 'romfile'"),
        ("device_add", {"driver": "virtio-blk-pci", "memdev": "ram0"}, "it takes no property 'memdev'"),
        ("device_add", {"driver": "virtio-blk-pci", "drive": {"a": 1}}, "its property 'drive' must be a string"),
    ],
)
def test_arguments(command: str, arguments: dict[str, Any], problem: str) -> None:
    said = denied(EVERYTHING, command, **arguments)
    assert problem in said
    assert bool(problem) == bool(said)


# At run time


def test_a_command_can_be_denied_for_a_while() -> None:
    policy = Policy()
    policy.deny("cont", "the guest is no longer isolated")
    assert denied(policy, "cont") == "Command cont is denied for now: the guest is no longer isolated"
    assert denied(policy, "stop") == ""
    policy.permit("cont")
    policy.permit("cont")
    assert denied(policy, "cont") == ""
    policy.permit("memsave")
    assert "copies guest memory" in denied(policy, "memsave")


# Entries of a guest file


@pytest.mark.parametrize("entry", ["stop", "device_del", "query-*", "*", "block-dirty-bitmap-*", "q*"])
def test_an_entry_that_has_a_meaning(entry: str) -> None:
    check_entry(entry)


@pytest.mark.parametrize("command", sorted(NEVER_ALLOWED))
def test_an_entry_that_is_never_allowed_says_why(command: str) -> None:
    with pytest.raises(ValueError, match=f"^is never allowed, as it {NEVER_ALLOWED[command]}; remove it$"):
        check_entry(command)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("x-query-roms", "^is never allowed, as it is not stable"),
        ("memsa*", "^matches no command that may be allowed; remove it$"),
        ("job-canecl", '^matches no command that may be allowed; did you mean "job-cancel"'),
        ("", "^is no command"),
        ("a b", "^is no command"),
        ("*x", "^is no command"),
        ("stop\n", "^is no command"),
        ("a" * 81, "^is no command"),
    ],
)
def test_an_entry_that_has_none(entry: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_entry(entry)


def test_names_that_clients_make_up_are_not_known() -> None:
    assert is_known("stop")
    assert is_known("memsave")
    assert is_known("device_add")
    assert not is_known("x-made-up")
    assert not is_known("made-up")
