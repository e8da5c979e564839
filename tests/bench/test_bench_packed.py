"""`lightseq bench packed`: partitions of other systems, and a row per method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lightseq.cli import run
from megatron_lightseq.mask import Mask
from megatron_lightseq.tools.bench.packed import HEADER
from megatron_lightseq.tools.bench.partitions import PARTITIONS, heaviest_first, zigzag_per_document
from megatron_lightseq.tools.lengths import draw

BORDERS = (0, 3, 10, 48, 64)


@pytest.mark.parametrize("name", PARTITIONS)
def test_partitions_hold_all_work(name: str) -> None:
    for borders in (BORDERS, draw("magi", 4 * 8192, 1), (0, 64)):
        tokens = range(borders[-1])
        assert sum(PARTITIONS[name](borders, 4).pairs) == Mask.documents(borders).area(tokens, tokens)


def test_zigzag_per_document_is_even_where_documents_divide() -> None:
    assert zigzag_per_document((0, 16, 64), 2).pairs == (16 * 17 // 4 + 48 * 49 // 4,) * 2


def test_heaviest_first_gives_every_rank_equally_many_chunks() -> None:
    """One document of four chunks on two ranks: the first and the last on one rank, the middle ones on the other."""
    partition = heaviest_first((0, 64), 2, chunk=16)
    first, second, third, fourth = (sum(range(16 * i + 1, 16 * i + 17)) for i in range(4))
    assert sorted(partition.pairs) == sorted((fourth + first, third + second))
    assert sorted(partition.keys) == [
        16,
        32,
    ]  # chunks 2 and 3 need chunk 1; chunks 1 and 4 need chunks 2 and 3


def test_the_command_writes_a_row_per_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "packed.json"
    flags = ["--cp", "4", "--tokens-per-rank", "1024", "--lengths", "magi", "--draws", "2"]
    assert run(["bench", "packed", *flags, "--methods", "balanced,lightseq", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["method"] for row in rows] == ["balanced", "lightseq", *PARTITIONS] * 2
    assert all(tuple(row) == HEADER for row in rows)
    assert all(0 < row["simulated"] <= 1.001 and 0 < row["totals"] <= 1.001 for row in rows)
    assert rows[0]["totals"] > rows[1]["totals"]
    assert "balanced" in capsys.readouterr().out


def test_wrong_counts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "packed", "--draws", "0"]) != 0
    assert "--draws 0" in capsys.readouterr().err
