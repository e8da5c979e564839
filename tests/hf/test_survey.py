"""Every causal language model of transformers against the expected list, architectures.txt.

``LIGHTSEQ_SURVEY=1 pytest tests/hf/test_survey.py`` goes through all of them, which takes minutes; without it, some are
tried. ``LIGHTSEQ_SURVEY=write`` rewrites the list for another release of transformers: look at what changed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.ranks import run_ranks
from tests.hf import survey

LIST = Path(__file__).with_name("architectures.txt")
SOME = ["codegen", "deepseek_v3", "gpt_neox", "gptj", "llama4_text", "lfm3", "nemotron", "opt", "vaultgemma"]


def expected() -> dict[str, str]:
    lines = (line.partition(": ") for line in LIST.read_text().splitlines() if not line.startswith("#"))
    return {name: verdict for name, _, verdict in lines}


def test_at_least_eighty_are_equal_and_every_other_has_a_reason() -> None:
    verdicts = list(expected().values())
    assert verdicts.count("equal") >= 80
    others = [verdict for verdict in verdicts if verdict != "equal"]
    assert all(verdict.startswith(("refused: ", "not tried: ")) and verdict[11:] for verdict in others)


def test_some_are_as_expected() -> None:
    wanted = expected()
    assert run_ranks(2, survey.run, SOME)[0] == {name: wanted[name] for name in SOME}


@pytest.mark.skipif(
    "LIGHTSEQ_SURVEY" not in os.environ, reason="LIGHTSEQ_SURVEY=1 goes through all architectures"
)
@pytest.mark.timeout(1800)
def test_all_are_as_expected() -> None:
    found = run_ranks(2, survey.run, timeout_s=1500)[0]
    if os.environ["LIGHTSEQ_SURVEY"] == "write":
        first = LIST.read_text().splitlines()[0]
        LIST.write_text("\n".join([first, *(f"{name}: {verdict}" for name, verdict in found.items())]) + "\n")
    assert found == expected()
