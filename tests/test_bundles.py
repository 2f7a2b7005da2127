"""Cycles of a kernel, from a schedule written by hand in libtpu's form."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# A step of the grid: 3 bundles of its own; 128 / 4 rounds of 3, one of them empty, for a latency;
# 16 rounds of 1 and, in each, 8 / 4 rounds of 1, which ends both loops.
SCHEDULE = """\
LH: loop header

     0   :  { %s1 = inlined_call_operand.vmem [shape: f32[1,8]] }
   0x1 LB: > { %s2_s0 = sadd.s32 1, %s9_s1  }
   0x2 LB: >> { %s3_s0 = sadd.s32 4, %s8_s1 ;; %p1_p0 = scmp.ge.s32.totalorder %s3_s0, 128 /* loop exit test */ }
   0x3   : >> { %4 = sbr.rel (!%p1_p0) target = $region1 }
   0x4   :  {} /* End region 1 */
   0x5 LB: >> { %v1 = vld [vmem:[%s1]] }
   0x6 LB: >>> { %s5_s0 = sadd.s32 4, %s7_s1 ;; %p2_p0 = scmp.ge.s32.totalorder %s5_s0, 8 /* loop exit test */ ;; %s6_s0 = sadd.s32 (%p2_p0), 1, %s6_s1 ;; %p3_p0 = scmp.ge.s32.totalorder (%p2_p0), %s6_s0, 16 /* loop exit test */ }
   0x7 PF: > { %p4_p0 = scmp.ge.s32.totalorder %s2_s0, 10 /* loop exit test */ }
   0x8   : > { %5 = sbr.rel (!%p4_p0) target = $region2 }
"""  # noqa: E501


@pytest.fixture
def grid_loop(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from _bundles import grid_loop

    return grid_loop


def test_loops_are_counted_by_their_exit_tests(grid_loop, tmp_path):
    file = tmp_path / "final_bundles.txt"
    file.write_text(SCHEDULE)
    loop = grid_loop(file)
    assert loop.cycles == 3 + 128 // 4 * 3 + 16 * (1 + 2 * 1)
    assert (loop.own, [inner.cycles for inner in loop.inner]) == (3, [3, 1 + 2 * 1])


def test_a_loop_extends_to_its_last_bundle(grid_loop, tmp_path):
    """What runs after a loop may be in its bundles, predicated."""
    hoisted = "   0x3   : > { %v2 = vld [vmem:[%s1]] (%p1_p0) }"
    file = tmp_path / "final_bundles.txt"
    before = "   0x3   : >> { %4"
    file.write_text(SCHEDULE.replace(before, f"{hoisted}\n{before}"))
    assert grid_loop(file).cycles == 3 + 128 // 4 * 4 + 16 * (1 + 2 * 1)


def test_a_loop_of_unknown_trip_count_is_refused(grid_loop, tmp_path):
    file = tmp_path / "final_bundles.txt"
    file.write_text(SCHEDULE.replace("%s3_s0, 128", "%s3_s0, %s11"))
    with pytest.raises(ValueError, match="trip count"):
        _ = grid_loop(file).cycles
