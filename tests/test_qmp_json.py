"""QMP's input: what is a message, what is an error, and where the next one begins."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmback.qmp_json import MAX_DEPTH, MAX_MESSAGE_BYTES, Malformed, Stream, parse


def read(*packets: bytes) -> list[Any]:
    """Return what a stream yields: values, and the text of each error."""
    stream = Stream()
    return [
        f"! {value}" if isinstance(value, Malformed) else value for packet in packets for value in stream.feed(packet)
    ]


def errors(found: list[Any]) -> int:
    return sum(isinstance(value, str) and value.startswith("! ") for value in found)


def test_messages_need_nothing_between_them() -> None:
    assert read(b'{"a":1}{"b":[{}]} \r\n\t{"c":"}{"}[]') == [{"a": 1}, {"b": [{}]}, {"c": "}{"}, []]


def test_a_message_may_come_byte_by_byte() -> None:
    text = '{"a": "\\"}\\\\", "ü": [1, {"b": null}]}{"c": "\\u00fc"}\n'.encode()
    assert read(*(bytes([byte]) for byte in text)) == [{"a": '"}\\', "ü": [1, {"b": None}]}, {"c": "ü"}]


def test_lines_may_break_anywhere_between_tokens() -> None:
    assert read(b'{\n"a":\r\n\t1\n}\n') == [{"a": 1}]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a":}', "JSON parse error, Expecting value"),
        (b'{"a":1,"a":1}', "JSON parse error, duplicate key"),
        (b'{"b":[{"a":1,"\\u0061":2}]}', "JSON parse error, duplicate key"),
        (b"{]", "JSON parse error, "),
        (b"{'a':1}", "JSON parse error, Expecting property name"),
        (b'{"a":NaN}', "JSON parse error, invalid keyword 'NaN'"),
        (b'{"a":-Infinity}', "JSON parse error, invalid keyword '-Infinity'"),
        (b'{"a":1e999}', "JSON parse error, a number is too large"),
        (b'{"a":' + b"9" * 5000 + b"}", "JSON parse error, a number is too large"),
        (b'{"a":"\\ud800"}', "JSON parse error, it has text that is not valid Unicode"),
        (b'{"a":["\\uffff"]}', "JSON parse error, it has text that is not valid Unicode"),
        ('{"a":"\ufdd0"}'.encode(), "JSON parse error, it has text that is not valid Unicode"),
        (b'{"\\udbff\\udfff":1}', "JSON parse error, it has text that is not valid Unicode"),
        (b'{"a":"\\x"}', "JSON parse error, Invalid \\escape"),
        (b'{"a":"\x80"}', "JSON parse error, it is not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "JSON parse error, it is not UTF-8"),
    ],
)
def test_a_message_that_ends_but_is_wrong_costs_itself_alone(data: bytes, says: str) -> None:
    found = read(data + b'{"next":1}')
    assert found[0].startswith(f"! {says}")
    assert found[1:] == [{"next": 1}]
    assert read(*(bytes([byte]) for byte in data + b'{"next":1}')) == found


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a":"\0"}', "JSON parse error, a message cannot hold the byte 0x00"),
        (b'{"a":\x1b}', "JSON parse error, a message cannot hold the byte 0x1b"),
        (b'{"a":"\xc0\x80"}', "JSON parse error, a message cannot hold the byte 0xc0"),
        (b"[" * (MAX_DEPTH + 1), "JSON nesting depth limit exceeded"),
        (b"[" * 50_000, "JSON nesting depth limit exceeded"),
        (b'{"a":"' + b"x" * (3 * MAX_MESSAGE_BYTES), "JSON message size limit exceeded"),
        (b'{"a":' + b" " * MAX_MESSAGE_BYTES + b"1}", "JSON message size limit exceeded"),
    ],
)
def test_a_message_that_cannot_end_lasts_up_to_the_end_of_its_line(data: bytes, says: str) -> None:
    for packets in ([data + b'{"skipped":1}\n{"next":1}'], [data, b'{"skipped":1}', b"\n", b'{"next":1}']):
        first, *rest = read(*packets)
        assert first.startswith(f"! {says}")
        assert rest == [{"next": 1}]


@pytest.mark.parametrize("data", [b'{"a":"b\n', b'{"a":"b\\\n'])
def test_a_line_that_ends_in_a_string_ends_the_message(data: bytes) -> None:
    first, *rest = read(data + b'{"next":1}')
    assert first == "! JSON parse error, a message cannot hold the byte 0x0a"
    assert rest == [{"next": 1}]


@pytest.mark.parametrize("stray", [b"hello", b"'", b'"text"', b"}", b"]}", b"null", b"1", b"\0\0", b"\x80", b","])
def test_a_stray_text_is_one_error_up_to_the_next_brace_or_line(stray: bytes) -> None:
    found = read(stray + b'{"a":1}' + stray + b"\n" + stray + b" " + stray + b'\n{"b":1}')
    assert [value for value in found if isinstance(value, dict)] == [{"a": 1}, {"b": 1}]
    assert errors(found) == 3
    assert errors(read(*(bytes([byte]) for byte in stray))) == 1


def test_ff_ends_what_was_begun() -> None:
    found = read(b'{"a":["b', b'\xff{"c":1}\xff', b'{"d":1}')
    assert [value for value in found if isinstance(value, dict)] == [{"c": 1}, {"d": 1}]
    assert errors(found) == 2


def test_numbers_are_what_qemu_makes_of_them() -> None:
    numbers = [0, -1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 1 << 64, -(1 << 63) - 1, 10**300]
    (found,) = read(json.dumps(numbers).encode())
    assert found == [*numbers[:5], float(1 << 64), -float(1 << 63), 1e300]
    assert [type(number) for number in found] == [int] * 5 + [float] * 3


def test_the_deepest_and_the_longest_message() -> None:
    assert errors(read(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)) == 0
    longest = b'{"a":"' + b"x" * (MAX_MESSAGE_BYTES - 8) + b'"}'
    assert read(longest) == [json.loads(longest)]


def test_memory_is_bounded() -> None:
    stream = Stream()
    for packet in (b'{"a":"' + b"x" * 1000, b"x" * 65536, b"hello" * 1000, b"[[" * 20, b"\\" * 70000):
        for _ in range(200):
            list(stream.feed(packet))
            assert len(stream._buffer) <= MAX_MESSAGE_BYTES


# Properties

no_character = [plane + last for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[*map(chr, no_character)]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts.filter(lambda text: not any("\ufdd0" <= character <= "\ufdef" for character in text)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=10,
)
messages = st.dictionaries(st.text("abc", max_size=3), values, max_size=4)
quick = settings(max_examples=150, deadline=None, database=None)


@quick
@given(sent=st.lists(st.tuples(messages, st.booleans(), st.sampled_from(["", " ", "\n", "\r\n"]))), seed=st.integers())
def test_any_messages_cut_anywhere(sent: list[tuple[dict[str, Any], bool, str]], seed: int) -> None:
    data = "".join(json.dumps(message, ensure_ascii=ascii_only) + end for message, ascii_only, end in sent).encode()
    dice = random.Random(seed)
    cuts = sorted(dice.randint(0, len(data)) for _ in range(dice.randint(0, 9)))
    packets = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert read(*packets) == [message for message, _, _ in sent]


@quick
@given(data=st.binary(max_size=300) | st.text('{}[]"\\:,1\n\xff ').map(lambda text: text.encode("latin-1")))
def test_any_bytes_then_a_line_then_a_message(data: bytes) -> None:
    """Whatever came before, a client gets its footing back: 0xff, a line end, and the next message is heard."""
    assert read(data, b'\xff\n{"a":1}')[-1] == {"a": 1}


@quick
@given(data=st.binary(max_size=300) | st.text('{}[]"\\:,1\n\xff ').map(lambda text: text.encode("latin-1")))
def test_how_it_is_cut_makes_no_difference(data: bytes) -> None:
    whole, bytewise = read(data), read(*(bytes([byte]) for byte in data))
    assert [value for value in whole if not isinstance(value, str)] == [
        value for value in bytewise if not isinstance(value, str)
    ]
    assert errors(whole) == errors(bytewise)


@quick
@given(value=values)
def test_what_is_parsed_can_be_written_anew(value: object) -> None:
    assert parse(json.dumps(parse(json.dumps({"a": value}).encode())).encode()) == {"a": value}
