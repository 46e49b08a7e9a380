"""Page walks against the oracle that lists every mapping."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.paging import legacy_mappings, mappings, pae_mappings
from reference.paging import translate as oracle

from vmbus.core.memory import EXECUTE, READ, GuestMemory
from vmbus.hypervisor import Hypervisor, PageFault, VirtualClock
from vmbus.hypervisor.tlfs import RegisterName, TranslateResult
from vmbus.hypervisor.translate import Access, PagingState, walk

PG_WP = 1 << 31 | 1 << 16 | 1
PAE = 1 << 5
LMA_NXE = 1 << 8 | 1 << 10 | 1 << 11
P, W, U, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
SIZE = 64 << 20
STATE = PagingState(PG_WP, 0x1000, PAE, LMA_NXE)


@pytest.fixture
def memory():
    return GuestMemory(SIZE)


def put(memory, table, index, entry):
    memory.write(table + 8 * index, entry.to_bytes(8, "little"))


def reader(memory):
    def read(gpa):
        return int.from_bytes(memory.read(gpa, 8), "little") if gpa + 8 <= SIZE else None

    return read


def build(memory, *, leaf=P | W | U, upper=P | W | U):
    """gva 0x40_0000 + … : a 4 KiB page to 0x7000; gva 0x20_0000: a 2 MiB page to 0x80_0000; gva 1 GiB: a 1 GiB page."""
    put(memory, 0x1000, 0, 0x2000 | upper)
    put(memory, 0x2000, 0, 0x3000 | upper)
    put(memory, 0x2000, 1, 0 | leaf | PS)
    put(memory, 0x3000, 1, 0x80_0000 | leaf | PS)
    put(memory, 0x3000, 2, 0x4000 | upper)
    put(memory, 0x4000, 3, 0x7000 | leaf)


@pytest.mark.parametrize(
    ("gva", "gpa", "size"),
    [(0x40_3ABC, 0x7ABC, 4096), (0x2A_BCDE, 0x8A_BCDE, 2 << 20), ((1 << 30) + 0x12_3456, 0x12_3456, 1 << 30)],
)
def test_the_three_page_sizes(memory, gva, gpa, size):
    build(memory)
    found = walk(memory, STATE, gva, Access(write=True))
    assert (found.result, found.gpa, found.page_size) == (TranslateResult.SUCCESS, gpa, size)


def test_accessed_and_dirty_bits_only_when_asked(memory):
    build(memory)
    before = memory.read(0x1000, 0x4000)
    walk(memory, STATE, 0x40_3000, Access(write=True))
    assert memory.read(0x1000, 0x4000) == before
    walk(memory, STATE, 0x40_3000, Access(set_bits=True))
    read = reader(memory)
    assert [read(at) & (A | D) for at in (0x1000, 0x2000, 0x3010, 0x4018)] == [A, A, A, A]
    walk(memory, STATE, 0x40_3000, Access(write=True, set_bits=True))
    assert [read(at) & (A | D) for at in (0x1000, 0x2000, 0x3010, 0x4018)] == [A, A, A, A | D]


def test_error_codes(memory):
    build(memory, leaf=P | NX)
    cases = {
        (0x40_3000, Access(write=True)): 0b00011,
        (0x40_3000, Access(execute=True)): 0b10001,
        (0x40_3000, Access(user=True)): 0b00101,
        (0x40_4000, Access(user=True, write=True)): 0b00110,
        (0x8000_0000_0000, Access()): 0,
    }
    for (gva, access), code in cases.items():
        found = walk(memory, STATE, gva, access)
        assert found.result is not TranslateResult.SUCCESS
        assert found.error_code == code, hex(gva)


def test_second_level_rights(memory):
    build(memory)
    memory.protect(0x7000, 0x1000, READ)
    assert walk(memory, STATE, 0x40_3000, Access()).result is TranslateResult.SUCCESS
    assert walk(memory, STATE, 0x40_3000, Access(write=True)).result is TranslateResult.GPA_NO_WRITE_ACCESS
    memory.protect(0x7000, 0x1000, EXECUTE)
    assert walk(memory, STATE, 0x40_3000, Access()).result is TranslateResult.GPA_NO_READ_ACCESS
    memory.unmap(0x7000, 0x1000)
    assert walk(memory, STATE, 0x40_3000, Access()).result is TranslateResult.GPA_UNMAPPED
    memory.unmap(0x4000, 0x1000)
    assert walk(memory, STATE, 0x40_3000, Access()).result is TranslateResult.GPA_UNMAPPED


def test_tables_outside_of_memory(memory):
    put(memory, 0x1000, 0, SIZE | P | W | U)
    assert walk(memory, STATE, 0, Access()).result is TranslateResult.GPA_UNMAPPED
    beyond = PagingState(PG_WP, SIZE, PAE, LMA_NXE)
    assert walk(memory, beyond, 0, Access()).result is TranslateResult.GPA_UNMAPPED


def test_a_processor_translates_and_faults():
    hv = Hypervisor(clock=VirtualClock())
    vp = hv.create_child(hv.create_root(), "paged", memory_size=SIZE).vps[0]
    build(vp.partition.memory)
    assert vp.translate(0x1234) == 0x1234  # paging is off at reset
    vp.registers |= {
        RegisterName.CR0: PG_WP,
        RegisterName.CR3: 0x1000,
        RegisterName.CR4: PAE,
        RegisterName.EFER: LMA_NXE,
    }
    assert vp.translate(0x40_3010) == 0x7010
    with pytest.raises(PageFault) as caught:
        vp.translate(0x40_5000, Access(write=True))
    assert (caught.value.address, caught.value.error_code) == (0x40_5000, 2)


def test_pae_and_32_bit_tables(memory):
    pae = PagingState(PG_WP, 0x1020, PAE, 1 << 11)
    put(memory, 0x1020, 3, 0x2000 | P)
    put(memory, 0x2000, 5, 0x80_0000 | P | W | PS)
    put(memory, 0x2000, 6, 0x3000 | P | W)
    put(memory, 0x3000, 7, 0x9000 | P | W)
    found = walk(memory, pae, 0xC0AB_CDEF, Access(write=True))
    assert (found.result, found.gpa, found.page_size) == (TranslateResult.SUCCESS, 0x8B_CDEF, 2 << 20)
    found = walk(memory, pae, 0xC0C0_7123, Access(write=True, set_bits=True))
    assert (found.result, found.gpa, found.page_size) == (TranslateResult.SUCCESS, 0x9123, 4096)
    read = reader(memory)
    assert [read(at) & (A | D) for at in (0x1038, 0x2030, 0x3038)] == [0, A, A | D]
    put(memory, 0x1020, 3, 0x2000 | P | W)  # the pointers have no writable bit
    assert walk(memory, pae, 0xC0C0_7123, Access()).error_code == 0b1001
    plain, large = PagingState(PG_WP, 0x4000, 0, 0), PagingState(PG_WP, 0x4000, 1 << 4, 0)
    memory.write(0x4000 + 4 * 3, (0x40_0000 | P | W | PS).to_bytes(4, "little"))
    memory.write(0x40_0000 + 4 * 0x2A, (0xA000 | P | W).to_bytes(4, "little"))
    found = walk(memory, large, 0xC2_ABCD, Access(write=True))
    assert (found.result, found.gpa, found.page_size) == (TranslateResult.SUCCESS, 0x42_ABCD, 4 << 20)
    found = walk(
        memory, plain, 0xC2_ABCD, Access(write=True, set_bits=True)
    )  # without CR4.PSE the bit says nothing
    assert (found.result, found.gpa, found.page_size) == (TranslateResult.SUCCESS, 0xABCD, 4096)
    assert memory.read(0x40_0000 + 4 * 0x2A, 4) == (0xA000 | P | W | A | D).to_bytes(4, "little")
    memory.write(0x4000 + 4 * 3, (1 << 13 | P | PS).to_bytes(4, "little"))  # PSE-36: beyond 4 GiB
    assert walk(memory, large, 0xC0_0000, Access()).gpa == 1 << 32


FLAGS = st.integers(0, 0xF).map(lambda n: (n & 7) | (n & 8) << 4)
ENTRY = st.builds(
    lambda present, flags, frame, nx, junk: present | flags | frame << 12 | nx << 63 | junk,
    st.sampled_from([1, 1, 1, 0]),
    FLAGS,
    # Mostly among the tables themselves and low memory, sometimes beyond the end of it.
    st.one_of(st.integers(0, 15), st.sampled_from([0x200, 0x400, SIZE >> 12, 0xFFF_FFFF])),
    st.booleans(),
    st.sampled_from([0, 0, 0, 0, 1 << 45, 1 << 13, 1 << 55]),
)
INDEX = st.sampled_from([0, 1, 2, 511])
MODES = {
    "long": (PAE, 1 << 8 | 1 << 10),
    "pae": (PAE, 0),
    "legacy": (0, 0),
    "legacy with large pages": (1 << 4, 0),
}


def address(mode, indices, offset, canonical):
    """A virtual address out of table indices."""
    gva = offset
    for index, shift in zip(indices, (39, 30, 21, 12), strict=True):
        gva |= index << shift
    if mode != "long":
        return gva & 0xFFFF_FFFF
    if gva >> 47:
        gva |= 0xFFFF << 48
    return gva if canonical else gva ^ 1 << 50


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(1, 6), INDEX, ENTRY), min_size=1, max_size=24),
    indices=st.tuples(INDEX, INDEX, INDEX, INDEX),
    offset=st.integers(0, 4095),
    canonical=st.sampled_from([True, True, True, False]),
    write=st.booleans(),
    execute=st.booleans(),
    user=st.booleans(),
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_against_the_oracle(mode, entries, indices, offset, canonical, write, execute, user, switches):
    memory = GuestMemory(SIZE)
    for table, index, entry in entries:
        put(memory, table << 12, index, entry)
    nx, wp, smep, smap, ac = switches
    cr4, efer = MODES[mode]
    gva = address(mode, indices, offset, canonical)
    state = PagingState(
        1 << 31 | 1 | wp << 16, 0x1000, cr4 | smep << 20 | smap << 21, efer | nx << 11, 2 | ac << 18
    )
    access = Access(read=not execute, write=write and not execute, execute=execute, user=user)
    found = walk(memory, state, gva, access)
    # The oracle does not know about missing memory behind tables and pages; those outcomes are the partition's.
    if found.result is TranslateResult.GPA_UNMAPPED:
        assert found.gpa >= SIZE
        return
    read = reader(memory)
    nx = nx and not mode.startswith("legacy")
    if mode == "long":
        mapped = mappings(read, 0x1000, nx)
        low = gva & (1 << 48) - 1
        gva = low if canonical else -1  # what no table can map
    elif mode == "pae":
        mapped = pae_mappings(read, 0x1000, nx)
    else:
        mapped = legacy_mappings(
            lambda at: (read(at & ~7) or 0) >> 8 * (at & 4) & 0xFFFF_FFFF, 0x1000, cr4 != 0
        )
    expected = oracle(
        mapped,
        gva,
        nx_enabled=nx,
        write_protect=wp,
        smep=smep,
        smap=smap,
        ac=ac,
        write=access.write,
        execute=execute,
        user=user,
    )
    if found.result is TranslateResult.SUCCESS:
        assert expected == ("ok", found.gpa)
    else:
        assert expected == ("fault", found.error_code & 1, found.error_code >> 3 & 1)
        assert found.error_code >> 1 & 1 == access.write
        assert found.error_code >> 2 & 1 == user
        assert found.error_code >> 4 & 1 == (execute and nx)
