"""Writes the generated parts of the documentation in place: everything between these two comments.

    <!-- generated: KIND ARGUMENTS -->
    <!-- end -->

    python scripts/write_docs.py            rewrites README.md, CONTRIBUTING.md and docs/*.md where they differ
    python scripts/write_docs.py --check    changes nothing; exits with 1 and the names of stale files

KIND is one of
    flags SECTION ...        the configuration keys of these sections (megatron_lightseq/config/sections.py)
    commands                 the subcommands of `lightseq`
    schedule METHOD P [DIRECTION]  a schedule over P ranks, as it prints
    balance                  the busy share of the ranks, by method and P (megatron_lightseq/schedule/simulate.py)
    balance_by_mask          the same on eight ranks, by method and mask
    packed_schedule          a plan of the method balanced for packed documents
    traffic                  bytes sent by method and P
    patch_points             what is replaced in Megatron-LM (megatron_lightseq/megatron/lm/patch_points.py)
    launcher VERDICT         arguments of Megatron-LM that the launcher refuses or replaces (config/megatron_options.py)
    variables                our options as environment variables, for Megatron-LM's --spec
    include FILE             a Markdown file that a command has written, as it is
    image FILE WORDS ...     a picture below docs/ that a command has drawn
    code FILE [FIRST | LAST] a file, or its lines from the one with FIRST to the next one with LAST
    megatron_options VERDICT what attention does with Megatron's options (config/megatron_options.py)
    recipe_spellings         what Megatron-LM's arguments mean in recipes (config/megatron_options.py)
    fresh_clone PART         what the README's commands did in a fresh clone (docs/results/fresh_clone.json)
    scan METHOD RANKS        a scan of linear attention, as it prints
    plan_memory              errors of planned memory (docs/results/plan-memory.json)
    trace_cost               what tracing costs (docs/results/trace-cost.json)
    published                measurements of others, predicted (megatron_lightseq/tools/planner/published.py)
    kernels                  every attention kernel (megatron_lightseq/kernels/specs.py)
    gpu_model                predicted rates of the Hopper kernels (megatron_lightseq/tools/bench/gpu_model.py)
    linear_kernels           those of linear attention (megatron_lightseq/kernels/linear/specs.py)
    rooms                    the folders and modules of the package, by their docstrings
    imports                  a diagram of which of them imports which
    errors                   every exception, in the same way
    reference MODULE [NAME ...] the public names of a module (its __all__), for Sphinx to document
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_lightseq as mls
import megatron_lightseq.errors as mls_errors
from megatron_lightseq.cli import COMMANDS
from megatron_lightseq.config.flat import to_flat
from megatron_lightseq.config.megatron_option import Option, as_flag, with_flags
from megatron_lightseq.config.megatron_options import OPTIONS, launcher_options, recipe_spellings
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.strict_yaml import dump_scalar
from megatron_lightseq.config.typed import describe, field_docstrings, section_types
from megatron_lightseq.kernels.linear.specs import LINEAR_KERNELS, LinearKernelSpec
from megatron_lightseq.kernels.specs import KERNELS, KernelSpec
from megatron_lightseq.megatron.lm.options import KEYS, PREFIX
from megatron_lightseq.megatron.lm.patch_points import DEFAULT_LAYERS, PATCH_POINTS
from megatron_lightseq.megatron.lm.refusals import SIZE_ARGUMENTS
from megatron_lightseq.schedule import METHODS, TensorShape, simulate
from megatron_lightseq.tools.bench import gpu_model
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.planner.published import published as published_measurements

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_lightseq"
BLOCK = re.compile(r"(<!-- generated: (?P<what>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
LANGUAGES = {".py": "python", ".mmd": "mermaid"}
SIZES = (2, 3, 4, 5, 8, 16)


def documents() -> list[Path]:
    """Files that may hold generated blocks."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "results"]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(pages)]


def flags(*sections: str) -> str:
    """Keys, defaults and meanings."""
    defaults = to_flat(PretrainConfig())
    rows = []
    for section in sections:
        for key, text in field_docstrings(section_types()[section]).items():
            default = dump_scalar(list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key])
            meaning = f"{' '.join(text.split())} *({describe(key)})*"
            rows.append([f"`--{key.replace('_', '-')}`", f"`{default}`", meaning])
    return markdown_table(["flag", "default", "meaning"], rows)


def commands() -> str:
    """The subcommands of `lightseq`."""
    return markdown_table(
        ["command", "what it does"], [[f"`lightseq {name}`", c.summary] for name, c in COMMANDS.items()]
    )


def layout_for(method: str, size: int) -> mls.SequenceLayout:
    """The layout a method is made for."""
    return mls.SequenceLayout(METHODS[method].default_layout, size)


def schedule(method: str, size: str, direction: str = "forward") -> str:
    """A schedule as it prints."""
    built = mls.schedule.build(method, layout_for(method, int(size)), direction=direction)
    return f"```text\n{built}\n```"


def scan(method: str, size: str) -> str:
    """A scan as it prints."""
    built = mls.schedule.build_scan(method, mls.SequenceLayout.contiguous(int(size)))
    return f"```text\n{built}\n```"


def packed_schedule() -> str:
    """A plan of `balanced` for two documents on four ranks, as it prints."""
    built = mls.schedule.build(
        "balanced",
        mls.SequenceLayout.contiguous(4),
        mask=mls.Mask.documents((0, 824, 1024)),
        shape=TensorShape(num_heads=8, num_query_groups=1),
    )
    return f"```text\n{built}\n```"


def methods() -> str:
    """Every method, as its entry in ``METHODS`` describes it."""
    rows = [
        [f"`{name}`", method.summary, ", ".join(method.layouts), method.source]
        for name, method in METHODS.items()
    ]
    return markdown_table(["method", "a rank computes", "layouts, the default first", "source"], rows)


def balance() -> str:
    """How busy the slowest rank leaves the others, when transfers cost nothing."""
    methods = ("ring", "zigzag", "lightseq")
    rows = [
        [str(size), *(f"{simulate(mls.schedule.build(m, layout_for(m, size))).busy:.0%}" for m in methods)]
        for size in SIZES
    ]
    return markdown_table(["ranks", *methods], rows)


def balance_by_mask() -> str:
    """The same under other masks, on eight ranks of 2,048 tokens."""
    length, methods = 8 * 2048, ("ring", "zigzag", "lightseq", "balanced")
    causal, ends = mls.Mask.causal(), (0, 0.14, 0.5, 0.52, 0.97, 1)
    masks = {
        "causal": causal,
        "causal, window of 6,144": mls.Mask.window(6143),
        "causal, five documents of unequal length": causal
        & mls.Mask.documents([int(x * length) for x in ends]),
    }
    rows = []
    for name, mask in masks.items():
        built = [mls.schedule.build(m, layout_for(m, 8), mask=mask, seq_length=length) for m in methods]
        rows.append([name, *(f"{simulate(one).busy:.0%}" for one in built)])
    return markdown_table(["mask", *methods], rows)


def traffic() -> str:
    """Forward bytes that a rank sends, for MHA and for GQA, mean over ranks and busiest rank."""
    rows = []
    for size in SIZES:
        cells = [str(size)]
        for groups in (8, 2):
            shape = TensorShape(num_heads=8, num_query_groups=groups)
            for method in ("zigzag", "lightseq"):
                built = mls.schedule.build(method, layout_for(method, size))
                sent = simulate(built, shape=shape).bytes_sent
                chunk = built.seq_length // size * 8 * 128 * 2
                cells.append(f"{sum(sent) / size / chunk:.2f} / {max(sent) / chunk:.2f}")
        rows.append(cells)
    return markdown_table(
        ["ranks", "zigzag, MHA", "lightseq, MHA", "zigzag, GQA 4:1", "lightseq, GQA 4:1"], rows
    )


def patch_points() -> str:
    """What is replaced in Megatron-LM."""
    rows = [[f"`{point.path}`", point.purpose, point.versions] for point in (*PATCH_POINTS, DEFAULT_LAYERS)]
    return markdown_table(["replaced, or called by `--spec`", "so that", "core"], rows)


def launcher(verdict: str) -> str:
    """Arguments of Megatron-LM that the launcher refuses, or replaces."""
    found: dict[int, tuple[Option, list[str]]] = {}
    for name, option in launcher_options():
        if option.in_launcher == verdict:
            found.setdefault(id(option), (option, []))[1].append(f"`{as_flag(name)}`")
    rows = []
    for option, flags_ in found.values():
        only = f" {', '.join(option.only)}" if option.only else ""
        condition = f", {option.condition.text}" if option.condition else ""
        names_ = [*KEYS, *option.names, *SIZE_ARGUMENTS]
        text = with_flags(f"{option.reason}|{option.remedy}", names_)
        rows.append([f"{', '.join(flags_)}{only}{with_flags(condition, names_)}", *text.split("|")])
    columns = ["argument", "because", "instead"]
    shown = len(columns) if verdict == "refused" else 2
    return markdown_table(columns[:shown], [row[:shown] for row in rows])


def variables() -> str:
    """Our options as environment variables."""
    return ", ".join(f"`{PREFIX}{key.upper()}`" for key in KEYS)


def code(path: str, *between: str) -> str:
    """A file of the repository, or a part of it."""
    lines = (ROOT / path).read_text().splitlines()
    if between:
        first, last = " ".join(between).split(" | ")
        start = next(number for number, line in enumerate(lines) if first in line)
        end = next(number for number, line in enumerate(lines) if number >= start and last in line)
        lines = lines[start : end + 1]
    body = textwrap.dedent("\n".join(lines)).strip("\n")
    return f"```{LANGUAGES.get(Path(path).suffix, 'yaml')}\n{body}\n```"


def fresh_clone(part: str) -> str:
    """What scripts/try_fresh_clone.py --record wrote down: `output`, `pictures`, `loss` or `times`."""
    path = ROOT / "docs" / "results" / "fresh_clone.json"
    if not path.is_file():
        return f"*Not measured yet: `{path.relative_to(ROOT)}` is not there.*"
    recorded = json.loads(path.read_text())
    if part == "output":
        return "```text\n" + "\n".join(recorded["commands"]["pretrain"]["lines"]) + "\n```"
    if part == "pictures":
        loss = "![Training loss by step, falling below the unigram entropy of the corpus](images/loss.png)"
        return f"{loss}\n\n![The schedule of the attention that ran](images/schedule.png)"
    if part == "loss":
        falls = "Loss falls from {first_loss:.2f} to {last_loss:.2f} nats per byte".format(
            **recorded["summary"]
        )
        return f"{falls}; a unigram model scores {recorded['summary']['entropy']:.2f}."
    return _times(recorded)


def _times(recorded: dict[str, Any]) -> str:
    pretrain, again = (recorded["commands"][name] for name in ("pretrain", "again"))
    rows = [
        *([f"`pretrain_gpt.sh`: {name}", f"{seconds} s"] for name, seconds in pretrain["phases"].items()),
        ["`pretrain_gpt.sh`: to the first step, the above included", f"{pretrain['first_step_s']} s"],
        [f"`pretrain_gpt.sh`: to its end, {recorded['summary']['steps']} steps", f"{pretrain['seconds']} s"],
        ["`pretrain_gpt.sh` a second time: to the first step", f"{again['first_step_s']} s"],
    ]
    if "tests" in recorded["commands"]:
        rows.append(["`run_tests.sh`, with its test tools", f"{recorded['commands']['tests']['seconds']} s"])
    where = "{cpu}, {cores} cores, {system}, load average {load}".format(**recorded["machine"])
    source = (
        f"`python scripts/try_fresh_clone.py --record` at commit {recorded['commit']}: {where}, warm caches."
    )
    return f"{markdown_table(['phase', 'time'], rows)}\n\n{source}"


def include(path: str) -> str:
    """A Markdown file that a command has written."""
    recorded = ROOT / path
    if not recorded.exists():
        return f"*Not measured yet: `{path}` is not there.*"
    return recorded.read_text().rstrip("\n")


def megatron_options(verdict: str) -> str:
    """The options with one verdict in attention, those with the same reason together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for option in OPTIONS:
        if option.attention == verdict and option.reason:
            condition = option.condition.text if option.condition else ""
            only = f"{', '.join(option.only)} " if option.only else ""
            suffix = "" if option.kind == "field" else " (argument)"
            names = found.setdefault((option.reason, option.remedy, f"{only}{condition}"), [])
            names.extend(f"`{name}`{suffix}" for name in option.names if f"`{name}`{suffix}" not in names)
    refused = verdict == "refused"
    rows = [
        [", ".join(names) + (f": {when}" if when else ""), reason, *([remedy] if refused else [])]
        for (reason, remedy, when), names in found.items()
    ]
    return markdown_table(["option", "why", *(["what to do"] if refused else [])], rows)


def recipe_spelling_rows() -> str:
    """What Megatron-LM's arguments that are not keys mean in recipes."""
    by_meaning: dict[str, list[str]] = {}
    for name, spelling in recipe_spellings().items():
        keys = [f"`{key}: {dump_scalar(value)}`" for key, value in spelling.values]
        keys += [f"nothing; needs `{spelling.needs}`"] if spelling.needs else []
        by_meaning.setdefault(spelling.refusal or ", ".join(keys) or "always the case", []).append(
            f"`{name}`"
        )
    rows = [[", ".join(names), meaning] for meaning, names in by_meaning.items()]
    return markdown_table(["argument of Megatron-LM", "in a recipe"], rows)


def image(path: str, *words: str) -> str:
    """A picture that a command has drawn, for the documents in docs/; nothing before it has."""
    if not (ROOT / path).exists():
        return f"*Not drawn yet: `{path}` is not there.*"
    return f"![{' '.join(words)}]({Path(path).relative_to('docs')})"


def _taken(spec: KernelSpec | LinearKernelSpec) -> str:
    """The devices, dtypes and head dims of a kernel."""
    return "; ".join(
        f"{support.device_type}: {', '.join(support.dtypes)}; head dims {support.head_dims}"
        for support in spec.devices
    )


def linear_kernels() -> str:
    """Every kernel of linear attention, as its spec describes it."""
    rows = []
    for spec in LINEAR_KERNELS.values():
        gates = [*map(str, spec.decays), *(["the delta rule"] if spec.delta_rule else [])]
        sources = ", ".join(f"`{source}`" for source in spec.sources)
        in_auto = "yes" if spec.in_auto else "no"
        rows.append([f"`{spec.name}`", spec.summary, _taken(spec), ", ".join(gates), in_auto, sources])
    header = ["name", "what it is", "devices, dtypes, head dims", "gates", "in `auto`", "where"]
    return markdown_table(header, rows)


def plan_memory() -> str:
    """Errors of planned memory: of all runs, and of the worst ones."""
    record = json.loads((ROOT / "docs" / "results" / "plan-memory.json").read_text())
    worst = sorted(record["by_run"], key=lambda run: -abs(run["worst_error"]))[:5]
    rows = [[run["name"], f"{run['worst_error']:+.1%}"] for run in worst]
    rows.append([f"median of {record['runs']} runs", f"{record['median_error']:.1%}"])
    return markdown_table(["run (the five worst)", "error of the worst rank"], rows)


def trace_cost() -> str:
    """What tracing costs, as measured."""
    record = json.loads((ROOT / "docs" / "results" / "trace-cost.json").read_text())
    return (
        f"The time of a traced step differs from that of its neighbour by {record['median'] - 1:+.1%} (median, "
        f"{record['what']}; `{record['command']}`)."
    )


def published() -> str:
    """Measurements of others, predicted."""
    rows = [
        [
            row.source,
            row.what,
            row.unit,
            f"{row.published:,.1f}",
            f"{row.predicted:,.1f}",
            f"{row.error:+.0%}",
        ]
        for row in published_measurements()
    ]
    return markdown_table(["source", "what", "unit", "published", "predicted", "error"], rows)


def kernels() -> str:
    """Every kernel, as its spec describes it."""
    rows = []
    for spec in KERNELS.values():
        takes = _taken(spec)
        sources = ", ".join(f"`{source}`" for source in spec.sources)
        in_auto = "yes" if spec.in_auto else "no"
        rows.append([f"`{spec.name}`", spec.summary, takes, str(spec.masks), in_auto, sources])
    header = ["name", "what it is", "devices, dtypes, head dims", "masks", "in `auto`", "where"]
    return markdown_table(header, rows)


def rooms() -> str:
    """The package's folders and top-level modules, with the first sentence of each docstring."""
    rows = []
    for path in sorted(PACKAGE.rglob("__init__.py")) + sorted(PACKAGE.glob("[a-z]*.py")):
        name = path.relative_to(PACKAGE).as_posix().removesuffix("__init__.py")
        if name:
            rows.append([f"`{name}`", _first_sentence(path)])
    return markdown_table(["room", "what it holds"], sorted(rows))


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", " ".join(text.split("\n\n")[0].split()))
    return re.sub(r"``([^`]+)``", r"`\1`", re.split(r"(?<=\.) (?=[A-Z`])", text)[0])


def imports() -> str:
    """The imports between the package's rooms, less those that follow from others."""
    direct = _imports_between_rooms()

    def reached(room: str, skipped: str) -> set[str]:
        found: set[str] = set()
        left = direct[room] - {skipped}
        while left:
            found |= left
            left = set().union(*(direct[other] for other in left)) - found
        return found

    edges = [
        f"  {room} --> {other}"
        for room in sorted(direct)
        for other in sorted(direct[room])
        if other not in reached(room, other)
    ]
    return "```mermaid\nflowchart TD\n" + "\n".join(edges) + "\n```"


def _imports_between_rooms() -> dict[str, set[str]]:
    prefix = f"{PACKAGE.name}."
    names = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_") and _is_room(path)}
    direct: dict[str, set[str]] = {name: set() for name in names}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            )
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            used = {module.split(".")[1] for module in modules if module.startswith(prefix)} & names
            if room in names:
                direct[room] |= used - {room}
    return direct


def _is_room(path: Path) -> bool:
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def reference(module: str, *names: str) -> str:
    """Directives that make Sphinx document the public names of a module."""
    public = names or importlib.import_module(module).__all__
    return "```{eval-rst}\n" + "\n".join(_directive(module, name) for name in public) + "\n```"


def _directive(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    if isinstance(value, type):
        return f".. {'autoexception' if issubclass(value, Exception) else 'autoclass'}:: {module}.{name}"
    if inspect.isroutine(value):
        return f".. autofunction:: {module}.{name}"
    # The docstring of a constant stands where it is defined.
    return f".. autodata:: {_home_of(module, name)}.{name}\n   :no-value:"


def _home_of(module: str, name: str) -> str:
    """The module that defines a name, followed through imports."""
    source = importlib.import_module(module).__file__
    assert source is not None
    for node in ast.walk(ast.parse(Path(source).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return _home_of(node.module, name)
    return module


def errors() -> str:
    """Every exception of the package, for Sphinx to document."""
    names = [
        name for name, value in vars(mls_errors).items() if isinstance(value, type) and name.endswith("Error")
    ]
    return reference(mls_errors.__name__, *names)


KINDS: dict[str, Callable[..., str]] = {
    "flags": flags,
    "commands": commands,
    "schedule": schedule,
    "scan": scan,
    "methods": methods,
    "balance": balance,
    "balance_by_mask": balance_by_mask,
    "packed_schedule": packed_schedule,
    "traffic": traffic,
    "patch_points": patch_points,
    "launcher": launcher,
    "variables": variables,
    "code": code,
    "include": include,
    "image": image,
    "megatron_options": megatron_options,
    "recipe_spellings": recipe_spelling_rows,
    "fresh_clone": fresh_clone,
    "plan_memory": plan_memory,
    "trace_cost": trace_cost,
    "published": published,
    "kernels": kernels,
    "linear_kernels": linear_kernels,
    "gpu_model": gpu_model.table,
    "rooms": rooms,
    "imports": imports,
    "reference": reference,
    "errors": errors,
}


def rewritten(text: str) -> str:
    """A document with its generated blocks written again."""

    def fill(match: re.Match[str]) -> str:
        kind, *arguments = match["what"].split()
        return f"{match[1]}{KINDS[kind](*arguments)}\n{match[3]}"

    return BLOCK.sub(fill, text)


def main() -> int:
    """Rewrite or check; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a file is stale")
    check = parser.parse_args().check
    stale = [path for path in documents() if rewritten(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale' if check else 'rewritten'}")
        if not check:
            path.write_text(rewritten(path.read_text()))
    if check and stale:
        print("run: python scripts/write_docs.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
