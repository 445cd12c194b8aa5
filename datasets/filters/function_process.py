"""A process that calls a user's function: one row in, one score out.

`function.py` starts it as a script, so that it imports nothing of ours, and ends it when it takes
too long. Requests come on the standard input, replies leave by the file descriptor of the first
argument; each is a JSON text after its length in four bytes. The first request says which function;
the others are rows. What the function prints is dropped; its error output goes to the log.
"""

import importlib
import json
import os
import signal
import sys
import types
from typing import Any, BinaryIO

LONGEST_ERROR = 300
START_S = 120.0
"""Seconds in which the function must be loaded."""
GRACE_S = 10.0
"""After its time limit and these seconds the process ends itself, where nobody was left to."""


def main(replies: int) -> None:
    """Answer requests until the input ends."""
    function, limit_s = None, START_S
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # The function reads no requests.
    while (request := receive(requests)) is not None:
        # The default action ends the process, also within C code that never returns.
        signal.setitimer(signal.ITIMER_REAL, limit_s + GRACE_S)
        try:
            if function is None:
                function = load(request)
                reply: dict[str, Any] = {"ready": True}
            else:
                reply = {"score": float(function(request["row"]))}
        except BaseException as error:  # Whatever it is, it is the function's.
            reply = {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        limit_s = float(request.get("timeout_s", limit_s))
        text = json.dumps(reply).encode()
        data = len(text).to_bytes(4, "big") + text
        while data:
            data = data[os.write(replies, data) :]


def load(request: dict[str, Any]) -> Any:
    """The function of a request: from the text of a file that the driver has read, or a module."""
    name = request["module"]
    if request["source"] is None:
        module = importlib.import_module(name)
    else:
        module = types.ModuleType("filter_functions")
        module.__file__ = name
        sys.modules[module.__name__] = module  # Where dataclasses and pickle look for it.
        exec(compile(request["source"], name, "exec"), module.__dict__)
    return getattr(module, request["function"])


def receive(requests: BinaryIO) -> dict[str, Any] | None:
    """The next request; None where the input has ended."""
    head = requests.read(4)
    if len(head) < 4:
        return None
    text = requests.read(int.from_bytes(head, "big"))
    request: dict[str, Any] = json.loads(text)
    return request


if __name__ == "__main__":
    main(int(sys.argv[1]))
