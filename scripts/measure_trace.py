#!/usr/bin/env python
"""Measures what tracing costs: steps of a small model over two processes, every other one traced.

python scripts/measure_trace.py    # writes docs/results/trace-cost.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from megatron_lightseq.attention.trace import HostClock, Trace
from megatron_lightseq.config import load_config
from megatron_lightseq.tools.provenance import provenance

ROOT = Path(__file__).parents[1]
RECIPE, RESULT = ROOT / "configs" / "gpt_stdlib.yaml", ROOT / "docs" / "results" / "trace-cost.json"
RANKS, PAIRS, VOCABULARY = 2, 40, 257


def run_rank(rank: int, folder: str) -> None:
    """Take pairs of steps, one of them traced; rank 0 writes their times."""
    from megatron_lightseq.megatron.cpu import platform
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step
    from megatron_lightseq.training.tracing.regions import install

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    platform.activate()
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    training = build_training(load_config([str(RECIPE)]), vocab_size=VOCABULARY)
    length = training.config.training.seq_length
    text = torch.randint(VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(1))
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "position_ids": torch.arange(length)[None],
        "loss_mask": torch.ones(1, length),
    }
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(2 * PAIRS):
        traced = step % 4 in (0, 3)  # neither is always the first of its pair
        undo = install(Trace(HostClock()), training) if traced else None
        dist.barrier()
        began = time.perf_counter()
        train_step(training, iter([batch] * training.num_microbatches))
        dist.barrier()
        seconds[traced].append(time.perf_counter() - began)
        if undo is not None:
            undo.close()
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps([seconds[True], seconds[False]]), encoding="utf-8")
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Run, print and write."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run_rank, (folder,), nprocs=RANKS)
        traced, others = json.loads(Path(folder, "seconds.json").read_text(encoding="utf-8"))
    ratios = [one / other for one, other in zip(traced, others, strict=True)]
    record = {
        "what": f"{RECIPE.name}, {RANKS} processes, {PAIRS} pairs of steps",
        "command": "python scripts/measure_trace.py",
        "where": provenance(),
        "step_seconds": median(others),
        "median": median(ratios),
    }
    sys.stdout.write(f"a traced step takes {record['median']:.4f} of another ({median(others):.3f} s)\n")
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
