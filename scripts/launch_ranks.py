"""torchrun for the launch scripts; see megatron_lightseq/training/job/launcher.py. Takes torchrun's arguments."""

from __future__ import annotations

import sys

from megatron_lightseq.training.job.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
