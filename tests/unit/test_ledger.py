"""The ledger adds, subtracts and reports exactly."""

import json
from collections import Counter
from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from vmbus.errors import HypercallError
from vmbus.hypervisor.tlfs import CallCode, Status
from vmbus.trace.ledger import Account, Ledger
from vmbus.trace.names import HYPERCALLS, hypercall_name

COUNTS = st.integers(0, 1 << 40)
ACCOUNTS = st.builds(
    Account,
    exits=st.dictionaries(st.sampled_from(["io_port", "mmio", "halt"]), st.integers(1, 1 << 40)).map(Counter),
    instructions=COUNTS,
    hypercalls=st.dictionaries(st.integers(0, 0xFFFF), st.integers(1, 1 << 40), max_size=4).map(Counter),
    interrupts=st.dictionaries(st.integers(0, 255), st.integers(1, 1 << 40), max_size=4).map(Counter),
    doorbells_sent=COUNTS,
    doorbells_suppressed=COUNTS,
    packets_sent=COUNTS,
    packets_received=COUNTS,
    bytes_copied=COUNTS,
    backend_calls=COUNTS,
)


@given(ACCOUNTS, ACCOUNTS)
def test_adding_and_taking_away_are_inverse(earlier: Account, added: Account) -> None:
    both = earlier + added
    assert both - earlier == added
    assert earlier + added == added + earlier
    assert both.instructions == earlier.instructions + added.instructions
    for reason in both.exits:
        assert both.exits[reason] == earlier.exits[reason] + added.exits[reason]


@given(ACCOUNTS)
def test_a_snapshot_does_not_follow_the_account(account: Account) -> None:
    before = account.copy()
    assert before == account
    account.exits["io_port"] += 3
    account.hypercalls[0x5C] += 2
    account.backend_calls += 1
    difference = account - before
    assert (difference.exits, difference.hypercalls) == (Counter(io_port=3), Counter({0x5C: 2}))
    assert difference.backend_calls == 1
    assert difference.packets_sent == 0


@given(ACCOUNTS)
def test_reports_are_json_and_hold_every_field(account: Account) -> None:
    report = json.loads(json.dumps(account.to_dict()))
    assert set(report) == {field.name for field in fields(Account)}
    assert report["exits"] == dict(account.exits)
    assert report["hypercalls"] == {hypercall_name(code): n for code, n in account.hypercalls.items()}


def test_hypercalls_are_reported_by_name() -> None:
    account = Account(
        hypercalls=Counter({CallCode.SIGNAL_EVENT: 2, 0x5C: 1, 0xABC: 3}), interrupts=Counter({0xF3: 1})
    )
    report = account.to_dict()
    assert report["hypercalls"] == {"HvCallSignalEvent": 2, "HvCallPostMessage": 1, "0xabc": 3}
    assert report["interrupts"] == {"0xf3": 1}
    assert "HvCallSignalEvent: 2" in repr(account)


def test_every_hypercall_that_is_served_has_its_own_name() -> None:
    for code in CallCode:
        assert hypercall_name(code).lower().endswith(code.name.removeprefix("EXT_").replace("_", "").lower())
    assert len(set(HYPERCALLS.values())) == len(HYPERCALLS)


def test_a_status_is_told_by_name() -> None:
    assert str(HypercallError(Status.INVALID_SYNIC_STATE)) == (
        "hypercall failed with HV_STATUS_INVALID_SYNIC_STATE (0x0018)"
    )
    assert str(HypercallError(0x7777)) == "hypercall failed with HV_STATUS 0x7777"


def test_an_account_is_made_once() -> None:
    ledger = Ledger()
    assert ledger.account("c0", "disk") is ledger.account("c0", "disk")
    assert ledger.account("c0") is not ledger.account("c0", "disk")
    assert ledger.account("c1", "disk") is not ledger.account("c0", "disk")
    assert set(ledger.accounts()) == {("c0", "disk"), ("c0", ""), ("c1", "disk")}


def test_totals_are_by_partition_or_of_all() -> None:
    ledger = Ledger()
    ledger.account("c0").hypercalls[0x5D] += 1
    ledger.account("c0", "disk").packets_sent += 10
    ledger.account("c0", "net").packets_sent += 5
    ledger.account("c1", "net").packets_sent += 100
    assert ledger.total("c0").packets_sent == 15
    assert ledger.total("c0").hypercalls == Counter({0x5D: 1})
    assert ledger.total().packets_sent == 115
    assert ledger.total("nobody") == Account()


def test_the_report_of_all_is_named_by_partition_and_device() -> None:
    ledger = Ledger()
    ledger.account("c0").interrupts[0x30] += 2
    ledger.account("c0", "disk").exits["mmio"] += 1
    report = ledger.to_dict()
    assert set(report) == {"c0", "c0/disk"}
    assert report["c0"]["interrupts"] == {"0x30": 2}
    assert report["c0/disk"]["exits"] == {"mmio": 1}


def test_the_accounts_listed_are_a_copy_of_the_table() -> None:
    ledger = Ledger()
    ledger.account("c0")
    ledger.accounts().clear()
    assert set(ledger.accounts()) == {("c0", "")}
