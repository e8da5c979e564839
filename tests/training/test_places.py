"""Where a rank is: in its attention, on its board, and how long it has waited."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.schedule import Direction
from megatron_lightseq.training.job.board import Board, BoardView, Whereabouts, exchange_in_words
from megatron_lightseq.training.job.failure import EVALUATE, FINISH, TRAIN
from megatron_lightseq.training.job.launch import Launch
from megatron_lightseq.training.job.rank_log import dump_stacks, log_path, note, rank_log
from megatron_lightseq.training.job.waits import Waits, counting
from megatron_lightseq.transport import run_loopback
from tests.harness.ranks import run_ranks


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ((3, TRAIN, Direction.FORWARD, 0, 2, 5), (3, TRAIN, "forward exchange 1 of 2, layer 5")),
        ((2**40, EVALUATE, Direction.BACKWARD, 7, 8, 0), (2**40, EVALUATE, "backward exchange 8 of 8")),
        ((1, TRAIN, None, 7, 8, 2), (1, TRAIN, "")),
        ((0, FINISH, None, 0, 0, 0), (0, FINISH, "")),
    ],
)
def test_a_board_is_read_as_it_was_written(entry: Any, expected: tuple[int, str, str]) -> None:
    board = Board()
    view = BoardView(board.path)
    assert view.read() is None
    board.write(*entry)
    step, phase, exchange = expected
    assert view.read() == Whereabouts(step=step, phase=phase, exchange=exchange)


def test_a_board_outlives_its_process(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        board = Board()
        board.write(17, TRAIN, Direction.BACKWARD, 1, 3, 2)
        (tmp_path / "part").write_text(board.path)
        os.rename(tmp_path / "part", tmp_path / "path")
        time.sleep(60)
        os._exit(0)
    while not (tmp_path / "path").exists():
        time.sleep(0.01)
    path = (tmp_path / "path").read_text()
    view = BoardView(path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert view.read() == Whereabouts(step=17, phase=TRAIN, exchange="backward exchange 2 of 3, layer 2")
    with pytest.raises(OSError, match=path):
        BoardView(path)


def test_attention_says_where_it_is() -> None:
    def one_rank(group: Any) -> list[str]:
        attention, seen = DistAttention(group, method="ring"), []
        place = attention.stats.place

        def look() -> None:
            seen.append(exchange_in_words(place.direction, place.step, place.num_steps, place.layer))

        place.changed = look
        q, k, v = (torch.randn(8, 1, 2, 4, requires_grad=True) for _ in range(3))
        outputs = []
        for layer in (1, 2):
            place.layer = layer
            outputs.append(attention(q, k, v))
        for out in reversed(outputs):
            out.sum().backward()
        return seen

    for seen in run_loopback(2, one_rank):
        assert seen == [
            text
            for direction, layers in (("forward", (1, 2)), ("backward", (2, 1)))
            for layer in layers
            for text in (
                *(
                    f"{direction} exchange {t} of {3 if direction == 'backward' else 2}, layer {layer}"
                    for t in (1, 2)
                ),
                *([f"backward exchange 3 of 3, layer {layer}"] if direction == "backward" else []),
                "",
            )
        ]


def waited(own_s: float) -> tuple[float, bool, float]:
    """Seconds in an all-reduce that the last rank is late for; whether it was seen waiting; and outside the block."""
    waits, seen = Waits(), []
    rank = dist.get_rank()
    with counting(waits):
        time.sleep(own_s * rank)
        if rank == 0:
            import threading

            threading.Timer(own_s / 2, lambda: seen.append(waits.since is not None)).start()
        dist.all_reduce(torch.ones(3))
    within = waits.seconds
    dist.barrier()
    return within, any(seen), waits.seconds - within


def test_waiting_is_counted_and_work_is_not() -> None:
    first, last = run_ranks(2, waited, 1.0)
    assert 0.5 < first[0] < 20.0
    assert first[1]
    assert last[0] < 0.5 * first[0]
    assert (first[2], last[2]) == (0.0, 0.0)


# ---- logs -----------------------------------------------------------------------------------------------------


def test_a_rank_that_fails_has_its_traceback_in_its_log(tmp_path: Path) -> None:
    launch = Launch(rank=3, world_size=4, attempt=2)
    with contextlib.suppress(ZeroDivisionError), rank_log(tmp_path, launch):
        note("step 7: train")
        raise ZeroDivisionError("by hand")
    text = log_path(tmp_path, launch).read_text()
    assert log_path(tmp_path, launch) == tmp_path / "logs" / "attempt_2" / "rank_00003.log"
    for words in (
        "rank 3 of 4, attempt 2",
        "INFO step 7: train",
        "ERROR ended by ZeroDivisionError",
        "by hand",
    ):
        assert words in text


def test_a_later_command_appends_and_stacks_are_written(tmp_path: Path) -> None:
    for _ in range(2):
        with rank_log(tmp_path, Launch()):
            dump_stacks("stopped because of a test")
    text = log_path(tmp_path, Launch()).read_text()
    assert text.count("stopped because of a test; the stacks of all threads:") == 2
    assert "test_a_later_command_appends_and_stacks_are_written" in text
    assert text.count("INFO ended") == 2


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with rank_log(tmp_path, Launch()):
        note("nowhere")
    with rank_log(None, Launch()):
        note("nowhere")
