"""``vmbus boot``: an unmodified Linux kernel as a child partition, its serial console in this terminal."""

import argparse
import json
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from vmbus.cli import describe
from vmbus.cli.disks import FORM, HELP, disk
from vmbus.cli.output import LONGEST_LINE, Screen, check_file, check_output, write_output
from vmbus.cli.units import seconds, size
from vmbus.errors import DeviceError, EngineError, VmbusError, printable
from vmbus.machine.crash import PANIC_SECONDS
from vmbus.machine.guest import Machine, Outcome, Result
from vmbus.machine.linux import BootError, KernelError, SizeError
from vmbus.machine.network import FORMS, OPTIONS, parse_network
from vmbus.machine.packages import load_guest

__all__ = ["EXIT_STATUS", "START_STATUS", "add_parser", "run"]

EXIT_STATUS: Final = {
    Outcome.POWER_OFF: 0,
    Outcome.MATCHED: 0,
    Outcome.REBOOT: 10,
    Outcome.PANIC: 11,
    Outcome.TRIPLE_FAULT: 12,
    Outcome.HALTED: 13,
    Outcome.IDLE: 14,
    Outcome.VIRTUAL_TIME: 15,
    Outcome.WALL_TIME: 16,
    Outcome.STOPPED: 17,
    Outcome.SUSPENDED: 18,
}
"""The exit status for each outcome."""
START_STATUS: Final[tuple[tuple[type[VmbusError], int, str], ...]] = (
    (KernelError, 3, "the kernel is none, or damaged"),
    (SizeError, 4, "kernel, initrd or command line do not fit"),
    (DeviceError, 5, "a file, disk or network adapter cannot be opened"),
    (EngineError, 6, "no engine can run it"),
)
"""Exit statuses of guests that could not be started, by what is wrong; 2 is for everything else."""
CANNOT_OPEN: Final = next(status for kind, status, _ in START_STATUS if kind is DeviceError)
ESCAPE: Final = 0x1D
"""Ctrl-]: leaves the console, as in telnet."""
LONGEST_WAIT: Final = 0.1
"""Seconds that a guest without a timer waits for a key before limits are looked at again."""
LONGEST_IDLE: Final = 2.0
"""Seconds that a guest waits for its next timer before limits are looked at again."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "boot",
        help="boot an unmodified Linux kernel",
        description=(
            "Boot an unmodified x86-64 Linux kernel as a child partition. Its own Hyper-V drivers talk to this "
            "package's VMBus; disks are served by the storage provider. Ctrl-] leaves the console. Without "
            "--kernel, the guest that `vmbus guest prepare` made is booted."
        ),
        epilog="Exit status: "
        + ", ".join(f"{status} {outcome.value}" for outcome, status in EXIT_STATUS.items() if status)
        + "; 0 powered off or --until matched; not started: "
        + ", ".join(f"{status} {why}" for _, status, why in START_STATUS)
        + ", 2 anything else.",
    )
    parser.add_argument("--kernel", type=Path, help="bzImage or ELF kernel")
    parser.add_argument("--initrd", type=Path, help="initial RAM disk or initramfs")
    parser.add_argument(
        "--disk",
        type=disk,
        action="append",
        default=[],
        metavar=FORM,
        help=f"{HELP}; may be repeated",
    )
    parser.add_argument(
        "--cdrom",
        type=disk,
        action="append",
        default=[],
        metavar="ISO[,OPTION...]",
        help="in a CD-ROM drive, with the same options; only read; may be repeated",
    )
    parser.add_argument(
        "--net",
        action="append",
        default=[],
        metavar="UPLINK[,OPTION=VALUE...]",
        help=(
            f"a network adapter on {FORMS} (stream: QEMU's framing; passt is started for the guest); "
            f"options: {OPTIONS}; may be repeated. The prepared guest gets an address by DHCP with --append ip=dhcp"
        ),
    )
    parser.add_argument(
        "--pcap",
        type=Path,
        metavar="FILE",
        help="record the first adapter's frames (pcapng); for others use --net's pcap=",
    )
    parser.add_argument("--append", default="", metavar="TEXT", help="added to the kernel's command line")
    parser.add_argument("--memory", type=size, default=512 << 20, metavar="SIZE", help="RAM (default: 512M)")
    parser.add_argument(
        "--processors",
        type=int,
        default=1,
        metavar="N",
        help="virtual processors, which take turns on one thread (default: 1)",
    )
    parser.add_argument(
        "--no-enlightenments",
        action="store_true",
        help="show the guest a plain PC: no hypervisor, no VMBus, disks on an emulated IDE controller",
    )
    parser.add_argument(
        "--unpack",
        choices=("auto", "host", "guest"),
        default="auto",
        help="who decompresses a bzImage; the guest itself is slower and truer (default: auto)",
    )
    parser.add_argument(
        "--clock",
        default="auto",
        metavar="fixed|host|DATE",
        help=(
            "what the real-time clock shows at the start: 2024-01-01 (fixed), the host's time, or a date as "
            "2025-06-30T12:00:00 (UTC). By default the host's for a run that cannot repeat anyway, at a terminal or "
            "with a network to the outside, else fixed"
        ),
    )
    parser.add_argument(
        "--no-reboot",
        action="store_true",
        help="end when the guest restarts the machine, instead of starting it again",
    )
    parser.add_argument(
        "--panic-timeout",
        type=seconds,
        default=PANIC_SECONDS,
        metavar="SECONDS",
        help=(
            "guest time after a crash report in which a crash kernel or a restart must have begun "
            f"(default: {PANIC_SECONDS:g})"
        ),
    )
    parser.add_argument("--until", metavar="TEXT", help="stop as soon as the guest prints this")
    parser.add_argument("--send", metavar="TEXT", help="type this line once --until has matched, and go on")
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", help="stop after so much host time")
    parser.add_argument(
        "--virtual-timeout", type=seconds, metavar="SECONDS", help="stop after so much guest time"
    )
    parser.add_argument("--ledger", action="store_true", help="print the ledger at the end")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write outcome, counts and ledger to a file; - for standard output (there with --quiet alone)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not show the guest's console")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Boot; the exit status says how the guest ended (`EXIT_STATUS`), or why it was not started (`START_STATUS`)."""
    started: list[Machine] = []
    try:
        with ExitStack() as disks:
            return _boot(args, started, disks)
    except OSError as error:
        if started or error.filename is None or Path(error.filename) not in (args.kernel, args.initrd):
            raise
        # What the guest is made of: a file that is missing is one, whatever it is for.
        print(f"vmbus: {describe(error)}", file=sys.stderr)
        return CANNOT_OPEN
    except VmbusError as error:
        if started:
            raise
        for kind, status, _ in START_STATUS:
            if isinstance(error, kind):
                print(f"vmbus: {printable(str(error), 2000)}", file=sys.stderr)
                return status
        raise


def _boot(args: argparse.Namespace, started: list[Machine], disks: ExitStack) -> int:
    kernel, initrd = args.kernel, args.initrd
    if kernel is None:
        guest = load_guest()
        if guest is None:
            raise BootError("no kernel: give --kernel, or run `vmbus guest prepare` first")
        kernel, initrd = guest.kernel, initrd or guest.initramfs
    if args.send is not None and args.until is None:
        raise BootError("--send needs --until")
    if args.pcap is not None and not args.net:
        raise BootError("--pcap needs --net")
    check_output(args.json)
    check_file(args.pcap, "--pcap")
    for description in args.net:
        check_file(parse_network(description).capture, "pcap=")
    _note(args, f"loading {kernel}")
    command_line = f"console=ttyS0 {args.append}".strip()
    with Machine(
        kernel,
        initrd=initrd,
        disks=[disks.enter_context(one.open()) for one in args.disk],
        cdroms=[disks.enter_context(one.open(read_only=True)) for one in args.cdrom],
        append=command_line,
        memory=args.memory,
        processors=args.processors,
        enlightenments=not args.no_enlightenments,
        unpack=args.unpack,
        clock=_clock(args),
        reboot=not args.no_reboot,
        panic_seconds=args.panic_timeout,
    ) as machine:
        for number, description in enumerate(args.net):
            interface = machine.network.add(description, capture=args.pcap if number == 0 else None)
            joined = interface.uplink
            name = "nothing" if joined is None else getattr(joined.uplink, "name", description)
            _note(args, f"network adapter {interface.mac.hex(':')} on {name}")
        started.append(machine)
        _note(args, "starting; Ctrl-] leaves" if sys.stdin.isatty() else "starting")
        if not args.quiet:
            machine.console.echo = _show
        with _Keyboard(machine) as keyboard:
            result = _run_guest(machine, args, keyboard)
        _report(machine, result, args)
        return EXIT_STATUS[result.outcome]


def _clock(args: argparse.Namespace) -> str | datetime:
    """What `--clock` means; by default the host's time for runs that cannot repeat."""
    if args.clock == "auto":
        outside = any(parse_network(description).kind != "none" for description in args.net)
        return "host" if outside or _is_terminal(sys.stdin) else "fixed"
    if args.clock in ("fixed", "host"):
        return str(args.clock)
    try:
        return datetime.fromisoformat(args.clock)
    except ValueError as error:
        raise BootError(f"--clock {args.clock}: neither fixed nor host nor a date ({error})") from error


def _run_guest(machine: Machine, args: argparse.Namespace, keyboard: "_Keyboard") -> Result:
    deadline = None if args.timeout is None else time.monotonic() + args.timeout

    def step(until: str | None) -> Result:
        left = (
            None if args.virtual_timeout is None else max(0.0, args.virtual_timeout - machine.virtual_seconds)
        )
        return machine.run(
            until,
            virtual_seconds=left,
            wall_seconds=None if deadline is None else deadline - time.monotonic(),
            idle=keyboard.idle,
            poll=keyboard.poll,
            paced=keyboard.is_interactive,
        )

    result = step(args.until)
    if args.send is not None and result.outcome is Outcome.MATCHED:
        first = result
        machine.console.send(args.send + "\n")
        result = step(None)
        result = replace(
            result,
            reboots=first.reboots + result.reboots,
            wall_seconds=first.wall_seconds + result.wall_seconds,
            cpu_seconds=first.cpu_seconds + result.cpu_seconds,
        )
    return result


def _note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"vmbus: {printable(text, LONGEST_LINE)}", file=sys.stderr)


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


class _Keyboard:
    """What is typed goes to the guest; a terminal is put into raw mode meanwhile.

    While the guest waits and a terminal or a network is there, its time goes at the host's pace; otherwise idle
    time is skipped. A guest without a timer is waited for as long as a key or a frame could wake it.

    Attributes:
        is_interactive: somebody sits at a terminal.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._fd = sys.stdin.fileno() if _has_descriptor(sys.stdin) else -1
        self.is_interactive = _is_terminal(sys.stdin)
        self._mode: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Keyboard":
        if self.is_interactive:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGHUP):
                    self._handlers[number] = signal.signal(number, _leave)
            self._mode = termios.tcgetattr(self._fd)
            tty.setraw(self._fd)
            self._mode_output()
        return self

    def _mode_output(self) -> None:
        mode = termios.tcgetattr(self._fd)
        mode[1] |= termios.OPOST  # messages of this program still end lines as usual
        termios.tcsetattr(self._fd, termios.TCSANOW, mode)

    def __exit__(self, *_: object) -> None:
        if self._mode is not None:
            with suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._mode)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def poll(self) -> None:
        """Pass on what was typed, without waiting."""
        self._take(0.0)

    def idle(self, until_timer: int | None) -> bool:
        """The guest waits: for a key, or for its next timer in `until_timer` ns."""
        network = self._machine.network
        if until_timer is None and not (
            network.is_listening or (self._fd >= 0 and self._machine.takes_input)
        ):
            return False  # nothing could wake it
        if network.is_live:
            came = network.idle(until_timer, [self._fd] if self._fd >= 0 else [])
            return self._take(0.0) or came
        if not self.is_interactive:
            return False  # time is skipped; a pipe's input was passed on by poll
        if until_timer is None:
            self._take(LONGEST_WAIT)
            return True
        end = time.monotonic() + min(until_timer / 1e9, LONGEST_IDLE)
        while (rest := end - time.monotonic()) > 0:
            if self._take(rest):
                return True
        return until_timer > LONGEST_IDLE * 1e9

    def _take(self, wait: float) -> bool:
        if self._fd < 0 or not select.select([self._fd], [], [], wait)[0]:
            return False
        data = os.read(self._fd, 4096)
        if not data:
            self._fd = -1
            return False
        if self.is_interactive and ESCAPE in data:
            self._machine.stop()
            data = data[: data.index(ESCAPE)]
        self._machine.console.send(data)
        return True


def _leave(number: int, _: object) -> None:
    """End as the signal does by itself, but give the terminal and the disks back first."""
    raise SystemExit(128 + number)


def _is_terminal(stream: Any) -> bool:
    return _has_descriptor(stream) and os.isatty(stream.fileno())


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _report(machine: Machine, result: Result, args: argparse.Namespace) -> None:
    if not args.quiet:
        print(file=sys.stdout)
        sys.stdout.flush()
    _note(
        args,
        f"{result.outcome.value}; {result.virtual_seconds:.3f} s of the guest's time, "
        f"{result.wall_seconds:.2f} s here ({result.cpu_seconds:.2f} s of processor time)",
    )
    if result.reboots:
        _note(args, f"it restarted the machine {result.reboots} times")
    if result.crash is not None and result.crash.message:
        _note(args, "it reported: " + result.crash.message.decode(errors="replace").strip().split("\n")[-1])
    if args.ledger:
        _print_ledger(machine)
    if args.json is not None:
        report = {
            "outcome": result.outcome.name,
            "virtual_seconds": result.virtual_seconds,
            "wall_seconds": result.wall_seconds,
            "cpu_seconds": result.cpu_seconds,
            "reboots": result.reboots,
            "counts": machine.counts,
            "ledger": machine.ledger.to_dict(),
        }
        write_output(args.json, json.dumps(report, indent=2) + "\n")


def _print_ledger(machine: Machine) -> None:
    table = Table(title="ledger")
    for heading in ("account", "what", "count"):
        table.add_column(heading, justify="right" if heading == "count" else "left")
    for what, count in machine.counts.items():
        table.add_row("engine", what, f"{count:,}")
    for account, values in machine.ledger.to_dict().items():
        for what, value in _flat(values):
            table.add_row(printable(account), printable(what), f"{value:,}")
    Screen().show(table)


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if isinstance(value, dict):
            for key, count in value.items():
                yield f"{name} {key}", count
        elif value:
            yield name, value
