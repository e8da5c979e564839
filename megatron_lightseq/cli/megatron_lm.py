"""`lightseq megatron-lm PATH/TO/pretrain_gpt.py [Megatron-LM's flags] --cp-method lightseq`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.training.job.launch import Launch

HELP = """usage: lightseq megatron-lm PATH/TO/pretrain_gpt.py [Megatron-LM's flags] [--cp-method METHOD] ...

Train with an unmodified checkout of NVIDIA's Megatron-LM and LightSeq attention. Start it with torchrun:

  torchrun --nproc-per-node 8 -m megatron_lightseq megatron-lm PATH/TO/pretrain_gpt.py ...

These flags are added to Megatron-LM's own: {flags}.
`lightseq megatron-lm PATH/TO/pretrain_gpt.py --help` describes both. Without a GPU, Megatron-LM runs on CPUs with
gloo.
"""


def run(arguments: Sequence[str]) -> int:
    """Launch the script that the first argument names."""
    from megatron_lightseq.megatron.lm.launcher import flags, launch

    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP.format(flags=", ".join(flags())))
        return 0 if arguments else 2
    script, *rest = arguments
    if script.startswith("-"):
        raise ConfigError(
            explain(
                got=f"{script!r} where the script is expected",
                rule="the script comes first, then its flags",
                remedy="Use `lightseq megatron-lm PATH/TO/pretrain_gpt.py [flags]`",
            )
        )
    launch(Path(script), rest, quiet=Launch.from_environment().rank > 0)
    return 0
