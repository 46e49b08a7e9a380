"""Page walks against the oracle that lists every mapping."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


FLAGS = st.integers(0, 0xF).map(lambda n: (n & 7) | (n & 8) << 4)
ENTRY = st.builds(
    lambda present, flags, frame, nx, junk: present | flags | frame << 12 | nx << 63 | junk,
    st.sampled_from([1, 1, 1, 0]),
    FLAGS,
    # Mostly among the tables themselves and low memory, sometimes beyond the end of it.
    st.one_of(st.integers(0, 15), st.sampled_from([0x200, 0x400, SIZE >> 12, 0xFFF_FFFF])),
    st.booleans(),
    st.sampled_from([0, 0, 0, 0, 1 << 45, 1 << 13]),
)
INDEX = st.sampled_from([0, 1, 2, 511])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(st.tuples(st.integers(1, 6), INDEX, ENTRY), min_size=1, max_size=24),
    indices=st.tuples(INDEX, INDEX, INDEX, INDEX),
    offset=st.integers(0, 4095),
    canonical=st.sampled_from([True, True, True, False]),
    write=st.booleans(),
    execute=st.booleans(),
    user=st.booleans(),
    modes=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_against_the_oracle(entries, indices, offset, canonical, write, execute, user, modes):
    memory = GuestMemory(SIZE)
    for table, index, entry in entries:
        put(memory, table << 12, index, entry)
    nx, wp, smep, smap, ac = modes
    gva = offset
    for index, shift in zip(indices, (39, 30, 21, 12), strict=True):
        gva |= index << shift
    if gva >> 47:
        gva |= 0xFFFF << 48
    if not canonical:
        gva ^= 1 << 50
    state = PagingState(
        1 << 31 | 1 | wp << 16,
        0x1000,
        PAE | smep << 20 | smap << 21,
        1 << 8 | 1 << 10 | nx << 11,
        2 | ac << 18,
    )
    access = Access(read=not execute, write=write and not execute, execute=execute, user=user)
    found = walk(memory, state, gva, access)
    # The oracle does not know about missing memory behind tables and pages; those outcomes are the partition's.
    if found.result is TranslateResult.GPA_UNMAPPED:
        assert found.gpa >= SIZE
        return
    expected = oracle(
        reader(memory),
        0x1000,
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
