"""Partitions, virtual processors, the synthetic interrupt controller and hypercalls (TLFS)."""

from vmbus.hypervisor.budget import Allowance, Budget, Meter
from vmbus.hypervisor.clock import Clock, HostClock, VirtualClock
from vmbus.hypervisor.faults import (
    GeneralProtectionFault,
    GuestFault,
    PageFault,
    UndefinedOpcodeFault,
    VpSuspended,
)
from vmbus.hypervisor.hypervisor import Hypervisor
from vmbus.hypervisor.partition import CrashReport, Partition, PartitionEvent
from vmbus.hypervisor.personality import PERSONALITIES, Personality
from vmbus.hypervisor.process import ChildProcess
from vmbus.hypervisor.remote import RemotePartition, RemoteProcessor
from vmbus.hypervisor.sandbox import Sandbox
from vmbus.hypervisor.vp import VirtualProcessor

__all__ = [
    "PERSONALITIES",
    "Allowance",
    "Budget",
    "ChildProcess",
    "Clock",
    "CrashReport",
    "GeneralProtectionFault",
    "GuestFault",
    "HostClock",
    "Hypervisor",
    "Meter",
    "PageFault",
    "Partition",
    "PartitionEvent",
    "Personality",
    "RemotePartition",
    "RemoteProcessor",
    "Sandbox",
    "UndefinedOpcodeFault",
    "VirtualClock",
    "VirtualProcessor",
    "VpSuspended",
]
