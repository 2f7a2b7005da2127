"""Emulators of Google Cloud Storage and S3 on loopback, in a process of their own.

Both have the bucket `bucket`, and refuse every access to the bucket `forbidden`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from threading import Thread

import pytest

FORBIDDEN = "forbidden"
on_one_store = pytest.mark.parametrize("bucket_url", ["gs"], indirect=True)
"""For what is the same on all: half the time."""


@contextmanager
def emulators() -> Iterator[dict[str, str]]:
    """The environment variables with which every library uses the emulators."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        gs, s3 = json.loads(process.stdout.readline())
        yield {
            "STORAGE_EMULATOR_HOST": gs,
            "TENSORSTORE_GCS_HTTP_URL": gs,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # kinds of buckets that it has not
            "NO_GCE_CHECK": "true",
            "AWS_ENDPOINT_URL": s3,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def serve_gs() -> str:
    """gcp-storage-emulator, with the generations that it lacks and TensorStore relies on."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    def insert(request, response, storage, *args, **kwargs):
        name = request.query.get("name", [None])[0] or request.data["meta"]["name"]
        expected = request.query.get("ifGenerationMatch")
        if expected and expected[0] != generation(request, storage, name):
            response.status = HTTPStatus.PRECONDITION_FAILED
        else:
            objects.insert(request, response, storage, *args, **kwargs)

    def with_generation(handler):
        def read(request, response, storage, *args, **kwargs):
            name = request.params["object_id"]
            response["x-goog-generation"] = generation(request, storage, name)
            handler(request, response, storage, *args, **kwargs)

        return read

    def generation(request, storage, name):
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except objects.NotFound:
            return "0"

    def refuse(request, response, storage, *args, **kwargs):
        response.status = HTTPStatus.FORBIDDEN

    changed = {
        objects.insert: insert,
        objects.get: with_generation(objects.get),
        objects.download: with_generation(objects.download),
    }
    handlers = [
        (pattern, {method: changed.get(handler, handler) for method, handler in methods.items()})
        for pattern, methods in server.HANDLERS
    ]
    every_method = dict.fromkeys(("GET", "POST", "PUT", "DELETE"), refuse)
    server.HANDLERS = ((rf".*/b/{FORBIDDEN}(/.*)?", every_method), *handlers)
    server.server.HTTPServer.request_queue_size = 100  # with 5, clients wait to connect again
    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    return f"http://127.0.0.1:{emulator._api._httpd.server_port}"


def serve_s3() -> str:
    """moto."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server
    from werkzeug.wrappers import Response

    moto = DomainDispatcherApplication(create_backend_app)
    s3_backends["123456789012"]["aws"].create_bucket("bucket", "us-east-1")
    body = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

    def application(environ, start_response):
        if environ["PATH_INFO"].startswith(f"/{FORBIDDEN}"):
            return Response(body, HTTPStatus.FORBIDDEN)(environ, start_response)
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


if __name__ == "__main__":
    print(json.dumps([serve_gs(), serve_s3()]), flush=True)
    sys.stdin.read()  # until the tests end, in whatever way
    os._exit(0)
