"""Sizes of the blocks that programs of a kernel take."""


def largest_block(limit: int, *sizes: int) -> int:
    """The largest power of two, at most `limit`, that divides all sizes.

    Args:
      limit: a power of two.
    """
    block = limit
    while any(size % block for size in sizes):
        block //= 2
    return block
