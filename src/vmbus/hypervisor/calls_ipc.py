"""Messages, events, ports and connections: the hypercalls between partitions (TLFS 11.9-11.11)."""

import struct
from typing import TYPE_CHECKING, Final

from vmbus.errors import HypercallError, VmbusError
from vmbus.hypervisor.abi import Call
from vmbus.hypervisor.ports import Connection, Port
from vmbus.hypervisor.tlfs import (
    ANY_VP,
    EVENT_FLAGS_PER_SINT,
    HYPERVISOR_MESSAGE,
    MAX_CONNECTION_ID,
    MESSAGE_PAYLOAD_SIZE,
    SINT_COUNT,
    CallCode,
    PartitionState,
    PortType,
    Privilege,
    Status,
)

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["CALLS", "signal_event"]

_SIGNAL_EVENTS: Final = int(Privilege.SIGNAL_EVENTS)
_POST: Final = struct.Struct("<IIII")
_CREATE_PORT: Final = struct.Struct("<QIBBHQIIQQQ")
_CONNECT_PORT: Final = struct.Struct("<QIBBHQIIIIQQ")
_PORT_REFERENCE: Final = struct.Struct("<QII")


def _connection(vp: "VirtualProcessor", connection_id: int, kind: PortType) -> Port:
    connection = vp.partition.connections.get(connection_id)
    if connection is None or connection.port.kind != kind:
        raise HypercallError(Status.INVALID_CONNECTION_ID)
    return connection.port


def _target(port: Port) -> "VirtualProcessor":
    vps = port.owner.vps
    index = 0 if port.target_vp == ANY_VP else port.target_vp
    if index >= len(vps):
        raise HypercallError(Status.INVALID_VP_INDEX)
    return vps[index]


def _post_message(vp: "VirtualProcessor", data: bytes) -> None:
    connection_id, reserved, message_type, size = _POST.unpack_from(data)
    if reserved or size > MESSAGE_PAYLOAD_SIZE or not message_type or message_type & HYPERVISOR_MESSAGE:
        raise HypercallError(Status.INVALID_PARAMETER)
    port = _connection(vp, connection_id, PortType.MESSAGE)
    payload = data[_POST.size : _POST.size + size]
    if port.on_message is None:
        _target(port).synic.post_message(port.target_sint, message_type, port.port_id, payload)
        return
    try:
        port.on_message(vp.index, message_type, payload)
    except HypercallError:
        raise
    except VmbusError as error:
        vp.partition.provider_failed(error)


def signal_event(vp: "VirtualProcessor", connection_id: int, flag: int, reserved: int) -> None:
    """HvSignalEvent.

    Raises:
        HypercallError: ACCESS_DENIED, INVALID_CONNECTION_ID, INVALID_PARAMETER (flag beyond the port's),
            INVALID_SYNIC_STATE or INVALID_VP_INDEX of the target.
    """
    partition = vp.partition
    if not partition.privileges & _SIGNAL_EVENTS:
        raise HypercallError(Status.ACCESS_DENIED)
    connection = partition.connections.get(connection_id)
    if connection is None or connection.port.kind is not PortType.EVENT:
        raise HypercallError(Status.INVALID_CONNECTION_ID)
    port = connection.port
    if flag >= port.flag_count or reserved:
        raise HypercallError(Status.INVALID_PARAMETER)
    if port.on_event is None:
        _target(port).synic.signal_event(port.target_sint, port.base_flag + flag)
        return
    try:
        port.on_event(flag)
    except HypercallError:
        raise
    except VmbusError as error:
        partition.provider_failed(error)


def _signal_event(vp: "VirtualProcessor", data: bytes) -> None:
    connection_id, flag, reserved = struct.unpack("<IHH", data)
    signal_event(vp, connection_id, flag, reserved)


def _create_port(vp: "VirtualProcessor", data: bytes) -> None:
    (owner_id, port_id, vtl, _, _, peer_id, kind, _, word0, word1, _) = _CREATE_PORT.unpack(data)
    hypervisor = vp.partition.hypervisor
    owner = hypervisor.controlled(vp.partition, owner_id)
    peer = hypervisor.visible(vp.partition, peer_id)
    if not 0 < port_id <= MAX_CONNECTION_ID or port_id in owner.ports:
        raise HypercallError(Status.INVALID_PORT_ID)
    if vtl:
        raise HypercallError(Status.INVALID_PARAMETER)
    sint, target_vp = word0 & 0xFFFF_FFFF, word0 >> 32
    port = Port(owner, port_id, PortType.MESSAGE, target_vp, sint, peer)
    if kind == PortType.EVENT:
        port.kind = PortType.EVENT
        port.base_flag, port.flag_count = word1 & 0xFFFF, word1 >> 16 & 0xFFFF
        if not port.flag_count or port.base_flag + port.flag_count > EVENT_FLAGS_PER_SINT:
            raise HypercallError(Status.INVALID_PARAMETER)
    elif kind == PortType.MONITOR:
        port.kind = PortType.MONITOR
        port.monitor_gpa, port.target_sint, port.target_vp = word0, 0, ANY_VP
        if word0 & 0xFFF or not owner.memory.access(word0):
            raise HypercallError(Status.INVALID_PARAMETER)
    elif kind != PortType.MESSAGE:
        raise HypercallError(Status.INVALID_PARAMETER)
    if port.kind is not PortType.MONITOR:
        if sint >= SINT_COUNT:
            raise HypercallError(Status.INVALID_PARAMETER)
        if target_vp != ANY_VP and target_vp >= len(owner.vps):
            raise HypercallError(Status.INVALID_VP_INDEX)
    owner.ports[port_id] = port


def _delete_port(vp: "VirtualProcessor", data: bytes) -> None:
    owner_id, port_id, _ = _PORT_REFERENCE.unpack(data)
    owner = vp.partition.hypervisor.controlled(vp.partition, owner_id)
    port = owner.ports.pop(port_id, None)
    if port is None:
        raise HypercallError(Status.INVALID_PORT_ID)
    # Connections stay until their owner disconnects them, and lead nowhere (TLFS 11.10.2).
    port.flag_count = 0
    sever(port)


def sever(port: Port) -> None:
    """Remove every connection to `port`."""
    peer = port.connection_partition
    for connection_id in [i for i, c in peer.connections.items() if c.port is port]:
        del peer.connections[connection_id]
    port.connections = 0


def _connect_port(vp: "VirtualProcessor", data: bytes) -> None:
    (sender_id, connection_id, _, _, _, owner_id, port_id, _, kind, _, _, _) = _CONNECT_PORT.unpack(data)
    hypervisor = vp.partition.hypervisor
    sender = hypervisor.controlled(vp.partition, sender_id)
    owner = hypervisor.visible(vp.partition, owner_id)
    connect(sender, connection_id, owner.ports.get(port_id), kind)


def connect(sender: "Partition", connection_id: int, port: Port | None, kind: int) -> None:
    """Give `sender` the connection `connection_id` to `port`.

    Raises:
        HypercallError: INVALID_PORT_ID, INVALID_CONNECTION_ID (out of range or in use), ACCESS_DENIED (the port is for
            another partition), INVALID_PARAMETER (another kind of port).
    """
    if sender.state != PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    if port is None:
        raise HypercallError(Status.INVALID_PORT_ID)
    if not 0 < connection_id <= MAX_CONNECTION_ID or connection_id in sender.connections:
        raise HypercallError(Status.INVALID_CONNECTION_ID)
    if port.connection_partition is not sender:
        raise HypercallError(Status.ACCESS_DENIED)
    if kind != port.kind:
        raise HypercallError(Status.INVALID_PARAMETER)
    sender.connections[connection_id] = Connection(connection_id, port)
    port.connections += 1


def _disconnect_port(vp: "VirtualProcessor", data: bytes) -> None:
    sender_id, connection_id, _ = _PORT_REFERENCE.unpack(data)
    sender = vp.partition.hypervisor.controlled(vp.partition, sender_id)
    connection = sender.connections.pop(connection_id, None)
    if connection is None:
        raise HypercallError(Status.INVALID_CONNECTION_ID)
    connection.port.connections -= 1


CALLS: Final = (
    Call(CallCode.POST_MESSAGE, _post_message, 256, privilege=Privilege.POST_MESSAGES),
    Call(CallCode.SIGNAL_EVENT, _signal_event, 8, privilege=Privilege.SIGNAL_EVENTS),
    Call(CallCode.CREATE_PORT, _create_port, 56, privilege=Privilege.CREATE_PORT),
    Call(CallCode.DELETE_PORT, _delete_port, 16, privilege=Privilege.CREATE_PORT),
    Call(CallCode.CONNECT_PORT, _connect_port, 56, privilege=Privilege.CONNECT_PORT),
    Call(CallCode.DISCONNECT_PORT, _disconnect_port, 16, privilege=Privilege.CONNECT_PORT),
)
"""The hypercalls of this module."""
