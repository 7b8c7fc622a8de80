"""An emulator of Google Cloud Storage on this machine, with the generation preconditions that it lacks."""

import functools
import http.server
import io
import json
import re
import threading
import urllib.parse

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one request at a time; answers 412 where `ifGenerationMatch` does not match the object's generation."""

    lock = threading.Lock()
    rfile: io.BufferedIOBase

    def __init__(self, storage, *args):
        self.storage = storage
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def answer(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.rfile = io.BytesIO(body)
        with self.lock:
            if self._allowed(body):
                server.Router(self).handle(method)
            else:
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()

    do_GET = functools.partialmethod(answer, "GET")
    do_POST = functools.partialmethod(answer, "POST")
    do_PUT = functools.partialmethod(answer, "PUT")
    do_DELETE = functools.partialmethod(answer, "DELETE")
    do_PATCH = functools.partialmethod(answer, "PATCH")

    def _allowed(self, body):
        address = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(address.query)
        if "ifGenerationMatch" not in query:
            return True
        bucket, _, name = address.path.partition("/b/")[2].partition("/o")
        name = query.get("name", [urllib.parse.unquote(name.removeprefix("/"))])[0]
        if not name and (described := re.search(rb'"name": ("(?:[^"\\]|\\.)*")', body)):  # an upload in two parts
            name = json.loads(described[1])
        known = self.storage.objects.get(bucket, {}).get(name, {})
        return query["ifGenerationMatch"][0] == known.get("generation", "0")


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Silent: gcsfs sends two requests at once and drops the slower connection."""


class Emulator:
    """Serves buckets in memory until `close`."""

    def __init__(self):
        self.storage = Storage(use_memory_fs=True)
        self._server = Server(("127.0.0.1", 0), functools.partial(Handler, self.storage))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def create(self, bucket):
        buckets.create_bucket(bucket, self.storage)

    def names(self, bucket):
        """Names of the objects in a bucket."""
        return sorted(self.storage.objects.get(bucket, {}))

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def environment(address):
    """Environment variables that point clients to the emulator."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the emulator does not support it
        "NO_GCE_CHECK": "true",  # no search for credentials
    }
