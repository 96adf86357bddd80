"""Where a key stands in a TOML file, and how a place in it is written."""

from __future__ import annotations

from vmmback.toml_errors import key_lines, key_text


def test_lines_of_tables_that_are_there_several_times() -> None:
    lines = key_lines("[[a]]\nx = 1\n[[a]]\nx = 2\n[b]\ny = 3\n[[a]]\n")
    assert lines["a",] == 1
    assert (lines["a", "0"], lines["a", "0", "x"]) == (1, 2)
    assert (lines["a", "1"], lines["a", "1", "x"]) == (3, 4)
    assert (lines["b", "y"], lines["a", "2"]) == (6, 7)


def test_a_number_in_a_key_path_is_shown_as_an_index() -> None:
    assert key_text(("disk", "1", "path")) == "disk[1].path"
    assert key_text(("disk", "10")) == "disk[10]"
