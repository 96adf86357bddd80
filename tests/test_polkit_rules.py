"""The rule for polkit: what it denies, as a JavaScript engine runs it with an object `polkit` of the test's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmmback.libvirt.installed_files import CONFIGS, filled
from vmmback.libvirt.places import RUN, SECRET

RULES = "00-vmmback.rules"
SECRET_UUID = "0d7e5a4f-8a1c-4b1e-9b0e-6a1f7e5d3c2b"
PLAIN_UUID = "11111111-2222-3333-4444-555555555555"

# What libvirt asks for: src/remote/remote_protocol.x. core-dump: virDomainCoreDump; hibernate: virDomainSave and
# virDomainManagedSave; migrate; snapshot: virDomainSnapshotCreateXML; mem-read: virDomainMemoryPeek.
EXPORTS = ("core-dump", "hibernate", "migrate", "snapshot", "mem-read")

ENGINE = """
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
const rules = [];
const spawned = [];
const polkit = {
  Result: {NO: "no", YES: "yes", NOT_HANDLED: null},
  addRule: (rule) => rules.push(rule),
  spawn: (argv) => {
    spawned.push(argv);
    if (input.fails.includes(argv[argv.length - 1])) throw new Error("Helper exited with non-zero exit status 1");
    return "";
  },
};
new Function("polkit", input.rules)(polkit);
const answers = input.asked.map(([id, attributes]) => {
  const answer = rules[0]({id, lookup: (key) => attributes[key]}, {user: "other"});
  return answer === undefined ? "nothing" : answer;
});
console.log(JSON.stringify({rules: rules.length, answers, spawned}));
"""


def answers(*asked: tuple[str, dict[str, str]], run: Path = RUN) -> dict[str, Any]:
    if not (node := shutil.which("node")):
        pytest.skip("no JavaScript engine (node); integration/test_libvirt_polkit.py asks polkit itself")
    rules = filled(RULES, RUN=str(run), SECRET=str(run / SECRET.name))
    given = {"rules": rules, "asked": asked, "fails": [f"{SECRET}/{SECRET_UUID}"]}
    done = subprocess.run([node, "-e", ENGINE], input=json.dumps(given), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def action(name: str, uuid: str = SECRET_UUID) -> tuple[str, dict[str, str]]:
    return f"org.libvirt.api.domain.{name}", {"connect_driver": "QEMU", "domain_name": "x", "domain_uuid": uuid}


def test_no_export_of_secret_ram_is_allowed() -> None:
    found = answers(*(action(name) for name in EXPORTS))
    assert found["answers"] == ["no"] * len(EXPORTS)
    assert found["rules"] == 1
    assert found["spawned"][0][0] == "/usr/bin/test"


def test_other_domains_and_other_actions_are_for_other_rules() -> None:
    others = [action(name, PLAIN_UUID) for name in EXPORTS]
    others += [action(name) for name in ("getattr", "start", "suspend", "screenshot", "write", "constructor")]
    others += [("org.libvirt.unix.manage", {}), ("toString", {})]
    found = answers(*others)
    assert found["answers"] == [None] * len(others)
    assert len(found["spawned"]) == len(EXPORTS)  # nothing is started for actions that export nothing


@pytest.fixture
def run() -> Iterator[Path]:
    """Where there is nothing yet, which another user may look into."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "run"


def is_exported(run: Path, uuid: str) -> bool:
    """Tell what the program says that the rule starts, by a user who is not root."""
    (argv,) = answers(action("core-dump", uuid), run=run)["spawned"]
    user = 65534 if os.geteuid() == 0 else None
    return subprocess.run(argv, user=user, group=user, extra_groups=[] if user else None, timeout=30).returncode == 0


def test_it_is_the_file_of_the_domain_that_counts(run: Path) -> None:
    assert is_exported(run, SECRET_UUID)  # no domain was ever announced
    run.mkdir(mode=0o755)
    assert is_exported(run, SECRET_UUID)  # the broker's records alone are there
    (run / SECRET.name).mkdir(mode=0o755)
    assert is_exported(run, SECRET_UUID)
    (run / SECRET.name / SECRET_UUID).touch()
    assert not is_exported(run, SECRET_UUID)
    assert is_exported(run, PLAIN_UUID)


@pytest.mark.parametrize("closed", ["", SECRET.name])
@pytest.mark.parametrize("mode", [0o000, 0o700, 0o744])
def test_where_it_cannot_look_nothing_is_exported(run: Path, closed: str, mode: int) -> None:
    if os.geteuid() and mode:
        pytest.skip("what is closed to others is open to its owner, who this is")
    (run / SECRET.name).mkdir(parents=True)
    (run / SECRET.name / SECRET_UUID).touch()
    (run / closed).chmod(mode)
    exported = [is_exported(run, uuid) for uuid in (SECRET_UUID, PLAIN_UUID)]
    (run / closed).chmod(0o755)
    assert exported == [False, False]


def test_where_the_folder_is_closed_that_would_have_the_files_nothing_is_exported(run: Path) -> None:
    run.mkdir()
    run.chmod(0o000)
    exported = is_exported(run, SECRET_UUID)
    run.chmod(0o755)
    assert not exported


@pytest.mark.parametrize(
    "uuid", ["", "../../../etc/passwd", f"{PLAIN_UUID}/..", f"{PLAIN_UUID}\n", PLAIN_UUID.upper() + "x"]
)
def test_a_domain_that_is_not_named_as_it_should_be_is_denied(uuid: str) -> None:
    found = answers(action("core-dump", uuid), ("org.libvirt.api.domain.core-dump", {}))
    assert found["answers"] == ["no", "no"]
    assert found["spawned"] == []


def test_the_rule_is_what_polkits_engines_understand() -> None:
    """polkit has Duktape, which knows ECMAScript 5.1: neither let nor const, neither arrows nor templates."""
    text = re.sub(r"//.*|\"[^\"]*\"", "", (CONFIGS / "libvirt" / RULES).read_text())
    assert not re.search(r"\b(let|const|class|of|async)\b|=>|`", text)
    for left, right in ("()", "[]", "{}"):
        assert text.count(left) == text.count(right)


def test_it_is_asked_before_all_others() -> None:
    assert Path(RULES).name < "10-"
