"""`python -m megatron_lightseq`, the same as the console script `lightseq`."""

from __future__ import annotations

import sys

from megatron_lightseq.cli import run


def main() -> int:
    """Run the command line of this process; returns its exit status."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
