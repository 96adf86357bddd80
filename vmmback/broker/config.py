"""What a broker file may say: who may borrow how much secret RAM, and what is kept ready."""

import grp
import pwd
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from vmmback.config.values import Size
from vmmback.errors import ConfigError
from vmmback.toml_errors import Problem, a_string, explain, quote, read, shown
from vmmback.toml_tables import Checked, Parsed, Table, WrongTables

MIB = 1 << 20
_MOST_READY = 1024
_MOST_ID = (1 << 32) - 2  # the number after it is no id (chown(2))


def _id_of(kind: str, number: Callable[[str], int]) -> Callable[[object, Path | None], int]:
    def parse(value: object, _: Path | None) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value <= _MOST_ID:
                raise ValueError(f"{shown(value)} is no number of a {kind}; write one from 0 to {_MOST_ID}, or a name")
            return value
        name = a_string(value, f"the name or the number of a {kind}")
        try:
            return number(name)
        except (KeyError, ValueError) as error:
            raise ValueError(f"there is no {kind} {name!a} on this host") from error

    return parse


def _whole_mib(size: int) -> int:
    if size % MIB:
        raise ValueError('is not a multiple of 1MiB; write it like "256MiB"')
    return size


def _address(written: object, _: Path | None) -> Path | tuple[str, int]:
    wanted = 'a port of this host, like "127.0.0.1:9464", or the absolute path of a socket'
    value = a_string(written, wanted)
    if "\0" in value:
        raise ValueError(f"{quote(value)} is not a path; write {wanted}")
    if value.startswith("/"):
        return Path(value)
    host, _colon, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        own, number = ip_address(host).is_loopback, int(port)
    except ValueError:
        own, number = False, 0
    if not own or not 0 < number < 1 << 16:
        raise ValueError(f"{value!a} is neither; write {wanted}")
    return host, number


Address = Path | tuple[str, int]
User = Annotated[int, Parsed(_id_of("user", lambda name: pwd.getpwnam(name).pw_uid))]
Group = Annotated[int, Parsed(_id_of("group", lambda name: grp.getgrnam(name).gr_gid))]
WholeSize = Annotated[Size, Checked(_whole_mib)]


class Ready(Table, frozen=True):
    """Guest RAM of one size that is kept prefaulted."""

    size: Annotated[
        WholeSize, Meta(description="Its size, as in [memory] of the guests that are to get it.", examples=["1GiB"])
    ]
    count: Annotated[int, Meta(ge=1, le=_MOST_READY, description="So many of them are kept ready.", examples=[2])] = 1


class Allow(Table, frozen=True, kw_only=True):
    """What a user, or a process of a group, may borrow; of several rules that fit the first one counts."""

    user: Annotated[User | None, Meta(description="A user, by name or number.", examples=["alice"])] = None
    group: Annotated[
        Group | None, Meta(description="A group, by name or number: that of the calling process.", examples=["vmm"])
    ] = None
    total: Annotated[
        WholeSize, Meta(description="At most so much at a time, all leases of a user together.", examples=["4GiB"])
    ]
    count: Annotated[int, Meta(ge=1, description="At most so many leases of a user at a time.", examples=[4])] = 16
    per_minute: Annotated[
        int, Meta(ge=1, description="At most so many new leases of a user in a minute.", examples=[10])
    ] = 60

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell whether the rule is for nobody."""
        if not written.keys() & {"user", "group"}:
            yield (), "names nobody; write user or group"


class BrokerConfig(Table, frozen=True):
    """A broker file. Root may always borrow; others where a rule says so."""

    pool: Annotated[tuple[Ready, ...], Meta(description="What is kept ready, one for each size.")] = ()
    allow: Annotated[tuple[Allow, ...], Meta(description="Who may borrow, one for each rule.")] = ()
    metrics: Annotated[
        Address | None,
        Parsed(_address),
        Meta(
            description="Where figures are served as OpenMetrics, at /metrics: a port of this host, or a socket's "
            "path.",
            examples=["127.0.0.1:9464"],
        ),
    ] = None
    fill_rate: Annotated[
        WholeSize, Meta(description="The pool is filled by at most so much a second.", examples=["512MiB"])
    ] = 512 * MIB

    def problems(self, folder: Path | None) -> Iterator[Problem]:
        """Tell which size is kept ready twice."""
        sizes = [ready.size for ready in self.pool]
        if twice := [size for size in sizes if sizes.count(size) > 1]:
            problem = f"there are two [[pool]] of {twice[0] // MIB}MiB; write one, with their counts added up"
            yield ("pool",), problem


def load(path: Path) -> BrokerConfig:
    """Return what a broker file says. Raises ConfigError with every error of the file, one a line."""
    text, tables = read(path)
    try:
        return BrokerConfig.of(tables)
    except WrongTables as error:
        hint = "docs/BROKER.md describes every table and key"
        raise ConfigError(explain(path, text, error.problems), hint) from error
