"""`lightseq doctor`: what this machine offers, what is missing and what that costs; suitable for bug reports.

Prints no environment variables and no paths, and therefore no secrets.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_lightseq import __version__
from megatron_lightseq.tools.provenance import usable_cores

Verdict = Literal["ok", "absent", "problem"]
REQUIRED = (
    "torch",
    "megatron-core",
    "numpy",
    "jsonargparse",
    "psutil",
    "rich",
    "matplotlib",
    "tensorboard",
    "tokenizers",
)
_INSTALL = "run `pip install -c constraints.txt -e .` in the repository"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """Optional dependencies under one name, for ``pip install -e '.[NAME]'``."""

    packages: tuple[str, ...]
    """Names of distributions; the main ones where there are many."""
    module: str | None = None
    """A module that is imported to see whether it works; None if an installed version says enough."""
    adds: str


EXTRAS = {
    "te": Extra(
        packages=("transformer-engine",),
        module="transformer_engine",
        adds="Transformer Engine layers on GPUs: fp8 and more fused kernels",
    ),
    "flash-attn": Extra(
        packages=("flash-attn",),
        module="flash_attn",
        adds="`--cp-kernel flash_attn` on GPUs",
    ),
    "hf": Extra(
        packages=("transformers", "accelerate", "safetensors"),
        adds="Hugging Face models and trainers with our attention (`megatron_lightseq.hf`)",
    ),
    "docs": Extra(packages=("sphinx",), adds="the tools that build the documentation site"),
    "dev": Extra(packages=("pytest", "ruff", "mypy", "import-linter"), adds="tests and linters"),
}
"""The extras in pyproject.toml."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    verdict: Verdict
    """absent: optional and not installed; problem: required, and training will not start or will be very slow."""
    found: str
    remedy: str = ""
    """How to solve a problem, or what is missing without it."""


def run(arguments: Sequence[str]) -> int:
    """Print the report; exit status 1 if there is a problem."""
    argparse.ArgumentParser(
        prog="lightseq doctor",
        description="Report what this machine offers, what is missing and what that costs. Prints no environment "
        "variables and no paths.",
    ).parse_args(arguments)
    findings = examine()
    Console(file=sys.stdout, highlight=False).print(report(findings))
    problems = sum(finding.verdict == "problem" for finding in findings)
    sys.stdout.write(f"{problems or 'no'} problem{'' if problems == 1 else 's'}\n")
    return 1 if problems else 0


def examine() -> list[Finding]:
    """Everything about this machine that decides whether training runs, and how fast."""
    findings = [_python(), _cores(), *map(_package, REQUIRED)]
    findings += [probed(probe) for probe in (_gpus, _kernels)]
    findings += [_extra(name, extra) for name, extra in EXTRAS.items()]
    return [
        *findings,
        _optional(
            "apex", "apex", "without it, torch's AdamW and gradient accumulation replace its fused ones"
        ),
        _optional(
            "pyarrow", "pyarrow", "`pip install pyarrow` adds Parquet files to `lightseq prepare-data`"
        ),
    ]


def probed(probe: Callable[[], Finding]) -> Finding:
    """The finding of a probe; an exception of a broken installation becomes a problem."""
    try:
        return probe()
    except Exception as error:  # noqa: BLE001  a broken installation can raise anything
        name = probe.__name__.strip("_").replace("_", " ")
        return Finding(
            what=name, verdict="problem", found=f"{type(error).__name__}: {str(error)[:120]}", remedy=_INSTALL
        )


def report(findings: Sequence[Finding]) -> Table:
    """The findings as a table."""
    colours = {"ok": "green", "absent": "yellow", "problem": "bold red"}
    table = Table(title=f"megatron_lightseq {__version__}", title_justify="left")
    for column in ("", "what", "found", "remedy, cost or use"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        verdict = Text(finding.verdict, style=colours[finding.verdict])
        table.add_row(verdict, Text(finding.what), Text(finding.found), Text(finding.remedy))
    return table


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    new_enough = sys.version_info >= (3, 11)
    return Finding(
        what="Python",
        verdict="ok" if new_enough else "problem",
        found=found,
        remedy="" if new_enough else "use Python 3.11 or later",
    )


def _cores() -> Finding:
    return Finding(what="CPU cores", verdict="ok", found=f"{usable_cores()} usable")


def _package(name: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(what=name, verdict="problem", found="not installed", remedy=_INSTALL)
    return Finding(what=name, verdict="ok", found=version)


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(what="GPUs", verdict="absent", found="none", remedy="training runs on CPUs with gloo")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding(what="GPUs", verdict="ok", found=f"{len(names)}: {', '.join(sorted(set(names)))}")


def _kernels() -> Finding:
    from megatron_lightseq.kernels.extension import load_extension, missing_extension

    missing = missing_extension()
    if missing is not None:
        return Finding(
            what="compiled kernels",
            verdict="problem",
            found=missing,
            remedy="without them only the reference kernel works, which is slow and stores full score matrices",
        )
    module = load_extension()
    cuda = "CPU and CUDA" if module.with_cuda else "CPU"
    return Finding(what="compiled kernels", verdict="ok", found=f"{cuda}, instruction set {module.cpu_isa}")


def _extra(name: str, extra: Extra) -> Finding:
    """What is installed of an extra, and what installing it adds."""
    use = f"`pip install -e '.[{name}]'` adds {extra.adds}"
    if extra.module is not None:
        return _optional(f"[{name}] {extra.module}", extra.module, use)
    versions = {package: _version(package) for package in extra.packages}
    found = ", ".join(f"{package} {version or 'not installed'}" for package, version in versions.items())
    return Finding(
        what=f"[{name}]",
        verdict="ok" if all(versions.values()) else "absent",
        found=found,
        remedy="" if all(versions.values()) else use,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional(what: str, module: str, use: str) -> Finding:
    """A package that may be missing, or installed but impossible to import."""
    if importlib.util.find_spec(module) is None:
        return Finding(what=what, verdict="absent", found="not installed", remedy=use)
    try:
        version = getattr(importlib.import_module(module), "__version__", "of unknown version")
    except Exception as error:  # noqa: BLE001  a build for another torch raises what its loader raises
        found = f"installed, but importing it fails: {type(error).__name__}: {str(error)[:120]}"
        return Finding(what=what, verdict="absent", found=found, remedy=f"treated as absent; {use}")
    return Finding(what=what, verdict="ok", found=str(version))
