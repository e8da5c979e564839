"""The launcher, with a fake checkout of Megatron-LM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lightseq.cli import run
from tests.megatron import fake_lm
from tests.packaging.fakes import ROOT

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on machines without a GPU")


def lightseq(*arguments: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_lightseq`` in another interpreter, with ``paths`` on its PYTHONPATH."""
    search = os.pathsep.join(map(str, (ROOT, *paths)))
    environment = {**os.environ, "PYTHONPATH": search, "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "megatron_lightseq", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@needs_cpu
def test_an_unmodified_script_runs_wired_on_the_cpu(tmp_path: Path) -> None:
    script = fake_lm.checkout(tmp_path)
    flags = ("--seq-length", "96", "--cp-method", "ring", "--attention-dropout", "0")
    done = lightseq("megatron-lm", str(script), *flags)
    assert done.returncode == 0, done.stderr
    assert "torch sees no CUDA device, so Megatron-LM runs on the CPU, over gloo" in done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["device"], seen["wired"], seen["module"]) == ("cpu", True, "__main__")
    assert seen["argv"] == list(flags)
    assert (seen["args"]["cp_method"], seen["args"]["seq_length"]) == ("ring", 96)
    assert (seen["args"]["transformer_impl"], seen["args"]["distributed_backend"]) == ("local", "gloo")


@needs_cpu
@pytest.mark.parametrize("place", ["inside", "importable"])
def test_scripts_of_others_run_where_megatron_lm_is_found(tmp_path: Path, place: str) -> None:
    """A script below a checkout, as in its examples/, or anywhere with the checkout on PYTHONPATH."""
    original = fake_lm.checkout(tmp_path / "checkout")
    folder = (
        tmp_path / "checkout" / "examples" / "post_training" if place == "inside" else tmp_path / "elsewhere"
    )
    folder.mkdir(parents=True)
    script = original.rename(folder / "finetune.py")
    (folder / "helper.py").write_text("ready = True\n")
    script.write_text("import helper\n" + script.read_text())
    paths = () if place == "inside" else (tmp_path / "checkout",)
    done = lightseq(
        "megatron-lm", str(script), "--cp-method", "ring", "--attention-dropout", "0", paths=paths
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["wired"], seen["args"]["cp_method"]) == (True, "ring")


@needs_cpu
def test_refusals_end_the_launcher_with_a_message_and_status_2(tmp_path: Path) -> None:
    done = lightseq("megatron-lm", str(fake_lm.checkout(tmp_path)), "--sft", "--attention-dropout", "0")
    assert done.returncode == 2
    assert (
        "lightseq megatron-lm: --sft: it packs several documents into one sequence, and shards here are cut from whole "
        "sequences. Keep it with Megatron's own attention (--cp-method megatron), or train without it."
        in done.stderr
    )
    assert "Traceback" not in done.stderr


@needs_cpu
def test_a_checkout_without_a_patch_point_is_refused_by_name(tmp_path: Path) -> None:
    script = fake_lm.checkout(tmp_path)
    arguments = tmp_path / "megatron" / "training" / "arguments.py"
    arguments.write_text(arguments.read_text().replace("def add_megatron_arguments", "def add_arguments"))
    done = lightseq("megatron-lm", str(script))
    assert done.returncode == 2
    assert (
        "has no megatron.training.arguments.add_megatron_arguments: it is replaced so that our flags are added"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/pretrain_gpt.py"], "nowhere/pretrain_gpt.py: there is no such file"),
        ([__file__], "neither the folders above it nor PYTHONPATH hold Megatron-LM's training program"),
        (["--cp-method", "ring"], "'--cp-method' where the script is expected: the script comes first"),
    ],
)
def test_what_is_no_script_of_megatron_lm_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["megatron-lm", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_names_our_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["megatron-lm", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "pretrain_gpt.py" in shown
    assert "--cp-method" in shown
    assert run(["megatron-lm"]) == 2


@pytest.mark.parametrize(
    ("checkout", "message"),
    [(None, "MEGATRON_LM_PATH is not set"), ("/nowhere", "there is no /nowhere/pretrain_gpt.py")],
)
def test_the_example_says_what_it_needs(checkout: str | None, message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_LM_PATH"}
    if checkout is not None:
        environment["MEGATRON_LM_PATH"] = checkout
    command = ["bash", "scripts/pretrain_megatron_lm.sh"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"[lightseq] error: {message}" in done.stderr
    assert "[lightseq] remedy: " in done.stderr
