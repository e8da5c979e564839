"""What the experiments on this machine share: their jobs, their comparisons, and the rows that they fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lightseq.config import parse_config, with_values
from megatron_lightseq.tools.compare.job import Job
from megatron_lightseq.tools.compare.run import common_config, run_comparison
from megatron_lightseq.tools.compare.systems import SYSTEMS
from megatron_lightseq.tools.compare.tables import Comparison, Figures

K, MIB = 1024, 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    row: str
    what: str
    paper: str
    here: str
    predicted: str = "-"
    """For the paper's cluster, to be compared with its measurement."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiments:
    """Runs comparisons and keeps their records."""

    configs: Path
    """Folder of the configurations, one per model."""
    output: Path
    report: Callable[[str], None]
    """Called with lines of progress."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """All comparisons so far, by label."""

    def job(self, name: str, ranks: int, **values: object) -> Job:
        """A job with the configuration NAME.yaml."""
        config = with_values(parse_config([str(self.configs / f"{name}.yaml")]), **values)
        return Job(
            system="lightseq",
            common=common_config(config, ranks),
            world_size=ranks,
            steps=2,
            profile_memory=False,
            measure_ceiling=False,
        )

    def compare(self, label: str, job: Job, *systems: str) -> dict[str, Figures]:
        """Figures by system; the first system is the baseline."""
        chosen = [SYSTEMS[name] for name in systems]
        comparison = run_comparison(
            job, chosen, baseline=systems[0], report=lambda line: self.report(f"{label}: {line}")
        )
        self.comparisons[label] = comparison
        return {row.system: row for row in comparison.figures}

    def ratio(self, label: str, system: str) -> str:
        """Speed-up of a system over the baseline of a comparison, or why there is none."""
        comparison = self.comparisons[label]
        row = next(row for row in comparison.figures if row.system == system)
        speedup = comparison.speedup(row)
        if speedup is not None:
            return f"{speedup:.2f}x"
        return f"refused: {comparison.disagreements.get(system) or row.problem or 'the baseline failed'}"


def value_range(values: Sequence[float]) -> str:
    """The smallest and the largest ratio, such as "1.20-1.45x"."""
    return f"{min(values):.2f}-{max(values):.2f}x"
