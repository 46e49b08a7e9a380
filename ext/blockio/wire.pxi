# A request and its completion as they lie in the ring. Included by blockio.pyx.

cdef enum:
    # vstor packet: 12-byte header, then the SCSI request of 36 or 52 bytes (vmbus.storage.wire)
    HEADER = 12
    REQUEST_LEAST = 36
    REQUEST_MOST = 52
    OPERATION_COMPLETE_IO = 1
    OPERATION_EXECUTE_SRB = 3
    DIRECTION_IN = 1
    SRB_SUCCESS = 1
    SRB_MASK = 0x3f
    READ_10 = 0x28
    WRITE_10 = 0x2a
    READ_16 = 0x88
    WRITE_16 = 0x8a

cdef packed struct wire_request_t:
    # vstor packet up to the end of the command (vmbus.storage.wire.PacketHeader, ScsiRequest)
    uint32_t operation
    uint32_t flags
    uint32_t status
    uint16_t length
    uint8_t srb_status
    uint8_t scsi_status
    uint8_t reserved1
    uint8_t path_id
    uint8_t target_id
    uint8_t lun
    uint8_t cdb_length
    uint8_t sense_info_length
    uint8_t data_in
    uint8_t properties
    uint32_t data_transfer_length
    uint8_t cdb[20]

cdef packed struct wire_packet_t:
    wire_request_t request
    uint16_t reserve
    uint8_t queue_tag
    uint8_t queue_action
    uint32_t srb_flags
    uint32_t time_out_value
    uint32_t queue_sort_key

def layout() -> dict:
    """Bytes from the start of a packet to each field, as compiled here; with the sizes of both forms."""
    cdef wire_packet_t packet
    cdef size_t start = <size_t>&packet
    return {
        "operation": <size_t>&packet.request.operation - start,
        "flags": <size_t>&packet.request.flags - start,
        "status": <size_t>&packet.request.status - start,
        "length": <size_t>&packet.request.length - start,
        "srb_status": <size_t>&packet.request.srb_status - start,
        "scsi_status": <size_t>&packet.request.scsi_status - start,
        "reserved1": <size_t>&packet.request.reserved1 - start,
        "path_id": <size_t>&packet.request.path_id - start,
        "target_id": <size_t>&packet.request.target_id - start,
        "lun": <size_t>&packet.request.lun - start,
        "cdb_length": <size_t>&packet.request.cdb_length - start,
        "sense_info_length": <size_t>&packet.request.sense_info_length - start,
        "data_in": <size_t>&packet.request.data_in - start,
        "properties": <size_t>&packet.request.properties - start,
        "data_transfer_length": <size_t>&packet.request.data_transfer_length - start,
        "payload": <size_t>&packet.request.cdb - start,
        "reserve": <size_t>&packet.reserve - start,
        "queue_tag": <size_t>&packet.queue_tag - start,
        "queue_action": <size_t>&packet.queue_action - start,
        "srb_flags": <size_t>&packet.srb_flags - start,
        "time_out_value": <size_t>&packet.time_out_value - start,
        "queue_sort_key": <size_t>&packet.queue_sort_key - start,
        "short packet": sizeof(wire_request_t),
        "long packet": sizeof(wire_packet_t),
    }
