"""Many requests at a time, from one model, over HTTP.

| file              | subject                                                                    |
|-------------------|----------------------------------------------------------------------------|
| `scheduler.py`    | continuous batching: who is prefilled, and decoded in which slot, when     |
| `model_thread.py` | the one thread that runs the model, and what coroutines get from it        |
| `protocol.py`     | requests and errors of the OpenAI API                                      |
| `messages.py`     | messages of the OpenAI API, as chat templates read them                    |
| `answers.py`      | deltas to answers, and to their chunks                                     |
| `tool_stream.py`  | tool calls in an answer as it comes                                        |
| `grammar.py`      | which tokens a JSON schema or a grammar allows next                        |
| `served_model.py` | a model by its name, and its requests as they are submitted                |
| `app.py`          | routes, limits, errors, streams of events                                  |
| `chat_page.html`  | the page at /, for people                                                  |
| `metrics.py`      | what is measured, for Prometheus                                           |
| `command.py`      | `hymba serve`                                                              |
| `batch.py`        | `hymba batch`                                                              |
| `bench.py`        | `hymba bench-serve`                                                        |

Requests pass from the coroutines of `app.py` through the scheduler's queue to the model's thread,
and deltas back through a queue of each request. Nothing else is shared.
"""
