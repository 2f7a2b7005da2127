"""Training, one subject a file.

| file                   | subject                                                             |
| ---------------------- | ------------------------------------------------------------------- |
| `config.py`            | how long, how fast and how often                                    |
| `loop.py`              | the run, from top to bottom                                         |
| `loss.py`              | objectives: next-token cross entropy; averages that add up exactly  |
| `optimizer.py`         | AdamW on a warmup-stable-decay schedule                             |
| `step.py`              | one update of any objective, as a pure function                     |
| `state.py`             | parameters and optimizer state: abstract, initialized, placed       |
| `capacity.py`          | whether the training state can fit the devices' memory              |
| `init_from.py`         | parameters of another run or model to start from                    |
| `run_directory.py`     | what a run writes, and whether a config resumes it                  |
| `run_lock.py`          | one run at a time in a directory                                    |
| `checkpoint.py`        | saving and restoring through Orbax                                  |
| `checkpoint_folder.py` | which checkpoints a run has                                         |
| `checksums.py`         | checksums of arrays, whatever their sharding                        |
| `validation.py`        | the objective on held-out text                                      |
| `sample.py`            | text from the trained model                                         |
| `metrics.py`           | JSON lines and TensorBoard                                          |
| `recorder.py`          | from the metrics of a step to lines                                 |
| `display.py`           | what a run shows while it works                                     |
| `interrupts.py`        | Ctrl-C and SIGTERM in one line                                      |
| `mfu.py`               | model FLOPs utilization, and throughput                             |
| `profile.py`           | traces of a few steps                                               |
| `closing.py`           | contexts whose end can fail                                         |
"""
