"""Guest virtual to guest physical addresses: the page walk of a virtual processor (SDM volume 3, chapter 4).

Four-level paging with 4 KiB, 2 MiB and 1 GiB pages, PAE and 32-bit paging with their large pages, and the identity
while paging is off. The walk reads each table entry once and checks rights as the processor does: present, reserved
bits, read/write with CR0.WP, user/supervisor with SMEP and SMAP, execute-disable. The second
translation, guest physical to system physical, is the partition's memory map (`GuestMemory`).
"""

from dataclasses import dataclass
from typing import Final

from vmbus.core.memory import READ, WRITE, GuestMemory
from vmbus.errors import GuestMemoryError
from vmbus.hypervisor.cpuid import PHYSICAL_ADDRESS_BITS
from vmbus.hypervisor.tlfs import TranslateResult

__all__ = ["READ_ACCESS", "Access", "PagingState", "Translation", "walk"]

CR0_PG: Final = 1 << 31
CR0_WP: Final = 1 << 16
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11
RFLAGS_AC: Final = 1 << 18

PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
USER: Final = 1 << 2
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
LARGE: Final = 1 << 7
NO_EXECUTE: Final = 1 << 63
_ADDRESS: Final = (1 << PHYSICAL_ADDRESS_BITS) - 1 & ~0xFFF
_RESERVED: Final = (1 << 52) - 1 & ~((1 << PHYSICAL_ADDRESS_BITS) - 1)

ERROR_PRESENT: Final = 1
ERROR_WRITE: Final = 2
ERROR_USER: Final = 4
ERROR_RESERVED: Final = 8
ERROR_FETCH: Final = 16


@dataclass(frozen=True, slots=True)
class PagingState:
    """The registers that steer a walk."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    rflags: int = 2


@dataclass(frozen=True, slots=True)
class Access:
    """What is wanted at the address.

    Attributes:
        read: a load; a walk with none of the three only looks whether the address is mapped.
        write: a store.
        execute: an instruction fetch.
        user: made at privilege level 3.
        exempt: no user/supervisor checks at all (HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT).
        set_bits: set accessed and dirty bits in the tables.
    """

    read: bool = True
    write: bool = False
    execute: bool = False
    user: bool = False
    exempt: bool = False
    set_bits: bool = False


READ_ACCESS: Final = Access()


@dataclass(frozen=True, slots=True)
class Translation:
    """The outcome of a walk.

    Attributes:
        result: `TranslateResult`.
        gpa: the guest physical address, if it succeeded.
        page_size: bytes of the page that maps it: 4096, 2 MiB or 1 GiB.
        error_code: what #PF would push, if it failed in the guest's own tables.
    """

    result: TranslateResult
    gpa: int = 0
    page_size: int = 4096
    error_code: int = 0


@dataclass(frozen=True, slots=True)
class _Format:
    """One way of paging: how the tables of a walk look.

    Attributes:
        shifts: the address bit at which each level's index begins, from the top.
        entry_size: bytes of an entry.
        root_mask: the address bits of CR3.
        large: the levels, by shift, whose entries may map a page.
        reserved: bits that must be zero in every present entry.
        bare_root: the top level's entries carry no rights (the four pointers of PAE paging).
        linear_bits: how many bits of an address count.
    """

    shifts: tuple[int, ...]
    entry_size: int
    root_mask: int
    large: frozenset[int]
    reserved: int
    bare_root: bool
    linear_bits: int


_LONG: Final = _Format((39, 30, 21, 12), 8, _ADDRESS, frozenset({30, 21}), _RESERVED, False, 64)
_PAE: Final = _Format((30, 21, 12), 8, 0xFFFF_FFE0, frozenset({21}), _RESERVED | 0x7FF << 52, True, 32)
_LEGACY: Final = _Format((22, 12), 4, 0xFFFF_F000, frozenset(), 0, False, 32)
_LEGACY_PSE: Final = _Format((22, 12), 4, 0xFFFF_F000, frozenset({22}), 0, False, 32)
_PAE_ROOT_RESERVED: Final = 0x1E6 | NO_EXECUTE
"""Bits of a PAE page directory pointer that are reserved beside the common ones: 8:5, 2:1, 63."""


def _format(state: PagingState) -> _Format:
    if not state.cr4 & CR4_PAE:
        return _LEGACY_PSE if state.cr4 & CR4_PSE else _LEGACY
    return _LONG if state.efer & EFER_LMA else _PAE


def walk(memory: GuestMemory, state: PagingState, gva: int, access: Access) -> Translation:
    """Translate `gva`.

    Returns:
        SUCCESS with the address; PAGE_NOT_PRESENT, PRIVILEGE_VIOLATION or INVALID_PAGE_TABLE_FLAGS with the
        error code of the #PF; GPA_UNMAPPED, GPA_NO_READ_ACCESS or GPA_NO_WRITE_ACCESS where the partition itself has
        no such memory or rights.
    """
    if not state.cr0 & CR0_PG:
        return _second_level(memory, gva & 0xFFFF_FFFF, 4096, access)
    form = _format(state)
    execute_disable = bool(state.efer & EFER_NXE) and form.entry_size == 8
    base_error = (
        (ERROR_WRITE if access.write else 0)
        | (ERROR_USER if access.user else 0)
        | (ERROR_FETCH if access.execute and execute_disable else 0)
    )
    if form is _LONG:
        if gva >> 47 not in (0, 0x1FFFF):
            return Translation(TranslateResult.PAGE_NOT_PRESENT, error_code=base_error)
    else:
        gva &= 0xFFFF_FFFF
    reserved = form.reserved
    if form.entry_size == 8 and not execute_disable:
        reserved |= NO_EXECUTE
    table = state.cr3 & form.root_mask
    rights, no_execute = WRITABLE | USER, 0
    visited: list[tuple[int, int]] = []
    entry, shift, large = 0, 0, False
    index_mask = 0x1FF if form.entry_size == 8 else 0x3FF
    for shift in form.shifts:
        root = form.bare_root and shift == form.shifts[0]
        at = table + (gva >> shift & (3 if root else index_mask)) * form.entry_size
        loaded = _load(memory, at, form.entry_size)
        if loaded is None:
            return Translation(TranslateResult.GPA_UNMAPPED, at & ~0xFFF)
        entry = loaded
        if not entry & PRESENT:
            return Translation(TranslateResult.PAGE_NOT_PRESENT, error_code=base_error)
        large = bool(entry & LARGE) and shift in form.large
        if _malformed(entry, shift, large, root, reserved, form):
            error = base_error | ERROR_PRESENT | ERROR_RESERVED
            return Translation(TranslateResult.INVALID_PAGE_TABLE_FLAGS, error_code=error)
        if not root:
            rights &= entry
            no_execute |= entry & NO_EXECUTE
            visited.append((at, entry))
        if large:
            break
        table = entry & _ADDRESS
    if not _allowed(state, access, rights, bool(no_execute)):
        return Translation(TranslateResult.PRIVILEGE_VIOLATION, error_code=base_error | ERROR_PRESENT)
    offset = (1 << shift) - 1
    gpa = entry & _ADDRESS & ~offset | gva & offset
    if large and form.entry_size == 4:
        gpa |= (entry >> 13 & 0xFF) << 32  # PSE-36: the upper address bits of a 4 MiB page
    done = _second_level(memory, gpa, 1 << shift, access)
    if done.result is TranslateResult.SUCCESS and access.set_bits:
        _mark(memory, visited, access.write, form.entry_size)
    return done


def _malformed(entry: int, shift: int, large: bool, root: bool, reserved: int, form: _Format) -> bool:
    """Whether a present entry sets bits that it must not set."""
    if entry & reserved or (root and entry & _PAE_ROOT_RESERVED):
        return True
    if form is _LONG and shift == 39 and entry & LARGE:
        return True
    if not large:
        return False
    if form.entry_size == 4:
        return bool(entry & 1 << 21)
    return bool(
        entry & ((1 << shift) - 1) & ~0x1FFF
    )  # address bits below the page's size; bit 12 is its PAT bit


def _load(memory: GuestMemory, gpa: int, size: int) -> int | None:
    try:
        return int.from_bytes(memory.read(gpa, size), "little")
    except GuestMemoryError:
        return None


def _allowed(state: PagingState, access: Access, rights: int, no_execute: bool) -> bool:
    user_page = bool(rights & USER)
    if access.execute and no_execute and state.efer & EFER_NXE:
        return False
    if access.exempt:
        return not access.write or bool(rights & WRITABLE) or not state.cr0 & CR0_WP
    if access.user:
        return user_page and (not access.write or bool(rights & WRITABLE))
    if user_page:
        if access.execute and state.cr4 & CR4_SMEP:
            return False
        if (access.read or access.write) and state.cr4 & CR4_SMAP and not state.rflags & RFLAGS_AC:
            return False
    return not access.write or bool(rights & WRITABLE) or not state.cr0 & CR0_WP


def _second_level(memory: GuestMemory, gpa: int, page_size: int, access: Access) -> Translation:
    have = memory.access(gpa)
    if not have:
        return Translation(TranslateResult.GPA_UNMAPPED, gpa, page_size)
    if access.write and not have & WRITE:
        return Translation(TranslateResult.GPA_NO_WRITE_ACCESS, gpa, page_size)
    if (access.read or access.execute) and not have & READ:
        return Translation(TranslateResult.GPA_NO_READ_ACCESS, gpa, page_size)
    return Translation(TranslateResult.SUCCESS, gpa, page_size)


def _mark(memory: GuestMemory, visited: list[tuple[int, int]], write: bool, entry_size: int) -> None:
    leaf = len(visited) - 1
    for level, (at, entry) in enumerate(visited):
        new = entry | ACCESSED | (DIRTY if write and level == leaf else 0)
        if new == entry:
            continue
        try:
            memory.write(at, new.to_bytes(entry_size, "little"))
        except GuestMemoryError:
            return  # tables in pages that the guest may only read keep their bits
