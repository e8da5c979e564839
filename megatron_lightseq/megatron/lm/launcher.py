"""``lightseq megatron-lm``: run a training script of Megatron-LM, unmodified, with LightSeq attention.

The script runs in this process as ``python SCRIPT`` would run it, after Megatron-LM has been patched. Every rank runs
the launcher, under torchrun.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.megatron.lm.options import KEYS

NOTICE = (
    "lightseq megatron-lm: torch sees no CUDA device, so Megatron-LM runs on the CPU, over gloo. These arguments have "
    "other defaults: {defaults}.\n"
)


def launch(script: Path, arguments: Sequence[str], *, quiet: bool = False) -> Any:
    """Run a training script; returns the :class:`~megatron_lightseq.megatron.lm.patches.Patches` it ran with.

    Args:
        script: ``pretrain_gpt.py`` of a checkout, or another script that uses ``megatron.training``.
        arguments: the rest of the command line, Megatron-LM's flags and ours.
        quiet: do not report that this runs on a CPU; set on all ranks but the first.

    Raises:
        ConfigError: there is no such script, or no Megatron-LM for it.
        UnsupportedError: this Megatron-LM lacks a patch point, or is asked for something that LightSeq would ignore.
    """
    script = _checked(script)
    sys.path.insert(0, str(script.parent))  # as python does for a script
    checkout = _checkout_of(script)
    if checkout is not None and checkout != script.parent:
        sys.path.insert(1, str(checkout))
    if not hasattr(typing, "override"):  # Megatron-LM's main branch asks for Python 3.12, for this name alone
        from typing_extensions import override

        typing.override = override  # type: ignore[attr-defined]
    on_cpu = _activate_cpu(quiet)

    from megatron_lightseq.megatron.lm.patches import Patches

    patches = Patches(on_cpu=on_cpu)
    patches.patch_arguments()
    patches.patch_model()
    try:
        execute(script, arguments, on_cpu=on_cpu)
    finally:
        patches.undo()
    return patches


def _checked(script: Path) -> Path:
    """The absolute path of a script that has a Megatron-LM."""
    if not script.is_file():
        raise ConfigError(
            explain(
                got=f"{script}",
                rule="there is no such file",
                remedy="Give the path to pretrain_gpt.py of a Megatron-LM checkout",
            )
        )
    script = script.resolve()
    if _checkout_of(script) is None and not _megatron_training_is_importable():
        raise ConfigError(
            explain(
                got=f"{script}",
                rule="neither the folders above it nor PYTHONPATH hold Megatron-LM's training program, "
                "megatron/training (the megatron-core package of PyPI does not contain it)",
                remedy="git clone https://github.com/NVIDIA/Megatron-LM, and give the path to its pretrain_gpt.py, or "
                "add the checkout to PYTHONPATH",
            )
        )
    return script


def _checkout_of(script: Path) -> Path | None:
    """The nearest folder around a script that holds ``megatron/training``."""
    folders = (folder for folder in script.parents if (folder / "megatron" / "training").is_dir())
    return next(folders, None)


def _megatron_training_is_importable() -> bool:
    try:
        return importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        return False


def _activate_cpu(quiet: bool) -> bool:
    """Make Megatron-LM run on the CPU if there is no GPU, and report it."""
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
    """Run a script as ``__main__`` while this process's own ``__main__`` module stays in place.

    Processes that are spawned later, to write checkpoints, import ``__main__`` again. They get this package's entry
    point, which does nothing then; the training script would import all of Megatron without the patches.
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
