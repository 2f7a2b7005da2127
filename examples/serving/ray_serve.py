"""`hymba serve` on Ray Serve: a replica of its application on each GPU, behind Ray's HTTP proxy.

    MODEL=/models/hymba serve run examples.serving.ray_serve:app

Every node has ray[serve] and hymba_jax[serve,cuda13]. The API is at http://127.0.0.1:8000/v1. The
turns of a conversation may reach different replicas, each with a prefix cache of its own. Run with
Ray 2.60 on a CPU (`num_cpus` in place of `num_gpus`, and smaller sizes), not with GPUs.
"""

import os

from ray import serve
from starlette.applications import Starlette

from hymba_jax.inference.loading import ModelChoice
from hymba_jax.serving.app import Api
from hymba_jax.serving.command import ServeConfig
from hymba_jax.serving.served_model import ApiOptions

SLOTS = 64


def make_app() -> Starlette:
    """The application of a replica, which compiles when its first requests wait already."""
    choice = ModelChoice(os.environ["MODEL"], context=8192)
    threads = ServeConfig(choice, name="hymba", slots=SLOTS).load()
    for thread in threads.values():
        thread.start(on_end=lambda: os._exit(1))  # Ray then starts another replica
    return Api(threads, ApiOptions()).app()


app = serve.deployment(
    num_replicas=2,
    max_ongoing_requests=2 * SLOTS,
    ray_actor_options={"num_gpus": 1},
    graceful_shutdown_timeout_s=90,
)(serve.ingress(make_app)()).bind()
