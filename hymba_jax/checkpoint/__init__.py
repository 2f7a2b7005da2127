"""What is stored of runs and models, and reading it back.

| file                      | subject                                                       |
|---------------------------|---------------------------------------------------------------|
| `train_state.py`          | parameters and optimizer state: abstract, initialized, placed |
| `checkpoints.py`          | saving and restoring through Orbax                            |
| `preservation.py`         | which checkpoints stay, and which is the best                 |
| `uploaded_checkpoints.py` | checkpoints in s3:// buckets, to which Orbax does not write   |
| `local_copy.py`           | a model directory in a bucket, copied to the disk             |
| `checksums.py`            | checksums of arrays, whatever their sharding                  |
| `run_directory.py`        | what a run writes, and whether a config resumes it            |
| `run_lock.py`             | one run at a time in a directory                              |
| `model_file.py`           | the file that says what model a directory holds               |
| `load.py`                 | a model for inference                                         |
| `save.py`                 | `save_model`: a standalone model, from Python                 |
"""
