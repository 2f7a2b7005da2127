"""Cycles of a Pallas kernel for TPUs, from the final schedule that libtpu dumps, without stalls for
memory.

A line of it is a bundle of instructions, which takes a cycle; `>` before a bundle says how many
loops its instructions are in, `LB` that a loop begins there. The outermost loop goes over the grid.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB)?(?:[A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")
# Where the bundle ends an inner loop, too, the test of the outer one is predicated by its end.
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (\(%p\w+\), )?%(s\w+), (\d+) /\* loop exit test")


@dataclass
class Loop:
    """A loop of a schedule.

    Attributes:
      own: bundles that are in no inner loop.
      inner: the loops in it, in order.
    """

    own: int = 0
    text: str = field(default="", repr=False)
    inner: list["Loop"] = field(default_factory=list)

    @property
    def trips(self) -> int:
        """From its exit test, and what is added to the counter that it tests.

        Raises:
          ValueError: it is not a constant.
        """
        tests = [(c, limit) for nested, c, limit in _EXIT.findall(self.text) if not nested]
        text = self.text + "".join(loop.text for loop in self.inner)
        for loop in self.inner if not tests else []:
            tests += [(c, limit) for nested, c, limit in _EXIT.findall(loop.text) if nested]
        for counter, limit in tests:
            if step := re.search(rf"%{counter} = sadd\.s32 (?:\(%p\w+\), )?(\d+), ", text):
                return -(-int(limit) // int(step[1]))
        raise ValueError("a loop whose trip count is not in its schedule")

    @property
    def cycles(self) -> int:
        """Of one iteration, branches taken.

        Raises:
          ValueError: an inner loop's trip count is not a constant.
        """
        return self.own + sum(loop.trips * loop.cycles for loop in self.inner)


def grid_loop(file: Path) -> Loop:
    """The loop over the grid in a dumped schedule.

    A loop extends to the last bundle that is marked as in it, and what empty ones follow, for the
    latency of its branch. Among these are others: empty ones, too, which have no marks, and those
    with what is predicated to run when it ends.
    """
    bundles = [
        match.groups() for match in map(_BUNDLE.match, file.read_text().splitlines()) if match
    ]
    depths = [len(marks) for _, marks, _ in bundles]
    begins = [i for i, (begin, _, _) in enumerate(bundles) if begin]
    outside = Loop()
    stack = [(outside, len(bundles))]
    for i, (begin, _, text) in enumerate(bundles):
        while i >= stack[-1][1]:
            stack.pop()
        if begin:
            depth = depths[i]
            following = (j for j in begins if j > i and depths[j] <= depth)
            limit = next(following, len(bundles))
            end = 1 + max(j for j in range(i, limit) if depths[j] >= depth)
            while end < limit and bundles[end][2].startswith("}"):
                end += 1
            loop = Loop()
            stack[-1][0].inner.append(loop)
            stack.append((loop, end))
        stack[-1][0].own += 1
        stack[-1][0].text += text
    return max(outside.inner, key=lambda loop: loop.own)
