"""Registers of warp-specialised kernels, by role, from their SASS.

Each role of a kernel (a branch taken by some of its warps) sets its number of registers with setmaxnreg, in SASS
USETMAXREG. Code that uses registers beyond that number reads and writes those of another warp. The instructions of a
role are found by following its jumps, because ptxas moves rarely executed code of all roles to the end of the kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?(?P<guard>U?P\d+) )?(?P<text>.*?) *;", re.MULTILINE
)
JUMPS = ("BRA", "BSSY", "WARPSYNC", "CALL", "JMP")
ENDS = ("EXIT", "BRA", "RET", "JMP")
"""Instructions after which execution does not continue, unless they are conditional."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A role, from its USETMAXREG on."""

    gives: bool
    """Whether it gives registers away, as producers do, instead of taking more."""
    allowed: int
    used: int


def roles(function: str) -> list[Role]:
    """The roles of one function of cuobjdump's output, in the order of its instructions."""
    found = [(int(match[1], 16), match) for match in INSTRUCTION.finditer(function)]
    code = dict(found)
    after = dict(zip(code, list(code)[1:], strict=False))
    result = []
    for address, match in found:
        asked = re.match(r"USETMAXREG\.(TRY_ALLOC|DEALLOC)\.CTAPOOL .*\b0x([0-9a-f]+)$", match["text"])
        if asked:
            reached = _reach(code, after, address)
            used = 1 + max(_highest(code[one]["text"]) for one in reached)
            result.append(Role(gives=asked[1] == "DEALLOC", allowed=int(asked[2], 16), used=used))
    return result


def _reach(code: dict[int, re.Match[str]], after: dict[int, int], start: int) -> set[int]:
    reached: set[int] = set()
    waiting = [start]
    while waiting:
        address = waiting.pop()
        if address in reached:
            continue
        reached.add(address)
        operation, _, operands = code[address]["text"].partition(" ")
        name = operation.split(".")[0]
        if name in JUMPS:
            waiting += [t for t in (int(x, 16) for x in re.findall(r"0x([0-9a-f]+)", operands)) if t in code]
        conditional = code[address]["guard"] or (name == "BRA" and re.match(r"!?U?P\d", operands))
        if address in after and (name not in ENDS or conditional):
            waiting.append(after[address])
    return reached


def _highest(text: str) -> int:
    """The last register that an instruction uses; -1 for none. Wide operands are named by their first register."""
    operation = text.split()[0]
    wide = 1
    if re.search(r"\.128|^(LDSM|STSM).*\.4", operation):
        wide = 4
    elif re.search(r"\.64|\.WIDE", operation):
        wide = 2
    data = re.sub(r"\[[^\]]*\]", "", text)  # without addresses
    last = [int(number) + wide - 1 for number in re.findall(r"\bR(\d+)", data)]
    last += [int(number) + bool(pair) for number, pair in re.findall(r"\bR(\d+)(\.64)?", text)]
    product = re.match(r"HGMMA\.64x(\d+)\S* R(\d+)(?:, R(\d+))?", text)
    if product:
        last.append(int(product[2]) + int(product[1]) // 2 - 1)
        last.append(int(product[3] or 0) + 3)
    return max(last, default=-1)
