"""What the tests' HTTP servers share: a handler that reads and writes JSON, and serving it."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar


class Server(ThreadingHTTPServer):
    """A server that a busy machine may let wait: a full queue would reset what connects."""

    request_queue_size = 128


S = TypeVar("S", bound=ThreadingHTTPServer)


class JsonHandler(BaseHTTPRequestHandler):
    """Tells nothing on the console."""

    def body(self) -> bytes:
        """What came with the request."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answers with JSON, or with bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        """Ends the connection without an answer."""
        self.close_connection = True
        self.connection.close()

    def drip(self) -> None:
        """Begins an answer and never ends it, until nobody waits any more."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving(server: S) -> Iterator[S]:
    """The server at work, in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_flight() -> int:
    """Bytes at most between a server that sends and a client that does not read: their buffers."""
    limits = [Path(f"/proc/sys/net/ipv4/tcp_{name}mem") for name in ("r", "w")]
    kernel = sum(int(path.read_text().split()[2]) for path in limits if path.exists())
    return max(kernel, 12 << 20)


def completion_of(
    text: str | None, usage: tuple[int, int] = (10, 5), **choice: Any
) -> dict[str, Any]:
    """A chat completion as JSON. usage: tokens read and written; choice: further fields of it."""
    read, written = usage
    told = {"index": 0, "finish_reason": "stop", **choice}
    told.setdefault("message", {"role": "assistant", "content": text})
    return {
        **{"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [told]},
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }
