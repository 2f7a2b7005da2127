"""Training, one subject a file.

| file                   | subject                                                             |
| ---------------------- | ------------------------------------------------------------------- |
| `arguments.py`         | the command line of a run                                           |
| `loop.py`              | the run, from top to bottom                                         |
| `stage_program.py`     | what the steps of a stage need, compiled                            |
| `extension.py`         | a run that goes on with more steps or stages                        |
| `schedule.py`          | learning rates, through stages                                      |
| `loss.py`              | objectives: next-token cross entropy; averages that add up exactly  |
| `optimizer.py`         | AdamW                                                               |
| `step.py`              | one update of any objective, as a pure function                     |
| `capacity.py`          | whether the training state can fit the devices' memory              |
| `validation.py`        | the objective on held-out text                                      |
| `sample.py`            | text from the trained model                                         |
| `metrics.py`           | JSON lines and TensorBoard                                          |
| `recorder.py`          | prints and writes the metrics                                       |
| `spikes.py`            | loss spikes                                                         |
| `interrupts.py`        | Ctrl-C and SIGTERM: a checkpoint, and one line                      |
| `mfu.py`               | model FLOPs utilization, and throughput                             |
| `profile.py`           | traces of a few steps                                               |
"""
