"""Every guest file in configs/ says what vmmback can do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmmback import config

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.toml")))
def test_a_guest_file_is_loaded_and_named_after_its_guest(name: str, tmp_path: Path) -> None:
    """Where `./dev` has not made the guest yet, too: its files are made up."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "build/guest").mkdir(parents=True)
    (tmp_path / "build/debian").mkdir()
    for made in ("guest/vmlinuz", "guest/initrd.img", "debian/initrd.img", "debian/root.key"):
        (tmp_path / "build" / made).write_bytes(b"made up")
        (tmp_path / "build" / made).chmod(0o600)
    (tmp_path / "build/debian/root.luks").write_bytes(b"LUKS\xba\xbe\0\1".ljust(512))
    guest = config.load(Path(shutil.copy(CONFIGS / name, tmp_path / "configs")))
    assert f"{guest.name}.toml" == name


def test_the_service_asks_for_its_shell_by_the_word_that_init_looks_for() -> None:
    assert " shell" in (CONFIGS / "demo-service.toml").read_text().split('cmdline = "')[1].split('"')[0]
    assert '*" shell "*)' in (CONFIGS / "guest/init").read_text()
