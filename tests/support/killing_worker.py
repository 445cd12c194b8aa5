"""A vLLM worker whose process ends at the third step of a row with a certain id in its prompt."""

import functools
import os
from typing import Any

from raystill.serve.engine.capture import Capture

KILLS = 333
STEPS = 3
EXTENSION = "tests.support.killing_worker.Killing"


class Killing(Capture):
    """Added to the worker as `Capture` is."""

    def raystill_capture(self, replica: int, host: str) -> dict[str, str] | None:
        """Also watch the rows of each step."""
        runner, steps = self.model_runner, dict[str, int]()
        execute = runner.execute_model

        @functools.wraps(execute)
        def watched(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            for new in scheduled.scheduled_new_reqs:
                if KILLS in (new.prompt_token_ids or ()):
                    steps[new.req_id] = 0
            for name in steps:
                if name in scheduled.num_scheduled_tokens:
                    steps[name] += 1
                    if steps[name] == STEPS:
                        os._exit(9)
            return execute(scheduled, *args, **kwargs)

        runner.execute_model = watched
        return super().raystill_capture(replica, host)
