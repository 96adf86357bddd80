"""libvirt, asked for its domains: the only module that imports its Python binding, an optional dependency."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from vmmback.errors import HostUnfit, NoSuchGuest, UsageError, VmmbackError
from vmmback.libvirt.domain_xml import mentions
from vmmback.toml_errors import quote

if TYPE_CHECKING:
    import libvirt

DEFAULT_URI = "qemu:///system"

# In the order of virDomainEventType, and of virDomainState in the words of virsh.
_LIFECYCLE = (
    "defined", "undefined", "started", "suspended", "resumed", "stopped", "shutdown", "pmsuspended", "crashed"
)  # fmt: skip
_STATES = ("no state", "running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended")

# How soon Ctrl-C is noticed, while nothing happens: libvirt's event loop waits in C.
_AWAKE_MS = 200
_KEEPALIVE_EVERY_S, _KEEPALIVE_TIMES = 5, 3


class Domain(NamedTuple):
    """A domain as libvirt has it defined; one that is not is as it runs."""

    name: str
    uuid: str
    state: str
    is_active: bool
    is_persistent: bool
    is_saved: bool
    """Whether it will start from what `virsh managedsave` has written, and from the XML in there."""
    xml: str
    """With the secrets in it, as it is to be given back."""

    @property
    def may_ask(self) -> bool:
        """Whether its XML mentions us."""
        return mentions(self.xml)


class Event(NamedTuple):
    """Something that happened to a domain."""

    domain: str
    uuid: str
    event: str
    """As libvirt, or as QEMU, calls it."""
    detail: str
    source: str
    """Who says so, `libvirt` or `qemu`."""
    seconds: float
    """When, since 1970, as far as that is known; else 0."""


class Libvirt:
    """A connection to libvirt. Use it as a context manager; it raises HostUnfit where none can be had.

    What libvirt says itself is raised, not printed.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or os.environ.get("LIBVIRT_DEFAULT_URI") or DEFAULT_URI

    def __enter__(self) -> Libvirt:
        self._api = _binding()
        self._api.registerErrorHandler(lambda *_: None, None)
        try:
            self._connection = self._api.open(self.uri)
            kind = self._connection.getType()
            self.uri = self._connection.getURI()
        except self._api.libvirtError as error:
            raise HostUnfit(
                f"libvirt cannot be reached at {quote(self.uri)}: {error.get_error_message()}",
                "start it (systemctl start libvirtd), or name another: --connect URI",
            ) from error
        if kind != "QEMU" or urlsplit(self.uri).path != "/system":
            self._connection.close()
            raise UsageError(
                f"{quote(self.uri)} is not the QEMU of a whole system; hooks are called for nobody else's domains",
                f"connect to one: --connect {DEFAULT_URI}",
            )
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(self._api.libvirtError):  # it is gone already
            self._connection.close()

    @property
    def is_here(self) -> bool:
        """Whether its domains run on this host, and files that they name are this host's."""
        return not urlsplit(self.uri).hostname

    def domains(self) -> list[Domain]:
        """Return all domains, by their names. Raises HostUnfit."""
        with self._errors("its domains"):
            found = []
            for domain in self._connection.listAllDomains():
                with suppress(NoSuchGuest):  # it ended meanwhile
                    found.append(self._read(domain))
            return sorted(found)

    def domain(self, name: str) -> Domain:
        """Return a domain by its name or UUID. Raises NoSuchGuest, HostUnfit."""
        return self._read(self._found(name))

    def running_xml(self, name: str) -> str:
        """Return the XML by which a domain runs, or is defined where it does not. Raises NoSuchGuest, HostUnfit."""
        domain = self._found(name)
        with self._errors(f"domain {quote(name)}"):
            return str(domain.XMLDesc(0))

    def define(self, domain: Domain, xml: str) -> None:
        """Define a domain anew; as it runs, it stays as it is. Raises UsageError, HostUnfit."""
        if not domain.is_persistent:
            raise UsageError(
                f"domain {quote(domain.name)} is transient: libvirt forgets it when it ends",
                "define it first: virsh dumpxml, virsh define",
            )
        if domain.is_saved:
            raise UsageError(
                f"domain {quote(domain.name)} has been saved with its memory, and would start from that as it was",
                "start it and shut it down, or virsh managedsave-remove, then try again",
            )
        with self._errors(f"domain {quote(domain.name)}"):
            self._connection.defineXML(xml)

    def hmp(self, name: str) -> Callable[[str], Awaitable[str]]:
        """Return what asks the monitor of a domain's QEMU in the words of people. Raises NoSuchGuest, HostUnfit.

        libvirt marks the domain as tainted ("custom-monitor"), and says so in its log.
        """
        import libvirt_qemu

        domain = self._found(name)

        async def ask(command: str) -> str:
            with self._errors(f"domain {quote(name)}"):
                answer: str = await asyncio.to_thread(
                    libvirt_qemu.qemuMonitorCommand, domain, command,
                    libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP,
                )  # fmt: skip
            return answer

        return ask

    def watch(self, tell: Callable[[Event], None], *, everything: bool) -> None:
        """Tell what happens to domains that ask for secret RAM, or to all, until the connection ends: HostUnfit.

        It returns by no other way than an exception, also by that of a signal.
        """
        import libvirt_qemu

        ended: list[str] = []
        asking = {domain.uuid for domain in self.domains() if domain.may_ask}

        def on(domain: libvirt.virDomain, *what: Any) -> None:
            uuid = domain.UUIDString()
            with suppress(self._api.libvirtError):  # it is gone, and what it was is known
                (asking.add if mentions(domain.XMLDesc(0)) else asking.discard)(uuid)
            if everything or uuid in asking:
                tell(Event(domain.name(), uuid, *what))

        def lifecycle(_: Any, domain: libvirt.virDomain, event: int, detail: int, __: Any) -> None:
            on(domain, *self._lifecycle(event, detail), "libvirt", 0.0)

        def qmp(_: Any, domain: libvirt.virDomain, event: str, seconds: int, micros: int, data: Any, __: Any) -> None:
            on(domain, event, data or "", "qemu", seconds + micros / 1e6)

        connection = self._connection
        with self._errors("its events"):
            connection.setKeepAlive(_KEEPALIVE_EVERY_S, _KEEPALIVE_TIMES)
            connection.registerCloseCallback(lambda *_: ended.append("it closed the connection"), None)
            first = connection.domainEventRegisterAny(None, self._api.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)
            second = libvirt_qemu.qemuMonitorEventRegister(connection, None, None, qmp, None)
            timer = self._api.virEventAddTimeout(_AWAKE_MS, lambda *_: None, None)
            try:
                while not ended:
                    self._api.virEventRunDefaultImpl()
            finally:
                self._api.virEventRemoveTimeout(timer)
                with suppress(self._api.libvirtError):  # the connection is gone
                    connection.domainEventDeregisterAny(first)
                    libvirt_qemu.qemuMonitorEventDeregister(connection, second)
                    connection.unregisterCloseCallback()
        raise HostUnfit(f"libvirt at {quote(self.uri)} ended: {ended[0]}", "watch again when it runs")

    def _lifecycle(self, event: int, detail: int) -> tuple[str, str]:
        """Return libvirt's words for a lifecycle event, which are in the names of its constants."""
        name = _word(_LIFECYCLE, event)
        prefix = f"VIR_DOMAIN_EVENT_{name.upper()}_"
        details = [word for word, value in vars(self._api).items() if word.startswith(prefix) and value == detail]
        return name, details[0].removeprefix(prefix).lower() if details else str(detail)

    def _found(self, name: str) -> libvirt.virDomain:
        for look in (self._connection.lookupByName, self._connection.lookupByUUIDString):
            with suppress(self._api.libvirtError):
                return look(name)
        with self._errors("its domains"):
            known = sorted(domain.name() for domain in self._connection.listAllDomains())
        raise NoSuchGuest(
            f"libvirt has no domain {quote(name)}", f"there are: {', '.join(map(quote, known)) or 'none'}"
        )

    def _read(self, domain: libvirt.virDomain) -> Domain:
        flags = self._api.VIR_DOMAIN_XML_SECURE | self._api.VIR_DOMAIN_XML_INACTIVE
        with self._errors(f"domain {quote(domain.name())}"):
            state = _word(_STATES, domain.state()[0])
            return Domain(
                domain.name(), domain.UUIDString(), state, bool(domain.isActive()), bool(domain.isPersistent()),
                bool(domain.hasManagedSaveImage()),
                domain.XMLDesc(flags),
            )  # fmt: skip

    @contextmanager
    def _errors(self, about: str) -> Iterator[None]:
        """Turn libvirt's errors into ours."""
        try:
            yield
        except self._api.libvirtError as error:
            said = f"{about}: libvirt says: {error.get_error_message()}"
            if error.get_error_code() == self._api.VIR_ERR_NO_DOMAIN:
                raise NoSuchGuest(said, "see which there are: virsh list --all") from error
            kind: type[VmmbackError] = HostUnfit
            if error.get_error_code() in {self._api.VIR_ERR_XML_ERROR, self._api.VIR_ERR_CONFIG_UNSUPPORTED}:
                kind = UsageError
            raise kind(said, f"its log may say more ({quote(self.uri)})") from error


def _word(words: tuple[str, ...], number: int) -> str:
    return words[number] if number < len(words) else str(number)


def _binding() -> Any:
    """Return libvirt's Python binding, with its event loop ready. Raises HostUnfit."""
    try:
        import libvirt
    except ImportError as error:
        raise HostUnfit(
            f"libvirt's Python binding is missing: {error}", "install it: pip install 'vmmback[libvirt]'"
        ) from error
    libvirt.virEventRegisterDefaultImpl()  # before the connection is opened
    return libvirt
