"""One rank of a Megatron-LM run: ``python -m tests.megatron.lm_rank MODE SCRIPT [flags]``, under torchrun.

MODE launcher runs the script as ``lightseq megatron-lm`` does; MODE spec runs it as ``python SCRIPT`` would,
only with the CPU platform of Megatron. Prints the number of attention forwards on this rank.
"""

from __future__ import annotations

import gc
import sys
import typing
from pathlib import Path
from types import FunctionType, ModuleType

from typing_extensions import override


def main(mode: str, script: str, flags: list[str]) -> None:
    """Run, then report. Megatron-LM raises SystemExit after ``--exit-interval``."""
    try:
        run(mode, Path(script), flags)
    except SystemExit as left:
        if left.code:
            raise
    from megatron_lightseq.attention import AttentionStats

    counts = [counter.forwards for counter in gc.get_objects() if isinstance(counter, AttentionStats)]
    sys.stdout.write(f"\nattention forwards: {max(counts, default=0)}\n")


def run(mode: str, script: Path, flags: list[str]) -> None:
    """Run the script in one of the two modes."""
    if mode == "launcher":
        from megatron_lightseq.megatron.lm.launcher import launch

        launch(script, flags)
    else:
        run_plainly(script, flags)


def run_plainly(script: Path, flags: list[str]) -> None:
    """Run the script as the interpreter does: as ``__main__``, with its folder first on the path."""
    sys.path.insert(0, str(script.parent))
    typing.override = override  # type: ignore[attr-defined]  # the main branch wants Python 3.12
    from megatron_lightseq.megatron.lm import cpu

    cpu.activate()
    sys.argv = [str(script), *flags]
    main_module = ModuleType("__main__")
    main_module.__file__ = str(script)
    sys.modules["__main__"] = main_module
    code = compile(script.read_text(encoding="utf-8"), str(script), "exec")
    FunctionType(cpu.script_code(code), main_module.__dict__)()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
