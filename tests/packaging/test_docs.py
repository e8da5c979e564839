"""The documents are correct: their code runs, and their generated parts are up to date."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import megatron_lightseq as mls
from docs.examples.travelling_queries import travelling_queries
from megatron_lightseq.config import keys as configuration_keys
from megatron_lightseq.kernels.specs import kernel_names
from megatron_lightseq.schedule import Payload
from megatron_lightseq.transport import run_loopback
from tests.core import oracle
from tests.core.test_attention import attend, check_exact, unshard
from tests.packaging.fakes import ROOT
from tests.packaging.test_setup import load

write_docs = load("write_docs")


def test_generated_parts_are_fresh() -> None:
    stale = [
        path.name
        for path in write_docs.documents()
        if write_docs.rewritten(path.read_text()) != path.read_text()
    ]
    assert stale == [], "run: python scripts/write_docs.py"


def test_a_stale_part_is_noticed() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    changed = text.replace("| 4 | 57% |", "| 4 | 58% |")
    assert changed != text
    assert write_docs.rewritten(changed) == text


def test_every_key_is_documented() -> None:
    documented = (ROOT / "docs" / "configuration.md").read_text()
    missing = [key for key in configuration_keys() if f"| `--{key.replace('_', '-')}` |" not in documented]
    assert missing == []


def test_every_variable_of_the_scripts_is_documented() -> None:
    documented = (ROOT / "docs" / "configuration.md").read_text()
    for script in ("lib.sh", "pretrain_megatron_lm.sh", "pretrain_gpt.sh"):
        head = (ROOT / "scripts" / script).read_text()
        variables = re.findall(r"^#   ((?:[A-Z_]+(?:, )?)+) ", head, flags=re.MULTILINE)
        assert variables, script
        for name in ", ".join(variables).split(", "):
            assert f"`{name}`" in documented, name
    exported = set(re.findall(r"^\s*export ([A-Z_]+)=", head, flags=re.MULTILINE)) - {"CUDA_VISIBLE_DEVICES"}
    assert [name for name in sorted(exported) if f"`{name}`" not in documented] == []


def test_every_method_and_kernel_is_documented() -> None:
    algorithms = (ROOT / "docs" / "algorithms.md").read_text()
    assert [name for name in mls.schedule.METHODS if f"| `{name}` |" not in algorithms] == []
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    assert [name for name in kernel_names() if name != "auto" and f"| `{name}` |" not in architecture] == []


def test_lightseq_balances_as_the_readme_says() -> None:
    """README: under a causal mask every rank computes the same number of pairs, for any number of ranks."""
    assert "every rank computes the same number of (query, key) pairs" in (ROOT / "README.md").read_text()
    for size in range(1, 34):
        built = mls.schedule.build("lightseq", mls.SequenceLayout.contiguous(size))
        assert mls.schedule.simulate(built).busy == pytest.approx(1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_method_of_the_contributing_guide(size: int) -> None:
    layout, mask = mls.SequenceLayout.contiguous(size), mls.Mask.causal()
    whole = oracle.inputs(size * 7, (4, 2), (8, 5), torch.float64)
    parts = run_loopback(size, lambda group: attend(group, travelling_queries, layout, mask, whole))
    check_exact(unshard(layout, parts), whole, mask, "travelling queries")
    moved = {
        move.payload for step in mls.schedule.build(travelling_queries, layout).steps for move in step.moves
    }
    assert moved == ({Payload.Q, Payload.OUT} if size > 1 else set())


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_code_of_the_contributing_guide_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    placement, look, use = python_blocks(ROOT / "CONTRIBUTING.md")
    assert placement.rstrip() in (ROOT / "docs" / "examples" / "travelling_queries.py").read_text()
    namespace: dict[str, object] = {}
    exec(look, namespace)
    exec(use, namespace)  # ends with an assertion
    assert "assert_close" in use


CODE_LINK = re.compile(r"\[`([^`]+)`\]\(([^)#\s]+\.(?:py|h|cpp|cu))\)")


def names_in(source: Path) -> set[str]:
    """The names that a file defines: `function`, `Class`, `Class.method`, `CONSTANT`; for C++, every word."""
    if source.suffix != ".py":
        return set(re.findall(r"\w+", source.read_text()))
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(source.read_text()).body, "")
    return names


def wrong_links(document: Path, text: str) -> list[str]:
    """Links from names in code type to source files that do not define them."""
    links = [(name, (document.parent / target).resolve()) for name, target in CODE_LINK.findall(text)]
    return [
        f"{name} is not in {source.relative_to(ROOT)}"
        for name, source in links
        if not (source.is_file() and (name in names_in(source) or source.as_posix().endswith(f"/{name}")))
    ]


@pytest.mark.parametrize("document", write_docs.documents(), ids=lambda path: path.stem)
def test_every_name_that_links_to_a_file_is_defined_there(document: Path) -> None:
    assert wrong_links(document, document.read_text()) == []


def test_a_name_that_moved_is_noticed() -> None:
    tour = ROOT / "docs" / "tour.md"
    moved = tour.read_text().replace("[`Runtime.execute`]", "[`Runtime.gone`]")
    assert wrong_links(tour, moved) == ["Runtime.gone is not in megatron_lightseq/attention/runtime.py"]


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: \S+\.(\w+)$", pages, flags=re.MULTILINE))
    rooms = [
        mls,
        *(
            importlib.import_module(f"megatron_lightseq.{room}")
            for room in ("attention", "linear", "schedule", "megatron")
        ),
    ]
    public = {name for room in rooms for name in room.__all__}
    assert public - documented == {"schedule"}  # a module: its names are there
    assert {"Kernel", "KERNELS", "ConfigError"} <= documented


def test_the_tour_has_ten_steps_each_with_code() -> None:
    _, *steps = re.split(r"^## (?=\d+\.)", (ROOT / "docs" / "tour.md").read_text(), flags=re.MULTILINE)
    assert [int(step.partition(".")[0]) for step in steps] == list(range(1, 11))
    assert [step.splitlines()[0] for step in steps if not CODE_LINK.search(step)] == []


def test_the_glossary_defines_every_word_once_and_knows_the_words_of_the_tour() -> None:
    rows = re.findall(r"^\| (\S[^|]*?) \|", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)
    words = [word.strip("`") for row in rows if row not in ("word", "---") for word in row.split(", ")]
    assert len(words) == len(set(words))
    emphasised = set(re.findall(r"(?<!\*)\*([a-z]+)\*(?!\*)", (ROOT / "docs" / "tour.md").read_text()))
    assert {"shard", "plan", "tile", "move", "step"} <= emphasised
    assert emphasised <= set(words)


def test_the_readme_is_one_screenful() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_diagram_of_imports_leaves_out_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rooms"
    (package / "upper").mkdir(parents=True)
    (package / "upper" / "__init__.py").write_text("from rooms import middle, lower\n")
    (package / "middle.py").write_text("import rooms.lower\nimport json\n")
    (package / "lower.py").write_text("")
    monkeypatch.setattr(write_docs, "PACKAGE", package)
    assert write_docs.imports().splitlines()[2:-1] == ["  middle --> lower", "  upper --> middle"]


def run_example(name: str, num_ranks: int) -> str:
    """The output of a documented program, started as its docstring says."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    example = str(ROOT / "docs" / "examples" / name)
    done = subprocess.run([*command, example], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_example_of_the_readme() -> None:
    printed = run_example("first_attention.py", 2)
    assert len(re.findall(r"rank \d: \(512, 1, 8, 64\), dk \(512, 1, 8, 64\)", printed)) == 2


def test_the_program_without_megatron() -> None:
    printed = run_example("own_attention.py", 2)
    assert len(re.findall(r"rank \d: \(512, 1, 8, 64\) of \(1024, 1, 8, 64\)", printed)) == 2


def test_the_program_with_megatron_has_the_same_loss_on_any_number_of_ranks() -> None:
    with ThreadPoolExecutor() as pool:
        alone, cut = pool.map(lambda ranks: run_example("own_megatron_code.py", ranks), (1, 2))
    losses = {float(loss) for loss in re.findall(r"mean loss (\d+\.\d+)", alone + cut)}
    assert "rank 1: 128 of 256 tokens" in cut
    assert max(losses) - min(losses) <= 2e-4  # printed with four digits
    assert 5.0 < min(losses) < 7.5  # about log 512, the loss of an untrained model
