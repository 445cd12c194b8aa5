"""An S3-compatible server for a test (moto's), and a proxy before it that makes trouble.

The proxy speaks HTTP/1.1, keeps connections open and counts them. moto looks whether an object is
there and writes it in two steps, which S3 does in one, so the proxy passes on one conditional
request at a time; all others go side by side.
"""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}

Request = tuple[str, str]
"""Method, and path with its query."""
Trouble = Callable[[Request], str | None]
"""What becomes of a request: None (it is answered), ``busy`` (503, not carried out), ``late``
(carried out, answered 503), ``cut`` (carried out, the connection breaks) or ``lost`` (not carried
out, the connection breaks)."""


@dataclass
class Proxy:
    """What passed, and what to do with what comes."""

    upstream: str
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    latency_s: float = 0.0
    trouble: Trouble = lambda _: None
    without_conditions: str | None = None
    """``refuses``: conditional writes are answered 501; ``ignores``: they are plain writes."""
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """Forget what was counted."""
        self.requests.clear()
        self.connections = 0


@dataclass
class S3:
    """A server's address (host:port) behind its proxy."""

    address: str
    proxy: Proxy
    upstream: str

    def uri(self, path: str) -> str:
        """The URI of a path that begins with a bucket."""
        return f"s3://{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"

    def make_bucket(self, name: str) -> str:
        """Make a bucket and return its name.

        The server loads its services at its first request, which may take longer than pyarrow
        waits: this one is waited for.
        """
        scope = "Credential=test/20260101/us-east-1/s3/aws4_request"
        signed = f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=none"
        asked = http.client.HTTPConnection(self.upstream, timeout=120)
        asked.request("PUT", f"/{name}", headers={"Authorization": signed})
        answer = asked.getresponse()
        assert answer.status == 200, answer.read()
        return name


class Handler(BaseHTTPRequestHandler):
    """Passes requests on to the server of ``proxy``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.proxy.connections += 1
        self.server_side = http.client.HTTPConnection(self.proxy.upstream, timeout=60)

    def log_message(self, *_: object) -> None:
        pass

    def pass_on(self) -> None:
        body = self.body()
        request = (self.command, self.path)
        self.proxy.requests.append(request)
        time.sleep(self.proxy.latency_s)
        trouble = self.proxy.trouble(request)
        if trouble == "lost":
            self.close_connection = True
            return
        if trouble != "busy":
            status, headers, answer = self.ask(body)
        if trouble == "cut":
            self.close_connection = True
            return
        if trouble is not None:
            status, headers = 503, []
            answer = b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP:
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), len(answer))
        self.send_header("Content-Length", str(length if self.command == "HEAD" else len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        headers["Content-Length"] = str(len(body))
        conditions = [n for n in headers if n.lower() in ("if-none-match", "if-match")]
        conditional = bool(conditions)
        if conditional and self.command == "PUT" and self.proxy.without_conditions == "refuses":
            return 501, [], b"<Error><Code>NotImplemented</Code><Message>no</Message></Error>"
        if conditional and self.proxy.without_conditions == "ignores":
            conditional = False
            headers = {name: value for name, value in headers.items() if name not in conditions}
        lock = self.proxy.one_at_a_time
        if conditional:
            lock.acquire()
        try:
            self.server_side.request(self.command, self.path, body, headers)
            response = self.server_side.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            if conditional:
                lock.release()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        pass  # A client that has gone.


@contextmanager
def s3_server() -> Iterator[S3]:
    """moto's server in this process, and the proxy before it."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    upstream = "{}:{}".format(*moto.get_host_and_port())
    proxy = Proxy(upstream)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"proxy": proxy}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield S3(f"127.0.0.1:{server.server_address[1]}", proxy, upstream)
    finally:
        server.shutdown()
        server.server_close()
        moto.stop()
