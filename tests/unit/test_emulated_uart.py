import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.emulated.uart import Uart16550
from vmbus.trace.ledger import Account

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
OUT2 = 0x08


class Terminal:
    def __init__(self) -> None:
        self.sent = bytearray()
        self.levels: list[bool] = []
        self.account = Account()
        self.uart = Uart16550(self.sent.extend, self.levels.append, self.account)

    def read(self, register: int) -> int:
        return self.uart.io_read(0x3F8 + register, 1)

    def write(self, register: int, value: int) -> None:
        self.uart.io_write(0x3F8 + register, 1, value)


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def test_polled_transmission(terminal: Terminal) -> None:
    for byte in b"hello\r\n":
        assert terminal.read(LSR) & 0x60 == 0x60
        terminal.write(DATA, byte)
    assert bytes(terminal.sent) == b"hello\r\n"
    assert terminal.account.bytes_copied == 7
    assert terminal.levels == []


def test_divisor_latch_hides_data_and_interrupt_enable(terminal: Terminal) -> None:
    terminal.write(IER, 0x05)
    terminal.write(LCR, 0x83)
    terminal.write(DATA, 0x01)
    terminal.write(IER, 0x00)
    assert terminal.uart.divisor == 1
    assert (terminal.read(DATA), terminal.read(IER)) == (1, 0)
    terminal.write(LCR, 0x03)
    assert terminal.read(IER) == 0x05
    assert not terminal.sent


def test_registers_that_probes_of_the_16550_write_and_read_back(terminal: Terminal) -> None:
    terminal.write(IER, 0xFF)
    assert terminal.read(IER) == 0x0F
    terminal.write(IER, 0)
    terminal.write(SCR, 0xA5)
    assert terminal.read(SCR) == 0xA5
    assert terminal.read(IIR) == 0x01
    terminal.write(FCR, 0x01)
    assert terminal.read(IIR) == 0xC1
    terminal.write(FCR, 0x00)
    assert terminal.read(IIR) == 0x01
    terminal.write(MCR, 0x1A)  # loopback with RTS and OUT2: CTS and DCD
    assert terminal.read(MSR) & 0xF0 == 0x90


def test_transmitter_interrupt_is_raised_acknowledged_and_raised_again(terminal: Terminal) -> None:
    terminal.write(MCR, OUT2)
    terminal.write(IER, 0x02)
    assert terminal.levels == [True]
    assert terminal.read(IIR) == 0x02
    assert terminal.levels == [True, False]
    assert terminal.read(IIR) == 0x01
    terminal.write(DATA, 0x41)
    assert terminal.levels == [True, False, True]
    terminal.write(DATA, 0x42)  # still pending: the line pulses, so that an edge is seen
    assert terminal.levels == [True, False, True, False, True]


def test_receiver_interrupt_trigger_and_timeout(terminal: Terminal) -> None:
    terminal.write(FCR, 0x81)  # trigger at 8
    terminal.write(MCR, OUT2)
    terminal.write(IER, 0x01)
    terminal.uart.receive(b"abc")
    assert terminal.levels == [True]
    assert terminal.read(IIR) == 0xCC
    terminal.uart.receive(b"defgh" * 5)
    assert terminal.read(IIR) == 0xC4
    got = bytearray()
    while terminal.read(LSR) & 1:
        got.append(terminal.read(DATA))
    assert bytes(got) == b"abc" + b"defgh" * 5
    assert terminal.levels == [True, False]
    assert terminal.uart.pending == 0


def test_out2_gates_the_interrupt(terminal: Terminal) -> None:
    terminal.write(IER, 0x01)
    terminal.uart.receive(b"x")
    assert terminal.levels == []
    terminal.write(MCR, OUT2)
    assert terminal.levels == [True]


def test_loopback_overruns_the_fifo_and_says_so(terminal: Terminal) -> None:
    terminal.write(FCR, 0x07)
    terminal.write(MCR, 0x10)
    for byte in range(17):
        terminal.write(DATA, byte)
    assert terminal.read(LSR) & 0x03 == 0x03
    assert terminal.read(LSR) & 0x03 == 0x01
    assert [terminal.read(DATA) for _ in range(16)] == list(range(16))
    assert not terminal.read(LSR) & 1
    assert not terminal.sent


def test_modem_status_changes_are_reported_once(terminal: Terminal) -> None:
    terminal.write(MCR, 0x10 | 0x04)  # loopback: OUT1 drives RI
    terminal.read(MSR)
    terminal.write(MCR, 0x10)
    assert terminal.read(MSR) & 0x0F == 0x04  # trailing edge
    assert terminal.read(MSR) & 0x0F == 0
    terminal.write(MCR, 0x10 | 0x04)
    assert terminal.read(MSR) & 0x0F == 0  # the leading edge does not count


def test_wide_access_is_two_byte_accesses(terminal: Terminal) -> None:
    terminal.uart.io_write(0x3F8 + SCR - 1, 2, 0x5A00)
    assert terminal.uart.io_read(0x3F8 + SCR, 1) == 0x5A


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 255), st.binary(max_size=20))))
def test_any_sequence_keeps_the_registers_bytes_and_the_line_consistent(
    steps: list[tuple[bool, int, int, bytes]],
) -> None:
    terminal = Terminal()
    for is_read, register, value, data in steps:
        if is_read:
            assert 0 <= terminal.read(register) <= 0xFF
        else:
            terminal.write(register, value)
        terminal.uart.receive(data)
    assert all(a != b for a, b in zip(terminal.levels, terminal.levels[1:], strict=False))  # only changes
    line = terminal.levels[-1] if terminal.levels else False
    terminal.write(LCR, 0)
    if line and terminal.levels[-1]:
        assert not terminal.read(IIR) & 1
