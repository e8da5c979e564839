"""The best layout as a recipe."""

from __future__ import annotations

from megatron_lightseq.config import to_yaml
from megatron_lightseq.tools.planner.cluster import GIB
from megatron_lightseq.tools.planner.report import layout
from megatron_lightseq.tools.planner.search import Found


def recipe_of(found: Found) -> str:
    """A YAML file that `lightseq pretrain` reads: every key, and a comment that says what was planned."""
    request, fullest, time = found.request, found.memory.fullest, found.time
    held, capacity = fullest.total_bytes / GIB, found.memory.capacity_bytes / GIB
    return "\n".join(
        [
            f"# {layout(request)} on {request.cluster}: chosen by lightseq plan --search.",
            "#",
            f"# Planned, not run: {held:.1f} of {capacity:.1f} GiB on the fullest rank, {time.seconds:.2f} s per step,",
            f"# {time.tokens_per_s:,.0f} tokens/s.",
            "",
            to_yaml(request.config),
        ]
    )
