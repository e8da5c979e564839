"""`lightseq pretrain` with counters; run as a script under torchrun by test_pretrain.

It prints how often each rule was checked, how often `auto` ran simulations, and how many schedules were built to run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from megatron_lightseq.cli import run
from megatron_lightseq.config import resolved
from megatron_lightseq.config.rules import Rule
from megatron_lightseq.schedule import pair

COUNTS: Counter[str] = Counter()


def counted(name: str, function: Any) -> Any:
    """Wraps the function to count its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        COUNTS[name] += 1
        return function(*args, **kwargs)

    return call


def main(arguments: list[str]) -> int:
    """Run the command line with counters installed. Returns the exit status."""
    message = Rule.message

    def counted_message(rule: Rule, *args: Any) -> Any:
        COUNTS[f"rule {rule.name}"] += 1
        return message(rule, *args)

    Rule.message = counted_message  # type: ignore[method-assign]
    resolved.rank_methods = pair.rank_methods = counted("simulated", pair.rank_methods)  # type: ignore[attr-defined]
    pair.solve = counted("built", pair.solve)  # type: ignore[attr-defined]
    status = run(["pretrain", *arguments])
    sys.stdout.write(f"\ncounts {json.dumps(COUNTS)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
