"""The 64-bit Linux boot protocol: from a kernel file to a processor that can run it.

Takes a bzImage, entered at its 64-bit entry (it decompresses itself), or an uncompressed ELF kernel.
Facts: Linux ``Documentation/arch/x86/boot.rst`` and ``zero-page.rst``; offsets below are theirs.
"""

import logging
import struct
from dataclasses import dataclass
from typing import Final

from vmbus.core.memory import GuestMemory
from vmbus.errors import VmbusError, printable
from vmbus.machine.acpi import RESET_PORT, RESET_VALUE, AcpiTables

__all__ = ["BootError", "Entry", "Kernel", "KernelError", "SizeError", "load_linux", "parse_kernel"]

log = logging.getLogger(__name__)

# Where things lie below 1 MiB.
GDT_ADDRESS: Final = 0x1000
PAGE_TABLE_ADDRESS: Final = 0x2000
ZERO_PAGE_ADDRESS: Final = 0x9000
STACK_ADDRESS: Final = 0xB000
COMMAND_LINE_ADDRESS: Final = 0x2_0000
ACPI_ADDRESS: Final = 0xE_0000
LOW_MEMORY_END: Final = 0x9_FC00
HIGH_MEMORY_START: Final = 0x10_0000

RESET_VECTOR: Final = 0xF_FFF0
RESET_CODE: Final = bytes([0xB0, RESET_VALUE, 0xBA, *RESET_PORT.to_bytes(2, "little"), 0xEE, 0xF4])
"""MOV AL, value; MOV DX, port; OUT DX, AL; HLT in real mode: all that is left of a BIOS. Linux restarts a
hardware-reduced machine without EFI by a jump to the reset vector, not by the FADT's reset register."""

MOST_MEMORY: Final = 0xE000_0000
"""RAM ends where device addresses begin; more would need a second range above 4 GiB."""

CODE_SELECTOR: Final = 0x10
DATA_SELECTOR: Final = 0x18
CODE_DESCRIPTOR: Final = 0x00AF_9B00_0000_FFFF
DATA_DESCRIPTOR: Final = 0x00CF_9300_0000_FFFF

# The setup header, by offset into the file's first sector and into the zero page alike.
SETUP_SECTS: Final = 0x1F1
SYSSIZE: Final = 0x1F4
BOOT_FLAG: Final = 0x1FE
HEADER_LENGTH: Final = 0x201
MAGIC: Final = 0x202
PROTOCOL_VERSION: Final = 0x206
TYPE_OF_LOADER: Final = 0x210
RAMDISK_IMAGE: Final = 0x218
RAMDISK_SIZE: Final = 0x21C
CMD_LINE_PTR: Final = 0x228
INITRD_ADDR_MAX: Final = 0x22C
KERNEL_ALIGNMENT: Final = 0x230
RELOCATABLE: Final = 0x234
XLOADFLAGS: Final = 0x236
CMDLINE_SIZE: Final = 0x238
PREF_ADDRESS: Final = 0x258
INIT_SIZE: Final = 0x260
HEADER_END: Final = 0x264

# Other parts of the zero page.
ACPI_RSDP_ADDR: Final = 0x070
E820_ENTRIES: Final = 0x1E8
E820_TABLE: Final = 0x2D0

OLDEST_PROTOCOL: Final = 0x20C
"""2.12 (Linux 3.8): the first with xloadflags and so with a 64-bit entry that says that it is there."""
XLF_KERNEL_64: Final = 1 << 0
ENTRY_64: Final = 0x200
UNDEFINED_LOADER: Final = 0xFF
E820_RAM: Final = 1
E820_RESERVED: Final = 2

ELF_CLASS_64: Final = 2
ELF_MACHINE_X86_64: Final = 62
ELF_LOAD: Final = 1


class BootError(VmbusError):
    """The guest cannot be started: the kernel, initrd, command line or memory size does not fit."""


class KernelError(BootError):
    """The file is not a kernel that can be booted, or it is damaged."""


class SizeError(BootError):
    """Kernel, initrd or command line do not fit into the memory, or what they are given."""


@dataclass(frozen=True)
class Kernel:
    """A kernel file that can be loaded.

    Attributes:
        header: the setup header, from offset 0x1f1 of the boot sector; made up for an ELF kernel.
        segments: (guest physical address, contents) to load.
        entry: guest physical address to start at.
        end: first guest physical address behind everything that the kernel needs before it has read the memory map.
        command_line_size: longest command line, in bytes.
        initrd_limit: highest address that the initrd may occupy.
        compressed: it decompresses itself.
    """

    header: bytes
    segments: tuple[tuple[int, memoryview], ...]
    entry: int
    end: int
    command_line_size: int
    initrd_limit: int
    compressed: bool


@dataclass(frozen=True)
class Entry:
    """Registers to start a loaded kernel with; see `vmbus.core.cpu_unicorn.Cpu.enter_long_mode`."""

    rip: int
    rsi: int
    rsp: int
    cr3: int
    gdt: int
    code: int
    data: int


def parse_kernel(image: bytes) -> Kernel:
    """Recognise and check a kernel file.

    Raises:
        KernelError: it is not a kernel that can be booted, or it is truncated.
    """
    if image[:4] == b"\x7fELF":
        return _parse_elf(image)
    if (
        len(image) < 0x1000
        or image[MAGIC : MAGIC + 4] != b"HdrS"
        or image[BOOT_FLAG : BOOT_FLAG + 2] != b"\x55\xaa"
    ):
        raise KernelError("not a Linux kernel: neither a bzImage nor an ELF file")
    return _parse_bzimage(image)


def _parse_bzimage(image: bytes) -> Kernel:
    (version,) = struct.unpack_from("<H", image, PROTOCOL_VERSION)
    if version < OLDEST_PROTOCOL:
        raise KernelError(
            f"the kernel speaks boot protocol {version >> 8}.{version & 0xFF:02}; 2.12 is needed"
        )
    (flags,) = struct.unpack_from("<H", image, XLOADFLAGS)
    if not flags & XLF_KERNEL_64:
        raise KernelError("the kernel has no 64-bit entry point")
    start = ((image[SETUP_SECTS] or 4) + 1) * 512
    (paragraphs,) = struct.unpack_from("<I", image, SYSSIZE)
    if len(image) < start + paragraphs * 16 or not paragraphs:
        raise KernelError(f"the kernel is truncated: {len(image)} of {start + paragraphs * 16} bytes")
    (preferred,) = struct.unpack_from("<Q", image, PREF_ADDRESS)
    init_size, initrd_max = (struct.unpack_from("<I", image, at)[0] for at in (INIT_SIZE, INITRD_ADDR_MAX))
    (command_line_size,) = struct.unpack_from("<I", image, CMDLINE_SIZE)
    if preferred < HIGH_MEMORY_START or preferred + max(init_size, paragraphs * 16) > MOST_MEMORY:
        raise KernelError(f"the kernel asks for address {preferred:#x} and {init_size:#x} bytes")
    return Kernel(
        header=image[SETUP_SECTS : min(MAGIC + image[HEADER_LENGTH], HEADER_END)],
        segments=((preferred, memoryview(image)[start : start + paragraphs * 16]),),
        entry=preferred + ENTRY_64,
        end=preferred + max(init_size, paragraphs * 16),
        command_line_size=command_line_size,
        initrd_limit=initrd_max,
        compressed=True,
    )


def _parse_elf(image: bytes) -> Kernel:
    if len(image) < 64 or image[4] != ELF_CLASS_64:
        raise KernelError("not a 64-bit ELF kernel")
    machine, _, entry, table = struct.unpack_from("<HIQQ", image, 18)
    size, count = struct.unpack_from("<HH", image, 54)
    if machine != ELF_MACHINE_X86_64 or size < 56:
        raise KernelError("not an x86-64 ELF kernel")
    segments = []
    for at in range(table, table + size * count, size):
        if at + 56 > len(image):
            raise KernelError("the kernel is truncated: its program headers are missing")
        kind, _, offset, virtual, physical, in_file, in_memory = struct.unpack_from("<IIQQQQQ", image, at)
        if kind != ELF_LOAD:
            continue
        if offset + in_file > len(image):
            raise KernelError(f"the kernel is truncated: {len(image)} of {offset + in_file} bytes")
        if physical < HIGH_MEMORY_START or physical + max(in_memory, in_file) > MOST_MEMORY:
            raise KernelError(f"the ELF file wants to lie at {physical:#x}, where no kernel can")
        if in_file > in_memory:
            raise KernelError(f"the ELF file has {in_file} bytes for {in_memory} bytes of memory")
        if virtual <= entry < virtual + in_memory:
            entry = physical + entry - virtual
        segments.append((physical, memoryview(image)[offset : offset + in_file], in_memory))
    # Each byte of memory is loaded once at most: that is all that a file can make of its contents.
    loaded = HIGH_MEMORY_START
    for physical, data, _ in sorted(segments, key=lambda segment: segment[0]):
        if data and physical < loaded:
            raise KernelError(f"the ELF file loads twice what lies at {physical:#x}")
        loaded = max(loaded, physical + len(data))
    if not any(physical <= entry < physical + size for physical, _, size in segments):
        raise KernelError("the ELF file's entry point is outside of what it loads")
    header = bytearray(HEADER_END - SETUP_SECTS)
    struct.pack_into("<H", header, BOOT_FLAG - SETUP_SECTS, 0xAA55)
    header[MAGIC - SETUP_SECTS : MAGIC - SETUP_SECTS + 4] = b"HdrS"
    struct.pack_into("<H", header, PROTOCOL_VERSION - SETUP_SECTS, 0x20F)
    return Kernel(
        header=bytes(header),
        segments=tuple((physical, data) for physical, data, _ in segments),
        entry=entry,
        end=max(physical + size for physical, _, size in segments),
        command_line_size=2047,
        initrd_limit=0x7FFF_FFFF,
        compressed=False,
    )


def load_linux(
    memory: GuestMemory,
    kernel: Kernel,
    *,
    command_line: str = "",
    initrd: bytes = b"",
    acpi: AcpiTables | None = None,
) -> Entry:
    """Put kernel, initrd, command line, memory map and ACPI tables into empty guest memory.

    Raises:
        SizeError: something does not fit.
        BootError: the command line contains a NUL character.
    """
    if memory.size > MOST_MEMORY:
        raise SizeError(
            f"{memory.size >> 20} MiB of memory are too much: up to {MOST_MEMORY >> 20} MiB are supported"
        )
    if kernel.end > memory.size:
        raise SizeError(
            f"the kernel needs {-(-kernel.end >> 20)} MiB of memory, there are {memory.size >> 20} MiB"
        )
    arguments = command_line.encode(
        errors="surrogateescape"
    )  # bytes of a shell's command line that are no UTF-8
    if len(arguments) > kernel.command_line_size:
        raise SizeError(
            f"the command line has {len(arguments)} bytes, the kernel takes {kernel.command_line_size}"
        )
    if b"\0" in arguments:
        raise BootError("the command line contains a NUL character")
    for address, data in kernel.segments:
        log.debug("%d bytes of the kernel at 0x%x", len(data), address)
        memory.write(address, data)
    log.info(
        "a kernel that %s, entered at 0x%x, in %d MiB of memory",
        "unpacks itself" if kernel.compressed else "is unpacked",
        kernel.entry,
        memory.size >> 20,
    )
    log.debug("its command line: %s", printable(command_line, 2000))
    memory.write(COMMAND_LINE_ADDRESS, arguments + b"\0")

    zero_page = bytearray(4096)
    zero_page[SETUP_SECTS : SETUP_SECTS + len(kernel.header)] = kernel.header
    zero_page[TYPE_OF_LOADER] = UNDEFINED_LOADER
    struct.pack_into("<I", zero_page, CMD_LINE_PTR, COMMAND_LINE_ADDRESS)
    if initrd:
        # As high as it may lie, so that the kernel has the room behind itself.
        top = min(memory.size, kernel.initrd_limit + 1)
        address = top - len(initrd) & ~0xFFF if len(initrd) <= top else 0
        if address < kernel.end:
            raise SizeError(
                f"the initrd of {len(initrd) / (1 << 20):.1f} MiB does not fit into {memory.size >> 20} MiB "
                f"of memory beside the kernel ({-(-kernel.end >> 20)} MiB)"
            )
        memory.write(address, initrd)
        log.info("an initrd of %.1f MiB at 0x%x", len(initrd) / (1 << 20), address)
        struct.pack_into("<II", zero_page, RAMDISK_IMAGE, address, len(initrd))
    regions = [
        (0, LOW_MEMORY_END, E820_RAM),
        (ACPI_ADDRESS, HIGH_MEMORY_START - ACPI_ADDRESS, E820_RESERVED),
        (HIGH_MEMORY_START, memory.size - HIGH_MEMORY_START, E820_RAM),
    ]
    zero_page[E820_ENTRIES] = len(regions)
    for index, region in enumerate(regions):
        struct.pack_into("<QQI", zero_page, E820_TABLE + 20 * index, *region)
    if acpi is not None:
        memory.write(acpi.base, acpi.data)
        struct.pack_into("<Q", zero_page, ACPI_RSDP_ADDR, acpi.base)
    memory.write(ZERO_PAGE_ADDRESS, zero_page)
    memory.write(RESET_VECTOR, RESET_CODE)
    memory.write(GDT_ADDRESS, struct.pack("<4Q", 0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR))
    memory.write(PAGE_TABLE_ADDRESS, _identity_map())
    return Entry(
        rip=kernel.entry,
        rsi=ZERO_PAGE_ADDRESS,
        rsp=STACK_ADDRESS,
        cr3=PAGE_TABLE_ADDRESS,
        gdt=GDT_ADDRESS,
        code=CODE_SELECTOR,
        data=DATA_SELECTOR,
    )


def _identity_map() -> bytes:
    """Page tables that map the first 4 GiB onto themselves, in 2 MiB pages: six tables from `PAGE_TABLE_ADDRESS`."""
    present_writable, large = 3, 0x80
    top = [PAGE_TABLE_ADDRESS + 0x1000 | present_writable] + [0] * 511
    second = [PAGE_TABLE_ADDRESS + 0x2000 + 0x1000 * n | present_writable for n in range(4)] + [0] * 508
    third = [n << 21 | large | present_writable for n in range(2048)]
    return struct.pack("<3072Q", *top, *second, *third)
