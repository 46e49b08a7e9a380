"""What docs/network.md says is what the code does: its tables name what there is."""

from pathlib import Path

from vmbus.network.oid import Oid
from vmbus.network.vsp_oid import AdapterConfig, AdapterState, OidServer
from vmbus.network.wire import Version

DOCS = Path(__file__).parents[2] / "docs"


def test_all_versions_and_oids_are_named() -> None:
    text = (DOCS / "network.md").read_text(encoding="utf-8")
    for version in Version:
        assert f"0x{version:x}" in text
    config = AdapterConfig(b"\0\x15\x5d\0\0\1")
    server = OidServer(config, AdapterState(config))
    listed = server.query(Oid.GEN_SUPPORTED_LIST, b"")[1]
    assert f"{len(listed) // 4} OIDs" in text
