"""`lightseq schedule --scan ring`: how the states of linear attention travel, and at what cost."""

from __future__ import annotations

import argparse

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Network
from megatron_lightseq.schedule.scan import Scan
from megatron_lightseq.schedule.scan_choose import StateShape, rank_scans, simulate_scan
from megatron_lightseq.schedule.scan_place import build_scan

TRANSITIONS = ("number", "diagonal", "matrix")
"""What a run of tokens multiplies a state by: with a decay of each head, of each channel, and with the delta rule."""


def scan_text(options: argparse.Namespace, mask: Mask, seq_length: int | None) -> str:
    """A scan and its figures, or with ``auto`` all scans by predicted time.

    Args:
        options: of ``lightseq schedule``.
        mask: of the sequence.
        seq_length: tokens over all ranks, if they are given.
    """
    layout, network = (
        SequenceLayout(options.layout or "contiguous", options.cp),
        Network.parse(options.network),
    )
    width = {"number": 1, "diagonal": options.head_dim, "matrix": None}[options.transition]
    shape = StateShape(
        heads=options.heads, key_dim=options.head_dim, value_dim=options.head_dim, transition=width
    )
    seq_length = seq_length or mask.length or options.cp * 1024
    if options.scan == "auto":
        title = f"{options.cp} ranks, {options.heads} heads, {network.name}: both directions of one layer, simulated"
        ranked = rank_scans(layout, mask, seq_length, shape, network)
        return "\n".join([title, *(f"{name:<11s} {seconds * 1e6:,.0f} us" for seconds, name in ranked), ""])
    scan = build_scan(
        options.scan,
        layout,
        mask=mask,
        direction=options.direction,
        seq_length=seq_length,
        network=network,
    )
    if options.png is not None:
        from megatron_lightseq.training.reporting.scan_plot import draw_scan

        draw_scan(scan, options.png)
    drawn = "" if options.png is None else f"drawn in        {options.png}\n"
    return f"{scan}\n\n{_figures(scan, shape, network)}\n{drawn}"


def _figures(scan: Scan, shape: StateShape, network: Network) -> str:
    played = simulate_scan(scan, shape, network)
    sent = [size / 2**20 for size in played.bytes_sent]
    return "\n".join(
        [
            f"fingerprint     {scan.fingerprint}",
            f"steps           {len(scan.steps)}",
            f"makespan        {played.makespan_s * 1e6:,.0f} us over {network.name}",
            f"sent per rank   {min(sent):,.2f} to {max(sent):,.2f} MiB, {sum(sent):,.2f} MiB in total",
        ]
    )
