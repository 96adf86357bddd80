"""Broker files: what they say, and each error with its place and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback.broker.config import MIB, load
from vmmback.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_the_example_says_what_its_comments_say() -> None:
    config = load(ROOT / "configs/broker/broker.toml")
    assert [(ready.size // MIB, ready.count) for ready in config.pool] == [(256, 2), (1024, 1)]
    assert config.fill_rate == 512 * MIB
    (rule,) = config.allow
    assert (rule.user, rule.total, rule.count, rule.per_minute) == (None, 1024 * MIB, 4, 10)
    assert rule.group is not None


def test_an_empty_file_lets_root_alone_borrow_what_is_never_ready(tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text("")
    assert load(tmp_path / "broker.toml").pool == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[pool]]\n", "pool[0].size"),
        ('[[pool]]\nsize = "1536KiB"\n', "is not a multiple of 1MiB"),
        ('[[pool]]\nsize = "1GiB"\ncuont = 2\n', '"count"'),
        ('[[pool]]\nsize = "1GiB"\ncount = 0\n', "pool[0].count"),
        ('[[pool]]\nsize = "1GiB"\n[[pool]]\nsize = "1024MiB"\n', "there are two [[pool]] of 1024MiB"),
        ('[[allow]]\ntotal = "1GiB"\n', "names nobody; write user or group"),
        ('[[allow]]\nuser = "nobody-of-that-name"\ntotal = "1GiB"\n', "there is no user 'nobody-of-that-name'"),
        ('[[allow]]\ngroup = -1\ntotal = "1GiB"\n', "-1 is no number of a group"),
        (f'[[allow]]\nuser = 0x{"F" * 5000}\ntotal = "1GiB"\n', "a huge number is no number of a user"),
        ('metrics = "/run/a\\u0000b"\n', "is not a path; write a port of this host"),
        ('[[allow]]\nuser = 1.5\ntotal = "1GiB"\n', "the name or the number of a user"),
        ("[allow]\nuser = 1\n", "[[allow]]"),
        ('fill-rate = "fast"\n', "fill-rate"),
        ('metrics = "0.0.0.0:9464"\n', "write a port of this host"),
        ('metrics = "127.0.0.1:0"\n', "write a port of this host"),
        ("metrics = 9464\n", "a port of this host"),
        ("= 1\n", "broker.toml:1"),
    ],
)
def test_each_error_says_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert said in caught.value.message
    assert str(file) in caught.value.message
