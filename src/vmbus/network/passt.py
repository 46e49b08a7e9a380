"""An uplink to the host's own connections: a ``passt`` of its own, started here and ended with the uplink.

``passt`` (https://passt.top) is a DHCP server and a TCP/UDP/ICMP translator without privileges: what the guest opens
becomes an ordinary socket of the host. It gets one end of a socket pair, so there is no path to agree on, nobody
else can connect, and it goes when we go.
"""

import contextlib
import ipaddress
import logging
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Final

from vmbus.errors import DeviceError
from vmbus.network.uplink import StreamUplink, enlarge

__all__ = ["PasstUplink", "passt_network"]

log = logging.getLogger(__name__)

PROGRAM: Final = "passt"
ADDRESS: Final = "10.0.2.15"
GATEWAY: Final = "10.0.2.2"
END_LIMIT: Final = 2.0
"""Seconds that ``passt`` has to end by itself when its socket is closed."""
SYSLOG_NOISE: Final = b"Failed to send"
"""What it prints about each of its lines on a host without a system logger."""
NO_LOOPBACK: Final = "--no-map-gw"
"""Connections to the gateway's address are not the host's loopback; those to 127.0.0.1 itself end in
`PasstUplink.send`. Every version of passt has it; later ones know it as ``--map-host-loopback none``, too."""
IPV4_PROTOCOLS: Final = (1, 6, 17)
"""ICMP, TCP and UDP: what passt takes of IPv4."""
SHORTEST_FRAME: Final = 60
"""To which Ethernet adapters pad, the check sequence not counted."""


class PasstUplink(StreamUplink):
    """A `StreamUplink` to a ``passt`` process.

    The guest's network is ``address/24`` by DHCP, with `gateway` as its router; the defaults are those of QEMU's
    user-mode network. What the guest opens goes out as connections of this process's user: to the internet, and to
    whatever listens on the host's other addresses. What listens on the host's loopback only is out of its reach, unless
    `loopback` lets connections to `gateway` end there.

    Attributes:
        name: says what the guest gets, for messages.
        buffers: what `enlarge` got for the socket, at our end and at the end of ``passt``.
        process: the ``passt`` process.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        gateway: str | None = None,
        mtu: int | None = None,
        tcp: Sequence[str] = (),
        udp: Sequence[str] = (),
        loopback: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        """Start ``passt``.

        Args:
            address: the guest's IPv4 address; 10.0.2.15 if not given, or the 15th of the gateway's network.
            gateway: its router, in the same /24; 10.0.2.2 if not given, or the second of the address's network.
            mtu: what the guest is told over DHCP; nothing if not given.
            tcp: ports of the host that lead to the guest, each ``HOST:GUEST`` or one number for both.
            udp: the same for UDP.
            loopback: the guest may connect to services on the host's loopback, at the address of `gateway`: databases,
                debuggers and agents that listen there because they trust everybody who can.
            arguments: more for its command line.

        Raises:
            DeviceError: there is no ``passt``, it cannot be started, or `address` and `gateway` are not two hosts of
                one /24.
        """
        address, gateway = passt_network(address, gateway)
        program = shutil.which(PROGRAM)
        if program is None:
            raise DeviceError("no passt here: install the package passt, or use a TAP interface")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.buffers = enlarge(ours), enlarge(theirs)
        command = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno())]
        command += ["--address", address, "--netmask", "255.255.255.0", "--gateway", gateway]
        command += ["--mtu", str(mtu or 0)]
        if not loopback:
            command += [NO_LOOPBACK]
        for option, ports in (("--tcp-ports", tcp), ("--udp-ports", udp)):
            for port in ports:
                command += [option, port]
        self.name = f"passt ({address}, {'host' if loopback else 'router'} at {gateway})"
        self._loopback = loopback
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*command, *arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._said,
                )
        except OSError as error:
            ours.close()
            self._said.close()
            raise DeviceError(f"{program}: {error}") from error
        super().__init__(ours)
        log.info("%s: socket buffers of %d and %d bytes", self.name, self.buffers[0][0], self.buffers[1][0])

    def send(self, frames: Sequence[bytes]) -> None:
        """Queue and send frames, short ones without the padding that an Ethernet adapter adds.

        passt (up to 2023 at least) takes what is behind an IPv4 packet for data of its TCP connection. And it opens a
        connection to whatever address a packet names, 127.0.0.1 included, so that such frames end here.
        """
        if not self._loopback:
            allowed = [frame for frame in frames if not is_for_the_host_itself(frame)]
            if len(allowed) < len(frames):
                self.lose(len(frames) - len(allowed), "host's loopback")
                frames = allowed
        super().send([_unpadded(frame) if len(frame) == SHORTEST_FRAME else frame for frame in frames])

    def receive(self, limit: int = 64) -> list[bytes]:
        """Complete frames that have come in.

        Raises:
            DeviceError: ``passt`` has ended; says why.
        """
        try:
            return super().receive(limit)
        except DeviceError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(END_LIMIT)
                raise DeviceError(f"passt ended with status {status}: {self._last_words()}") from error
            raise

    def _last_words(self) -> str:
        if self._said.closed:
            return "closed"
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line and SYSLOG_NOISE not in line]
        return lines[-1].decode(errors="replace") if lines else "it said nothing"

    def close(self) -> None:
        """Close the socket, which ends ``passt``."""
        super().close()
        try:
            self.process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._said.close()


def passt_network(address: str | None, gateway: str | None) -> tuple[str, str]:
    """The guest's address and its router's, two hosts of one /24, where none, one or both are given.

    Raises:
        DeviceError: they are not.
    """
    if address is None and gateway is None:
        return ADDRESS, GATEWAY
    try:
        network = ipaddress.IPv4Network((address or gateway, 24), strict=False)
        first, last = network.network_address, network.broadcast_address
        # The other one stands where it stands by default, or beside it if that place is taken.
        guest = ipaddress.IPv4Address(address) if address else first + 15 + (gateway == str(first + 15))
        router = ipaddress.IPv4Address(gateway) if gateway else first + 2 - (address == str(first + 2))
    except ValueError as error:
        raise DeviceError(f"passt: {error}") from error
    if router not in network or guest == router or {guest, router} & {first, last}:
        raise DeviceError(f"passt: {guest} and {router} are not two hosts of one /24")
    if network.is_loopback or network.is_multicast or network.is_unspecified:
        raise DeviceError(f"passt: {network} is no network for a guest")
    return str(guest), str(router)


def is_for_the_host_itself(frame: bytes) -> bool:
    """Whether a packet's destination would be the host where a socket is connected to it, and no host on a wire.

    IPv4: 127/8, and 0/8 ("this host", which Linux takes for the loopback). IPv6: ::/96 with :: and ::1, the IPv4
    addresses in ::ffff:0:0/96, and groups that do not leave the host.
    """
    kind = frame[12:14]
    if kind == b"\x08\x00":
        return len(frame) > 30 and frame[23] in IPV4_PROTOCOLS and frame[30] in (0, 127)
    if kind == b"\x86\xdd":
        address = frame[38:54]
        return address[:12] in (bytes(12), bytes(10) + b"\xff\xff") or (
            address[:1] == b"\xff" and address[1:2] != b"" and address[1] & 15 <= 1
        )
    return False


def _unpadded(frame: bytes) -> bytes:
    """An IPv4 frame without what is behind its packet; others as they are."""
    end = 14 + int.from_bytes(frame[16:18], "big")
    return frame[:end] if frame[12:14] == b"\x08\x00" and 34 <= end < len(frame) else frame
