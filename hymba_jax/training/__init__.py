"""Training, one subject a file.

| file                   | subject                                                             |
| ---------------------- | ------------------------------------------------------------------- |
| `arguments.py`         | the command line of a run                                           |
| `loop.py`              | the run, from top to bottom                                         |
| `loss.py`              | objectives: next-token cross entropy; averages that add up exactly  |
| `optimizer.py`         | AdamW on a warmup-stable-decay schedule                             |
| `step.py`              | one update of any objective, as a pure function                     |
| `capacity.py`          | whether the training state can fit the devices' memory              |
| `validation.py`        | the objective on held-out text                                      |
| `evaluation.py`        | evaluations during training, on their schedules                     |
| `sample.py`            | text from the trained model                                         |
| `metrics.py`           | the metrics of a run: JSON lines, and the trackers                  |
| `trackers.py`          | the interface of trackers; Weights & Biases, Trackio                |
| `tensorboard.py`       | event files for TensorBoard                                         |
| `run_start.py`         | what a run is started with                                          |
| `git_state.py`         | the commit that a run is started from                               |
| `recorder.py`          | prints and writes the metrics                                       |
| `spikes.py`            | loss spikes                                                         |
| `interrupts.py`        | Ctrl-C and SIGTERM: a checkpoint, and one line                      |
| `mfu.py`               | model FLOPs utilization, and throughput                             |
| `profile.py`           | traces of a few steps                                               |
"""
