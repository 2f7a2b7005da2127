"""train.py, which also says how many training examples this process read."""

from hymba_jax.cli import train
from hymba_jax.data.examples import Examples

read = Examples.__getitem__
count = 0


def counted(self, index):
    global count
    count += 1
    return read(self, index)


Examples.__getitem__ = counted
train()
print("rows read:", count)
