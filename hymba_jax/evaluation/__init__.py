"""Evaluation of trained models.

| file               | subject                                                              |
|--------------------|----------------------------------------------------------------------|
| `command.py`       | `hymba evaluate`                                                     |
| `documents.py`     | documents to tokens, with the bytes of each                          |
| `windows.py`       | strided windows over long documents                                  |
| `perplexity.py`    | the cross entropy of each token                                      |
| `statistics.py`    | means, bootstrap errors, the curve over the position in the context  |
| `report.py`        | the results as JSON, table and image                                 |
| `harness.py`       | a model for lm-evaluation-harness                                    |
| `control_marks.py` | control tokens of a chat template in the harness' strings            |
| `answers.py`       | answers kept in a file, so that an interrupted evaluation resumes    |
| `tasks.py`         | the harness' tasks, and the paper's task lists (`task_groups`)       |
| `needle.py`        | a needle in a haystack                                               |
| `replicas.py`      | copies of a model, one on each device, which share the batches       |
| `progress.py`      | the bar that shows what is left                                      |
"""
