from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_lightseq.config import rules
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from tests.training.launched import OUR_LAUNCHER, Launched, launch, make_corpus, train_metrics

GOLDEN_TRAIN = {
    "kind",
    "time",
    "step",
    "loss",
    "mtp_loss",
    "load_balancing_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "step_seconds",
    "tflops_per_rank",
    "memory_bytes",
    "exposed_communication",
    "consumed_samples",
    "skipped",
}
GOLDEN_SUMMARY = {
    "steps",
    "first_loss",
    "last_loss",
    "entropy",
    "validation_loss",
    "tokens_per_second",
    "seconds",
    "stopped",
    "checkpoint",
    "goodput",
    "goodput_seconds",
    "stragglers",
}
LINE = re.compile(
    r"^step +\d+/12 \| loss \d+\.\d{4} \| grad norm \d+\.\d{3} \| lr \d\.\d\de[+-]\d\d \| [\d,]+ tokens/s "
    r"\| \d+\.\d\d GiB \| ETA \d+s$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts runs, and ends those that a failed test leaves running."""
    started: list[Launched] = []

    def begin(**options: Any) -> Launched:
        started.append(launch(corpus, tmp_path, **options))
        return started[-1]

    yield begin
    for run in started:
        run.stop()


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run: its folder and its output."""
    folder = tmp_path_factory.mktemp("whole")
    run = launch(
        corpus, folder, save_interval=5, eval_interval=6, eval_iters=1, tensorboard_dir=folder / "tb"
    )
    assert run.wait() == 0, run.text()
    return folder, run.text()


def test_a_run_says_what_it_does_and_leaves_its_files(whole: tuple[Path, str]) -> None:
    folder, output = whole
    assert len(LINE.findall(output)) == 12
    assert re.search(r"^model +\d+\.\d k parameters: 2 layers, hidden 32, 4 heads in 2 groups", output, re.M)
    assert re.search(r"^ranks +2 on cpu/gloo: CP 2$", output, re.M)
    assert re.search(
        r"^attention +lightseq, kernel reference, contiguous layout over 2 ranks, overlap on$", output, re.M
    )
    assert re.search(r"^data +[\d.]+ k tokens, unigram entropy \d\.\d{3} nats$", output, re.M)
    assert re.search(r"^12 steps in .*: loss \d+\.\d\d -> \d+\.\d\d, validation \d+\.\d\d$", output, re.M)
    assert "the corpus' unigram entropy of" in output
    assert "Apex" not in output
    names = {"loss.png", "schedule.png", "summary.json", "metrics.jsonl", "logs"}
    assert {path.name for path in (folder / "report").iterdir()} == names
    assert list((folder / "tb").glob("events.out.tfevents.*"))
    saved = [path.name for path in CheckpointDirectory(root=folder / "checkpoints").candidates()]
    assert saved == ["iter_0000012", "iter_0000010", "iter_0000005"]
    for name in ("loss.png", "schedule.png"):
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_and_summary_have_their_keys(whole: tuple[Path, str]) -> None:
    report = whole[0] / "report"
    lines = [json.loads(line) for line in (report / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    checks = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert all(line.keys() == GOLDEN_TRAIN for line in train)
    assert [line["step"] for line in checks] == [6, 12]
    assert all(line.keys() == {"kind", "time", "step", "loss", "num_tokens"} for line in checks)
    assert [line["step"] for line in lines if line["kind"] == "save"] == [5, 10, 12]
    (attempt,) = [line for line in lines if line["kind"] == "attempt"]
    assert (attempt["step"], attempt["restart"], attempt["world_size"]) == (0, 0, 2)
    assert attempt == lines[0]
    assert all(0 <= line["exposed_communication"] <= 1 for line in train)
    summary = json.loads((report / "summary.json").read_text())
    assert summary.keys() == GOLDEN_SUMMARY
    assert summary["steps"] == 12
    assert summary["stopped"] is None
    seconds = summary["goodput_seconds"]
    parts = sum(seconds[name] for name in ("useful", "start", "save", "restart", "replay", "other"))
    assert parts == pytest.approx(seconds["wall"])
    assert seconds["useful"] == pytest.approx(sum(line["step_seconds"] for line in train))
    assert 0 < summary["goodput"] < 1
    assert seconds["start"] > 0
    assert seconds["save"] > 0


def test_every_rank_keeps_a_log(whole: tuple[Path, str]) -> None:
    for rank in (0, 1):
        text = (whole[0] / "report" / "logs" / "attempt_0" / f"rank_{rank:05d}.log").read_text()
        assert f"rank {rank} of 2, attempt 0, process " in text
        for line in ("step 1: train", "step 5: save", "step 6: evaluate", "step 12: finish", "ended"):
            assert text.count(f"INFO {line}\n") == 1, text


NEW_METHOD = """
import sys
from megatron_lightseq.cli import run
from megatron_lightseq.schedule import METHODS, Method, register

register(Method("mine", METHODS["ring"].place, summary="a ring under my name", default_layout="striped"))
sys.exit(run(["pretrain", *sys.argv[1:]]))
"""


def test_a_method_that_a_program_registers_trains_by_its_name(start: Any, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(NEW_METHOD)
    program = (str(tmp_path / "program.py"),)
    mine = start(program=program, cp_method="mine", train_iters=1)
    assert mine.wait() == 0, mine.text()
    assert re.search(r"^attention +mine, kernel reference, striped layout over 2 ranks", mine.text(), re.M)
    (metrics,) = train_metrics(tmp_path)
    ring = start(cp_method="ring", cp_layout="striped", train_iters=1)
    assert ring.wait() == 0, ring.text()
    assert train_metrics(tmp_path)[0].loss == metrics.loss


def test_rules_and_schedules_are_worked_out_once(start: Any) -> None:
    """Between launch and the first step, on every rank. The layers run the schedules that were compared."""
    program = ("-m", "tests.training.counted_rank")
    run = start(program=program, cp_method="auto", train_iters=1, window_size="15,0", window_attn_skip_freq=2)
    assert run.wait() == 0, run.text()
    counts = [json.loads(text) for text in re.findall(r"^counts (.*)$", run.text(), re.M)]
    assert len(counts) == 2
    for found in counts:
        checked = {name: count for name, count in found.items() if name.startswith("rule ")}
        assert set(checked.values()) == {1}, checked
        assert len(checked) == len(rules())
        assert found["simulated"] == 2, "two masks: layers with a window, and layers without"
        assert found["built"] == 4, "forward and backward for each mask"
    assert re.search(r"^attention +auto \(.+\), kernel reference, \w+ layout over 2 ranks", run.text(), re.M)


def test_sigterm_saves_and_the_resumed_run_is_the_same_bit_for_bit(
    start: Any, whole: tuple[Path, str], tmp_path: Path
) -> None:
    interrupted = start(save_interval=5, eval_interval=6, eval_iters=1)
    interrupted.wait_for(r"step +3/12")
    interrupted.rank_process(1).send_signal(signal.SIGTERM)  # one rank only: they must agree
    assert interrupted.wait() == 0, interrupted.text()
    assert "stopped early: another rank was asked to stop" in interrupted.text()
    reached = train_metrics(tmp_path)[-1].step
    assert 3 <= reached < 12
    newest = CheckpointDirectory(root=tmp_path / "checkpoints").candidates()[0]
    assert newest.name == f"iter_{reached:07d}"

    resumed = start(save_interval=5, eval_interval=6, eval_iters=1, load=tmp_path / "checkpoints")
    assert resumed.wait() == 0, resumed.text()
    assert f"at step {reached}" in resumed.text()
    ours, undisturbed = train_metrics(tmp_path), train_metrics(whole[0])
    assert [m.step for m in ours] == list(range(1, 13))
    assert [(m.loss, m.grad_norm, m.learning_rate) for m in ours] == [
        (m.loss, m.grad_norm, m.learning_rate) for m in undisturbed
    ]


def test_one_host_opens_no_port_to_the_network_and_a_long_evaluation_can_be_stopped(
    start: Any, tmp_path: Path
) -> None:
    run = start(launcher=OUR_LAUNCHER, eval_interval=2, eval_iters=1_000_000, train_iters=2)
    run.wait_for(r"step +2/2")
    family = [psutil.Process(run.process.pid), *psutil.Process(run.process.pid).children(recursive=True)]
    sockets = [c for p in family for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    assert sockets, "the store and gloo listen"
    assert {socket.laddr.ip for socket in sockets} <= {"127.0.0.1", "::1"}

    run.process.send_signal(signal.SIGHUP)
    assert run.wait() == 0, run.text()
    assert "validation after step 2 was interrupted" in run.text()
    assert CheckpointDirectory(root=tmp_path / "checkpoints").candidates()[0].name == "iter_0000002"


def test_ranks_with_other_flags_are_refused_before_the_first_collective(corpus: Path) -> None:
    """Rank 1 has a different learning rate, as if its host had another recipe."""
    runs = launch_pair({"data_path": corpus, "lr": "0.003"}, {"data_path": corpus, "lr": "0.004"})
    for code, text in runs:
        assert code == 2, text
    message = runs[0][1]
    assert "The ranks disagree before the first step" in message
    assert re.search(r"^  lr +0\.003 +0$", message, re.M), message
    assert re.search(r"^ +0\.004 +1$", message, re.M), message


def test_ranks_with_other_texts_under_one_name_are_refused(tmp_path: Path) -> None:
    for rank, seed in enumerate((0, 1)):
        (tmp_path / str(rank)).mkdir()
        make_corpus(tmp_path / str(rank), seed)
    same = {"data_path": "corpus"}
    for code, text in launch_pair(same, same, folders=(tmp_path / "0", tmp_path / "1")):
        assert code == 2, text
        assert re.search(r"^  corpus +[0-9a-f]{16} +0$\n^ +[0-9a-f]{16} +1$", text, re.M), text


def launch_pair(*flags_of_rank: dict[str, Any], folders: tuple[Path, ...] = ()) -> list[tuple[int, str]]:
    """Starts two ranks without torchrun, as on two machines. Returns exit codes and outputs."""
    import os
    import socket
    import subprocess
    import sys

    from tests.training.launched import FLAGS, REPOSITORY, WALL_LIMIT_S

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank, flags_given in enumerate(flags_of_rank):
        values = {**FLAGS, **flags_given}
        flags = [text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "megatron_lightseq", "pretrain", *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=folders[rank] if folders else REPOSITORY,
                env={**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)},
            )
        )
    outputs = [process.communicate(timeout=WALL_LIMIT_S)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
