"""`lightseq pretrain` under a real torchrun, on a corpus and a model so small that start-up dominates."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_lightseq.training.reporting.metrics import TrainMetrics, read_metrics

REPOSITORY = Path(__file__).parents[2]
WALL_LIMIT_S = 150.0
FLAGS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 64,
    "global_batch_size": 2,
    "train_iters": 12,
    "hidden_dropout": 0.1,
    "context_parallel_size": 2,
    "split": "90,10,0",
    "cp_kernel": "reference",
    "progress": "plain",
}


def make_corpus(folder: Path, seed: int = 0) -> Path:
    """Prepares a few thousand words in forty files. Returns the prefix of the corpus."""
    from megatron_lightseq.cli import run

    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    text = folder / "text"
    text.mkdir()
    for index in range(40):
        (text / f"{index}.txt").write_text(" ".join(rng.choice(words) for _ in range(200)))
    assert run(["prepare-data", str(text), "--output", str(folder / "corpus"), "--quiet"]) == 0
    return folder / "corpus"


@dataclass
class Launched:
    """A running or finished torchrun."""

    process: subprocess.Popen[str]
    output: Path
    began: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        """Everything printed so far, by all ranks and torchrun."""
        return self.output.read_text(errors="replace")

    def wait_for(self, pattern: str) -> None:
        """Block until the output matches."""
        while not re.search(pattern, self.text()):
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.text()}"
            assert time.monotonic() - self.began < WALL_LIMIT_S, f"no {pattern!r} in:\n{self.text()}"
            time.sleep(0.05)

    def rank_process(self, rank: int) -> psutil.Process:
        """The process that runs a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(rank):
                return child
        raise AssertionError(f"rank {rank} has no process")

    def wait(self) -> int:
        """Wait for torchrun to end. Returns its exit code."""
        return self.process.wait(timeout=WALL_LIMIT_S)

    def stop(self) -> None:
        """End all remaining processes, including children."""
        try:
            family = [
                psutil.Process(self.process.pid),
                *psutil.Process(self.process.pid).children(recursive=True),
            ]
        except psutil.NoSuchProcess:
            return
        for member in family:
            if member.is_running():
                member.kill()
        self.process.wait()


PRETRAIN = ("-m", "megatron_lightseq", "pretrain")
OUR_LAUNCHER = (str(REPOSITORY / "scripts" / "launch_ranks.py"), "--standalone")


def launch(
    corpus: Path,
    folder: Path,
    *,
    ranks: int = 2,
    max_restarts: int = 0,
    launcher: Sequence[str] | None = None,
    program: Sequence[str] = PRETRAIN,
    variables: Mapping[str, str] | None = None,
    **flags: Any,
) -> Launched:
    """Start torchrun, or ``launcher``, with :data:`FLAGS` and the given flags. All output goes to ``folder``.

    ``variables`` are added to the environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        **FLAGS,
        "data_path": corpus,
        "save": folder / "checkpoints",
        "report_dir": folder / "report",
        **flags,
    }
    arguments = [text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = folder / f"output{port}.txt"
    torchrun = ("-m", "torch.distributed.run", "--master-port", str(port))
    command = [sys.executable, *(launcher or torchrun), "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(max_restarts), *program, *arguments]
    with output.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "PYTHONPATH": str(REPOSITORY),
                **(variables or {}),
            },
        )
    return Launched(process, output)


def train_metrics(folder: Path) -> list[TrainMetrics]:
    """The recorded training steps."""
    found = read_metrics(folder / "report" / "metrics.jsonl")
    return [metrics for metrics in found if isinstance(metrics, TrainMetrics)]


def kill_hard(process: psutil.Process) -> None:
    """SIGKILL."""
    process.send_signal(signal.SIGKILL)
