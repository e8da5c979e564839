"""Flags of the commands that may run their ranks on several hosts."""

from __future__ import annotations

import argparse


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Add those that :meth:`megatron_lightseq.tools.ranks.Cluster.of` takes."""
    parser.add_argument(
        "--network-namespaces",
        metavar="A,B",
        help="run ranks in these, as on as many hosts (compare_two_hosts.sh)",
    )
    parser.add_argument(
        "--interface", default="lo", help="network interface between them (default: %(default)s)"
    )
