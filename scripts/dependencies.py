"""Requirements and constraints for pip, for scripts/setup_env.sh. Uses only the standard library.

    python scripts/dependencies.py requirements [--dev]          requirement lines from pyproject.toml
    python scripts/dependencies.py constraints [--keep-torch]    constraint lines from constraints.txt

`--keep-torch` is for images that come with torch, such as NVIDIA's: torch and the packages compiled against it are
pinned to the installed versions, so that pip does not replace them, and the image's constraint file (`PIP_CONSTRAINT`)
overrides ours.

LIGHTSEQ_MEGATRON_CORE=VERSION replaces the pinned version of megatron-core in both outputs.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS_OF_DEV = ("dev", "docs", "hf")
VARIABLE = "LIGHTSEQ_MEGATRON_CORE"
COMPILED_AGAINST_TORCH = re.compile(r"(torch|(pytorch-)?triton|transformer-engine|apex|flash-attn|nvidia-)")


def distribution_name(line: str) -> str | None:
    """The normalised name (PEP 503) a requirement line starts with; None for comments, options and blank lines."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return re.sub(r"[-_.]+", "-", match.group(1)).lower() if match else None


def requirements(pyproject: Path, *, dev: bool) -> list[str]:
    """What pyproject.toml says is needed to build and run the package and, with dev, to check it."""
    parsed = tomllib.loads(pyproject.read_text())
    lines = [*parsed["build-system"]["requires"], *parsed["project"]["dependencies"]]
    if dev:
        lines += [
            line for extra in EXTRAS_OF_DEV for line in parsed["project"]["optional-dependencies"][extra]
        ]
    return lines


def with_megatron_core(lines: Sequence[str], version: str) -> list[str]:
    """`lines` with megatron-core at `version`, an exact release such as `0.18.0`.

    Raises:
        ValueError: `version` is not of that form.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(
            f"{VARIABLE}={version}: a release of megatron-core has three numbers. "
            "Give one such as 0.18.0, or unset the variable for the pinned version."
        )
    return [f"megatron-core=={version}" if distribution_name(x) == "megatron-core" else x for x in lines]


def undeclared(version: str) -> list[str]:
    """What that release of megatron-core imports without declaring it: triton, on CPUs too, from 0.17 on."""
    major, minor, _ = map(int, version.split("."))
    return ["triton"] if (major, minor) >= (0, 17) else []


def constraints(pins: str, installed: Mapping[str, str], image_constraints: str = "") -> list[str]:
    """Constraint lines that keep an installed torch and its relatives, and pin the rest as `pins` does.

    `installed` maps normalised distribution names to versions; names in `image_constraints` are left to it.
    """
    kept = {name: version for name, version in installed.items() if COMPILED_AGAINST_TORCH.match(name)}
    left_alone = set(installed) | {distribution_name(line) for line in image_constraints.splitlines()}
    ours = [line for line in pins.splitlines() if distribution_name(line) not in {None, *left_alone}]
    return [f"{name}=={version}" for name, version in sorted(kept.items())] + ours


def _installed() -> dict[str, str]:
    names = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {distribution_name(name) or name: version for name, version in names.items()}


def _image_constraints() -> str:
    files = os.environ.get("PIP_CONSTRAINT", "").split()
    return "\n".join(Path(file).read_text() for file in files if Path(file).is_file())


def main() -> None:
    """Print what the arguments ask for, one line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("requirements").add_argument(
        "--dev", action="store_true", help="tests and linters too"
    )
    commands.add_parser("constraints").add_argument("--keep-torch", action="store_true")
    arguments = parser.parse_args()
    pins = (ROOT / "constraints.txt").read_text()
    asked = os.environ.get(VARIABLE, "")
    if arguments.command == "requirements":
        lines = requirements(ROOT / "pyproject.toml", dev=arguments.dev)
    elif arguments.keep_torch:
        lines = constraints(pins, _installed(), _image_constraints())
    else:
        lines = pins.splitlines()
    if asked:
        lines = with_megatron_core(lines, asked)
    if asked and arguments.command == "requirements":
        lines += undeclared(asked)
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"dependencies.py: {error}") from None
