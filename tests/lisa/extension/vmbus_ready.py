"""What LISA's platform for machines that exist already leaves out, for guests of `vmbus boot`.

LISA imports this file as an extension (see ``run.py``). Its "ready" platform has no serial console and cannot reload a
network driver; cases that use either fail before they begin.
"""

import os
from pathlib import Path

from lisa import features
from lisa.feature import Feature
from lisa.sut_orchestrator.ready import ReadyPlatform
from lisa.tools import Modprobe
from lisa.util import LisaException


class SerialConsole(features.SerialConsole):
    """The console that `vmbus boot` prints, from the file where it is kept."""

    def _get_console_log(self, saved_path: Path | None) -> bytes:
        return Path(os.environ["VMBUS_LISA_CONSOLE"]).read_bytes()


class NetworkInterface(features.NetworkInterface):
    """Reloads hv_netvsc as LISA's other platforms do."""

    def reload_module(self) -> None:
        """Take the driver out and put it in again, once; the connection is back when this returns.

        Raises:
            LisaException: it was not reloaded.
        """
        result = self._node.tools[Modprobe].reload("hv_netvsc")
        if (
            not result.get("module_exists")
            or result.get("rmmod_count") != 1
            or result.get("insmod_count") != 1
        ):
            raise LisaException(f"hv_netvsc was not reloaded once: {result}")


def _supported() -> list[type[Feature]]:
    others = [
        feature
        for feature in _supported_before()
        if feature not in (features.NetworkInterface, features.SerialConsole)
    ]
    return [*others, SerialConsole, NetworkInterface]  # LISA finds them by the names of their classes


_supported_before = ReadyPlatform.supported_features
ReadyPlatform.supported_features = staticmethod(_supported)  # type: ignore[method-assign]
