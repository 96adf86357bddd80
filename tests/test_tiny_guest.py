import struct

import pytest

from vmmback import tiny_guest
from vmmback.tiny_guest import DEFAULT_HALVES, READY, canary, filled_ranges, new_halves, rom


def test_a_rom_is_64_kib_and_the_reset_vector_jumps_into_it() -> None:
    image = rom()
    assert len(image) == 65536
    assert image[0xFFF0] == 0xE9  # jmp rel16
    (distance,) = struct.unpack_from("<h", image, 0xFFF1)
    target = 0xFFF3 + distance
    assert 0 <= target < 0xFFF0
    assert image[target] == 0xFA  # cli


@pytest.mark.parametrize("halves", [DEFAULT_HALVES, new_halves()], ids=["default", "new"])
@pytest.mark.parametrize("fill", [True, False])
def test_the_rom_holds_both_halves_but_no_piece_of_the_canary(halves: tiny_guest.Halves, fill: bool) -> None:
    image = rom(halves, fill=fill)
    secret = canary(halves)
    assert len(secret) == 64
    assert 4096 % len(secret) == 0
    assert halves[0] + halves[1] in image
    for start in range(0, 64, 8):
        assert secret[start : start + 8] not in image


def test_the_canary_is_the_xor_of_the_halves() -> None:
    assert canary((b"\x0f" * 64, b"\xff" * 64)) == b"\xf0" * 64


def test_new_halves_are_new_each_time_and_the_default_is_fixed() -> None:
    assert new_halves() != new_halves()
    assert rom() == rom(DEFAULT_HALVES)
    assert rom() != rom(new_halves())


def test_all_but_code_and_data_is_zero_and_ready_is_said_once() -> None:
    for image in (rom(), rom(fill_bytes=64 << 20), rom(fill=False)):
        assert not any(image[:0xFC00])
        assert not any(image[0xFFF3:])
        assert image.count(READY + b"\0") == 1


@pytest.mark.parametrize("halves", [(b"", b""), (bytes(64), bytes(63)), (bytes(128), bytes(64))])
def test_halves_of_a_wrong_length_are_refused(halves: tiny_guest.Halves) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        rom(halves)


@pytest.mark.parametrize("fill_bytes", [0, 1 << 20, (16 << 20) + 1, 3 << 30])
def test_a_fill_that_the_guest_cannot_do_is_refused(fill_bytes: int) -> None:
    with pytest.raises(ValueError, match="fill_bytes"):
        rom(fill_bytes=fill_bytes)


def test_a_comment_in_the_listing_names_each_instruction() -> None:
    listing = tiny_guest.ENTER + tiny_guest._FILL_LOW + tiny_guest._FILL + tiny_guest._SAY_READY
    assert all(comment for _label, _code, comment in listing)


def test_filled_ranges_leave_out_video_memory_and_rom() -> None:
    assert filled_ranges(64 << 20) == [(0, 640 << 10), (1 << 20, 64 << 20)]
