"""`python -m megatron_lightseq`, the same as the console script `lightseq`."""

from __future__ import annotations

import sys

from megatron_lightseq.cli import run
from megatron_lightseq.training.job.exit import CleanExit
from megatron_lightseq.training.job.launch import end_with_launcher


def main() -> int:
    """Run the command line of this process; returns its exit status."""
    end = CleanExit()
    end_with_launcher()
    end.status = run(sys.argv[1:])
    return end.status


if __name__ == "__main__":
    sys.exit(main())
