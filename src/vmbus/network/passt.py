"""An uplink to the host's own connections: a ``passt`` of its own, started here and ended with the uplink.

``passt`` (https://passt.top) is a DHCP server and a TCP/UDP/ICMP translator without privileges: what the guest opens
becomes an ordinary socket of the host. It gets one end of a socket pair, so there is no path to agree on, nobody
else can connect, and it goes when we go.
"""

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Final

from vmbus.errors import DeviceError
from vmbus.network.uplink import StreamUplink

__all__ = ["PasstUplink"]

PROGRAM: Final = "passt"
END_LIMIT: Final = 2.0
"""Seconds that ``passt`` has to end by itself when its socket is closed."""
SYSLOG_NOISE: Final = b"Failed to send"
"""What it prints about each of its lines on a host without a system logger."""
SHORTEST_FRAME: Final = 60
"""To which Ethernet adapters pad, the check sequence not counted."""


class PasstUplink(StreamUplink):
    """A `StreamUplink` to a ``passt`` process.

    The guest's network is ``address/24`` by DHCP, with `gateway` as its router; connections to `gateway` itself end at
    the host's loopback. The defaults are those of QEMU's user-mode network.

    Attributes:
        name: says what the guest gets, for messages.
        process: the ``passt`` process.
    """

    def __init__(
        self,
        *,
        address: str = "10.0.2.15",
        gateway: str = "10.0.2.2",
        mtu: int | None = None,
        tcp: Sequence[str] = (),
        udp: Sequence[str] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        """Start ``passt``.

        Args:
            address: the guest's IPv4 address.
            gateway: its router, in the same /24.
            mtu: what the guest is told over DHCP; nothing if not given.
            tcp: ports of the host that lead to the guest, each ``HOST:GUEST`` or one number for both.
            udp: the same for UDP.
            arguments: more for its command line.

        Raises:
            DeviceError: there is no ``passt``, or it cannot be started.
        """
        program = shutil.which(PROGRAM)
        if program is None:
            raise DeviceError("no passt here: install the package passt, or use a TAP interface")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno())]
        command += ["--address", address, "--netmask", "255.255.255.0", "--gateway", gateway]
        command += ["--mtu", str(mtu or 0)]
        for option, ports in (("--tcp-ports", tcp), ("--udp-ports", udp)):
            for port in ports:
                command += [option, port]
        self.name = f"passt ({address}, host at {gateway})"
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

    def send(self, frames: Sequence[bytes]) -> None:
        """Queue and send frames, short ones without the padding that an Ethernet adapter adds.

        passt (up to 2023 at least) takes what is behind an IPv4 packet for data of its TCP connection.
        """
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


def _unpadded(frame: bytes) -> bytes:
    """An IPv4 frame without what is behind its packet; others as they are."""
    end = 14 + int.from_bytes(frame[16:18], "big")
    return frame[:end] if frame[12:14] == b"\x08\x00" and 34 <= end < len(frame) else frame
