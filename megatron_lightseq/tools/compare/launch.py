"""Runs one system on new ranks."""

from __future__ import annotations

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.tools.compare.job import Job, JobResult, Measurement
from megatron_lightseq.tools.compare.systems import SYSTEMS
from megatron_lightseq.tools.ranks import Cluster, run_task

_TASK = "megatron_lightseq.tools.compare.worker:answer"


def measure(job: Job, cluster: Cluster) -> JobResult:
    """Run a job to its end; failures of the job are returned, not raised."""
    try:
        SYSTEMS[job.system].configure(job.common, job.world_size)
    except UnsupportedError as error:
        return JobResult(system=job.system, refusal=str(error))
    answers = run_task(_TASK, job.to_json(), job.world_size, cluster)
    return JobResult(
        system=job.system,
        ranks=tuple(map(Measurement.from_dict, answers.by_rank)),
        failure=answers.failure,
        out_of_memory=answers.out_of_memory,
    )
