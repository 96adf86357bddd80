"""What QEMU's arguments say of a domain's name and memory."""

from __future__ import annotations

import json

import pytest

from vmmback.errors import ConfigError
from vmmback.libvirt.ram_arguments import blocks_of, name_of


def memfd(**more: object) -> str:
    return json.dumps({"qom-type": "memory-backend-memfd", "id": "pc.ram", "size": 1 << 20} | more)


def file(**more: object) -> str:
    made = {"qom-type": "memory-backend-file", "id": "ram-node0", "mem-path": "/ram/1-a/ram-node0", "size": 1 << 20}
    return json.dumps(made | more)


def test_the_domains_name_and_memory_are_in_qemus_arguments() -> None:
    argv = ["-name", "guest=a,,b,debug-threads=on"]
    argv += ["-object", memfd(), "-object", file(share=True), "-object", "secret"]
    assert name_of(argv) == "a,b"
    assert blocks_of(argv) == [
        ("memfd_create", "memory-backend-memfd", 1 << 20),
        ("open", "/ram/1-a/ram-node0", 1 << 20),
    ]


@pytest.mark.parametrize(
    "value",
    [
        file(),
        file(share=False),
        memfd(hugetlb=True),
        json.dumps({"qom-type": "memory-backend-ram", "id": "pc.ram", "size": 1}),
        json.dumps({"qom-type": "memory-backend-epc", "id": "epc0", "size": 1}),
        "memory-backend-memfd,id=pc.ram,size=1",
        "[]memory-backend-",
        '["memory-backend-"]',
        '"memory-backend-"',
        "[" * 10_000 + "memory-backend-",
        '{"qom-type": "memory-backend-memfd"}',
        memfd(size=[]),
        memfd(size="5"),
        memfd(size=5.5),
        memfd(size=True),
        memfd(size=-5),
        memfd(size=0),
        '{"qom-type": "memory-backend-memfd", "size": 1e999}',
        '{"qom-type": "memory-backend-memfd", "size": Infinity}',
    ],
    ids=range(19),
)
def test_memory_that_cannot_be_secret_is_refused(value: str) -> None:
    with pytest.raises(ConfigError):
        blocks_of(["-object", value])


def test_arguments_without_a_name_are_refused() -> None:
    with pytest.raises(ConfigError):
        name_of(["-name", "debug-threads=on"])
