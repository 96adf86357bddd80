"""Making a domain's XML ask for secret RAM, and undoing it: text in, text out.

The text is changed in place, so all that is not ours stays byte for byte as it was, and a user who looks at the
difference sees what `enable` does and nothing else. What it replaces is copied into our element of <metadata>, what it
adds is named there; `disabled` puts back the one and removes the other, and leaves what was changed since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers.expat import ExpatError, ParserCreate

from vmmback.errors import ConfigError
from vmmback.libvirt.domain_xml import NAMESPACE, OnExposed, Source, name_of, parse, policy_of, wrong_domain
from vmmback.libvirt.own_user import GROUP, own_label
from vmmback.toml_errors import quote

_ASKS, _BEFORE = f"{NAMESPACE} secret-ram", f"{NAMESPACE} before"
_TAG = re.compile(rb"""<[^"'>]*(?:"[^"]*"[^"'>]*|'[^']*'[^"'>]*)*>""")
# As libvirt writes them (src/conf/domain_conf.c, virDomainDefFormatInternalSetRootName, virDomainMemorybackingFormat).
_ABOVE_METADATA = ("name", "uuid", "genid", "title", "description")
_ABOVE_BACKING = (*_ABOVE_METADATA, "metadata", "maxMemory", "memory", "currentMemory", "blkiotune", "memtune")
_ABOVE_LABEL = ("devices", "seclabel")
_IN_BACKING = ("hugepages", "nosharepages", "locked", "source", "access", "allocation", "discard")


@dataclass
class _Node:
    """An element, and where its text is: its start tag, what is in it, its end tag."""

    tag: str
    attributes: dict[str, str]
    start: int
    opened: int
    closing: int = 0
    end: int = 0
    children: list[_Node] = field(default_factory=list)

    def find(self, *path: str) -> _Node | None:
        """Return the first element of that path below this one."""
        for child in self.children:
            if child.tag == path[0]:
                return child.find(*path[1:]) if path[1:] else child
        return None

    @property
    def childless(self) -> bool:
        """Whether it is written as one tag, <like-this/>."""
        return self.opened == self.end


def _parsed(data: bytes) -> _Node:
    """Return the root of a domain's XML. Raises ConfigError."""
    parser = ParserCreate("utf-8", " ")
    above = [_Node("", {}, 0, 0)]

    def opens(tag: str, attributes: dict[str, str]) -> None:
        start = parser.CurrentByteIndex
        found = _TAG.match(data, start)
        assert found
        node = _Node(tag, attributes, start, found.end())
        above[-1].children.append(node)
        above.append(node)

    def closes(_: str) -> None:
        node = above.pop()
        is_one_tag = data[node.opened - 2 : node.opened] == b"/>"
        node.closing = node.opened if is_one_tag else parser.CurrentByteIndex
        node.end = node.opened if is_one_tag else data.index(b">", node.closing) + 1

    parser.StartElementHandler, parser.EndElementHandler = opens, closes
    try:
        parser.Parse(data, True)
    except ExpatError as error:
        raise ConfigError(f"the domain is not XML: {error}", "give it as `virsh dumpxml` prints it") from error
    return above[0].children[0]


class _Edits:
    """A text, and what is to change in it."""

    def __init__(self, xml: str) -> None:
        self.data = xml.encode()
        self.root = _parsed(self.data)
        self._changes: list[tuple[int, int, bytes]] = []

    def text(self, node: _Node) -> str:
        """Return the text of an element."""
        return self.data[node.start : node.end].decode()

    def change(self, start: int, end: int, text: str) -> None:
        """Put text in place of what is there; of changes at one place the first comes first."""
        self._changes.append((start, end, text.encode()))

    def space_before(self, node: _Node) -> str:
        """Return the line end and the blanks that stand before an element."""
        found = re.search(rb"(?:\r?\n)?[ \t]*\Z", self.data[: node.start])
        return found[0].decode() if found else ""

    def remove(self, node: _Node) -> None:
        """Remove an element and the white space before it."""
        self.change(len(self.data[: node.start].rstrip()), node.end, "")

    def is_left(self, node: _Node, without: list[_Node]) -> bool:
        """Tell whether anything is left of what is in an element when others are gone."""
        inner = self.data[node.opened : node.closing]
        for gone in without:
            inner = inner.replace(self.data[gone.start : gone.end], b"", 1)
        return bool(inner.strip())

    def made(self) -> str:
        """Return the text as it is after all changes."""
        parts, at = [], 0
        for start, end, text in sorted(self._changes, key=lambda change: change[0]):
            parts += [self.data[at:start], text]
            at = end
        return b"".join([*parts, self.data[at:]]).decode()


def enabled(xml: str, wrapper: Path, on_exposed: OnExposed, source: Source | None = None, group: str = GROUP) -> str:
    """Return a domain's XML, such that it asks for secret RAM and starts `wrapper`. Raises ConfigError.

    Without `source` one that can be secret stays, and is memfd where there is none. `group` is libvirt's of all QEMUs.
    """
    now = _source_of(_parsed(xml.encode()))
    xml = disabled(xml)
    edits = _Edits(xml)
    emulator = _emulator(xml, edits, wrapper)
    edits.change(emulator.opened, emulator.closing, str(wrapper))
    old = edits.data[emulator.opened : emulator.closing].decode()
    added, replaced = _set_backing(edits, source or now or "memfd")
    label, its_old = _set_user(edits, group)
    _ask(edits, f'on-exposed="{on_exposed}" emulator="{old}"', added + label, replaced + its_old)
    return edits.made()


def disabled(xml: str) -> str:
    """Return a domain's XML as it was before `enabled`; as it is, if it does not ask for secret RAM.

    Raises ConfigError.
    """
    root = parse(xml)
    policy = policy_of(root)
    if not policy:
        return xml
    edits = _Edits(xml)
    asks = edits.root.find("metadata", _ASKS)
    assert asks
    before = asks.find(_BEFORE) or _Node(_BEFORE, {}, 0, 0)
    added = before.attributes.get("added", "").split()
    copies = {copy.tag: edits.text(copy) for copy in before.children}
    if emulator := edits.root.find("devices", "emulator"):
        edits.change(emulator.opened, emulator.closing, str(policy.emulator))
    if backing := edits.root.find("memoryBacking"):
        children = {child.tag: child for child in backing.children}
        for tag in children.keys() & (copies.keys() - set(added)):
            edits.change(children[tag].start, children[tag].end, copies[tag])
        _take_out(edits, backing, [children[tag] for tag in children.keys() & set(added)], added, copies)
    if label := _dac_label(edits.root):
        if "seclabel" in added:
            edits.remove(label)
        elif "seclabel" in copies:
            edits.change(label.start, label.end, copies["seclabel"])
    if metadata := edits.root.find("metadata"):
        _take_out(edits, metadata, [asks], added, copies)
    return edits.made()


def difference(before: str, after: str, name: str) -> str:
    """Return what is different between two texts of a domain, as diff -u shows it; "" if nothing is."""
    import difflib  # for those who ask: it takes longer than reading a domain

    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"{name} before", f"{name} after", lineterm=""
    )
    return "".join(f"{line}\n" for line in lines)


def _source_of(root: _Node) -> Source | None:
    source = root.find("memoryBacking", "source")
    said = source.attributes.get("type") if source else None
    return "file" if said == "file" else "memfd" if said == "memfd" else None


def _emulator(xml: str, edits: _Edits, wrapper: Path) -> _Node:
    """Return the element of the QEMU that is to be replaced. Raises ConfigError."""
    node = edits.root.find("devices", "emulator")
    path = edits.data[node.opened : node.closing].decode() if node else ""
    if not node or not path:
        said = "is not there, and nothing else says which QEMU is to run; write <emulator>/usr/bin/qemu-system-…"
    elif path == str(wrapper):
        said = "is the wrapper already, and nothing says which QEMU it is to run; write that one's path"
    elif not re.fullmatch(r"/[^\s&<>\"']+", path):
        said = f"{quote(path)} is not a path that can be kept; write a plain absolute one"
    else:
        return node
    raise wrong_domain(name_of(parse(xml)), [("devices/emulator", said)])


def _set_backing(edits: _Edits, source: Source) -> tuple[list[str], list[str]]:
    """Have RAM that can be secret; return which elements were added, and the text of those that were replaced."""
    wanted = {
        "nosharepages": "<nosharepages/>",
        "source": f"<source type='{source}'/>",
        "access": "<access mode='shared'/>",
    }
    backing = edits.root.find("memoryBacking")
    if not backing:
        anchor, space = _anchor(edits, _ABOVE_BACKING)
        edits.change(anchor, anchor, space + _element("memoryBacking", list(wanted.values()), space))
        return ["memoryBacking", *wanted], []
    space = edits.space_before(backing)
    if backing.childless:
        edits.change(backing.start, backing.end, _element("memoryBacking", list(wanted.values()), space))
        return list(wanted), [edits.text(backing)]
    added, replaced = [], []
    space = edits.space_before(backing.children[0]) if backing.children else _deeper(space)
    for tag, text in wanted.items():
        there = backing.find(tag)
        if not there:
            edits.change(at := _place_in_backing(backing, tag), at, space + text)
            added.append(tag)
        elif there.attributes != _attributes(text):
            edits.change(there.start, there.end, text)
            replaced.append(edits.text(there))
    return added, replaced


def _set_user(edits: _Edits, group: str) -> tuple[list[str], list[str]]:
    """Have a user of the domain's own, where its XML says none; return as `_set_backing` does. Raises ConfigError."""
    there = _dac_label(edits.root)
    # A dynamic one, as the XML of a domain that runs has it, says what is so without it.
    if there and there.attributes.get("type") != "dynamic":
        return [], []
    node = edits.root.find("uuid")
    if not node or node.childless:
        said = "is not there, and the domain's user has its number by it; define the domain first (virsh define)"
        raise wrong_domain(name_of(parse(edits.data.decode())), [("uuid", said)])
    uuid = edits.data[node.opened : node.closing].decode().strip()
    anchor, space = _anchor(edits, _ABOVE_LABEL)
    label = f"<label>{own_label(uuid, group)}</label>"
    made = _element("seclabel", [label], space, " type='static' model='dac' relabel='yes'")
    if there:
        edits.change(there.start, there.end, made)
        return [], [edits.text(there)]
    edits.change(anchor, anchor, space + made)
    return ["seclabel"], []


def _dac_label(root: _Node) -> _Node | None:
    labels = (child for child in root.children if child.tag == "seclabel" and child.attributes.get("model") == "dac")
    return next(labels, None)


def _attributes(element: str) -> dict[str, str]:
    return _parsed(element.encode()).attributes


def _place_in_backing(backing: _Node, tag: str) -> int:
    above = _IN_BACKING[: _IN_BACKING.index(tag)]
    return max((child.end for child in backing.children if child.tag in above), default=backing.opened)


def _ask(edits: _Edits, attributes: str, added: list[str], replaced: list[str]) -> None:
    """Put our element into <metadata>."""
    metadata = edits.root.find("metadata")
    if not metadata:
        anchor, space = _anchor(edits, _ABOVE_METADATA)
        inner = _asks(attributes, ["metadata", *added], replaced, _deeper(space))
        edits.change(anchor, anchor, space + _element("metadata", [inner], space))
        return
    space = edits.space_before(metadata)
    if metadata.childless:
        inner = _asks(attributes, added, [*replaced, edits.text(metadata)], _deeper(space))
        edits.change(metadata.start, metadata.end, _element("metadata", [inner], space))
        return
    space = edits.space_before(metadata.children[0]) if metadata.children else _deeper(space)
    at = metadata.children[-1].end if metadata.children else metadata.opened
    edits.change(at, at, space + _asks(attributes, added, replaced, space))


def _asks(attributes: str, added: list[str], replaced: list[str], space: str) -> str:
    before = f' added="{" ".join(added)}"' if added else ""
    inner = _element("vmmback:before", replaced, _deeper(space), before)
    return _element("vmmback:secret-ram", [inner], space, f' xmlns:vmmback="{NAMESPACE}" {attributes}')


def _element(tag: str, children: list[str], space: str, attributes: str = "") -> str:
    """Return an element; its end tag and its children stand on lines of their own if `space` has a line end."""
    if not children:
        return f"<{tag}{attributes}/>"
    inner = "".join(_deeper(space) + child for child in children)
    return f"<{tag}{attributes}>{inner}{space}</{tag}>"


def _deeper(space: str) -> str:
    return f"{space}  " if "\n" in space else space


def _anchor(edits: _Edits, above: tuple[str, ...]) -> tuple[int, str]:
    """Return behind what to put a new child of <domain>, and the white space before it."""
    found = [child for child in edits.root.children if child.tag in above]
    return (found[-1].end, edits.space_before(found[-1])) if found else (edits.root.opened, "")


def _take_out(edits: _Edits, of: _Node, gone: list[_Node], added: list[str], copies: dict[str, str]) -> None:
    """Remove children of an element, and the element itself if it was added and nothing else is in it."""
    if of.tag in added and not edits.is_left(of, gone):
        edits.remove(of)
    elif of.tag in copies and not edits.is_left(of, gone):
        edits.change(of.start, of.end, copies[of.tag])
    else:
        for node in gone:
            edits.remove(node)
