"""The plan of a machine: whether guests fit, by the same budget as admission's, and what to boot it with. docs/PLAN.md.

A guest of the plan was launched and has touched all its RAM. The machine is the worst of those that it can turn out to
be (host/machine.py), so what the plan says to fit is admitted by each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from vmmback.errors import AdmissionRefused
from vmmback.host import machine as machines
from vmmback.host.budget import KERNEL_SIDE_BYTES, PROCESSES_BYTES, Budget, NodeBudget, with_page_tables
from vmmback.host.direct_map_estimate import left_in_huge_pages
from vmmback.host.machine import Core, Machine
from vmmback.host.memory import HostMemory
from vmmback.host.qemu import AUX_RAM_BYTES

_MIB, _GIB = 1 << 20, 1 << 30
MAX_RAM_BYTES = 64 << 40
_FINEST_CORE, _FINEST_RAM = 128 * _MIB, 256 * _MIB


@dataclass(frozen=True)
class Guests:
    """So many guests of `size` bytes of secret RAM."""

    count: int
    size: int


@dataclass(frozen=True)
class NodePlan:
    """One node: its zones, its budget before the first guest, and the guests on it where each has one node. In bytes.

    `placed` are guests that lie on this node alone, placed largest first, and take `whole` of its budget; `parts` is
    what guests that straddle nodes take of it.
    """

    number: int
    kernel_zones: int
    movable_zone: int
    cma: int
    budget: NodeBudget
    placed: tuple[Guests, ...]
    whole: int
    parts: int


@dataclass(frozen=True)
class Plan:
    """What became of a plan; sizes in bytes.

    `spare` is what the budget has left with all guests; less than nothing says how much is missing. `fitting` are the
    guests that fit, as many as possible of each in the order given; `straddling` of them find no node with room enough.
    `least_kernelcore` is the smallest `kernelcore=` with which all fit, None where none does; `least_ram` the smallest
    RAM with which they do, with the parameters given. `memlock` is the limit for one guest, `memlock_of_all` for all.
    `huge_direct_map` is what of the direct map huge pages still map once the guests that fit have run, by estimate.
    """

    machine: Machine
    guests: tuple[Guests, ...]
    taken: machines.Taken
    nodes: tuple[NodePlan, ...]
    budget: int
    movable: int
    spare: int
    fits: bool
    fitting: tuple[Guests, ...]
    straddling: int
    least_kernelcore: int | None
    least_ram: int | None
    huge_direct_map: int
    memlock: int
    memlock_of_all: int

    @property
    def boot(self) -> tuple[str, ...]:
        """The kernel's parameters: those given, and what kernels before 6.5 need to have memfd_secret at all."""
        cma = (f"cma={machines.boot_size(self.machine.cma)}",) if self.machine.cma else ()
        core = (str(self.machine.core),) if self.machine.core else ()
        return ("secretmem.enable=1", *core, *cma)


def make(machine: Machine, guests: Sequence[Guests]) -> Plan:
    """Plan a machine for guests, of which there is at least one."""
    guests = tuple(replace(some, size=-(-some.size // _MIB) * _MIB) for some in guests)  # admission counts whole MiB
    worst = min(machines.idle(machine), key=lambda idle: _spare(idle.memory, guests))
    budget = Budget.of(worst.memory)
    fitting = _fitting(machine, guests)
    nodes, straddling = _place(worst.memory, fitting)
    largest, everything = max(some.size for some in guests), sum(some.count * some.size for some in guests)
    count = sum(some.count for some in guests)
    return Plan(
        machine=machine,
        guests=guests,
        taken=worst.taken,
        nodes=nodes,
        budget=budget.available() + budget.overhead,
        movable=budget.movable,
        spare=_spare(worst.memory, guests),
        fits=fits(machine, guests),
        fitting=fitting,
        straddling=straddling,
        least_kernelcore=_least_kernelcore(machine, guests),
        least_ram=_least_ram(machine, guests),
        huge_direct_map=_huge_direct_map(nodes, fitting),
        memlock=largest + AUX_RAM_BYTES,
        memlock_of_all=everything + count * AUX_RAM_BYTES,
    )


def fits(machine: Machine, guests: Iterable[Guests]) -> bool:
    """Tell whether admission would let all guests in, one after the other, whatever the machine turns out to be."""
    guests = list(guests)
    return all(_admits(idle.memory, guests) for idle in machines.idle(machine))


def launch(memory: HostMemory, some: Guests) -> HostMemory:
    """Return the memory once guests were launched, have touched all their RAM, and their processes all of theirs."""
    processes = some.count * PROCESSES_BYTES
    movable = min(processes, Budget.of(memory).movable)
    kernel = some.count * (with_page_tables(some.size) + KERNEL_SIDE_BYTES)
    return machines.take(machines.take_movable(memory, movable), kernel + processes - movable)


def _admits(memory: HostMemory, guests: Iterable[Guests]) -> bool:
    """Ask for the last guest of each size: with it in, those before it were, too."""
    for some in guests:
        if some.count:
            memory = launch(memory, replace(some, count=some.count - 1))
            try:
                Budget.of(memory).admit(some.size)
            except AdmissionRefused:
                return False
            memory = launch(memory, replace(some, count=1))
    return True


def _spare(memory: HostMemory, guests: Sequence[Guests]) -> int:
    """Return what is left of the budget with all guests in: less than nothing if they do not fit."""
    *others, last = guests
    for some in (*others, replace(last, count=last.count - 1)):
        memory = launch(memory, some)
    return Budget.of(memory).available() - with_page_tables(last.size)


def _fitting(machine: Machine, guests: Sequence[Guests]) -> tuple[Guests, ...]:
    """Return as many of each as fit beside those before."""
    chosen: list[Guests] = []
    for some in guests:

        def too_many(count: int, some: Guests = some) -> bool:
            return not fits(machine, [*chosen, replace(some, count=count)])

        count = some.count if not too_many(some.count) else _first(too_many, 0, some.count) - 1
        chosen.append(replace(some, count=max(0, count)))
    return tuple(chosen)


def _least_kernelcore(machine: Machine, guests: Sequence[Guests]) -> int | None:
    """Return the least kernelcore= with which all fit, in steps of about 1/256 of the RAM; None if none is enough."""
    if not fits(replace(machine, core=None), guests):
        return None
    step = _step(machine.ram, 256, _FINEST_CORE)
    most = -(-machine.ram // step)

    def enough(count: int) -> bool:
        return fits(replace(machine, core=Core(movable=False, size=count * step)), guests)

    return _first(enough, 1, most) * step


def _least_ram(machine: Machine, guests: Sequence[Guests]) -> int | None:
    """Return the least RAM with which all fit, in steps of about 1/64 of it; None if no RAM is enough."""
    most = MAX_RAM_BYTES // _FINEST_RAM

    def enough(count: int) -> bool:
        return fits(replace(machine, ram=count * _FINEST_RAM), guests)

    if not enough(most):
        return None
    ram = _first(enough, machine.nodes, most) * _FINEST_RAM
    step = _step(ram, 64, _FINEST_RAM)
    rounded = -(-ram // step) * step
    return rounded if fits(replace(machine, ram=rounded), guests) else ram


def _step(size: int, parts: int, finest: int) -> int:
    """Return the power of two next below 1/parts of a size, or `finest` where that is more."""
    return max(finest, 1 << max(0, (size // parts).bit_length() - 1))


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the first number from `low` to `high` for which it holds; for `high` it does, and after the first one."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _place(memory: HostMemory, guests: Sequence[Guests]) -> tuple[tuple[NodePlan, ...], int]:
    """Place guests on nodes, the largest first, each where it fits first; return the nodes, and how many straddle."""
    budget = Budget.of(memory)
    count = max(1, sum(some.count for some in guests))
    besides = KERNEL_SIDE_BYTES + -(-max(0, count * PROCESSES_BYTES - budget.movable) // count)
    left: Counter[int] = Counter()
    for some in guests:
        left[some.size] += some.count
    nodes = []
    for node, kernel, given in zip(memory.nodes, machines.kernel_sizes(memory), budget.nodes, strict=True):
        placed = _place_on(given.available, left, besides)
        whole = sum(some.count * (with_page_tables(some.size) + besides) for some in placed)
        cma = sum(zone.cma for zone in node.zones)
        nodes.append(NodePlan(node.number, kernel, node.managed - kernel, cma, given, placed, whole, 0))
    parts = sum(count * (with_page_tables(size) + besides) for size, count in left.items())
    return _with_parts(nodes, parts), sum(left.values())


def _place_on(room: int, left: Counter[int], besides: int) -> tuple[Guests, ...]:
    """Take guests out of `left`, counted by their size, that fit into the room together."""
    placed = []
    for size in sorted(left, reverse=True):
        need = with_page_tables(size) + besides
        if count := min(left[size], max(0, room) // need):
            left[size] -= count
            room -= count * need
            placed.append(Guests(count, size))
    return tuple(placed)


def _huge_direct_map(nodes: Iterable[NodePlan], guests: Iterable[Guests]) -> int:
    """Return the bytes of the direct map that huge pages map still: secret RAM splits none of ZONE_MOVABLE's."""
    kernel, movable = sum(node.kernel_zones for node in nodes), sum(node.movable_zone for node in nodes)
    return left_in_huge_pages(kernel, sum(some.count * some.size for some in guests)) + movable


def _with_parts(nodes: Iterable[NodePlan], size: int) -> tuple[NodePlan, ...]:
    """Spread the guests that straddle nodes over what is left on each."""
    spread = []
    for node in nodes:
        part = min(size, max(0, node.budget.available) - node.whole)
        size -= part
        spread.append(replace(node, parts=part))
    return tuple(spread)
