from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

def crc32c(data: Buffer, value: int = 0) -> int: ...
