"""The end of an engine's process, which ends with its replica.

vLLM's processes wait for requests on a socket. A replica that is killed, with its node or its
driver, closes nothing, and they would wait for ever, with all their memory: `end_with`.
"""

import contextlib
import os
import socket
import time
from threading import Thread

import psutil

LOOK_EVERY_S = 1.0
EXIT_ALONE = 1


def end_with(pid: int, host: str) -> None:
    """End this process within two seconds of the end of process ``pid``, without a word.

    Returns at once; a thread looks. Does nothing on another machine than ``host``, where the number
    means another process: Ray ends what it started there.
    """
    if host != socket.gethostname():
        return
    watched = psutil.Process(pid)  # Remembers when it started: a number may be given again.

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
                time.sleep(LOOK_EVERY_S)
        os._exit(EXIT_ALONE)

    Thread(target=watch, name="end-with-replica", daemon=True).start()
