"""Names of hypercalls for people: what the TLFS calls the numbers that guests pass and ledgers count."""

from typing import Final

__all__ = ["HYPERCALLS", "hypercall_name"]

_HYPERCALLS: Final = {
    0x0001: "SwitchVirtualAddressSpace",
    0x0002: "FlushVirtualAddressSpace",
    0x0003: "FlushVirtualAddressList",
    0x0004: "GetLogicalProcessorRunTime",
    0x0008: "NotifyLongSpinWait",
    0x000B: "SendSyntheticClusterIpi",
    0x000C: "ModifyVtlProtectionMask",
    0x000D: "EnablePartitionVtl",
    0x000E: "DisablePartitionVtl",
    0x000F: "EnableVpVtl",
    0x0010: "DisableVpVtl",
    0x0011: "VtlCall",
    0x0012: "VtlReturn",
    0x0013: "FlushVirtualAddressSpaceEx",
    0x0014: "FlushVirtualAddressListEx",
    0x0015: "SendSyntheticClusterIpiEx",
    0x0040: "CreatePartition",
    0x0041: "InitializePartition",
    0x0042: "FinalizePartition",
    0x0043: "DeletePartition",
    0x0044: "GetPartitionProperty",
    0x0045: "SetPartitionProperty",
    0x0046: "GetPartitionId",
    0x0047: "GetNextChildPartition",
    0x0048: "DepositMemory",
    0x0049: "WithdrawMemory",
    0x004A: "GetMemoryBalance",
    0x004B: "MapGpaPages",
    0x004C: "UnmapGpaPages",
    0x004D: "InstallIntercept",
    0x004E: "CreateVp",
    0x004F: "DeleteVp",
    0x0050: "GetVpRegisters",
    0x0051: "SetVpRegisters",
    0x0052: "TranslateVirtualAddress",
    0x0053: "ReadGpa",
    0x0054: "WriteGpa",
    0x0056: "ClearVirtualInterrupt",
    0x0058: "DeletePort",
    0x005A: "GetPortProperty",
    0x005B: "DisconnectPort",
    0x005C: "PostMessage",
    0x005D: "SignalEvent",
    0x005E: "SavePartitionState",
    0x005F: "RestorePartitionState",
    0x0069: "PostDebugData",
    0x006A: "RetrieveDebugData",
    0x006B: "ResetDebugSession",
    0x006C: "MapStatsPage",
    0x006D: "UnmapStatsPage",
    0x006E: "MapSparseGpaPages",
    0x006F: "SetSystemProperty",
    0x0070: "SetPortProperty",
    0x0076: "AddLogicalProcessor",
    0x0077: "RemoveLogicalProcessor",
    0x0078: "QueryNumaDistance",
    0x0079: "SetLogicalProcessorProperty",
    0x007A: "GetLogicalProcessorProperty",
    0x007B: "GetSystemProperty",
    0x007C: "MapDeviceInterrupt",
    0x007D: "UnmapDeviceInterrupt",
    0x007E: "RetargetDeviceInterrupt",
    0x0094: "AssertVirtualInterrupt",
    0x0095: "CreatePort",
    0x0096: "ConnectPort",
    0x0099: "StartVirtualProcessor",
    0x009A: "GetVpIndexFromApicId",
    0x00AF: "FlushGuestPhysicalAddressSpace",
    0x00B0: "FlushGuestPhysicalAddressList",
}

HYPERCALLS: Final = {code: f"HvCall{name}" for code, name in _HYPERCALLS.items()} | {
    0x8001: "HvExtCallQueryCapabilities",
    0x8002: "HvExtCallGetBootZeroedMemory",
    0x8003: "HvExtCallMemoryHeatHint",
}
"""Call code → name (TLFS appendix A; those that it leaves out as Linux `hvgdk.h` and OpenVMM `hvdef` have them)."""


def hypercall_name(code: int) -> str:
    """The name of a call code; a guest may pass any number, and one without a name stays hexadecimal."""
    return HYPERCALLS.get(code) or f"0x{code:x}"
