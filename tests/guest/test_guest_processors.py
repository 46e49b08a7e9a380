"""Linux on several processors: they start by INIT and STARTUP, take turns, and each has a channel of its own."""

import hashlib
import re
from pathlib import Path

import pytest

from vmbus.machine.guest import Machine, Outcome
from vmbus.storage.wire import SCSI_INTERFACE

pytestmark = [pytest.mark.guest, pytest.mark.slow]

CHANNELS = "/sys/bus/vmbus/devices/6c2ab6f0-4f0e-4f4e-9d5e-0f2b1f7a5c01/channels"


def digest(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


def signals(run) -> dict[int, tuple[int, int]]:
    """(processor, interrupts) of each of the controller's channels, as Linux counts them."""
    said = run(f"cd {CHANNELS}; for c in *; do echo $c $(cat $c/cpu) $(cat $c/interrupts); done")
    return {
        int(c): (int(cpu), int(count)) for c, cpu, count in re.findall(r"^(\d+) (\d+) (\d+)$", said, re.M)
    }


def read_on(run, processor: int, blocks: int) -> None:
    run(
        f"taskset {1 << processor:x} dd if=/dev/sda of=/dev/null bs=4k count={blocks} iflag=direct 2>/dev/null"
    )


def test_sub_channels_move_and_processors_come_and_go(boot, shell, image: Path) -> None:
    machine = boot(disks=[image], processors=5)
    run = shell(machine)
    assert run("nproc").strip() == "5"
    first = signals(run)
    assert len(first) == len(machine.bus.channels) == 2, "one channel for each four processors, as on Hyper-V"
    assert len({cpu for cpu, _ in first.values()}) == 2

    # Each processor's requests take one channel, and all channels are taken by some.
    taken = set()
    for processor in range(5):
        before = signals(run)
        read_on(run, processor, 64)
        more = {channel: count - before[channel][1] for channel, (_, count) in signals(run).items()}
        assert min(more.values()) == 0
        assert 50 < max(more.values()) <= 64  # two completions may share an interrupt
        taken |= {channel for channel, count in more.items() if count}
    assert taken == set(first)

    # MODIFY_CHANNEL: the host interrupts another processor for the same channel.
    moved, other = next((channel, cpu) for channel, (cpu, _) in first.items() if cpu != 0)
    run(f"echo 0 >{CHANNELS}/{moved}/cpu")
    channel = next(c for c in machine.bus.channels if c.channel_id == moved)
    assert channel.target_vp == 0
    run(f"echo 4 >{CHANNELS}/{moved}/cpu")
    assert signals(run)[moved][0] == channel.target_vp == 4
    run(f"echo 0 >{CHANNELS}/{moved}/cpu")

    # Without a channel that interrupts it, a processor can go offline; it starts again later.
    run(f"echo 0 >/sys/devices/system/cpu/cpu{other}/online")
    assert run("nproc").strip() == "4"
    assert digest(image) in run("sha256sum /dev/sda")
    run(f"echo 1 >/sys/devices/system/cpu/cpu{other}/online")
    assert run("nproc").strip() == "5"
    read_on(run, other, 16)
    assert machine.bus.violations == 0
    machine.bus.machine.check()

    # All of it at once: jobs on several processors, and the driver taken out and put in again.
    jobs = " ".join(f"taskset {1 << n:x} sha256sum /dev/sda &" for n in range(3))
    said = run(f"echo 3 >/proc/sys/vm/drop_caches; {jobs} wait")
    assert said.count(digest(image)) == 3
    run("rmmod hv_storvsc")
    assert not machine.bus.channels
    run("insmod /lib/modules/hv_storvsc.ko; sleep 1")
    assert len(machine.bus.channels) == 2
    assert digest(image) in run("sha256sum /dev/sda")
    run.power_off()


@pytest.mark.parametrize(("processors", "channels"), [(4, 1), (8, 2), (9, 3)])
def test_storage_channels_for_so_many_processors(
    boot, shell, image: Path, processors: int, channels: int
) -> None:
    machine = boot(disks=[image], processors=processors)
    run = shell(machine)
    assert len(signals(run)) == len(machine.bus.channels) == channels
    assert digest(image) in run("sha256sum /dev/sda")


def test_two_runs_on_two_processors_are_identical(boot, image: Path) -> None:
    runs = []
    for _ in range(2):
        machine: Machine = boot(disks=[image], processors=2)
        assert machine.run(until="# ", wall_seconds=300).outcome is Outcome.MATCHED
        machine.console.send("sha256sum /dev/sda & sha256sum /dev/sda; wait; poweroff -f\n")
        assert machine.run(wall_seconds=300).outcome is Outcome.POWER_OFF
        machine.close()
        runs.append((bytes(machine.console.output), machine.counts, machine.ledger.to_dict()))
    assert runs[0] == runs[1]
    assert runs[0][1]["switches"] > 1000
    assert runs[0][0].count(digest(image).encode()) == 2


def test_panic_stops_all_processors(boot, shell) -> None:
    machine = boot(processors=2)
    shell(machine)
    machine.console.send("taskset 2 sh -c 'echo c >/proc/sysrq-trigger'\n")
    assert machine.run(wall_seconds=300).outcome is Outcome.PANIC


def test_the_network_adapter_has_a_queue_for_each_processor(boot, shell) -> None:
    machine = boot(processors=2, networks=["none,queues=2"])
    run = shell(machine)
    run("ip link set eth0 up && ip addr add 10.99.0.1/24 dev eth0")
    run("arp -s 10.99.0.2 02:00:00:00:00:02")
    assert run("ls /sys/class/net/eth0/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]

    channels = [c for c in machine.bus.channels if c.offer.interface_id != SCSI_INTERFACE]
    assert sorted(channel.target_vp for channel in channels) == [0, 1]
    before = run("cat /sys/class/net/eth0/statistics/tx_packets")
    for processor in range(2):
        run(f"taskset {1 << processor:x} ping -q -c 8 -i 0.1 -W 1 10.99.0.2", check=False)  # nobody answers
    assert int(run("cat /sys/class/net/eth0/statistics/tx_packets")) >= int(before) + 16
    assert machine.bus.violations == 0
    run("rmmod hv_netvsc && insmod /lib/modules/hv_netvsc.ko && ip link set eth0 up")
    assert run("ls /sys/class/net/eth0/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
