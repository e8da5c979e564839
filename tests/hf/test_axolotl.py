"""The plugin for Axolotl: with a stand-in that has its hooks, and through its own command line where it is installed.

``LIGHTSEQ_AXOLOTL=FOLDER pytest tests/hf/test_axolotl.py`` runs ``axolotl train`` with the packages in a folder
(CONTRIBUTING, Versions); Axolotl pins other releases than ours, and cannot be installed beside them.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_lightseq.errors import ConfigError, UnsupportedError
from tests.harness.ranks import run_ranks
from tests.hf import axolotl_stand_in as stand_in
from tests.hf import tiny, trained

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "hf_axolotl.yml"


def plugin() -> Any:
    stand_in.install()
    from megatron_lightseq.hf.axolotl import LightSeqPlugin

    return LightSeqPlugin()


def config(**keys: Any) -> stand_in.Config:
    return stand_in.Config({"lightseq_context_parallel_size": 2, **keys})


def train(cut: bool) -> trained.Outcome:
    """A few steps as Axolotl takes them: the hooks of the plugin around its own trainer."""
    with trained.launched() as (_, size), tempfile.TemporaryDirectory() as folder:
        ours, keys = plugin(), config(lightseq_context_parallel_size=2 if cut else 1)
        ours.load_datasets(keys)
        ours.pre_model_load(keys)
        model = tiny.model("llama")
        ours.post_model_load(keys, model)
        kind = ours.get_trainer_cls(keys) or stand_in.AxolotlTrainer
        args = trained.arguments(size, size, folder, **ours.get_training_args(keys))
        data = trained.rows(packed=True)
        built = kind(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=data[:5],
            data_collator=trained.collate,
        )
        built.remove_callback(transformers.PrinterCallback)
        built.train()
        return trained.outcome(built)


def test_training_is_that_of_one_process() -> None:
    wanted = run_ranks(1, train, False)[0]
    for log, evaluation, weights, forwards in run_ranks(2, train, True):
        assert forwards > 0
        torch.testing.assert_close(torch.tensor(log), torch.tensor(wanted[0]), atol=1e-5, rtol=0)
        assert evaluation["eval_loss"] == pytest.approx(wanted[1]["eval_loss"], abs=1e-5)
        for name, x in weights.items():
            assert (x - wanted[2][name]).abs().max() <= 1e-6


def test_without_the_key_nothing_changes() -> None:
    ours, keys = plugin(), stand_in.Config()
    model = tiny.model("llama")
    ours.pre_model_load(keys)
    ours.post_model_load(keys, model)
    assert model.config._attn_implementation == "eager"
    assert ours.get_trainer_cls(keys) is None
    assert ours.get_training_args(keys) == {}


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("context_parallel_size", 2, "sequences are cut once, by this plugin"),
        ("tensor_parallel_size", 2, "with data parallelism only"),
        ("rl", "dpo", "losses of their own"),
        ("deepspeed", "zero2.json", "averages gradients over groups of its own"),
    ],
)
def test_other_keys_that_would_give_another_loss_are_refused(key: str, value: Any, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{key}: {value} with .*{why}.* Take {key} out of the file"):
        plugin().pre_model_load(config(**{key: value}))


def test_ranks_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="lightseq_context_parallel_size: 2 with 3 processes"):
        plugin().pre_model_load(config())
    monkeypatch.setenv("WORLD_SIZE", "4")
    plugin().pre_model_load(config())


@pytest.mark.skipif(
    "LIGHTSEQ_AXOLOTL" not in os.environ, reason="LIGHTSEQ_AXOLOTL names a folder with Axolotl"
)
def test_its_command_line_prints_the_losses_of_one_process(tmp_path: Path) -> None:
    write_inputs(tmp_path / "tiny")
    wanted = losses(tmp_path, 1)
    assert len(wanted) == 3
    assert losses(tmp_path, 2) == wanted


def write_inputs(folder: Path) -> None:
    """A tiny model with its tokenizer, and documents of many lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tiny.VOCABULARY)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t3"
    )
    tokenizer.save_pretrained(folder / "model")
    tiny.model("llama").save_pretrained(folder / "model")
    numbers = random.Random(3)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(64):
            text = " ".join(
                f"t{numbers.randrange(4, tiny.VOCABULARY)}" for _ in range(numbers.randrange(20, 90))
            )
            file.write(json.dumps({"text": text}) + "\n")


def losses(folder: Path, ranks: int) -> list[tuple[str, str]]:
    """(loss, gradient norm) of every step, as printed."""
    text = EXAMPLE.read_text().replace("parallel_size: 2", f"parallel_size: {ranks}")
    (folder / "run.yml").write_text(text)
    launch = (
        ["--launcher", "torchrun", "--", "--nproc-per-node", "2"] if ranks > 1 else ["--launcher", "python"]
    )
    root, packages = EXAMPLE.parents[2], os.environ["LIGHTSEQ_AXOLOTL"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{packages}",
        "ACCELERATE_USE_CPU": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", "train", "run.yml", *launch],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    return re.findall(r"\{'loss': '([^']*)', 'grad_norm': '([^']*)'", said)
