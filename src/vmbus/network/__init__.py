"""Enlightened networking: the network provider (VSP) and client (VSC) over a VMBus channel, and the virtual switch."""

from vmbus.network.adapter import NetworkAdapter
from vmbus.network.oid import Offloads, PacketFilter
from vmbus.network.passt import PasstUplink
from vmbus.network.pcapng import PcapngReader, PcapngWriter
from vmbus.network.rndis import Frame, LargeSend, TransmitChecksum
from vmbus.network.switch import Access, Mirror, Port, PortKind, Switch, SwitchKind, Trunk
from vmbus.network.uplink import LoopbackUplink, StreamUplink, TapUplink, Uplink, attach
from vmbus.network.vsc import NetworkVsc
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp import NetworkVsp
from vmbus.network.vsp_oid import AdapterConfig, AdapterStatistics
from vmbus.network.wire import Capabilities, Version

__all__ = [
    "Access",
    "AdapterConfig",
    "AdapterStatistics",
    "Capabilities",
    "Frame",
    "GuestConfig",
    "LargeSend",
    "LoopbackUplink",
    "Mirror",
    "NetworkAdapter",
    "NetworkVsc",
    "NetworkVsp",
    "Offloads",
    "PacketFilter",
    "PasstUplink",
    "PcapngReader",
    "PcapngWriter",
    "Port",
    "PortKind",
    "StreamUplink",
    "Switch",
    "SwitchKind",
    "TapUplink",
    "TransmitChecksum",
    "Trunk",
    "Uplink",
    "Version",
    "attach",
]
