"""The bytes of ata_pio.S; `tests/unit/test_guest_code.py` assembles the source and compares."""

__all__ = ["CODE", "ISR", "SPURIOUS", "START"]

START = 0x0
"""Offset of the entry: RDI = first request, ESI = number of requests, RSP = stack; ends with CLI, HLT."""
ISR = 0x25E
"""Offset of the interrupt handler of line 14."""
SPURIOUS = 0x281
"""Offset of the handler of other lines."""
CODE = bytes.fromhex(
    "fc 49 89 fc 41 89 f5 45 85 ed 74 24 41 0f b6 5c 24 15 45 0f b7 7c 24 16 45 8b 74 24 10 e8 12 00"
    "00 00 41 89 44 24 18 49 83 c4 20 41 ff cd eb d7 fa f4 eb fc 41 0f b6 44 24 14 83 f8 01 74 42 83"
    "f8 02 0f 84 8b 00 00 00 83 f8 03 0f 84 d4 00 00 00 83 f8 00 74 18 83 f8 04 0f 84 d7 00 00 00 83"
    "f8 05 0f 84 e7 00 00 00 b8 00 00 04 00 c3 b9 ec 00 00 00 41 be 01 00 00 00 41 bf 01 00 00 00 eb"
    "10 48 8d 15 08 02 00 00 89 d8 83 e0 03 0f b6 0c 02 e8 0f 01 00 00 49 8b 3c 24 e8 71 01 00 00 a8"
    "21 0f 85 d2 00 00 00 a8 08 0f 84 ca 00 00 00 e8 e0 00 00 00 ba f0 01 00 00 f6 c3 08 75 05 66 f3"
    "6d eb 08 66 ed 66 ab ff c9 75 f8 45 85 f6 75 ca 31 c0 c3 48 8d 15 ba 01 00 00 89 d8 83 e0 03 0f"
    "b6 0c 02 e8 bd 00 00 00 49 8b 34 24 e8 24 01 00 00 a8 21 0f 85 80 00 00 00 a8 08 74 7c e8 92 00"
    "00 00 ba f0 01 00 00 f6 c3 08 75 05 66 f3 6f eb 08 66 ad 66 ef ff c9 75 f8 e8 f2 00 00 00 45 85"
    "f6 75 ce eb 20 b9 e7 00 00 00 f6 c3 01 74 0c b9 ea 00 00 00 eb 05 b9 c6 00 00 00 e8 65 00 00 00"
    "e8 cb 00 00 00 a9 21 00 01 00 75 2d 31 c0 c3 b9 02 00 00 00 f6 c3 04 74 02 31 c9 ba f6 03 00 00"
    "8d 41 04 ee ec 89 c8 ee e8 a8 00 00 00 c7 05 21 01 00 00 00 00 00 00 eb cc 89 c1 81 e1 00 00 01"
    "00 88 c4 ba f1 01 00 00 ec 0f b7 c0 09 c8 0d 00 00 02 00 c3 44 89 f9 44 39 f1 41 0f 47 ce 41 29"
    "ce c1 e1 08 c3 49 8b 44 24 08 ba f6 01 00 00 f6 c3 01 75 0b 48 c1 e8 18 24 0f 0c e0 ee eb 29 b0"
    "40 ee 44 89 f0 c1 e8 08 ba f2 01 00 00 ee 49 8b 44 24 08 48 c1 e8 18 ff c2 ee 48 c1 e8 08 ff c2"
    "ee 48 c1 e8 08 ff c2 ee 44 89 f0 ba f2 01 00 00 ee 49 8b 44 24 08 ff c2 ee 48 c1 e8 08 ff c2 ee"
    "48 c1 e8 08 ff c2 ee 89 c8 ba f7 01 00 00 ee c3 f6 c3 04 75 2c ba f6 03 00 00 ec ba f7 01 00 00"
    "b9 40 42 0f 00 ec a8 80 74 13 3c ff 74 06 f3 90 ff c9 75 f1 0f b6 c0 0d 01 00 01 00 c3 0f b6 c0"
    "c3 fa 83 3d 4f 00 00 00 00 75 04 fb f4 eb f2 ff 0d 43 00 00 00 0f b6 05 40 00 00 00 fb c3 50 52"
    "ba f7 01 00 00 ec 88 05 30 00 00 00 ff 05 26 00 00 00 b8 b0 00 e0 fe c7 00 00 00 00 00 5a 58 48"
    "cf 50 b8 b0 00 e0 fe c7 00 00 00 00 00 58 48 cf 20 24 c4 29 30 34 c5 39 00 00 00 00 00 00 00 00"
)
