"""What a broker file may say: who may borrow how much secret RAM, and what is kept ready."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from vmmback.config.tables import Table
from vmmback.config.values import Size, Tables
from vmmback.errors import ConfigError
from vmmback.toml_errors import Grammar, explain, read, wrong_type

MIB = 1 << 20
_MOST_READY = 1024
_MOST_ID = (1 << 32) - 2  # the number after it is no id (chown(2))


def _id_of(kind: str, number: Callable[[str], int]) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value <= _MOST_ID:
                raise ValueError(f"{value} is no number of a {kind}; write one from 0 to {_MOST_ID}, or a name")
            return value
        if not isinstance(value, str):
            raise ValueError(wrong_type(value, f"the name or the number of a {kind}"))  # noqa: TRY004 (pydantic's)
        try:
            return number(value)
        except (KeyError, ValueError) as error:
            raise ValueError(f"there is no {kind} {value!a} on this host") from error

    return parse


def _whole_mib(size: int) -> int:
    if size % MIB:
        raise ValueError('is not a multiple of 1MiB; write it like "256MiB"')
    return size


def _address(value: object) -> object:
    wanted = 'a port of this host, like "127.0.0.1:9464", or the absolute path of a socket'
    if not isinstance(value, str):
        raise ValueError(wrong_type(value, wanted))  # noqa: TRY004 (pydantic's)
    if value.startswith("/"):
        return Path(value)
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        own, number = ip_address(host).is_loopback, int(port)
    except ValueError:
        own, number = False, 0
    if not own or not 0 < number < 1 << 16:
        raise ValueError(f"{value!a} is neither; write {wanted}")
    return host, number


Address = Path | tuple[str, int]
User = Annotated[int, BeforeValidator(_id_of("user", lambda name: pwd.getpwnam(name).pw_uid))]
Group = Annotated[int, BeforeValidator(_id_of("group", lambda name: grp.getgrnam(name).gr_gid))]
WholeSize = Annotated[Size, AfterValidator(_whole_mib)]


class Ready(Table):
    """Guest RAM of one size that is kept prefaulted."""

    size: WholeSize = Field(description="Its size, as in [memory] of the guests that are to get it.", examples=["1GiB"])
    count: Annotated[int, Field(ge=1, le=_MOST_READY)] = Field(
        default=1, description="So many of them are kept ready.", examples=[2]
    )


class Allow(Table):
    """What a user, or a process of a group, may borrow; of several rules that fit the first one counts."""

    user: User | None = Field(default=None, description="A user, by name or number.", examples=["alice"])
    group: Group | None = Field(
        default=None, description="A group, by name or number: that of the calling process.", examples=["vmm"]
    )
    total: WholeSize = Field(description="At most so much at a time, all leases of a user together.", examples=["4GiB"])
    count: Annotated[int, Field(ge=1)] = Field(
        default=16, description="At most so many leases of a user at a time.", examples=[4]
    )
    per_minute: Annotated[int, Field(ge=1)] = Field(
        default=60, alias="per-minute", description="At most so many new leases of a user in a minute.", examples=[10]
    )

    @model_validator(mode="after")
    def _names_somebody(self) -> Self:
        if self.user is None and self.group is None:
            raise ValueError("names nobody; write user or group")
        return self


class BrokerConfig(Table):
    """A broker file. Root may always borrow; others where a rule says so."""

    pool: Annotated[tuple[Ready, ...], Tables] = Field(default=(), description="What is kept ready, one for each size.")
    allow: Annotated[tuple[Allow, ...], Tables] = Field(default=(), description="Who may borrow, one for each rule.")
    metrics: Annotated[Address | None, BeforeValidator(_address)] = Field(
        default=None,
        description="Where figures are served as OpenMetrics, at /metrics: a port of this host, or a socket's path.",
        examples=["127.0.0.1:9464"],
    )
    fill_rate: WholeSize = Field(
        default=512 * MIB, alias="fill-rate", description="The pool is filled by at most so much a second.",
        examples=["512MiB"],
    )  # fmt: skip

    @model_validator(mode="after")
    def _each_size_once(self) -> Self:
        sizes = [ready.size for ready in self.pool]
        if twice := [size for size in sizes if sizes.count(size) > 1]:
            raise ValueError(f"there are two [[pool]] of {twice[0] // MIB}MiB; write one, with their counts added up")
        return self


_TABLES: dict[str, type[Table]] = {"": BrokerConfig, "pool": Ready, "allow": Allow}
_GRAMMAR = Grammar(
    tables={
        name: {field.alias or key: field for key, field in table.model_fields.items()}
        for name, table in _TABLES.items()
    },
    arrays={"pool", "allow"},
)


_HINT = "docs/BROKER.md describes every table and key"


def load(path: Path) -> BrokerConfig:
    """Return what a broker file says. Raises ConfigError with every error of the file, one a line."""
    text, tables = read(path)
    try:
        return BrokerConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(explain(path, text, error, _GRAMMAR), _HINT) from error
