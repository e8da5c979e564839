"""Whether the softmax of a Hopper kernel runs concurrently with a matrix product, from the kernel's SASS.

wgmma products are asynchronous. A kernel that issues two groups of them, waits for the first (at most one group left),
computes its exponentials and only then waits for the second, overlaps the exponentials with the second group. ptxas may
move the second wait in front of the exponentials: results stay the same and the overlap is gone.
"""

from __future__ import annotations

from itertools import pairwise

from tests.cuda.roles import INSTRUCTION

EXPONENTIAL = "MUFU.EX2"
WAIT = "WARPGROUP.DEPBAR"
ONE_GROUP_LEFT = "0x1"


def overlapped_exponentials(function: str) -> int:
    """Exponentials between a wait that leaves one group of products running and the next wait: the most of any pair.

    Args:
        function: one function of ``cuobjdump -sass``.
    """
    code = [match["text"] for match in INSTRUCTION.finditer(function)]
    waits = [position for position, text in enumerate(code) if WAIT in text]
    counts = [
        sum(EXPONENTIAL in text for text in code[first:second])
        for first, second in pairwise(waits)
        if code[first].endswith(ONE_GROUP_LEFT)
    ]
    return max(counts, default=0)
