"""`lightseq doctor`: what this machine offers, what is missing and what that costs. Fit to paste into a bug report.

Prints no environment variables and no paths, so no secrets.
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
class Finding:
    """One line of the report."""

    what: str
    verdict: Verdict
    """absent: optional and not there; problem: needed, and training will not start or will be very slow."""
    found: str
    remedy: str = ""
    """What to do about a problem, or what the absence costs."""


def run(arguments: Sequence[str]) -> int:
    """Print the report; exit status 1 when there is a problem."""
    argparse.ArgumentParser(
        prog="lightseq doctor", description=(__doc__ or "").partition("\n\n")[2]
    ).parse_args(arguments)
    findings = examine()
    Console(file=sys.stdout, highlight=False).print(report(findings))
    problems = sum(finding.verdict == "problem" for finding in findings)
    sys.stdout.write(f"{problems or 'no'} problem{'' if problems == 1 else 's'}\n")
    return 1 if problems else 0


def examine() -> list[Finding]:
    """Everything about this machine that decides whether and how fast training runs."""
    findings = [_python(), _cores(), *map(_package, REQUIRED)]
    for probe in (_gpus, _kernels, _transformer_engine, _apex):
        findings.append(probed(probe))
    return findings


def probed(probe: Callable[[], Finding]) -> Finding:
    """A probe's finding; whatever a broken installation raises becomes a problem instead of an end."""
    try:
        return probe()
    except Exception as error:  # noqa: BLE001  a broken installation raises anything, and is to be reported
        name = probe.__name__.strip("_").replace("_", " ")
        return Finding(
            what=name, verdict="problem", found=f"{type(error).__name__}: {str(error)[:120]}", remedy=_INSTALL
        )


def report(findings: Sequence[Finding]) -> Table:
    """The findings as a table."""
    colours = {"ok": "green", "absent": "yellow", "problem": "bold red"}
    table = Table(title=f"megatron_lightseq {__version__}", title_justify="left")
    for column in ("", "what", "found", "remedy or cost"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        verdict = Text(finding.verdict, style=colours[finding.verdict])
        table.add_row(verdict, finding.what, Text(finding.found), Text(finding.remedy))
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
    try:
        return Finding(what=name, verdict="ok", found=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(what=name, verdict="problem", found="not installed", remedy=_INSTALL)


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            what="GPUs", verdict="absent", found="none", remedy="training runs on the CPU, over gloo"
        )
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
            remedy="until then only the reference kernel works, which is slow and holds whole score matrices",
        )
    module = load_extension()
    cuda = "CPU and CUDA" if module.with_cuda else "CPU"
    return Finding(what="compiled kernels", verdict="ok", found=f"{cuda}, instruction set {module.cpu_isa}")


def _transformer_engine() -> Finding:
    return _optional(
        "transformer_engine", "layers are built from Megatron's local modules: no fp8, fewer fused kernels"
    )


def _apex() -> Finding:
    return _optional("apex", "torch's AdamW and gradient accumulation instead of apex's fused ones")


def _optional(module: str, cost: str) -> Finding:
    """A package that may be missing, and that may be there and not import."""
    if importlib.util.find_spec(module) is None:
        return Finding(what=module, verdict="absent", found="not installed", remedy=cost)
    try:
        version = getattr(importlib.import_module(module), "__version__", "of unknown version")
    except Exception as error:  # noqa: BLE001  a build for another torch raises what its loader raises
        found = f"installed, but importing it fails: {type(error).__name__}: {str(error)[:120]}"
        return Finding(what=module, verdict="absent", found=found, remedy=f"as if it were absent: {cost}")
    return Finding(what=module, verdict="ok", found=str(version))
