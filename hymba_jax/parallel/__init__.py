"""Devices and processes: how arrays are sharded over a mesh, how processes work together.

| file           | subject                                                              |
|----------------|----------------------------------------------------------------------|
| `mesh.py`      | the one table from logical axes to mesh axes, constraints, gathering |
| `shard_map.py` | ops whose kernels XLA cannot shard                                   |
| `memory.py`    | device memory, and checks before allocation                          |
| `processes.py` | how processes find one another, agree and end                        |
| `largest.py`   | a number that processes share at each step                           |
| `slowest.py`   | the slowest process of a run, found without waiting                  |
| `watchdog.py`  | reports a lost process in one line                                   |
"""
