"""Evaluation of trained models.

| file             | subject                                                                |
|------------------|------------------------------------------------------------------------|
| `command.py`     | `hymba evaluate`                                                       |
| `documents.py`   | documents to tokens, with the bytes of each                            |
| `windows.py`     | strided windows over long documents                                    |
| `perplexity.py`  | the cross entropy of each token                                        |
| `statistics.py`  | means, bootstrap errors, the curve over the position in the context    |
| `report.py`      | the results as JSON, table and image                                   |
"""
