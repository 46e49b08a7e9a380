"""The sequence diagram of docs/storage.md.

A client and a provider talk over two rings; this script sits on the host's side of both and writes down every
packet as it passes.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.core.ring import COMPLETION
from vmbus.storage.disk import MemoryDisk
from vmbus.storage.scsi.codes import Opcode
from vmbus.storage.scsi.sense import Sense
from vmbus.storage.vsc import CommandError, StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.storage.wire import NtStatus, Operation, PacketHeader, SrbStatus, parse_scsi_request

SIZE = 1 << 20


def describe(kind: int, payload: bytes) -> str:
    """One packet in words."""
    header = PacketHeader.unpack(payload)
    body = payload[PacketHeader.SIZE :]
    if header.operation == Operation.EXECUTE_SRB:
        request = parse_scsi_request(payload)
        name = Opcode(request.payload[0]).name
        return f"EXECUTE_SRB {name}, LUN {request.lun}, {request.data_transfer_length} bytes"
    if header.operation == Operation.COMPLETE_IO and kind == COMPLETION:
        text = "COMPLETE_IO " + NtStatus(header.status).name
        if body[2]:  # SRB status: the completion of a SCSI request
            answer = parse_scsi_request(payload)
            text += f", SRB {SrbStatus(answer.srb_status & SrbStatus.MASK).name}"
            if answer.srb_status & SrbStatus.AUTOSENSE_VALID:
                return f"{text}, {Sense.unpack(answer.payload)}"
            return f"{text}, {answer.data_transfer_length} bytes"
        return text
    if header.operation == Operation.QUERY_PROTOCOL_VERSION:
        major_minor = struct.unpack_from("<H", body)[0]
        return f"QUERY_PROTOCOL_VERSION {major_minor >> 8}.{major_minor & 0xFF}"
    return Operation(header.operation).name


def record() -> Iterator[str]:
    """The lines of the diagram."""
    guest, host = loopback(GuestMemory(1 << 20))
    vsp = StorageVsp({(0, 0): MemoryDisk(SIZE)}, versions=[0x0600, 0x0501])
    vsp.open(host)
    serve = host.on_signal
    assert serve is not None
    lines: list[str] = []
    seen = {"up": 0, "down": 0}

    def look() -> None:
        for key, channel_end, arrow in (("up", guest.outgoing, "C->>P"), ("down", host.outgoing, "P->>C")):
            view = channel_end.window.view()
            write = struct.unpack_from("<I", view, 0)[0]
            size = len(view) - 4096
            area = bytes(view[4096:]) * 2
            view.release()
            while seen[key] != write:
                at = seen[key]
                kind, offset, length, _, tid = struct.unpack_from("<HHHHQ", area, at)
                text = describe(kind, area[at + offset * 8 : at + length * 8])
                name = "unasked" if tid == 0 else f"#{tid & 0xFFFFFFFF}"
                lines.append(f"    {arrow}: {text} ({name})".replace(";", ","))
                seen[key] = (at + length * 8 + 8) % size

    def serve_and_look() -> None:
        look()
        serve()
        look()

    host.on_signal = serve_and_look
    client = StorageVsc(guest, range(16, 64))
    client.connect()
    disk = client.disk()
    disk.write(4096, bytes(4096))
    disk.flush()
    with suppress(CommandError):
        disk.read(SIZE, 512)
    vsp.add_disk((0, 1), MemoryDisk(SIZE))
    look()
    yield from ("sequenceDiagram", "    participant C as client (VSC)", "    participant P as provider (VSP)")
    yield from lines
