"""The sequence diagram of docs/network.md.

A client and a provider talk over two rings; this script sits on the host's side of both and writes down every
packet as it passes, with the RNDIS message that it announces.
"""

import struct
from collections.abc import Iterator

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.core.ring import COMPLETION, GPA_DIRECT, TRANSFER_PAGES
from vmbus.network import rndis
from vmbus.network.oid import Offloads, Oid
from vmbus.network.rndis import NdisStatus, RndisType
from vmbus.network.switch import Switch
from vmbus.network.vsc import NetworkVsc
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp import NetworkVsp
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.network.wire import (
    NO_SECTION,
    Capabilities,
    Init,
    InitComplete,
    MessageType,
    NvspStatus,
    Sender,
    SendReceiveBufferComplete,
    SendRndisPacket,
    SendSendBufferComplete,
    Version,
    unpack_message,
)

PAGE = 4096
GUEST_MAC = bytes.fromhex("00155d000001")
OTHER_MAC = bytes.fromhex("00155d000002")


def describe_rndis(message: bytes) -> str:
    """An RNDIS message in words."""
    if message[:4] == b"\1\0\0\0":
        frames = rndis.unpack_packets(message, 32)
        return f"{len(frames)} frame{'s' * (len(frames) > 1)}"
    kind, body, data = rndis.unpack_control(message)
    text = RndisType(kind).name
    oid = getattr(body, "oid", None)
    if oid is not None:
        text += f" {Oid(oid).name}"
    status = getattr(body, "status", None)
    if status:
        text += f" {NdisStatus(status).name}"
    return text + (f", {len(data)} bytes" if data else "")


def describe(payload: bytes, sender: Sender, version: int) -> str:
    """An NVSP message in words."""
    kind, body = unpack_message(payload, version, sender)
    text = MessageType(kind).name
    match body:
        case Init():
            text += f" 0x{body.protocol_version:x}"
        case InitComplete():
            text += f" {NvspStatus(body.status).name}"
        case SendReceiveBufferComplete(section=section):
            text += f", {section.num_sub_allocations} sections of {section.sub_allocation_size} bytes"
        case SendSendBufferComplete():
            text += f", sections of {body.section_size} bytes"
    return text


class Recorder:
    """Looks at both rings whenever the host is rung, before and after the provider works."""

    def __init__(self) -> None:
        self.memory = GuestMemory(8 << 20)
        self.guest, host = loopback(self.memory)
        self.port = Switch().connect("guest")
        config = AdapterConfig(GUEST_MAC, versions=frozenset(Version) - {Version.V6_1})
        self.vsp = NetworkVsp(host, self.port, config)
        self.lines: list[str] = []
        self.sides = (
            (host.outgoing, Sender.HOST, "P->>C"),
            (self.guest.outgoing, Sender.GUEST, "C->>P"),
        )
        self.seen = [0, 0]
        self.frames = False
        serve = host.on_signal
        assert serve is not None

        def serve_and_look() -> None:
            self.look()
            serve()
            self.look()

        host.on_signal = serve_and_look

    def look(self) -> None:
        """Write down what has been sent since the last look."""
        for side, (ring, sender, arrow) in enumerate(self.sides):
            view = ring.window.view()
            write = struct.unpack_from("<I", view, 0)[0]
            size = len(view) - PAGE
            area = bytes(view[PAGE:]) * 2
            view.release()
            while self.seen[side] != write:
                at = self.seen[side]
                kind, offset, length, _, tid = struct.unpack_from("<HHHHQ", area, at)
                header, payload = area[at : at + offset * 8], area[at + offset * 8 : at + length * 8]
                text = self.packet(kind, header, payload, sender)
                # Who numbered the packet: a completion carries the id of the other end's.
                owner = "PC"[side ^ (kind == COMPLETION)]
                # The provider's numbers are those of sections, of which there is one with 0.
                name = f" (#P{tid})" if owner == "P" else "" if tid == 0 else f" (#C{tid >> 32 or tid})"
                if self.frames or text != "SEND_RNDIS_PACKET_COMPLETE":
                    self.lines.append(f"    {arrow}: {text}{name}".replace(";", ","))
                self.seen[side] = (at + length * 8 + 8) % size

    def packet(self, kind: int, header: bytes, payload: bytes, sender: Sender) -> str:
        """One packet in words."""
        if kind == COMPLETION and not payload:
            return "completion"
        version = self.vsp.protocol.version or Version.V6_1
        text = describe(payload, sender, version)
        if kind == COMPLETION or not text.startswith("SEND_RNDIS_PACKET"):
            return text
        message = b""
        body = SendRndisPacket.unpack(payload, 4)
        if kind == TRANSFER_PAGES:
            length, offset = struct.unpack_from("<II", header, 24)
            buffer = self.vsp._receive_window
            assert buffer is not None
            message = bytes(buffer.view()[offset : offset + length])
            where = "receive buffer"
        elif kind == GPA_DIRECT:
            length, offset, pfn = struct.unpack_from("<IIQ", header, 24)
            message = self.memory.read(pfn * PAGE + offset, length)
            where = "guest pages"
        else:
            assert body.send_buffer_section_index != NO_SECTION
            send = self.vsp._send
            assert send is not None
            start = body.send_buffer_section_index * send.section_size
            message = bytes(send.view[start : start + body.send_buffer_section_size])
            where = "send buffer"
        return f"{describe_rndis(message)} in the {where}"


def record() -> Iterator[str]:
    """The lines of the diagram."""
    recorder = Recorder()
    config = GuestConfig(capabilities=Capabilities.IEEE_8021Q, offloads=Offloads.everything())
    client = NetworkVsc(recorder.guest, range(64, 364), config)
    recorder.frames = True
    client.send_batch([OTHER_MAC + GUEST_MAC + b"\x88\xb5" + bytes(46)] * 3)
    recorder.port.receiver([GUEST_MAC + OTHER_MAC + b"\x88\xb5" + bytes(46)])
    recorder.look()
    recorder.frames = False
    recorder.vsp.set_link(False)
    client.close()
    recorder.look()
    yield from ("sequenceDiagram", "    participant C as client (VSC)", "    participant P as provider (VSP)")
    yield from recorder.lines
