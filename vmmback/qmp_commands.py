"""QEMU's QMP commands, judged one by one: what other processes may ask of a guest, on request or by default, and never.

Every command of QEMU 7.2 and 10.0 on x86 is in one of the three tables (`query-commands` of both was gone through, and
qapi/*.json of later releases for what they add). A command that is in none is unknown here and denied, whatever a
guest file says: what a later QEMU makes of it cannot be told (10.2's query-firmware-log returns guest memory).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

# What is wrong with a command's arguments, "" if nothing is.
Rule = Callable[[Mapping[str, object]], str]


def _takes(kinds: Mapping[str, type]) -> Rule:
    """Only these arguments, each of its type; `object` is any JSON value. Which ones are needed is QEMU's to say."""

    def problem(arguments: Mapping[str, object]) -> str:
        for name, value in arguments.items():
            if name not in kinds:
                return f"it takes no argument {name[:80]!a} here"
            if kinds[name] not in (object, type(value)):  # not isinstance: true is no integer
                return f"its argument {name!a} must be of type {_JSON_NAMES[kinds[name]]} here"
        return ""

    return problem


_JSON_NAMES = {str: "string", int: "integer", bool: "boolean", list: "array", dict: "object"}
_NOTHING = _takes({})
_DISK = _takes({"device": str, "id": str, "force": bool})
_JOB = _takes({"id": str, "device": str, "force": bool, "speed": int})
_BITMAP = _takes(
    {"node": str, "name": str, "target": str, "bitmaps": list, "granularity": int, "persistent": bool, "disabled": bool}
)


def _names(text: str) -> list[str]:
    return text.split()


def _each(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(_names(names), rule)


def _anything(_: Mapping[str, object]) -> str:
    return ""


# Devices that were added by a command or an option lie right below these two (hw/core/qdev.c, qdev_set_id). One name
# and no more: a path that goes on can follow a link to anything, a memory backend or a secret among them.
_DEVICE_PATH = re.compile(r"/machine/(peripheral|peripheral-anon)/[A-Za-z0-9_.\[\]-]{1,80}")
_DEVICE_STATUS = ("type", "realized", "hotplugged", "guest-stats", "guest-stats-polling-interval")


def _device_status(arguments: Mapping[str, object]) -> str:
    path, name = arguments.get("path"), arguments.get("property")
    if problem := _takes({"path": str, "property": str})(arguments):
        return problem
    if not (isinstance(path, str) and _DEVICE_PATH.fullmatch(path)):
        return "its path must be that of a device: /machine/peripheral/ID or /machine/peripheral-anon/device[N]"
    if name not in _DEVICE_STATUS:
        return f"its property must be one of {', '.join(_DEVICE_STATUS)}"
    return ""


def _cpu_model(arguments: Mapping[str, object]) -> str:
    """Names of models only: QEMU makes a CPU object, and what comes with the name could set any property of it."""
    if problem := _takes({"type": str, "model": dict, "modela": dict, "modelb": dict})(arguments):
        return problem
    models = [value for value in arguments.values() if isinstance(value, dict)]
    if any(set(model) - {"name"} or not isinstance(model.get("name", ""), str) for model in models):
        return "a CPU model may have nothing but its name here"
    return ""


# No balloon: it takes memory from the guest and gives the host none back (docs/REFUSALS.md).
# Devices without memory of their own that the guest can write to (video memory, ivshmem, a DIMM, an NVMe controller's
# buffer would be ordinary memory), and that share no RAM with another process (vhost-user) or a driver (vfio, vdpa).
_DRIVERS = _names(
    "virtio-blk-pci virtio-keyboard-pci virtio-net-pci virtio-rng-pci virtio-scsi-pci "
    "virtio-tablet-pci scsi-cd scsi-hd i6300esb pcie-root-port qemu-xhci usb-kbd usb-tablet"
)
# Not: memdev, chardev, romfile (reads a file of the host), vhost*, hostfd, x-*, and what QEMU may add.
_DRIVER_PROPERTIES = _names(
    "driver id bus addr multifunction drive netdev mac bootindex serial port chassis slot channel scsi-id lun "
    "share-rw write-cache disable-legacy disable-modern"
)


def _harmless_device(arguments: Mapping[str, object]) -> str:
    if arguments.get("driver") not in _DRIVERS:
        return f"its driver must be one that brings no memory and shares none: {', '.join(sorted(_DRIVERS))}"
    for name, value in arguments.items():
        if name not in _DRIVER_PROPERTIES:
            return f"it takes no property {name[:80]!a} here, but {', '.join(sorted(_DRIVER_PROPERTIES))}"
        if not isinstance(value, str | int):
            return f"its property {name!a} must be a string, an integer or a boolean"
    return ""


def _no_dimm(arguments: Mapping[str, object]) -> str:
    """Whatever names a DIMM of `vmmback grow`: its id, or a path in QEMU's object model that ends with it."""
    if problem := _takes({"id": str})(arguments):
        return problem
    if re.search(r"(^|/)dimm[0-9]+/*$", str(arguments.get("id", ""))):
        return "it is a part of the guest's RAM"
    return ""


# Passed to QEMU for everyone: status, and what steers the guest without touching its memory.
DEFAULT: dict[str, Rule] = {
    # Steering. Pausing and resuming change no mapping; -no-reboot turns a reset into the guest's end.
    "stop": _NOTHING,
    "cont": _NOTHING,
    "system_powerdown": _NOTHING,
    "system_reset": _NOTHING,
    "quit": _NOTHING,
    # Status without arguments: names, counts and settings that QEMU keeps itself.
    **_each(
        _NOTHING,
        "query-acpi-ospm-status query-audiodevs query-balloon query-block query-block-exports query-block-jobs "
        "query-chardev query-chardev-backends query-colo-status query-commands query-cpu-definitions query-cpus-fast "
        "query-cryptodev query-current-machine query-display-options query-dump query-dump-guest-memory-capability "
        "query-fdsets query-gic-capabilities query-hotpluggable-cpus query-hv-balloon-status-report query-iothreads "
        "query-jobs query-kvm query-memdev query-memory-devices query-memory-size-summary query-mice query-migrate "
        "query-migrate-capabilities query-migrate-parameters query-migrationthreads query-name query-pci "
        "query-pr-managers query-qmp-schema query-replay query-s390x-cpu-polarization query-sev query-sgx query-spice "
        "query-status query-target query-tpm query-tpm-models query-tpm-types query-uuid query-vcpu-dirty-limit "
        "query-version query-vm-generation-id query-vnc query-vnc-servers query-xen-replication-status "
        "query-yank",
    ),
    # Status with arguments that choose what is shown.
    "query-blockstats": _takes({"query-nodes": bool}),
    "query-command-line-options": _takes({"option": str}),
    "query-cpu-model-expansion": _cpu_model,
    "query-dirty-rate": _takes({"calc-time-unit": str}),
    "query-machines": _takes({"compat-props": bool}),
    "query-named-block-nodes": _takes({"flat": bool}),
    "query-rx-filter": _takes({"name": str}),
    "query-stats": _takes({"target": str, "providers": list, "vcpus": list}),
    "query-stats-schemas": _takes({"provider": str}),
    # Devices and the balloon: which there are, and what the balloon's driver says of the guest's memory use.
    "qom-list": _takes({"path": str}),
    "qom-get": _device_status,
}

# Passed once `[qmp] allow` names it: changes devices, disks or the guest's course, but reaches no memory.
ON_REQUEST: dict[str, Rule] = {
    # The guest's course.
    "system_wakeup": _NOTHING,
    "inject-nmi": _NOTHING,
    "rtc-reset-reinjection": _NOTHING,
    "balloon": _takes({"value": int}),
    "watchdog-set-action": _takes({"action": str}),
    "send-key": _takes({"keys": list, "hold-time": int}),
    "input-send-event": _takes({"device": str, "head": int, "events": list}),
    "chardev-send-break": _takes({"id": str}),
    "xen-event-inject": _takes({"port": int}),
    "xen-event-list": _NOTHING,
    # Devices and the network.
    "device_add": _harmless_device,
    "device_del": _no_dimm,
    "device-sync-config": _takes({"id": str}),
    "netdev_del": _takes({"id": str}),
    "set_link": _takes({"name": str, "up": bool}),
    "announce-self": _anything,
    # Disks: trays, limits, and jobs and bitmaps that are there. None opens a file or copies a disk.
    "eject": _DISK,
    "blockdev-open-tray": _DISK,
    "blockdev-close-tray": _DISK,
    "blockdev-remove-medium": _DISK,
    "block_resize": _takes({"device": str, "node-name": str, "size": int}),
    "block_set_io_throttle": _anything,
    "block-latency-histogram-set": _anything,
    "block-set-write-threshold": _takes({"node-name": str, "write-threshold": int}),
    "block-job-change": _anything,
    **_each(
        _JOB,
        "block-job-cancel block-job-complete block-job-dismiss block-job-finalize block-job-pause block-job-resume "
        "block-job-set-speed job-cancel job-complete job-dismiss job-finalize job-pause job-resume",
    ),
    **_each(
        _BITMAP,
        "block-dirty-bitmap-add block-dirty-bitmap-clear block-dirty-bitmap-disable block-dirty-bitmap-enable "
        "block-dirty-bitmap-merge block-dirty-bitmap-remove",
    ),
    # Status that has side effects: it makes an object to look at it, or opens a device of the host.
    "device-list-properties": _takes({"typename": str}),
    "qom-list-properties": _takes({"typename": str}),
    "qom-list-types": _takes({"implements": str, "abstract": bool}),
    "query-cpu-model-baseline": _cpu_model,
    "query-cpu-model-comparison": _cpu_model,
    "query-sev-attestation-report": _takes({"mnonce": str}),
    "query-sev-capabilities": _NOTHING,
    "query-sev-launch-measure": _NOTHING,
    "query-sgx-capabilities": _NOTHING,
    # Status that the guest wrote: a switch's tables.
    "query-rocker": _takes({"name": str}),
    "query-rocker-ports": _takes({"name": str}),
    "query-rocker-of-dpa-flows": _takes({"name": str, "tbl-id": int}),
    "query-rocker-of-dpa-groups": _takes({"name": str, "type": int}),
    "request-ebpf": _takes({"id": str}),
    "trace-event-get-state": _takes({"name": str, "vcpu": int}),
}

_NEVER: dict[str, str] = {
    "copies guest memory into a file": "memsave pmemsave dump-guest-memory",
    "returns guest memory": "query-firmware-log",
    "sends guest memory to another process, or receives it": "client_migrate_info migrate migrate-continue "
    "migrate-incoming migrate-pause migrate-recover migrate-set-capabilities migrate-set-parameters "
    "migrate-start-postcopy migrate_cancel xen-colo-do-checkpoint xen-set-replication",
    "saves guest memory or device state in a file, or puts other state in its place": "snapshot-save snapshot-load "
    "snapshot-delete xen-save-devices-state xen-load-devices-state replay-break replay-delete-break replay-seek "
    "dump-skeys dumpdtb",
    "runs any text in the human monitor, which reads memory, starts gdbserver and more": "human-monitor-command",
    "sets any property of any object, such as dump=on of the memory backend": "qom-set",
    "makes or removes memory backends and other objects": "object-add object-del set-numa-node "
    "cxl-add-dynamic-capacity cxl-release-dynamic-capacity",
    "reports errors of memory that is not there, or injects them": "cxl-inject-correctable-error cxl-inject-dram-event "
    "cxl-inject-general-media-event cxl-inject-memory-module-event cxl-inject-poison cxl-inject-uncorrectable-errors",
    "watches or samples the guest's memory": "calc-dirty-rate set-vcpu-dirty-limit cancel-vcpu-dirty-limit "
    "xen-set-global-dirty-log",
    "writes into guest memory": "sev-inject-launch-secret",
    "gives QEMU descriptors, or takes them away": "add-fd remove-fd getfd closefd add_client",
    "connects QEMU to files, sockets or programs": "chardev-add chardev-change chardev-remove netdev_add",
    "reads or writes a console's buffer": "ringbuf-read ringbuf-write",
    "cuts connections, the supervisor's own among them": "yank",
    "shows the guest's screen to others": "screendump change-vnc-password expire_password set_password display-reload "
    "display-update",
    "opens, makes or rewires the files that the guest's data goes to": "blockdev-add blockdev-change-medium "
    "blockdev-create blockdev-del blockdev-insert-medium blockdev-reopen blockdev-set-active blockdev-snapshot "
    "blockdev-snapshot-delete-internal-sync blockdev-snapshot-internal-sync blockdev-snapshot-sync change-backing-file",
    "copies the guest's disk": "block-commit block-stream blockdev-backup blockdev-mirror drive-backup drive-mirror",
    "serves the guest's disk to others": "block-export-add block-export-del nbd-server-add nbd-server-remove "
    "nbd-server-start nbd-server-stop",
    "carries other commands past this policy": "transaction",
    "writes what the guest does to a log": "trace-event-set-state",
    "lets a guest reboot, and a boot is what was validated": "set-action",
}

# Nothing widens this: each exports or unprotects memory, changes backends or runs text that could. With the reason.
NEVER_ALLOWED: dict[str, str] = {name: reason for reason, names in _NEVER.items() for name in _names(names)}

UNSTABLE_PREFIX = "x-"
UNSTABLE = "is not stable: QEMU may change at any time what it shows or does"
# A negotiation is between a client and the socket; QEMU's was made by the supervisor.
NEGOTIATION = "qmp_capabilities"
