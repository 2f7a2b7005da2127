"""Many requests at a time, from one model, over HTTP.

| file              | subject                                                                    |
|-------------------|----------------------------------------------------------------------------|
| `scheduler.py`    | continuous batching: who is prefilled, and decoded in which slot, when     |
| `model_thread.py` | the one thread that runs the model, and what coroutines get from it        |
| `protocol.py`     | requests and errors of the OpenAI API                                      |
| `messages.py`     | messages of the OpenAI API, as chat templates read them                    |
| `answers.py`      | deltas to answers, and to their chunks                                     |
| `tool_stream.py`  | tool calls in an answer as it comes                                        |
| `app.py`          | routes, limits, errors, streams of events                                  |
| `metrics.py`      | what is measured, for Prometheus                                           |
| `command.py`      | `hymba serve`                                                              |
| `bench.py`        | `hymba bench-serve`                                                        |

Requests pass from the coroutines of `app.py` through the scheduler's queue to the model's thread,
and deltas back through a queue of each request. Nothing else is shared.
"""
