"""``vmbus guest prepare``: a Linux kernel and an initramfs for `vmbus boot`, from the distribution's packages."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from vmbus.cli.output import LONGEST_LINE
from vmbus.cli.units import format_size, size
from vmbus.errors import printable
from vmbus.machine.packages import ROOT_LABEL, default_cache, describe, make_root_disk, prepare_guest

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "guest",
        help="prepare a Linux guest",
        description="Prepare a Linux guest for `vmbus boot`.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    prepare = actions.add_parser(
        "prepare",
        help="download a kernel and build an initramfs",
        description=(
            "Download the distribution's cloud kernel and busybox with apt (nothing is installed), and build an "
            "initramfs that loads the hv_* modules and mounts the root disk. The result is kept in a cache folder, "
            "with checksums; `vmbus boot` uses it unless told otherwise."
        ),
    )
    prepare.add_argument("--cache", type=Path, metavar="FOLDER", help=f"default: {default_cache()}")
    prepare.add_argument(
        "--package",
        help="the kernel package (default: what is in the cache, else the distribution's cloud kernel)",
    )
    prepare.add_argument(
        "--refresh", action="store_true", help="download again even if the cache is complete"
    )
    prepare.add_argument(
        "--root-disk", type=Path, metavar="IMAGE", help="also make an ext4 root disk with busybox"
    )
    prepare.add_argument(
        "--root-size", type=size, default=256 << 20, metavar="SIZE", help="its size (default: 256M)"
    )
    prepare.add_argument("--json", action="store_true", help="print the result as JSON")
    prepare.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare; 0 when the guest is complete."""
    guest = prepare_guest(
        args.cache,
        package=args.package,
        refresh=args.refresh,
        progress=lambda message: print(printable(message, LONGEST_LINE), file=sys.stderr),
    )
    if args.root_disk is not None:
        make_root_disk(args.root_disk, args.root_size, guest.busybox.read_bytes())
        print(f"{args.root_disk}: ext4, {format_size(args.root_size)}", file=sys.stderr)
    if args.json:
        print(json.dumps(describe(guest), indent=2))
    else:
        command = ["vmbus", "boot", "--kernel", str(guest.kernel), "--initrd", str(guest.initramfs)]
        if args.root_disk is not None:
            command += ["--disk", f"{args.root_disk},format=raw", "--append", f"root=LABEL={ROOT_LABEL}"]
        print(shlex.join(command))
    return 0
