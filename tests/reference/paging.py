"""The obvious way to translate: list everything that the page tables map, then look the address up.

Written from the rules in the processor manual and nothing of the product; slow on purpose.
"""

PAGE = 4096
ADDRESS = (1 << 40) - 1 & ~0xFFF


def mappings(read, cr3, nx_enabled):
    """Yield (first gva, size, first gpa, entries with rights, malformed) of everything that four levels map.

    `read(gpa)` gives the eight bytes there as an integer, None where there is no memory.
    """
    for i4, e4 in _entries(read, cr3 & ADDRESS):
        if _malformed(e4, nx_enabled) or e4 >> 7 & 1:
            yield i4 << 39, 1 << 39, 0, (e4,), True
            continue
        for i3, e3 in _entries(read, e4 & ADDRESS):
            at3 = i4 << 39 | i3 << 30
            if _malformed(e3, nx_enabled):
                yield at3, 1 << 30, 0, (e4, e3), True
                continue
            if e3 >> 7 & 1:
                yield at3, 1 << 30, e3 & ADDRESS & ~((1 << 30) - 1), (e4, e3), bool(e3 >> 13 & 0x1FFFF)
                continue
            for first, size, gpa, entries, malformed in _lower(read, e3, nx_enabled):
                yield at3 | first, size, gpa, (e4, e3, *entries), malformed


def pae_mappings(read, cr3, nx_enabled):
    """The same for PAE paging: four pointers without rights, then two levels."""
    for index in range(4):
        e3 = read((cr3 & 0xFFFF_FFE0) + 8 * index)
        if e3 is None or not e3 & 1:
            continue
        if e3 & 0x1E6 or e3 >> 40:
            yield index << 30, 1 << 30, 0, (), True
            continue
        for first, size, gpa, entries, malformed in _lower(read, e3, nx_enabled):
            yield index << 30 | first, size, gpa, entries, malformed or any(e >> 52 & 0x7FF for e in entries)


def legacy_mappings(read4, cr3, large_pages):
    """The same for 32-bit paging: two levels of 1024 four-byte entries."""
    for i2 in range(1024):
        e2 = read4((cr3 & 0xFFFF_F000) + 4 * i2)
        if e2 is None or not e2 & 1:
            continue
        if large_pages and e2 >> 7 & 1:
            gpa = e2 & 0xFFC0_0000 | (e2 >> 13 & 0xFF) << 32
            yield i2 << 22, 1 << 22, gpa, (e2,), bool(e2 >> 21 & 1)
            continue
        for i1 in range(1024):
            e1 = read4((e2 & 0xFFFF_F000) + 4 * i1)
            if e1 is not None and e1 & 1:
                yield i2 << 22 | i1 << 12, PAGE, e1 & 0xFFFF_F000, (e2, e1), False


def _lower(read, above, nx_enabled):
    """The two lowest levels of eight-byte entries."""
    for i2, e2 in _entries(read, above & ADDRESS):
        at2 = i2 << 21
        if _malformed(e2, nx_enabled):
            yield at2, 1 << 21, 0, (e2,), True
            continue
        if e2 >> 7 & 1:
            yield at2, 1 << 21, e2 & ADDRESS & ~((1 << 21) - 1), (e2,), bool(e2 >> 13 & 0xFF)
            continue
        for i1, e1 in _entries(read, e2 & ADDRESS):
            yield at2 | i1 << 12, PAGE, e1 & ADDRESS, (e2, e1), _malformed(e1, nx_enabled)


def _entries(read, table):
    for index in range(512):
        entry = read(table + 8 * index)
        if entry is not None and entry & 1:
            yield index, entry


def _malformed(entry, nx_enabled):
    return bool(entry >> 40 & 0xFFF) or bool(entry >> 63 and not nx_enabled)


def translate(
    mapped,
    gva,
    *,
    nx_enabled=True,
    write_protect=True,
    smep=False,
    smap=False,
    ac=False,
    write=False,
    execute=False,
    user=False,
):
    """The outcome for one access, among the mappings `mapped`.

    ("ok", gpa) or ("fault", present bit of the error code, reserved bit of it).
    """
    for first, size, gpa, entries, malformed in mapped:
        if not first <= gva < first + size:
            continue
        if malformed:
            return ("fault", 1, 1)
        writable = all(e >> 1 & 1 for e in entries)
        for_user = all(e >> 2 & 1 for e in entries)
        executable = not (nx_enabled and any(e >> 63 for e in entries))
        allowed = True
        if user and not for_user:
            allowed = False
        if write and not writable and (user or write_protect):
            allowed = False
        if execute and not executable:
            allowed = False
        if not user and for_user and execute and smep:
            allowed = False
        if not user and for_user and not execute and smap and not ac:
            allowed = False
        return ("ok", gpa | gva - first) if allowed else ("fault", 1, 0)
    return ("fault", 0, 0)
