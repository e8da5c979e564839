"""Runs one system on ranks of its own."""

from __future__ import annotations

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.tools.compare.job import Job, Measurement, Outcome
from megatron_lightseq.tools.compare.systems import SYSTEMS
from megatron_lightseq.tools.ranks import Cluster, run_task

_TASK = "megatron_lightseq.tools.compare.worker:answer"


def measure(job: Job, cluster: Cluster) -> Outcome:
    """Run a job to its end; never raises for what the job does."""
    try:
        SYSTEMS[job.system].configure(job.common, job.world_size)
    except UnsupportedError as error:
        return Outcome(system=job.system, refusal=str(error))
    answers = run_task(_TASK, job.to_json(), job.world_size, cluster)
    return Outcome(
        system=job.system,
        ranks=tuple(map(Measurement.from_dict, answers.by_rank)),
        failure=answers.failure,
        out_of_memory=answers.out_of_memory,
    )
