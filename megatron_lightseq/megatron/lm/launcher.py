"""``lightseq megatron-lm``: run a training script of Megatron-LM, unmodified, with LightSeq attention.

The script runs in this process as ``python SCRIPT`` would run it, after the seams have been wired. Every rank runs
the launcher, under torchrun.
"""

from __future__ import annotations

import builtins
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.megatron.lm.options import KEYS

NOTICE = (
    "lightseq megatron-lm: torch sees no CUDA device, so Megatron-LM runs on the CPU, over gloo. Its arguments "
    "default to {defaults}.\n"
)


def launch(script: Path, arguments: Sequence[str], *, quiet: bool = False) -> Any:
    """Run a training script; returns the :class:`~megatron_lightseq.megatron.lm.plug.Plug` it ran with.

    Args:
        script: ``pretrain_gpt.py`` of a checkout.
        arguments: what follows it on the command line, Megatron-LM's flags and ours.
        quiet: whether to say nothing about running on a CPU; all ranks but the first are quiet.

    Raises:
        ConfigError: there is no such script, or no Megatron-LM beside it.
        UnsupportedError: this Megatron-LM lacks a seam, or is asked for what LightSeq would have to ignore.
    """
    script = _checked(script)
    sys.path.insert(0, str(script.parent))  # as python does for a script
    if not hasattr(typing, "override"):  # Megatron-LM's main branch wants Python 3.12, for this name alone
        from typing_extensions import override

        typing.override = override  # type: ignore[attr-defined]
    on_cpu = _activate_cpu(quiet)

    from megatron_lightseq.megatron.lm.plug import Plug

    plug = Plug(on_cpu=on_cpu)
    plug.wire_flags()
    plug.wire_model()
    try:
        execute(script, arguments, on_cpu=on_cpu)
    finally:
        plug.remove()
    return plug


def _checked(script: Path) -> Path:
    if not script.is_file():
        raise ConfigError(
            explain(
                got=f"{script}",
                rule="there is no such file",
                remedy="Give the path to pretrain_gpt.py of a Megatron-LM checkout",
            )
        )
    script = script.resolve()
    if not (script.parent / "megatron" / "training").is_dir():
        raise ConfigError(
            explain(
                got=f"{script}",
                rule="there is no megatron/training beside it, so it is no script of a Megatron-LM checkout (the "
                "megatron-core package of PyPI does not contain the training program)",
                remedy="git clone https://github.com/NVIDIA/Megatron-LM, and give the path to its pretrain_gpt.py",
            )
        )
    return script


def _activate_cpu(quiet: bool) -> bool:
    """Serve Megatron-LM on the CPU where there is no GPU, and say so."""
    import torch

    if torch.cuda.is_available():
        return False
    from megatron_lightseq.megatron.lm import cpu

    if not quiet:
        shown = ", ".join(f"{name}={value}" for name, value in cpu.DEFAULTS.items())
        sys.stderr.write(NOTICE.format(defaults=shown))
    cpu.activate()
    return True


def execute(script: Path, arguments: Sequence[str], *, on_cpu: bool) -> None:
    """Run a script as ``__main__`` without giving up this process's own ``__main__`` module.

    Processes that are spawned later, to write checkpoints, import ``__main__`` again: this package's entry point
    does nothing then, where a training script would import all of Megatron without what the launcher prepared.
    """
    code = compile(script.read_text(encoding="utf-8"), str(script), "exec")
    if on_cpu:
        from megatron_lightseq.megatron.lm import cpu

        code = cpu.script_code(code)
    sys.argv = [str(script), *arguments]
    namespace = {"__name__": "__main__", "__file__": str(script), "__builtins__": builtins}
    FunctionType(code, namespace)()


def flags() -> list[str]:
    """Our flags, as the launcher adds them to Megatron-LM's."""
    return [f"--{key.replace('_', '-')}" for key in KEYS]
