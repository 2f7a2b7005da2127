"""Training, one subject a file.

| file                   | subject                                                             |
| ---------------------- | ------------------------------------------------------------------- |
| `arguments.py`         | the command line of a run                                           |
| `loop.py`              | the run, from top to bottom                                         |
| `stage_program.py`     | what the steps of a stage need, compiled                            |
| `extension.py`         | what a resumed run does otherwise: steps, stages, updates           |
| `schedule.py`          | learning rates, through stages                                      |
| `schedule_command.py`  | `hymba schedule`                                                    |
| `objectives.py`        | the objectives that a config can name                               |
| `loss.py`              | next-token cross entropy; averages that add up exactly              |
| `distillation.py`      | distillation, and its teacher                                       |
| `preference.py`        | preference optimization: DPO and SimPO                              |
| `reference.py`         | what the model that a stage of DPO starts from gives its pairs      |
| `optimizer.py`         | AdamW and Muon                                                      |
| `weights.py`           | float32 master weights, and the moving average of the parameters    |
| `step.py`              | one update of any objective, as a pure function                     |
| `fixed_order.py`       | sums over a batch in an order that does not depend on the devices   |
| `capacity.py`          | whether the training state can fit the devices' memory              |
| `validation.py`        | the objective on held-out text                                      |
| `evaluation.py`        | evaluations during training, on their schedules                     |
| `sample.py`            | text from the trained model                                         |
| `metrics.py`           | the metrics of a run: JSON lines, and the trackers                  |
| `trackers.py`          | the interface of trackers; Weights & Biases, Trackio                |
| `tensorboard.py`       | event files for TensorBoard                                         |
| `uploaded_records.py`  | metrics of a run in a bucket                                        |
| `run_start.py`         | what a run is started with                                          |
| `git_state.py`         | the commit that a run is started from                               |
| `recorder.py`          | prints and writes the metrics                                       |
| `spikes.py`            | loss spikes                                                         |
| `interrupts.py`        | Ctrl-C and SIGTERM: a checkpoint, and one line                      |
| `mfu.py`               | model FLOPs utilization, and throughput                             |
| `profile.py`           | traces of a few steps                                               |
"""
