"""Names that people write: the nearest key, and Megatron's options that are not keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megatron_lightseq.config.megatron_options import recipe_spellings


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when nothing is near."""
    by_spelling = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), by_spelling, n=1, cutoff=0.5)
    return by_spelling[found[0]] if found else None


MEGATRON_SPELLINGS = recipe_spellings()
"""Megatron's options that are no keys of ours, by their name with underscores (config/megatron_options.py)."""
