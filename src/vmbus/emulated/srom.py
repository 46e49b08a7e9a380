"""The serial ROM of a network card: a 93C46 behind four bits of a register.

Protocol: National Semiconductor NM93C46 data sheet. A start bit, two bits of opcode and six of address go in on
rising edges of the clock, then a zero and sixteen bits of data come out, most significant bit first. Only READ does
something; the content is the manufacturer's.
"""

import struct
from binascii import crc32
from typing import Final

__all__ = ["LINK_PIN", "SerialRom", "tulip_rom"]

WORDS = 64
ADDRESS_BITS = 6
READ = 0b10
LINK_PIN = 1 << 7
"""The general-purpose pin that is low while the cable is connected."""
LINK_SENSE = 7 << 1 | 0x80
"""Says so in a medium's command: the pin's number in bits 1 to 3, and bit 7 for "active low". Linux looks at it every
few seconds and sends nothing without a link."""


class SerialRom:
    """A 93C46 with 64 words.

    Args:
        content: up to 128 bytes.

    Attributes:
        output: the data output line: 0 or 1.
    """

    def __init__(self, content: bytes) -> None:
        self._words = struct.unpack(f"<{WORDS}H", content.ljust(2 * WORDS, b"\0")[: 2 * WORDS])
        self._clock = 0
        self._command = 0
        self._bits = 0
        self._left = 0
        self._data = 0
        self.output = 1

    def lines(self, select: int, clock: int, data: int) -> None:
        """Set the three input lines."""
        rising = clock and not self._clock
        self._clock = clock
        if not select:
            self._bits = self._command = self._left = 0
            self.output = 1
        elif rising:
            self._edge(1 if data else 0)

    def _edge(self, bit: int) -> None:
        if self._left:
            self._left -= 1
            self.output = self._data >> self._left & 1
            if not self._left:  # goes on with the next word
                self._command = self._command + 1 & WORDS - 1
                self._data, self._left = self._words[self._command], 16
            return
        if not self._bits and not bit:  # still waiting for the start bit
            return
        self._command = self._command << 1 | bit
        self._bits += 1
        if self._bits == 1 + 2 + ADDRESS_BITS:
            opcode, address = self._command >> ADDRESS_BITS & 3, self._command & WORDS - 1
            self._bits = self._command = 0
            if opcode == READ:
                self._command = address
                self._data, self._left = self._words[address], 16
                self.output = 0


TULIP_SUBSYSTEM: Final = (0x0A00, 0x2114)
"""Subsystem vendor and subsystem of Hyper-V's legacy adapter. Windows' in-box driver takes no 21140A with another
identity (PCI\\VEN_1011&DEV_0009&SUBSYS_21140A00&REV_20)."""


def tulip_rom(address: bytes) -> bytes:
    """The content that a DEC 21140 card's driver expects (Digital's serial ROM format, version 3).

    Args:
        address: the card's Ethernet address.
    """
    rom = bytearray(126)
    struct.pack_into(
        "<HH", rom, 0, *TULIP_SUBSYSTEM
    )  # from here the chip loads what its configuration space shows
    rom[18] = 3  # format version
    rom[19] = 1  # controllers
    rom[20:26] = address
    rom[26] = 0  # its device number
    struct.pack_into("<H", rom, 27, 30)  # where its information leaf is
    # the leaf: autosense, general purpose control (pins 0 to 4 are outputs), one medium: 100BaseTX, data, command
    struct.pack_into("<HBBBBH", rom, 30, 0x0800, 0x1F, 1, 3, 0x00, LINK_SENSE)
    return bytes(rom) + struct.pack("<H", crc32(rom) & 0xFFFF)
