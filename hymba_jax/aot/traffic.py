"""HBM bytes of a compiled program.

What each instruction reads and writes, including the padding of tiles, not the other memories of
TPUs. A slice or gather reads its result, an update in place reads and writes the update, a fusion
reads of each operand what its instructions read, and writes an update that it computes. A kernel
reads its arguments and writes its results once, and again as often as it says that it does.
"""

import math
from collections.abc import Iterable, Iterator

from hymba_jax.aot.hlo import HLOArray, Instruction, Program
from hymba_jax.aot.kernels import stated_cost

# Neither reads nor writes: names for arrays, what other computations do, and branches.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("after-all", "while", "conditional", "iota", "partition-id"),
    *("call", "async-start", "async-update"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update
# Of which a slice reads no larger share of an operand than of the result: each of its elements is
# computed from elements of one place of the operand, or summed over other axes.
_PROPORTIONAL = {
    *("bitcast", "convert", "copy", "reshape", "transpose", "negate", "reduce"),
    *("add", "subtract", "multiply"),
}


def hbm_bytes(program: Program, line: Instruction) -> int:
    """Bytes that an instruction outside of fusions reads from and writes to HBM."""
    if line.op in _FREE or line.op.endswith("-done"):
        return 0
    if line.op in ("copy-start", "slice-start"):
        source, destination = line.results[:2]  # in either order
        return (source.in_hbm + destination.in_hbm) * min(source.size, destination.size)
    inputs = [array for name in line.operands for array in program.arrays[name]]
    in_hbm = any(array.in_hbm for array in (*inputs, *line.results))
    if line.op == "custom-call" and not (in_hbm and inputs):
        return 0  # one without inputs reserves memory
    if line.called:
        return _fusion_bytes(program, line)
    # What is started has its operands among its results.
    results = line.results[-1:] if line.op.endswith("-start") else line.results
    written = sum(array.in_hbm_size for array in results)
    if stated := stated_cost(line).hbm_bytes:
        arrays = (*inputs, *results)
        again = stated / sum(array.data_size for array in arrays)
        return round(max(again, 1.0) * sum(array.in_hbm_size for array in arrays))
    if line.op in _SLICES:
        return 2 * written
    if line.op in _UPDATES:
        return 2 * program.arrays[line.operands[_UPDATES[line.op]]][0].size
    return written + sum(array.in_hbm_size for array in inputs)


def launches(program: Program, lines: Iterable[Instruction]) -> int:
    """Kernels and copies that a GPU starts for these instructions, without those of branches and
    inner loops; a call of a library counts as one."""
    return sum(hbm_bytes(program, line) > 0 for line in lines)


def _fusion_bytes(program: Program, line: Instruction) -> int:
    read = sum(
        array.in_hbm_size * _share_read(program, line.called, i)
        for i, name in enumerate(line.operands)
        for array in program.arrays[name][:1]
    )
    results = line.results
    if line.op == "fusion-start":  # has its operands among its results
        results = program.computations[line.called][-1].results
    return round(read) + _written(program, line.called, results)


def _share_read(program: Program, computation: str, number: int) -> float:
    """The share of its operand of that number that a fusion reads."""
    lines = program.computations[computation]
    (parameter,) = (
        line.name for line in lines if line.op == "parameter" and line.operands == [str(number)]
    )
    return _share_used(program, lines, parameter)


def _share_used(program: Program, lines: list[Instruction], name: str) -> float:
    """The share of an array that the instructions of a fusion use; what two slices share is read
    once."""
    total = 0.0
    size = max(math.prod(program.arrays[name][0].shape), 1)
    by_name = {line.name: line for line in lines}
    in_place = {line.name for line in _updates_in_place(lines)}
    is_parameter = _behind_bitcasts(by_name, name).op == "parameter"
    for line in lines:
        for place, operand in enumerate(line.operands):
            if operand != name:
                continue
            if line.op in _SLICES and place == 0:
                total += math.prod(line.results[0].shape) / size
            elif (line.op == "tuple" and is_parameter) or (line.name in in_place and place == 0):
                continue  # passed through, or updated
            elif line.op in _PROPORTIONAL and line is not lines[-1]:
                total += _share_used(program, lines, line.name)
            elif line.op == "fusion":
                total += _share_read(program, line.called, place)
            else:
                return 1.0
            if total >= 1.0:
                return 1.0
    return total


def _written(program: Program, computation: str, results: list[HLOArray]) -> int:
    """Bytes that a fusion writes; a scatter also reads what it adds to."""
    lines = program.computations[computation]
    by_name = {line.name: line for line in lines}
    in_place = {line.name for line in _updates_in_place(lines)}
    total = 0
    for end, result in zip(_ends(lines), results, strict=False):
        line = _behind_bitcasts(by_name, end)
        while line.name in in_place:
            reads = 2 if line.op == "scatter" else 1
            total += reads * program.arrays[line.operands[_UPDATES[line.op]]][0].size
            line = _behind_bitcasts(by_name, line.operands[0])
        if line.op == "fusion":
            total += _written(program, line.called, [result])
        elif line.op != "parameter":  # which is passed through, or updated
            total += result.in_hbm_size
    return total


def _updates_in_place(lines: list[Instruction]) -> Iterator[Instruction]:
    """Updates of a parameter, one after another, that a fusion returns. Others are new arrays."""
    by_name = {line.name: line for line in lines}
    for end in _ends(lines):
        chain = [_behind_bitcasts(by_name, end)]
        while chain[-1].op in _UPDATES:
            chain.append(_behind_bitcasts(by_name, chain[-1].operands[0]))
        if chain[-1].op == "parameter":
            yield from chain[:-1]


def _ends(lines: list[Instruction]) -> list[str]:
    """What a fusion returns."""
    root = lines[-1]
    return root.operands if root.op == "tuple" else [root.name]


def _behind_bitcasts(by_name: dict[str, Instruction], name: str) -> Instruction:
    line = by_name[name]
    while line.op == "bitcast":
        line = by_name[line.operands[0]]
    return line
