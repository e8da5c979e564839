"""What the recipes say about their memory is what `lightseq plan` finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lightseq.tools.planner.cluster import GIB, Cluster
from megatron_lightseq.tools.planner.footprint import footprint
from megatron_lightseq.tools.planner.request import Request, read_config, vocabulary

FOLDER = Path(__file__).parents[2] / "configs"
COMMAND = re.compile(r"#   lightseq plan configs/(\S+) --cluster (\S+) --set (\S+)")
NUMBERS = re.compile(
    r"# Of ([\d.]+) GiB, the fullest rank holds ([\d.]+): among them ([\d.]+) of weights.*?, ([\d.]+) of gradients.*?, "
    r"and ([\d.]+) of optimizer"
)
PLANNED = sorted(path.name for path in FOLDER.glob("*gpu*.yaml"))


@pytest.mark.parametrize("name", PLANNED)
def test_memory_in_the_comments_is_what_is_planned(name: str) -> None:
    text = (FOLDER / name).read_text()
    command, numbers = COMMAND.search(text), NUMBERS.search(text)
    assert command is not None
    assert numbers is not None
    assert command[1] == name
    config = read_config([str(FOLDER / name)], [command[3]])
    request = Request(config=config, cluster=Cluster.parse(command[2]), vocab_size=vocabulary(config))
    found = footprint(request, quick=True)
    fullest = found.fullest
    held = [
        fullest.total_bytes,
        *(fullest.holdings[purpose] for purpose in ("weights", "gradients", "optimizer")),
    ]
    capacity, *told = map(float, numbers.groups())
    assert capacity == round(found.capacity_bytes / GIB, 1)
    assert told == pytest.approx([amount / GIB for amount in held], rel=0.02, abs=0.06)
