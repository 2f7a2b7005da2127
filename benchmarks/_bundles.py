"""Cycles of a Pallas kernel for TPUs, from the final schedule that libtpu dumps.

A line of it is a bundle of instructions, which takes a cycle; `>` before a bundle says how many
loops it is in, `LB` that a loop begins there. The outermost loop goes over the grid.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB)?(?:[A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")
# Where the bundle ends an inner loop, too, the test of the outer one is predicated by its end.
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (\(%p\w+\), )?%(s\w+), (\d+) /\* loop exit test")


@dataclass
class _Loop:
    depth: int
    own: int = 0  # bundles that are in no inner loop
    text: str = ""
    inner: list["_Loop"] = field(default_factory=list)

    @property
    def trips(self) -> int:
        """From its exit test, and what is added to the counter that it tests."""
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
        """Of one iteration."""
        return self.own + sum(loop.trips * loop.cycles for loop in self.inner)


def cycles_per_grid_step(file: Path) -> int:
    """Cycles of one iteration of the loop over the grid, branches taken.

    Raises:
      ValueError: an inner loop's trip count is not a constant.
    """
    outside = _Loop(0)
    stack = [outside]
    for line in file.read_text().splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        begins, marks, text = bundle.groups()
        if not text.strip().startswith("}"):  # empty ones, for latencies, have no marks
            while stack[-1].depth > len(marks) or (begins and stack[-1].depth == len(marks)):
                stack.pop()
            if begins:
                loop = _Loop(len(marks))
                stack[-1].inner.append(loop)
                stack.append(loop)
        stack[-1].own += 1
        stack[-1].text += text
    return max(loop.cycles for loop in outside.inner)
