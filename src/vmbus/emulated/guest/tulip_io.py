"""The bytes of tulip_io.S; `tests/unit/test_guest_code.py` assembles the source and compares."""

__all__ = ["CODE", "ISR", "RECEIVE", "SEND", "SPURIOUS"]

SEND = 0x0
"""Offset of the entry that sends: RDI = `Nic`, RSI = `FrameBuffer` array, EDX = its length, RSP = stack."""
RECEIVE = 0x8D
"""Offset of the entry that receives; the same registers."""
ISR = 0x17D
"""Offset of the interrupt handler of the adapter's line."""
SPURIOUS = 0x1B1
"""Offset of the handler of other lines."""
CODE = bytes.fromhex(
    "e8 31 01 00 00 45 39 f7 0f 83 1f 01 00 00 45 8b 44 24 0c 41 ff c8 45 8b 4c 24 20 44 89 c8 44 21"
    "c0 c1 e0 04 49 8b 5c 24 10 48 01 c3 83 3b 00 0f 88 f8 00 00 00 49 8b 45 00 89 43 08 41 8b 4d 08"
    "81 c9 00 00 00 60 41 ff c1 44 89 c8 d1 e0 44 21 c0 75 06 81 c9 00 00 00 80 45 85 c1 75 06 81 c9"
    "00 00 00 02 89 4b 04 c7 03 00 00 00 80 45 89 4c 24 20 b9 01 00 00 00 b8 01 00 00 00 e8 ca 00 00"
    "00 49 83 c5 10 41 ff c7 e9 78 ff ff ff e8 a4 00 00 00 fb 90 90 fa 45 39 f7 73 6f 45 8b 44 24 0c"
    "41 ff c8 41 8b 44 24 24 44 21 c0 c1 e0 04 49 8b 5c 24 18 48 01 c3 8b 03 85 c0 78 4e a9 00 80 00"
    "00 75 35 89 c1 81 e1 00 03 00 00 81 f9 00 03 00 00 75 25 c1 e8 10 25 ff 3f 00 00 83 e8 04 76 18"
    "41 89 45 08 89 c1 8b 73 08 49 8b 7d 00 f3 a4 49 83 c5 10 41 ff c7 eb 05 41 ff 44 24 34 c7 03 00"
    "00 00 80 41 ff 44 24 24 eb 8c 41 f7 44 24 28 80 00 00 00 74 18 41 81 64 24 28 7f ff ff ff b9 02"
    "00 00 00 b8 01 00 00 00 e8 1e 00 00 00 45 89 7c 24 30 fa f4 eb fc fc 48 89 3d 82 00 00 00 49 89"
    "fc 49 89 f5 41 89 d6 45 31 ff c3 48 8b 15 6e 00 00 00 83 7a 08 00 48 8b 12 48 8d 14 ca 75 03 89"
    "02 c3 ef c3 48 8b 15 55 00 00 00 83 7a 08 00 48 8b 12 48 8d 14 ca 75 03 8b 02 c3 ed c3 50 51 52"
    "b9 05 00 00 00 e8 da ff ff ff 48 8b 15 2f 00 00 00 09 42 28 ff 42 2c 25 ff ff 01 00 e8 aa ff ff"
    "ff b8 b0 00 e0 fe c7 00 00 00 00 00 5a 59 58 48 cf 50 b8 b0 00 e0 fe c7 00 00 00 00 00 58 48 cf"
    "00 00 00 00 00 00 00 00"
)
