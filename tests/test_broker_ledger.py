"""Who may borrow how much, and who sees what: pure bookkeeping."""

from __future__ import annotations

import pytest

from vmmback.broker.config import MIB, Allow, BrokerConfig
from vmmback.broker.ledger import Caller, Lease, Ledger, NotAllowed

ROOT, ALICE, BOB = Caller(1, 0, 0, 5), Caller(2, 1000, 100, 5), Caller(3, 1001, 200, 5)
RULE = Allow.of({"user": 1000, "total": "512MiB", "count": 3, "per-minute": 4})


def ledger(*rules: Allow) -> Ledger:
    return Ledger(BrokerConfig(allow=rules))


def lend(book: Ledger, caller: Caller, size: int = 64 * MIB, now_s: float = 0.0) -> int:
    book.check(caller, size, now_s)
    lease = Lease(book.next_number(), size, 7, *caller, "a guest", "2026-01-01 00:00:00+00:00")
    book.add(lease, now_s)
    return lease.number


def test_root_may_have_any_amount_and_a_stranger_nothing() -> None:
    book = ledger(RULE)
    for _ in range(100):
        lend(book, ROOT, 1 << 40)
    assert not book._recent, "root's leases are remembered though nobody asks"
    with pytest.raises(NotAllowed, match="uid 1001 may not borrow secret RAM"):
        lend(book, BOB)


@pytest.mark.parametrize(
    ("held", "wanted", "why"),
    [
        ([256 * MIB], 257 * MIB, "it has 256 of at most 512 MiB, and wants 257 MiB"),
        ([], 513 * MIB, "it has 0 of at most 512 MiB"),
        ([MIB] * 3, MIB, "it has 3 leases"),
    ],
)
def test_a_rule_bounds_the_total_and_the_count(held: list[int], wanted: int, why: str) -> None:
    book = ledger(RULE)
    numbers = [lend(book, ALICE, size) for size in held]
    with pytest.raises(NotAllowed, match=why):
        lend(book, ALICE, wanted)
    if numbers:  # what is given back may be had again
        book.end(numbers[0], ALICE)
        lend(book, ALICE, held[0])


def test_a_rule_bounds_the_rate() -> None:
    book = ledger(RULE)
    for second in range(4):
        book.end(lend(book, ALICE, now_s=second))
    with pytest.raises(NotAllowed, match="4 new leases within a minute"):
        lend(book, ALICE, now_s=59.9)
    lend(book, ALICE, now_s=60.0)
    with pytest.raises(NotAllowed, match="within a minute"):
        lend(book, ALICE, now_s=60.5)


def test_the_first_rule_that_fits_counts_by_user_and_by_group() -> None:
    of_group = Allow.of({"group": 200, "total": "64MiB"})
    both = Allow.of({"user": 1001, "group": 100, "total": "1GiB"})
    book = ledger(both, of_group, Allow.of({"user": 1001, "total": "1GiB"}))
    lend(book, BOB)
    with pytest.raises(NotAllowed, match="64 of at most 64 MiB"):
        lend(book, BOB, MIB)


def test_nobody_sees_or_ends_the_lease_of_another_user() -> None:
    book = ledger(RULE, Allow.of({"user": 1001, "total": "1GiB"}))
    hers, his = lend(book, ALICE), lend(book, BOB)
    assert [lease.number for lease in book.of(ALICE)] == [hers]
    assert {lease.number for lease in book.of(ROOT)} == {hers, his}
    assert book.end(hers, BOB) is None
    assert [lease.number for lease in book.of(ALICE)] == [hers]
    assert book.end(hers, ALICE) is not None
    assert book.end(hers, ALICE) is None
    assert book.end(his, ROOT) is not None
    assert list(book) == []


def test_what_a_process_has_is_the_sum_of_its_leases_that_have_not_ended() -> None:
    book = ledger()
    for number, pid in enumerate((7, 7, 8)):
        book.add(Lease(number, MIB << number, number, pid, 0, 0, 5, "", ""), 0.0)
    assert [book.held_by(pid) for pid in (7, 8, 9)] == [3 * MIB, 4 * MIB, 0]
    book.end(0)
    book.end(2)
    assert [book.held_by(pid) for pid in (7, 8)] == [2 * MIB, 0]
