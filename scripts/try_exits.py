"""Whether every rank of a good run ends with exit status 0, on a busy machine.

    python scripts/try_exits.py [--runs N] [--busy N]

A small model trains for one step on two ranks, and two cells of `lightseq verify` run, again and again, while other
processes keep the cores busy. Ranks are started as srun does it, without a launcher that ends one after another. Every
rank is a fork of a process that has imported Megatron once, runs the same function as the console script, and is torn
down as an interpreter of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

from megatron_lightseq import cli
from megatron_lightseq.__main__ import main as lightseq

RANKS = 2
RECIPE = """\
num_layers: 2
hidden_size: 64
num_attention_heads: 4
seq_length: 128
micro_batch_size: 1
global_batch_size: 1
train_iters: 1
data_path: corpus
context_parallel_size: 2
"""
ENTRIES = {
    "pretrain": ["pretrain", "recipe.yaml", "--progress", "plain"],
    "verify": ["verify", "--cells", "^cp2 (lightseq|ring)$", "--processes", "2"],
}


def fork_rank(words: list[str], rank: int, port: int, folder: Path) -> int:
    """Start a rank; returns its process id in the parent. In the child, does not return."""
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    sys.argv = ["lightseq", *words]
    sys.exit(lightseq())


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def exit_statuses(words: list[str], folder: Path) -> list[int]:
    """Of all ranks of one run; a negative one is the number of the signal that ended it."""
    port = free_port()
    children = [fork_rank(words, rank, port, folder) for rank in range(RANKS)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def be_busy(parent: int) -> None:
    """Keep a core busy as long as the process ``parent`` lives."""
    while os.getppid() == parent:
        sum(range(100_000))


def run_all(runs: int, folder: Path) -> Counter[tuple[str, int]]:
    """How often ranks of each entry ended with each status; prints the log of those that did not end with 0."""
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    status = cli.run(["prepare-data", __file__, "--output", str(folder / "corpus")])
    assert status == 0, "the corpus of this file's text could not be prepared"
    counts: Counter[tuple[str, int]] = Counter()
    for _ in range(runs):
        for name, words in ENTRIES.items():
            statuses = exit_statuses(words, folder)
            counts.update((name, status) for status in statuses)
            for rank, status in enumerate(statuses):
                if status:
                    text = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace")
                    print(f"{name}, rank {rank}: status {status}\n{text[-2000:]}", flush=True)
    return counts


def main() -> int:
    """Print how many ranks ended with which status; returns 0 if all of them ended with 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100, help="of each entry (default: 100)")
    parser.add_argument("--busy", type=int, default=8, help="processes that keep the cores busy (default: 8)")
    options = parser.parse_args()
    import megatron_lightseq.tools.verify.ranks
    import megatron_lightseq.training.loop  # noqa: F401 - imported once, before ranks are forked

    context = get_context("spawn")
    busy = [context.Process(target=be_busy, args=(os.getpid(),), daemon=True) for _ in range(options.busy)]
    for process in busy:
        process.start()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp())  # no context manager: ranks would remove it when they leave
    counts = run_all(options.runs, folder)
    shutil.rmtree(folder)
    for process in busy:
        process.kill()
    for (name, status), count in sorted(counts.items()):
        print(f"{name}: {count} ranks ended with status {status}")
    print(
        f"{options.runs} runs of each entry in {time.monotonic() - began:.0f} s beside {options.busy} busy processes"
    )
    return 0 if all(status == 0 for _, status in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
