"""The plan never says that guests fit where admission would refuse one: tried on machines as good or better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from random import Random

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vmmback.host import machine as machines
from vmmback.host import plan
from vmmback.host.budget import KERNEL_SIDE_BYTES, PROCESSES_BYTES, Budget, held, with_page_tables
from vmmback.host.machine import Core, Machine
from vmmback.host.memory import HostMemory
from vmmback.host.plan import Guests
from vmmback.linux.zones import Node, Zone

MIB, GIB = 1 << 20, 1 << 30

cores = st.none() | st.builds(
    Core, movable=st.booleans(), size=st.integers(256, 200 << 10).map(lambda size: size * MIB)
) | st.builds(Core, movable=st.booleans(), percent=st.integers(5, 95))  # fmt: skip
plans = st.builds(
    Machine,
    ram=st.integers(2 << 10, 256 << 10).map(lambda size: size * MIB),
    nodes=st.sampled_from([1, 1, 2, 3, 4]),
    core=cores,
    cma=st.sampled_from([0, 0, 64 * MIB, 300 * MIB]),
)
mixes = st.lists(st.tuples(st.integers(1, 12), st.floats(0.01, 0.9)), min_size=1, max_size=4)


def boot(machine: Machine, chance: Random, *, worst: bool) -> Host:
    """Return such a machine once it is up: its RAM lies anywhere, and its kernel took what the plan assumes at most.

    The worst took all of it.
    """
    usable = machine.ram - int((worst or chance.random()) * min(machine.ram // 64, GIB)) // 4096 * 4096
    low = min(usable, chance.choice(range(GIB, 4 * GIB + 1, GIB // 2 if worst else 4096)))
    bounds = [usable * number // machine.nodes // 4096 * 4096 for number in range(machine.nodes + 1)]
    spans = list(pairwise(bounds))
    starts = machines._movable_starts(spans, low, machine.core.kernel(usable) if machine.core else 0)
    cut = [machines._zones(*span, start, low) for span, start in zip(spans, starts, strict=True)]
    part = worst or chance.random()
    nodes = [lowered(node, part) for node in machines._with_watermarks(cut)]
    host = Host(nodes, chance, worst)
    for number, node in enumerate(nodes):
        size = node.managed // 64
        if node.zones and not node.zones[-1].for_kernel:
            size = host.use(size, only=partial(_movable_of, number))
        host.use(size, only=lambda _, zone: zone.for_kernel)
    assumed = 384 * MIB + usable // 512 + usable // 64 + usable // 512
    host.read_files()
    host.use(int(assumed * (worst or chance.random())), only=lambda _, zone: zone.for_kernel)
    host.reserve_cma(machine.cma)
    return host


def _movable_of(number: int, at: int, zone: Zone) -> bool:
    return at == number and not zone.for_kernel


def lowered(node: Node, part: float) -> Node:
    """Return a node whose watermarks are no higher, and of which nothing is used."""
    zones = []
    for zone in node.zones:
        high, low, least = (int(mark * part) for mark in (zone.high, zone.low, zone.min))
        zones.append(zone._replace(free=zone.managed, high=high, low=low, min=least))
    return node._replace(zones=tuple(zones))


@dataclass
class Host:
    """A machine that runs; memory is taken of any zone, and page cache gives way.

    On the worst one all of it is taken where a budget counts it, and page cache up to twice the low watermark stays.
    """

    nodes: list[Node]
    chance: Random
    worst: bool
    promised: int = 0

    @property
    def memory(self) -> HostMemory:
        return HostMemory(tuple(self.nodes), self.promised)

    def use(self, size: int, only: Callable[[int, Zone], bool], page_tables: bool = False) -> int:
        """Take memory of zones in any order; return what there was not."""
        places = [(n, z) for n, node in enumerate(self.nodes) for z, zone in enumerate(node.zones) if only(n, zone)]
        self.chance.shuffle(places)
        for first in (True, False):  # a bit of each, then all of it
            for n, z in places:
                zone = self.nodes[n].zones[z]
                room = zone.free - zone.free_cma + zone.file
                if first:
                    counted = max(0, zone.free - zone.free_cma - held(zone, self.nodes[n].protected_for))
                    room = counted if self.worst else int(room * self.chance.random())
                part = min(size, room)
                size -= part
                if page_tables:
                    self.nodes[n] = self.nodes[n]._replace(page_tables=self.nodes[n].page_tables + part)
                of_free = min(part, zone.free - zone.free_cma)
                self.put(n, z, zone._replace(free=zone.free - of_free, file=zone.file - part + of_free))
        return size

    def put(self, n: int, z: int, zone: Zone) -> None:
        zones = list(self.nodes[n].zones)
        zones[z] = zone
        self.nodes[n] = self.nodes[n]._replace(zones=tuple(zones))

    def reserve_cma(self, size: int) -> None:
        places = [(n, z) for n, node in enumerate(self.nodes) for z, zone in enumerate(node.zones)]
        self.chance.shuffle(places)
        for n, z in places:
            zone = self.nodes[n].zones[z]
            part = min(size, max(0, zone.free - held(zone, self.nodes[n].protected_for) * self.worst))
            if self.worst and not zone.for_kernel:
                part = 0
            size -= part
            self.put(n, z, zone._replace(cma=part, free_cma=part))

    def read_files(self) -> None:
        for n, node in enumerate(self.nodes):
            for z, zone in enumerate(node.zones):
                some = int(zone.free * self.chance.choice([0.0, self.chance.random(), 0.99]))
                file = min(zone.free, 2 * zone.low) if self.worst else some
                self.put(n, z, zone._replace(free=zone.free - file, file=file))

    def run_processes(self, size: int) -> None:
        """Take memory of processes: of CMA and movable zones as far as a budget counts it there, else of any."""
        left = size
        for n, node in enumerate(self.nodes):
            for z, zone in enumerate(node.zones):
                if not zone.for_kernel:
                    part = min(left, zone.file - min(zone.file // 2, zone.low))
                    self.put(n, z, zone._replace(file=zone.file - part))
                    left -= part
                    zone = self.nodes[n].zones[z]
                    part = min(left, max(0, zone.free - zone.high))
                    self.put(n, z, zone._replace(free=zone.free - part))
                else:
                    part = min(left, zone.free_cma)
                    self.put(
                        n, z, zone._replace(free=zone.free - part, free_cma=zone.free_cma - part, anon=zone.anon + part)
                    )
                left -= part
        assert not self.use(left, only=lambda _, zone: zone.for_kernel)


def admit_all(host: Host, sizes: list[int], chance: Random) -> None:
    """Admit guests as launches do, and touch their RAM in any order; AdmissionRefused is the test's end."""
    untouched: list[int] = []

    def touch() -> None:
        left = untouched.pop(chance.randrange(len(untouched)))
        part = chance.choice([left, chance.randrange(0, left + 1, 4096)])
        host.promised -= with_page_tables(left) - with_page_tables(left - part)
        assert not host.use(part, only=lambda _, zone: zone.for_kernel)
        assert not host.use(part // 256, only=lambda _, zone: zone.for_kernel, page_tables=not host.worst)
        if left - part:
            untouched.append(left - part)

    for size in sizes:
        budget = Budget.of(host.memory)
        budget.admit(size)
        host.promised += with_page_tables(size)
        untouched.append(size)
        while untouched and chance.random() < 0.7:
            touch()
        part = host.worst or chance.random()
        assert not host.use(int(KERNEL_SIDE_BYTES * part), only=lambda _, zone: zone.for_kernel)
        host.run_processes(int(PROCESSES_BYTES * part))


def last_guest(machine: Machine, guests: list[Guests]) -> int:
    """Return the size of one more guest that fills what is left, to the MiB; 0 for none."""
    after = [idle.memory for idle in machines.idle(machine)]
    for some in guests:
        after = [plan.launch(memory, some) for memory in after]
    return min(Budget.of(memory).largest_guest() for memory in after)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(machine=plans, mix=mixes, seed=st.integers(0, 1 << 32), worst=st.booleans())
def test_what_a_plan_says_to_fit_is_admitted_by_every_machine_as_good(
    machine: Machine, mix: list[tuple[int, float]], seed: int, worst: bool
) -> None:
    chance = Random(seed)
    budget = min(Budget.of(idle.memory).available() for idle in machines.idle(machine))
    assume(budget > 100 * MIB)
    asked = [Guests(count, max(1, int(budget * share / count) >> 20) * MIB) for count, share in mix]
    fitting = [some for some in plan._fitting(machine, asked) if some.count]
    assume(fitting)
    fitting += [Guests(1, size)] if (size := last_guest(machine, fitting)) else []
    assert plan.fits(machine, fitting)
    sizes = [some.size for some in fitting for _ in range(some.count)]
    chance.shuffle(sizes)
    admit_all(boot(machine, chance, worst=worst), sizes, chance)


@settings(max_examples=12, deadline=None)
@given(machine=plans, mix=mixes)
def test_the_plan_s_answers_agree_with_each_other(machine: Machine, mix: list[tuple[int, float]]) -> None:
    guests = [Guests(count, max(1, int(machine.ram * share / count / 2) >> 20) * MIB) for count, share in mix]
    made = plan.make(machine, guests)
    assert made.fits == plan.fits(machine, guests) == (made.spare >= 0) == (made.fitting == made.guests)
    assert plan.fits(machine, made.fitting)
    assert made.straddling + sum(some.count for node in made.nodes for some in node.placed) == sum(
        some.count for some in made.fitting
    )
    if made.least_ram:
        assert plan.fits(replace(machine, ram=made.least_ram), guests)
    if made.least_kernelcore:
        assert plan.fits(replace(machine, core=Core(movable=False, size=made.least_kernelcore)), guests)
