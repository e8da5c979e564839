"""Ranks of a measurement: processes on this host, or in network namespaces that play hosts."""

from megatron_lightseq.tools.ranks.cluster import Answers, Cluster, Host, run_task
from megatron_lightseq.tools.ranks.rank_context import Seat

__all__ = ["Answers", "Cluster", "Host", "Seat", "run_task"]
