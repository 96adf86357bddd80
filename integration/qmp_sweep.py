"""Plausible arguments for every command that QEMU has, made from what it says of itself (query-qmp-schema).

Names of arguments say what is meant by them: a file, an address, an object. So commands that could export memory are
asked to do it, into a folder of the test's.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Schema = dict[str, dict[str, Any]]

# What would end the guest, by itself or in the hands of a guest that does not expect it: tried apart.
ENDING = ("quit", "system_reset", "inject-nmi")

RAM = "/objects/ram0"


class Plausible:
    """Makes arguments; every file in them is in `folder`, under a name of its own."""

    def __init__(self, schema: list[dict[str, Any]], folder: Path) -> None:
        self.schema: Schema = {entity["name"]: entity for entity in schema}
        self._folder = folder
        self._files = 0

    def of(self, command: str) -> Iterator[dict[str, Any]]:
        """Yield ways to call a command: by hand, then with what it needs, with all it takes, and with nothing."""
        yield from self._by_hand(command)
        arguments = self.schema[self.schema[command]["arg-type"]]
        yield self._members(arguments, optional=False, depth=0)
        yield self._members(arguments, optional=True, depth=0)
        yield {}

    def _by_hand(self, command: str) -> Iterator[dict[str, Any]]:
        file = self._file()
        known: dict[str, list[dict[str, Any]]] = {
            "memsave": [{"val": 0, "size": 4096, "filename": file}],
            "pmemsave": [{"val": 1 << 20, "size": 1 << 20, "filename": file}],
            "dump-guest-memory": [{"paging": False, "protocol": f"file:{file}"}],
            "migrate": [{"uri": f"exec:cat > {file}"}, {"uri": f"unix:{file}"}],
            "human-monitor-command": [
                {"command-line": line}
                for line in ("xp /8xg 0x100000", "x /8xg 0", f"gdbserver unix:{file}", f"pmemsave 0 4096 {file}")
            ],
            "qom-set": [{"path": RAM, "property": name, "value": True} for name in ("dump", "merge")],
            "qom-get": [
                {"path": path, "property": name}
                for path in (RAM, "ram0", "/machine", "/machine/unattached/device[0]")
                for name in ("dump", "type", "crash-information", "mem-path", "guest-stats")
            ],
            "qom-list": [{"path": path} for path in (RAM, "/machine", "/chardevs", "/objects")],
            "device_add": [
                {"driver": driver, "id": f"new{number}", "memdev": "ram0"}
                for number, driver in enumerate(("pc-dimm", "ivshmem-plain", "nvdimm", "virtio-mem-pci"))
            ]
            + [{"driver": driver} for driver in ("VGA", "virtio-rng-pci", "virtio-balloon-pci", "usb-kbd")],
            "object-add": [
                {"qom-type": "memory-backend-file", "id": "m", "size": 4096, "mem-path": file, "share": True},
                {"qom-type": "memory-backend-ram", "id": "m2", "size": 4096},
            ],
            "chardev-add": [
                {
                    "id": "c",
                    "backend": {
                        "type": "socket",
                        "data": {"addr": {"type": "unix", "data": {"path": file}}, "server": True, "wait": False},
                    },
                }
            ],
            "blockdev-add": [{"driver": "file", "node-name": "n", "filename": "/etc/hostname", "read-only": True}],
            "transaction": [{"actions": [{"type": "abort", "data": {}}]}],
            "set-action": [{"reboot": "reset"}],
            "yank": [{"instances": [{"type": "chardev", "id": "qmp"}]}],
            "query-cpu-model-expansion": [{"type": "full", "model": {"name": "max"}}],
        }
        yield from known.get(command, [])

    def _file(self) -> str:
        self._files += 1
        return str(self._folder / f"file{self._files}")

    def _value(self, name: str, kind: str, depth: int) -> Any:
        entity = self.schema[kind]
        match entity["meta-type"]:
            case "builtin":
                return self._builtin(name, entity["json-type"])
            case "enum":
                return entity["members"][0]["name"] if "members" in entity else entity["values"][0]
            case "array":
                return [self._value(name, entity["element-type"], depth + 1)]
            case "alternate":
                return self._value(name, entity["members"][0]["type"], depth + 1)
            case _:
                return self._members(entity, optional=False, depth=depth + 1)

    def _builtin(self, name: str, json_type: str) -> Any:
        match json_type:
            case "string":
                return self._text(name)
            case "boolean":
                return True
            case "number":
                return 0.5
            case "null":
                return None
            case "value":
                return True
            case _:
                return 4096 if "size" in name or "length" in name else 0

    def _text(self, name: str) -> str:
        known = {
            "path": RAM,
            "property": "dump",
            "driver": "virtio-rng-pci",
            "typename": "virtio-rng-pci",
            "implements": "memory-backend",
            "device": "ram0",
            "protocol": f"file:{self._file()}",
            "uri": f"exec:cat > {self._file()}",
            "command-line": "xp /8xg 0",
            "option": "memory",
            "mnonce": base64.b64encode(b"0" * 16).decode(),
        }
        if "file" in name or name in ("target", "vmstate", "base", "out", "in"):
            return self._file()
        return known.get(name, "ram0")

    def _members(self, entity: dict[str, Any], *, optional: bool, depth: int) -> dict[str, Any]:
        if depth > 4:
            return {}
        made = {
            member["name"]: self._value(member["name"], member["type"], depth)
            for member in entity["members"]
            if optional or "default" not in member
        }
        if tag := entity.get("tag"):
            chosen = next((case for case in entity["variants"] if case["case"] == made.get(tag)), None)
            if chosen:
                made |= self._members(self.schema[chosen["type"]], optional=False, depth=depth + 1)
        return made


class Needles:
    """A canary in the ways in which a monitor could show it."""

    def __init__(self, canary: bytes) -> None:
        repeated = canary * 4
        words = {canary[at : at + 8] for at in range(0, len(canary), 8)}
        self.raw = [canary[at : at + 16] for at in range(0, len(canary), 16)]
        self._texts = {word[::-1].hex() for word in words} | {word.hex() for word in words}
        # Base64 looks different at each of the three places where a copy can begin in it.
        self._texts |= {base64.b64encode(repeated[at:])[:48].decode() for at in range(3)}
        self._texts = {text.lower() for text in self._texts}

    def in_text(self, text: str) -> bool:
        """Tell whether an answer shows the canary: as hexadecimal words or bytes, in base64, or as it is."""
        lowered = text.lower()
        data = text.encode("utf-8", "surrogatepass"), text.encode("latin-1", "replace")
        return any(needle in lowered for needle in self._texts) or any(raw in one for raw in self.raw for one in data)

    def in_files(self, folder: Path) -> list[str]:
        """Return the files below `folder` that hold the canary."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        return [path.name for path in files if any(raw in path.read_bytes() for raw in self.raw)]
