"""The VMBus protocol versions and the features negotiated with them.

Sources: the versions that Linux's ``hv_vmbus`` asks for, OpenVMM's list of the older and newer ones, and the
products that introduced each.
"""

from enum import IntEnum, IntFlag

__all__ = ["DISCONNECTED", "SUPPORTED_FEATURES", "FeatureFlags", "Version", "features_of", "version_name"]

DISCONNECTED = 0
"""Minimum version of messages that are also taken while nothing has been negotiated."""


class Version(IntEnum):
    """A protocol version as INITIATE_CONTACT carries it: major in the upper, minor in the lower 16 bits."""

    V0_13 = 0x0000_000D
    """Server 2008 (OpenVMM: V1, Linux: VERSION_WS2008)."""
    V1_1 = 0x0001_0001
    """Server 2008 R2, Windows 7; guests of that time wait for UNLOAD_COMPLETE, older ones do not."""
    V2_4 = 0x0002_0004
    """Server 2012, Windows 8: sub-channels, a target VP and a dedicated connection for each channel."""
    V3_0 = 0x0003_0000
    """Server 2012 R2, Windows 8.1."""
    V4_0 = 0x0004_0000
    """Server 2016, Windows 10: hv_sock (TL_CONNECT_REQUEST), reserved channels."""
    V4_1 = 0x0004_0001
    """Windows 10 1709: MODIFY_CHANNEL and TL_CONNECT_REQUEST_RESULT."""
    V5_0 = 0x0005_0000
    """Windows 10 1709: INITIATE_CONTACT names a SINT, the answer names the connection to use from then on."""
    V5_1 = 0x0005_0001
    """Windows 10 1803."""
    V5_2 = 0x0005_0002
    """Server 2019: TL_CONNECT_REQUEST with a silo id."""
    V5_3 = 0x0005_0003
    """Server 2022: MODIFY_CHANNEL_RESPONSE."""
    V6_0 = 0x0006_0000
    """After Server 2022 (OpenVMM: Copper): feature flags, client id."""


class FeatureFlags(IntFlag):
    """Optional parts of `Version.V6_0`: asked for in INITIATE_CONTACT, granted in VERSION_RESPONSE."""

    NONE = 0
    GUEST_SPECIFIED_SIGNAL_PARAMETERS = 0x01
    """OPEN_CHANNEL carries the event flag (host to guest) and the connection id (guest to host)."""
    CHANNEL_INTERRUPT_REDIRECTION = 0x02
    """OPEN_CHANNEL may ask for the channel's interrupt to go to another SINT or VTL."""
    MODIFY_CONNECTION = 0x04
    """The monitor pages may be changed after the connection was made."""
    CLIENT_ID = 0x08
    """INITIATE_CONTACT carries the GUID by which the guest's VMBus driver identifies itself."""
    CONFIDENTIAL_CHANNELS = 0x10
    """Offers may demand encrypted rings and external memory (hardware-isolated guests only)."""
    PAUSE_RESUME = 0x20
    """The guest may stop the host's control messages and let them flow again."""
    SERVER_SPECIFIED_MONITOR_PAGES = 0x40
    """The host chooses the monitor pages, and names them in VERSION_RESPONSE."""
    GPA_PINNING = 0x80
    """Offers may demand pinned external memory."""


SUPPORTED_FEATURES = (
    FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    | FeatureFlags.MODIFY_CONNECTION
    | FeatureFlags.CLIENT_ID
    | FeatureFlags.PAUSE_RESUME
)
"""What both our ends implement. Redirection needs VTLs, the confidential flags need encrypted memory,
host-chosen monitor pages need an overlay that a guest without a paravisor has no place for, and nothing
here is swapped out."""


def features_of(version: int, asked: int, supported: int = SUPPORTED_FEATURES) -> FeatureFlags:
    """The feature flags that hold on a connection: none before `Version.V6_0`, else those known to both."""
    if version < Version.V6_0:
        return FeatureFlags.NONE
    return FeatureFlags(asked & supported)


def version_name(version: int) -> str:
    """The usual text of a version number: ``"5.3"``, also for unknown ones."""
    return f"{version >> 16}.{version & 0xFFFF}"
