"""Flags of the commands that can run their ranks on several simulated hosts."""

from __future__ import annotations

import argparse


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for :meth:`megatron_lightseq.tools.ranks.Cluster.of`."""
    parser.add_argument(
        "--network-namespaces",
        metavar="A,B",
        help="run the ranks in these network namespaces, one per host (see scripts/compare_two_hosts.sh)",
    )
    parser.add_argument(
        "--interface", default="lo", help="network interface between the hosts (default: %(default)s)"
    )
