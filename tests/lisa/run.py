"""Run cases of LISA, Microsoft's test suite for Linux guests, in a Debian guest of `vmbus boot`, and print a table.

    python tests/lisa/run.py --work /var/tmp/lisa

It does what a user would: debootstrap makes a Debian with systemd, ssh and kdump, `mke2fs -d` makes a disk of it, and
`vmbus boot` boots Debian's own kernel and initramfs from there, with passt for the network. LISA (PyPI ``mslisa``, in
an environment of its own) does its cases over ssh, and each may restart the guest as often as it likes. Hibernation
is done by hand at the end, because LISA's case wants a platform that can deallocate a machine and a tool from GitHub:
the guest hibernates, `vmbus boot` ends, and a new process resumes it.

It needs root (debootstrap), debootstrap, passt, mke2fs and ssh. The first run makes Debian; `--work` keeps it.
docs/lisa.md has the results.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
SOURCES = Path("/etc/apt")
SUITE = "bookworm"
PACKAGES = (
    *(
        "systemd-sysv",
        "udev",
        "dbus",
        "openssh-server",
        "sudo",
        "kmod",
        "procps",
        "util-linux",
        "lsb-release",
    ),
    *(
        "iproute2",
        "iputils-ping",
        "ifupdown",
        "isc-dhcp-client",
        "netbase",
        "ethtool",
        "wget",
        "ca-certificates",
    ),
    *("linux-image-cloud-amd64", "initramfs-tools", "kexec-tools", "makedumpfile", "kdump-tools"),
    *("pciutils", "dmidecode", "python3-minimal", "hyperv-daemons", "bc", "gawk", "file", "psmisc"),
)


def mirror() -> str:
    """Where this machine has its own Debian packages from."""
    for file in (SOURCES / "sources.list", *sorted((SOURCES / "sources.list.d").glob("*"))):
        if file.is_file() and (
            found := re.search(r"^(?:deb .*?|URIs: *)(https?://\S+)", file.read_text(), re.M)
        ):
            return found[1]
    raise SystemExit("apt knows no package mirror on this machine")


CASES = (
    *("verify_cpu_count", "verify_l3_cache", "verify_vmbus_interrupts", "verify_cpu_hot_plug"),
    *("validate_netvsc_reload", "verify_reload_hyperv_modules"),
    *("verify_ringbuffer_settings_change", "verify_device_channels_change", "verify_device_enabled_features"),
    *("verify_device_gro_lro_settings_change", "verify_device_rss_hash_key_change"),
    *("verify_device_rx_hash_level_change", "verify_device_msg_level_change"),
    *("verify_timesync_unbind_clocksource", "verify_kexec_reboot_direct", "verify_kexec_reboot_systemd"),
    *("verify_kdumpcrash_smp", "verify_kdumpcrash_on_random_cpu"),
)
"""Names of LISA's cases, those that restart the guest last."""
SINGLE_CASES = ("verify_timesync_unbind_clockevent", "verify_kdumpcrash_single_core")
"""Those that want one processor: with more, the first of them unbinds nothing."""
HIBERNATION = "hibernation and resume in a new process"
USER = "lisa"
READY = b"Reached target"
SSH_LIMIT = 600.0
"""Seconds until the guest must answer, however busy the host is."""
SHIMS = {
    "usr/sbin/update-grub": "#!/bin/sh\n# No boot loader: the command line is `vmbus boot --append`.\n",
}
FILES = {
    "etc/fstab": "LABEL=debian / ext4 defaults 0 1\nLABEL=sleep none swap sw,nofail 0 0\n",
    "etc/hostname": "lisa\n",
    "etc/hosts": "127.0.0.1 localhost lisa\n",
    "etc/network/interfaces": "auto lo\niface lo inet loopback\nallow-hotplug eth0\niface eth0 inet dhcp\n",
    f"etc/sudoers.d/{USER}": f"{USER} ALL=(ALL) NOPASSWD:ALL\n",
    "etc/ssh/sshd_config.d/lisa.conf": "UseDNS no\nMaxStartups 100\nMaxSessions 100\n",
    "etc/environment": 'PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"\n',  # LISA asks for kexec
    "etc/default/kexec": "LOAD_KEXEC=false\n",
    "etc/sysctl.d/lisa.conf": "kernel.panic = 10\n",
}


@dataclass
class Row:
    """One line of the table."""

    case: str
    status: str
    seconds: float
    message: str


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a host's program; it must succeed."""
    return subprocess.run([str(word) for word in command], check=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def say(text: str) -> None:
    print(f"lisa: {text}", flush=True)


class Debian:
    """The guest's disk, and what is needed to boot it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.tree = work / "debian"
        self.disk = work / "debian.img"
        self.swap = work / "swap.img"
        self.key = work / "key"
        self.kernel = work / "vmlinuz"
        self.initrd = work / "initrd"

    def make(self, size: str, swap: str) -> None:
        """Make what is not there yet."""
        if not self.key.exists():
            run("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", self.key)
        if not (self.tree / "made").exists():
            say(f"debootstrap {SUITE} into {self.tree}")
            shutil.rmtree(self.tree, ignore_errors=True)
            with (self.work / "debootstrap.log").open("w") as log:
                include = "--include=" + ",".join(PACKAGES)
                run(
                    "debootstrap",
                    "--variant=minbase",
                    include,
                    SUITE,
                    self.tree,
                    mirror(),
                    stdout=log,
                    stderr=log,
                )
            self._configure()
            (self.tree / "made").touch()
        if not self.disk.exists():
            say(f"a disk of {size}")
            new = self.disk.with_suffix(".new")
            new.unlink(missing_ok=True)
            run("mke2fs", "-q", "-t", "ext4", "-L", "debian", "-d", self.tree, new, size)
            new.rename(self.disk)
        if not self.swap.exists():
            run("truncate", "-s", swap, self.swap)
            run("mkswap", "-q", "-L", "sleep", self.swap)
        for target, name in ((self.kernel, "vmlinuz-*"), (self.initrd, "initrd.img-*")):
            shutil.copy(max((self.tree / "boot").glob(name)), target)

    def _configure(self) -> None:
        for name, text in FILES.items():
            path = self.tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name, text in SHIMS.items():
            path = self.tree / name
            path.write_text(text)
            path.chmod(0o755)
        (self.tree / f"etc/sudoers.d/{USER}").chmod(0o440)
        commands = (
            f"useradd -m -s /bin/bash {USER}; mkdir -p -m 700 /home/{USER}/.ssh",
            f"cat >/home/{USER}/.ssh/authorized_keys; chmod 600 /home/{USER}/.ssh/authorized_keys",
            f"chown -R {USER}: /home/{USER}; systemctl enable kdump-tools ssh",
            "rm -f /etc/machine-id; touch /etc/machine-id",
            # The crash kernel's initramfs is Debian's: it must hold the drivers of this machine's disk.
            "echo RESUME=LABEL=sleep >/etc/initramfs-tools/conf.d/resume",
            "printf 'hv_vmbus\\nhv_storvsc\\nhv_netvsc\\n' >>/etc/initramfs-tools/modules; update-initramfs -u",
        )
        public = self.key.with_suffix(".pub").read_text()
        path = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        with (self.work / "configure.log").open("w") as log:
            run(
                "chroot",
                self.tree,
                "sh",
                "-ec",
                "\n".join(commands),
                input=public,
                env=path,
                stdout=log,
                stderr=log,
            )


class Guest:
    """A running `vmbus boot`."""

    def __init__(self, debian: Debian, arguments: argparse.Namespace, processors: str) -> None:
        self.debian = debian
        self.processors = processors
        self.port = arguments.port
        self.console = debian.work / "console.txt"
        line = f"root=LABEL=debian rw crashkernel={arguments.crashkernel} resume=LABEL=sleep printk.time=1"
        self._command = [
            *(sys.executable, "-m", "vmbus", "boot", "--kernel", debian.kernel, "--initrd", debian.initrd),
            *(
                "--disk",
                f"{debian.disk},format=raw",
                "--disk",
                f"{debian.swap},format=raw",
                "--memory",
                arguments.memory,
            ),
            *("--processors", processors, "--net", f"passt,tcp={self.port}:22{arguments.net}"),
            *("--append", line, *arguments.boot),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Guest":
        say("vmbus boot")
        with self.console.open("ab") as output:
            self.process = subprocess.Popen(
                [str(word) for word in self._command], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.ssh("sudo systemctl poweroff", check=False)
            try:
                self.process.wait(180)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        say(f"vmbus boot ended with status {self.process.returncode}")

    def ssh(self, command: str, *, check: bool = True, limit: float = 120.0) -> str:
        """What a command prints in the guest."""
        options = (
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        )
        where = ("-o", "ConnectTimeout=10", "-i", self.debian.key, "-p", self.port, f"{USER}@127.0.0.1")
        words = [str(word) for word in ("ssh", *options, *where, command)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=check, timeout=limit)
        except subprocess.TimeoutExpired:
            if check:
                raise
            return ""
        return done.stdout

    def await_ssh(self) -> None:
        """Wait until the guest answers."""
        assert self.process is not None
        end = time.monotonic() + SSH_LIMIT
        while "ready" not in self.ssh("echo ready", check=False, limit=30):
            if self.process.poll() is not None or time.monotonic() > end:
                tail = self.console.read_bytes()[-2000:].decode(errors="replace")
                raise SystemExit(f"the guest does not answer\n{tail}")
            time.sleep(2)


@contextmanager
def booted(debian: Debian, arguments: argparse.Namespace, processors: str) -> Iterator[Guest]:
    """A guest that answers."""
    with Guest(debian, arguments, processors) as guest:
        guest.await_ssh()
        yield guest


def lisa_program(work: Path) -> Path:
    """LISA, in an environment of its own."""
    program = work / "venv/bin/lisa"
    if not program.exists():
        say("installing mslisa")
        run(sys.executable, "-m", "venv", work / "venv")
        run(work / "venv/bin/pip", "install", "-q", "mslisa[azure]")
    return program


def runbook(work: Path, testsuites: Path, guest: Guest, cases: Sequence[str], processors: str) -> Path:
    """The file that tells LISA what to do."""
    chosen = "\n".join(f"  - criteria:\n      name: {case}" for case in cases)
    path = work / "runbook.yml"
    path.write_text(f"""name: vmbus
exit_with_failed_count: false
extension:
  - {testsuites}
  - {HERE / "extension"}
testcase:
{chosen}
notifier:
  - type: junit
    path: results.xml
    append_message_id: false
environment:
  environments:
    - nodes:
        - type: remote
          address: 127.0.0.1
          public_address: 127.0.0.1
          port: {guest.port}
          public_port: {guest.port}
          username: {USER}
          private_key_file: {guest.debian.key}
          capability:
            core_count: {processors}
            memory_mb: 4096
            disk:
              data_disk_count:
                min: 1
platform:
  - type: ready
""")
    return path


def run_lisa(guest: Guest, cases: Sequence[str]) -> list[Row]:
    """Do the cases; their rows."""
    program = lisa_program(guest.debian.work)
    (testsuites,) = program.parent.parent.glob("lib/python*/site-packages/lisa/microsoft/testsuites")
    book = runbook(guest.debian.work, testsuites, guest, cases, guest.processors)
    results = guest.debian.work / f"lisa-{guest.processors}"
    shutil.rmtree(results, ignore_errors=True)
    say(f"LISA: {len(cases)} cases, its log is in {results}")
    environment = {**os.environ, "VMBUS_LISA_CONSOLE": str(guest.console)}
    with (guest.debian.work / "lisa.log").open("w") as log:
        subprocess.run(
            [program, "-r", book, "-l", results, "-w", guest.debian.work / "scratch"],
            env=environment,
            stdout=log,
            stderr=log,
            check=False,
        )
    rows = {case: Row(case, "NOT RUN", 0.0, "") for case in cases}
    for report in results.rglob("results.xml"):
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name", "").split(" ")[0]
            failure, skipped = case.find("failure"), case.find("skipped")
            status = "failed" if failure is not None else "skipped" if skipped is not None else "passed"
            said = next((found.get("message") or "" for found in (failure, skipped) if found is not None), "")
            rows[name] = Row(name, status, float(case.get("time") or 0), " ".join(said.split())[:160])
    return list(rows.values())


def hibernate(debian: Debian, arguments: argparse.Namespace) -> Row:
    """A guest hibernates and ends; a new process resumes it."""
    began = time.monotonic()
    look = "cat /proc/sys/kernel/random/boot_id /dev/shm/memory; cat /sys/class/net/eth*/address"
    try:
        with booted(debian, arguments, arguments.processors) as guest:
            guest.ssh("echo kept-$RANDOM >/dev/shm/memory; sudo swapon -L sleep 2>/dev/null; true")
            before = guest.ssh(look)
            guest.ssh("sudo systemctl start --no-block hibernate.target; sleep 1", check=False)
            assert guest.process is not None
            guest.process.wait(SSH_LIMIT)
        with booted(debian, arguments, arguments.processors) as guest:
            after = guest.ssh(look)
            log = guest.ssh("sudo dmesg | grep -ci 'hibernation exit'", check=False).strip()
    except (OSError, subprocess.SubprocessError, SystemExit) as error:
        return Row(HIBERNATION, "failed", time.monotonic() - began, str(error).splitlines()[0][:160])
    same = "kept-" in before and before == after
    detail = (
        "the same boot, memory and adapters" if same else f"before {before.split()}, after {after.split()}"
    )
    return Row(
        HIBERNATION, "passed" if same else "failed", time.monotonic() - began, f"{detail}; exits: {log}"
    )


def main() -> int:
    """0 if nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("/var/tmp/vmbus-lisa"), help="folder that keeps all"
    )
    parser.add_argument("--cases", nargs="*", default=[*CASES, *SINGLE_CASES], help="LISA's names")
    parser.add_argument("--no-hibernation", action="store_true")
    parser.add_argument("--processors", default="4")
    parser.add_argument("--memory", default="3G")
    parser.add_argument("--crashkernel", default="512M", help="what LISA expects for so much memory")
    parser.add_argument("--disk-size", default="6G")
    parser.add_argument("--port", type=int, default=2222, help="of the host, for ssh")
    parser.add_argument("--net", default="", help="more for --net, as ',queues=4'")
    parser.add_argument("boot", nargs=argparse.REMAINDER, help="after --: more for vmbus boot")
    arguments = parser.parse_args()
    arguments.boot = [word for word in arguments.boot if word != "--"]
    if unknown := set(arguments.cases) - {*CASES, *SINGLE_CASES}:
        parser.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join((*CASES, *SINGLE_CASES))}")
    if not arguments.cases and arguments.no_hibernation:
        parser.error("there is nothing to do")
    arguments.work.mkdir(parents=True, exist_ok=True)
    debian = Debian(arguments.work.resolve())
    debian.make(arguments.disk_size, arguments.memory)
    (debian.work / "console.txt").unlink(missing_ok=True)
    rows: list[Row] = []
    for cases, processors in ((CASES, arguments.processors), (SINGLE_CASES, "1")):
        wanted = [case for case in cases if case in arguments.cases]
        if wanted:
            with booted(debian, arguments, processors) as guest:
                rows += run_lisa(guest, wanted)
    if not arguments.no_hibernation:
        rows.append(hibernate(debian, arguments))
    width = max(len(row.case) for row in rows)
    print(f"\n{'case':{width}}  result   seconds  message")
    for row in rows:
        print(f"{row.case:{width}}  {row.status:8} {row.seconds:7.0f}  {row.message}")
    return int(any(row.status in ("failed", "NOT RUN") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
