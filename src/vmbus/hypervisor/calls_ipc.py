"""Messages, events, ports and connections: the hypercalls between partitions (TLFS, inter-partition communication)."""

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
    PortProperty,
    PortType,
    Privilege,
    Status,
)
from vmbus.hypervisor.wire import (
    ConnectPort,
    CreatePort,
    GetPortProperty,
    PortReference,
    PostMessageHeader,
    SignalEvent,
)

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["CALLS", "connect", "delete_port", "signal_event"]

MAX_PORTS: Final = 65_536
"""Ports, and connections, of one partition: a bound on what one partition can make its host keep."""

PORT_COST: Final = 1024
"""Bytes of the host's memory that a port or a connection made by hypercall is charged with."""

# The members that the exit path compares with, without their attribute look-up.
_ACTIVE: Final = PartitionState.ACTIVE
_MESSAGE: Final = PortType.MESSAGE
_EVENT: Final = PortType.EVENT
_SIGNAL_EVENTS: Final = int(Privilege.SIGNAL_EVENTS)
_POST: Final = struct.Struct("<IIII")
assert _POST.size == PostMessageHeader.SIZE


def _port(partition: "Partition", connection_id: int, kind: PortType) -> Port:
    """The live port of that kind behind a connection of `partition`."""
    connection = partition.connections.get(connection_id)
    if connection is None:
        raise HypercallError(Status.INVALID_CONNECTION_ID)
    port = connection.port
    if port.deleted or port.kind is not kind or port.owner.state is not _ACTIVE:
        raise HypercallError(Status.INVALID_PORT_ID)
    return port


def _target(port: Port) -> "VirtualProcessor":
    return port.owner.vp(0 if port.target_vp == ANY_VP else port.target_vp)


def _post_message(vp: "VirtualProcessor", data: bytes) -> None:
    connection_id, reserved, message_type, size = _POST.unpack_from(
        data
    )  # as PostMessageHeader, on the hot path
    if reserved or size > MESSAGE_PAYLOAD_SIZE or not message_type or message_type & HYPERVISOR_MESSAGE:
        raise HypercallError(Status.INVALID_PARAMETER)
    port = _port(vp.partition, connection_id, _MESSAGE)
    payload = data[_POST.size : _POST.size + size]
    if port.on_message is None:
        _target(port).synic.post_message(port.target_sint, message_type, port.port_id, payload, port)
        port.posts += 1
        return
    port.posts += 1
    try:
        port.on_message(vp.index, message_type, payload)
    except HypercallError:
        raise
    except VmbusError as error:
        vp.partition.provider_failed(error)


def signal_event(vp: "VirtualProcessor", connection_id: int, flag: int, reserved: int) -> None:
    """HvCallSignalEvent.

    Raises:
        HypercallError: ACCESS_DENIED, INVALID_CONNECTION_ID, INVALID_PORT_ID, INVALID_PARAMETER (a flag beyond the
            port's), INVALID_SYNIC_STATE or INVALID_VP_INDEX of the target.
    """
    partition = vp.partition
    if not partition.privileges & _SIGNAL_EVENTS:
        raise HypercallError(Status.ACCESS_DENIED)
    port = _port(partition, connection_id, _EVENT)
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
    call = SignalEvent.unpack(data)
    signal_event(vp, call.connection_id, call.flag_number, call.reserved)


def _create_port(vp: "VirtualProcessor", data: bytes) -> None:
    call = CreatePort.unpack(data)
    hypervisor = vp.partition.hypervisor
    owner = hypervisor.controlled(vp.partition, call.port_partition_id)
    peer = hypervisor.visible(vp.partition, call.connection_partition_id)
    if owner.state is not PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    if not 0 < call.port_id <= MAX_CONNECTION_ID or call.port_id in owner.ports:
        raise HypercallError(Status.INVALID_PORT_ID)
    if len(owner.ports) >= MAX_PORTS:
        raise HypercallError(Status.INSUFFICIENT_MEMORY)
    if call.port_vtl or call.min_connection_vtl or call.reserved or call.reserved2:
        raise HypercallError(Status.INVALID_PARAMETER)
    low, high = call.port_info_low, call.port_info_high
    port = Port(owner, call.port_id, PortType.MESSAGE, low >> 32, low & 0xFFFF_FFFF, peer)
    if call.port_type == PortType.MONITOR:
        port.kind, port.monitor_gpa, port.target_sint, port.target_vp = PortType.MONITOR, low, 0, ANY_VP
        if low & 0xFFF or not owner.memory.access(low):
            raise HypercallError(Status.INVALID_PARAMETER)
    elif call.port_type == PortType.EVENT:
        port.kind, port.base_flag, port.flag_count = PortType.EVENT, high & 0xFFFF, high >> 16 & 0xFFFF
        if not port.flag_count or port.base_flag + port.flag_count > EVENT_FLAGS_PER_SINT:
            raise HypercallError(Status.INVALID_PARAMETER)
    elif call.port_type != PortType.MESSAGE:
        raise HypercallError(Status.INVALID_PARAMETER)
    if port.kind is not PortType.MONITOR and not 0 < port.target_sint < SINT_COUNT:
        # SINT0 is the hypervisor's own.
        raise HypercallError(Status.INVALID_PARAMETER)
    if port.target_vp != ANY_VP and port.target_vp >= len(owner.vps):
        raise HypercallError(Status.INVALID_VP_INDEX)
    owner.meter.host_memory.charge(PORT_COST)
    port.cost = PORT_COST
    owner.ports[call.port_id] = port


def _delete_port(vp: "VirtualProcessor", data: bytes) -> None:
    call = PortReference.unpack(data)
    owner = vp.partition.hypervisor.controlled(vp.partition, call.partition_id)
    port = owner.ports.get(call.id)
    if port is None:
        raise HypercallError(Status.INVALID_PORT_ID)
    delete_port(port)


def _port_property(vp: "VirtualProcessor", data: bytes) -> bytes:
    call = GetPortProperty.unpack(data)
    owner = vp.partition.hypervisor.controlled(vp.partition, call.partition_id)
    if owner.state is not PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    port = owner.ports.get(call.port_id)
    if port is None:
        raise HypercallError(Status.INVALID_PORT_ID)
    if call.reserved or call.reserved2:
        raise HypercallError(Status.INVALID_PARAMETER)
    if call.property_code == PortProperty.POST_COUNT:
        value = port.posts
    elif call.property_code == PortProperty.TARGET_VP:
        value = port.target_vp
    elif call.property_code == PortProperty.PREFERRED_TARGET_VP:
        value = 0 if port.target_vp == ANY_VP else port.target_vp
    elif call.property_code == PortProperty.MONITOR_ADDRESS and port.kind is PortType.MONITOR:
        value = port.monitor_gpa
    else:
        raise HypercallError(Status.UNKNOWN_PROPERTY)
    return value.to_bytes(8, "little")


def delete_port(port: Port) -> None:
    """Delete a port with the messages that wait in it. Connections to it stay, and lead nowhere."""
    port.deleted = True
    cost, port.cost = port.cost, 0
    port.owner.meter.host_memory.release(cost)
    port.owner.ports.pop(port.port_id, None)
    sender = port.connection_partition
    for connection in list(port.connections):  # they must not keep an owner that may be gone soon
        connection.port = Port(sender, port.port_id, port.kind, 0, 0, sender, deleted=True)
    port.connections.clear()
    if port.waiting:
        for vp in port.owner.vps:
            vp.synic.drop(port)


def _connect_port(vp: "VirtualProcessor", data: bytes) -> None:
    call = ConnectPort.unpack(data)
    hypervisor = vp.partition.hypervisor
    sender = hypervisor.controlled(vp.partition, call.connection_partition_id)
    owner = hypervisor.visible(vp.partition, call.port_partition_id)
    if call.connection_vtl or call.reserved or call.reserved2 or call.reserved3 or call.reserved4:
        raise HypercallError(Status.INVALID_PARAMETER)
    connect(sender, call.connection_id, owner.ports.get(call.port_id), call.port_type, PORT_COST)


def connect(sender: "Partition", connection_id: int, port: Port | None, kind: int, cost: int = 0) -> None:
    """Give `sender` the connection `connection_id` to `port`, and charge its guest with `cost` bytes of host memory.

    Raises:
        BudgetExceeded: it may not have that much.
        HypercallError: INVALID_PORT_ID, INVALID_CONNECTION_ID (out of range or in use), ACCESS_DENIED (the port is for
            another partition), INVALID_PARAMETER (another kind of port), INVALID_PARTITION_STATE.
    """
    if sender.state is not PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    if port is None:
        raise HypercallError(Status.INVALID_PORT_ID)
    if not 0 < connection_id <= MAX_CONNECTION_ID or connection_id in sender.connections:
        raise HypercallError(Status.INVALID_CONNECTION_ID)
    if port.connection_partition is not sender:
        raise HypercallError(Status.ACCESS_DENIED)
    if kind != port.kind:
        raise HypercallError(Status.INVALID_PARAMETER)
    if len(sender.connections) >= MAX_PORTS:
        raise HypercallError(Status.INSUFFICIENT_MEMORY)
    sender.meter.host_memory.charge(cost)
    connection = Connection(connection_id, port, cost)
    port.connections.add(connection)
    sender.connections[connection_id] = connection
    if port.deleted:  # by another thread, which did not see this one
        delete_port(port)


def _disconnect_port(vp: "VirtualProcessor", data: bytes) -> None:
    call = PortReference.unpack(data)
    sender = vp.partition.hypervisor.controlled(vp.partition, call.partition_id)
    connection = sender.connections.pop(call.id, None)
    if connection is None:
        raise HypercallError(Status.INVALID_CONNECTION_ID)
    sender.meter.host_memory.release(connection.cost)
    connection.port.connections.discard(connection)


CALLS: Final = (
    Call(
        CallCode.POST_MESSAGE,
        _post_message,
        PostMessageHeader.SIZE + MESSAGE_PAYLOAD_SIZE,
        privilege=Privilege.POST_MESSAGES,
    ),
    Call(CallCode.SIGNAL_EVENT, _signal_event, SignalEvent.SIZE, privilege=Privilege.SIGNAL_EVENTS),
    Call(CallCode.CREATE_PORT, _create_port, CreatePort.SIZE, privilege=Privilege.CREATE_PORT),
    Call(CallCode.DELETE_PORT, _delete_port, PortReference.SIZE, privilege=Privilege.CREATE_PORT),
    Call(
        CallCode.GET_PORT_PROPERTY, _port_property, GetPortProperty.SIZE, 8, privilege=Privilege.CREATE_PORT
    ),
    Call(CallCode.CONNECT_PORT, _connect_port, ConnectPort.SIZE, privilege=Privilege.CONNECT_PORT),
    Call(CallCode.DISCONNECT_PORT, _disconnect_port, PortReference.SIZE, privilege=Privilege.CONNECT_PORT),
)
"""The hypercalls of this module."""
