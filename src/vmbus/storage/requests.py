"""One SCSI request of the storage client: its packet, and what the host's completion says of it."""

from dataclasses import dataclass

from vmbus.bus.channel import Channel
from vmbus.errors import DeviceError, RemoteProtocolError
from vmbus.storage.scsi.codes import ScsiStatus
from vmbus.storage.scsi.sense import Sense
from vmbus.storage.wire import (
    SENSE_SIZE,
    DataDirection,
    Operation,
    PacketFlags,
    PacketHeader,
    ScsiRequest,
    SrbFlags,
    SrbStatus,
    VersionRules,
    parse_scsi_request,
)

__all__ = ["CommandError", "CommandResult", "Pending", "request_packet", "result_of"]


class CommandError(DeviceError):
    """A SCSI command failed.

    Attributes:
        srb_status: `SrbStatus` without its flags.
        scsi_status: `ScsiStatus`.
        sense: why, if the host said so.
    """

    def __init__(self, cdb: bytes, srb_status: int, scsi_status: int, sense: Sense | None) -> None:
        reason = (
            str(sense) if sense is not None else f"SCSI status 0x{scsi_status:02x}, SRB 0x{srb_status:02x}"
        )
        super().__init__(f"SCSI command 0x{cdb[0]:02x} failed: {reason}")
        self.srb_status = srb_status
        self.scsi_status = scsi_status
        self.sense = sense


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a SCSI command ended.

    Attributes:
        srb_status: `SrbStatus` without its flags.
        scsi_status: `ScsiStatus`.
        transferred: data bytes that the host says it moved, never more than the buffer has.
        sense: sense data, if there is any.
        data: data-in bytes, `transferred` of them.
    """

    srb_status: int
    scsi_status: int
    transferred: int
    sense: Sense | None
    data: bytes = b""

    @property
    def good(self) -> bool:
        """Whether the command did what it should.

        Hyper-V says DATA_OVERRUN of an answer that is shorter than the room for it; `transferred` then is its length.
        """
        done = self.srb_status == SrbStatus.SUCCESS or (
            self.srb_status == SrbStatus.DATA_OVERRUN and bool(self.data)
        )
        return done and self.scsi_status == ScsiStatus.GOOD


@dataclass(slots=True)
class Pending:
    """A request; `before` is how many packets the ring had taken when it was about to be sent, -1 until then."""

    cdb: bytes
    length: int
    request_id: int
    channel: Channel
    before: int = -1
    result: CommandResult | None = None

    def outstanding(self) -> tuple[int, ...]:
        """Its transaction id, if the host has it and has not completed it."""
        if self.result is not None or self.before in (-1, self.channel.outgoing.packets):
            return ()
        return (self.request_id,)


def request_packet(
    rules: VersionRules, address: tuple[int, int], cdb: bytes, direction: DataDirection, length: int
) -> bytes:
    """The packet of a request for a (target, lun) with `length` bytes of data."""
    flags = {DataDirection.IN: SrbFlags.DATA_IN, DataDirection.OUT: SrbFlags.DATA_OUT}.get(direction, 0)
    size = rules.packet_size - PacketHeader.SIZE
    request = ScsiRequest(
        length=size,
        target_id=address[0],
        lun=address[1],
        cdb_length=len(cdb),
        sense_info_length=rules.sense_size,
        data_in=direction,
        data_transfer_length=length,
        payload=cdb,
        srb_flags=flags | SrbFlags.DISABLE_SYNCH_TRANSFER,
        time_out_value=60,
    )
    header = PacketHeader(Operation.EXECUTE_SRB, PacketFlags.REQUEST_COMPLETION)
    return header.pack() + request.pack()[:size]


def result_of(payload: bytes, length: int) -> CommandResult:
    """What a completion says of a request with `length` bytes of data.

    Raises:
        RemoteProtocolError: nothing that makes sense.
    """
    header = PacketHeader.unpack(payload)
    if header.operation != Operation.COMPLETE_IO:
        raise RemoteProtocolError(f"operation {header.operation} instead of a completion")
    answer = parse_scsi_request(payload)
    status = answer.srb_status & SrbStatus.MASK
    sense = None
    if answer.srb_status & SrbStatus.AUTOSENSE_VALID:
        sense = Sense.unpack(answer.payload[: min(answer.sense_info_length, SENSE_SIZE)])
    if header.status and status == SrbStatus.SUCCESS:
        status = SrbStatus.ERROR  # refused before it became a SCSI command
    return CommandResult(status, answer.scsi_status, min(answer.data_transfer_length, length), sense)
