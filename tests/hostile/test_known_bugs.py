"""Bugs that other hosts had, and the tests that keep them out of this one, in each room where they can be made."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUS, STORAGE = "test_bus_bad_input.py", "test_storage_hostile_guest.py"
NETWORK, NETWORK_HOST = "test_network_hostile_guest.py", "test_network_hostile_host.py"

KNOWN_BUGS = {
    "a GPA-direct or transfer-page header shorter than 24 bytes underflows": {
        BUS: ["test_bug_gpa_direct_or_transfer_page_header_shorter_than_24_bytes"],
        STORAGE: [
            "test_a_gpa_direct_header_shorter_than_24_bytes_closes_only_that_channel",
            "test_a_transfer_page_header_shorter_than_24_bytes_closes_only_that_channel",
        ],
        NETWORK: ["test_external_header_shorter_than_24_bytes"],
    },
    "the byte offset of a GPA range is 4096 or more, unchecked": {
        BUS: ["test_bug_gpa_range_with_byte_offset_of_a_page_or_more_unchecked"],
        STORAGE: ["test_a_gpa_range_that_begins_behind_its_first_page_is_corruption"],
        NETWORK: ["test_gpa_byte_offset_of_a_page_or_more"],
    },
    "event flag 2048 or more panics": {BUS: ["test_bug_event_flag_2048_or_more_panics"]},
    "interrupts before OPENCHANNEL_RESULT are lost": {
        BUS: ["test_bug_interrupts_before_the_open_result_are_lost"]
    },
    "a GPADL fails on a revoked channel": {BUS: ["test_bug_gpadl_fails_on_a_revoked_channel"]},
    "a primary is rescinded before its sub-channels": {
        BUS: ["test_bug_primary_rescinded_before_its_sub_channels"]
    },
    "guests set pending_send_size to the ring's size less one": {
        BUS: ["test_bug_guests_that_set_pending_send_size_to_ring_size_minus_one"],
        STORAGE: ["test_a_pending_send_size_of_the_ring_less_one_is_honoured"],
        NETWORK: ["test_pending_send_size_of_the_whole_ring"],
    },
    "an RNDIS header crosses a 4 KiB page": {NETWORK: ["test_rndis_header_that_crosses_a_page"]},
    "an RNDIS completion of an unknown id": {NETWORK: ["test_completion_of_an_unknown_id"]},
    "an RSS table of size zero": {NETWORK: ["test_rss_table_of_impossible_size"]},
    "a receive-buffer index out of range": {
        NETWORK: ["test_completion_of_an_unknown_id", "test_completed_twice"],
        NETWORK_HOST: ["test_wrong_transfer_pages"],
    },
    "a request longer than expected during storage initialization": {
        STORAGE: ["test_a_request_longer_than_expected_during_initialization_is_taken"]
    },
    "an unknown storage operation kills the worker": {
        STORAGE: ["test_an_unknown_operation_does_not_kill_the_channel"]
    },
}


@pytest.mark.parametrize("bug", KNOWN_BUGS)
def test_each_known_bug_has_its_tests(bug: str) -> None:
    for file, names in KNOWN_BUGS[bug].items():
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name in names:
            assert name in functions, f"{file} has no {name}"
            assert any(isinstance(node, ast.Assert | ast.With) for node in ast.walk(functions[name]))
