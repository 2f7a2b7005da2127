"""Training, one subject a file.

| file                   | subject                                                             |
| ---------------------- | ------------------------------------------------------------------- |
| `config.py`            | how long, how fast and how often                                    |
| `loop.py`              | the run, from top to bottom                                         |
| `loss.py`              | next-token cross entropy                                            |
| `optimizer.py`         | AdamW on a warmup-stable-decay schedule                             |
| `step.py`              | one update, and one evaluation, as pure functions                   |
| `state.py`             | parameters and optimizer state: drawn, described, placed on devices |
| `capacity.py`          | whether the training state can fit the devices' memory              |
| `start.py`             | parameters of another run or model to start from                    |
| `run_directory.py`     | what a run leaves behind, and whether it can be gone on with        |
| `checkpoint.py`        | saving and restoring through Orbax                                  |
| `checkpoint_folder.py` | which checkpoints a run has                                         |
| `metrics.py`           | JSON lines and TensorBoard                                          |
| `recorder.py`          | from the metrics of a step to lines                                 |
| `display.py`           | what a run shows while it works                                     |
| `interrupts.py`        | Ctrl-C and SIGTERM in one line                                      |
| `utilisation.py`       | how much of what the devices can compute goes into the model        |
| `profile.py`           | traces of a few steps                                               |
| `text.py`              | whether the tokenizer fits, and a sample of text                    |
"""
