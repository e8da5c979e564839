"""Processes for measurements on several ranks, on this host or in network namespaces that act as hosts."""

from megatron_lightseq.tools.ranks.cluster import Answers, Cluster, Host, run_task
from megatron_lightseq.tools.ranks.rank_context import RankContext

__all__ = ["Answers", "Cluster", "Host", "RankContext", "run_task"]
