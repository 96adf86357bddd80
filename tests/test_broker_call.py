"""What hook and emulator say to the broker: JSON without the module json."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.libvirt.broker_call import Failed, decoded, encoded
from vmmback.libvirt.emulator import blocks_of, name_of

values = st.recursive(
    st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(values)
def test_it_is_what_json_would_say(value: object) -> None:
    assert json.loads(encoded(value)) == value
    assert decoded(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["", "{", "nul", "{} ", "{}{}", " {}", '{"a": }', "[1,]"])
def test_what_is_no_json_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        decoded(text)


@pytest.mark.parametrize("module", ["hook", "emulator"])
def test_what_takes_long_to_import_is_not(module: str) -> None:
    """A domain's start waits for it."""
    slow = "{'re', 'typing', 'json', 'socket', 'array'}"
    program = f"import sys; import vmmback.libvirt.{module}; print(sorted({slow} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def memfd(**more: object) -> str:
    return json.dumps({"qom-type": "memory-backend-memfd", "id": "pc.ram", "size": 1 << 20} | more)


def file(**more: object) -> str:
    made = {"qom-type": "memory-backend-file", "id": "ram-node0", "mem-path": "/ram/1-a/ram-node0", "size": 1 << 20}
    return json.dumps(made | more)


def test_the_domains_name_and_memory_are_in_qemus_arguments() -> None:
    argv = [
        "-name",
        "guest=a,,b,debug-threads=on",
        "-object",
        memfd(),
        "-object",
        file(share=True),
        "-object",
        "secret",
    ]
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
        '{"qom-type": "memory-backend-memfd"}',
    ],
)
def test_memory_that_cannot_be_secret_is_refused(value: str) -> None:
    with pytest.raises(Failed):
        blocks_of(["-object", value])


def test_arguments_without_a_name_are_refused() -> None:
    with pytest.raises(Failed):
        name_of(["-name", "debug-threads=on"])
