"""Which run a checkpoint belongs to, and which runs that run continues: by names, because clocks may be set back."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """One run and the runs it continues. The default belongs to checkpoints that name no run."""

    run: str = ""
    parents: tuple[tuple[str, int], ...] = ()
    """Each earlier run, and the step up to which this one continues it; the latest first."""

    @staticmethod
    def fresh() -> Lineage:
        """A run that starts from scratch."""
        return Lineage(run=uuid.uuid4().hex)

    def continued(self, iteration: int) -> Lineage:
        """A new run that starts from this one's checkpoint of ``iteration``."""
        return Lineage(run=uuid.uuid4().hex, parents=((self.run, iteration), *self.parents))

    def includes(self, other: Lineage, iteration: int) -> bool:
        """Whether the checkpoint that ``other`` saved at ``iteration`` lies on the way to this run's last step."""
        return other.run == self.run or any(
            run == other.run and iteration <= last for run, last in self.parents
        )

    def to_json(self) -> dict[str, Any]:
        """For :meth:`of_json`."""
        return {"run": self.run, "parents": [list(parent) for parent in self.parents]}

    @staticmethod
    def of_json(value: Mapping[str, Any]) -> Lineage:
        """Raises ValueError, KeyError or TypeError for anything that :meth:`to_json` has not returned."""
        parents = tuple((str(run), int(last)) for run, last in value["parents"])
        return Lineage(run=str(value["run"]), parents=parents)

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_json())

    @staticmethod
    def loads(text: str) -> Lineage | None:
        """The inverse of :meth:`dumps`; None for any other text."""
        try:
            return Lineage.of_json(json.loads(text))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
