"""vLLM with a draft model: greedy answers, and what the teacher accepted at each verification.

Where it sits: as `vllm.VllmEngine`, with the student as vLLM's ``draft_model``. *Consumed* by
``serve/bench/draft.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raystill.serve.engine.arguments import EngineSettings
from raystill.serve.engine.vllm import VllmEngine

SPECULATIVE = "speculative_config"


@dataclass(frozen=True)
class Drafted:
    """An answer that was written with a draft model.

    ``accepted``: tokens accepted at each verification, in order; the last ones may lie beyond the
    answer's end. ``error``: why there is no answer; None for a usable one.
    """

    response_ids: NDArray[np.int32]
    accepted: tuple[int, ...] = ()
    error: str | None = None


def with_draft(settings: EngineSettings, student: str, num_tokens: int) -> EngineSettings:
    """The same engine with the student in ``student``, a folder, as its draft model.

    vLLM wants as many tensor-parallel ranks of the draft as of the teacher.
    """
    teacher = settings.teacher
    drafting: dict[str, Any] = {
        SPECULATIVE: {
            "method": "draft_model",
            "model": student,
            "num_speculative_tokens": num_tokens,
            "draft_tensor_parallel_size": teacher.tensor_parallel_size,
        },
        "per_request_spec_decode_metrics": "detailed",
    }
    arguments = {**teacher.engine_args, **drafting}
    return replace(settings, teacher=teacher.model_copy(update={"engine_args": arguments}))


class SpeculativeEngine(VllmEngine):
    """A teacher with a draft model; its settings come from `with_draft`."""

    async def sample_drafted(self, prompt_ids: Sequence[NDArray[np.int32]]) -> list[Drafted]:
        """Answer the prompts, in order. Raises EngineDeadError where the engine has died."""
        reasons = [None] * len(prompt_ids)
        parameters = self._parameters(None)
        outputs, _ = await self._run(prompt_ids, reasons, [None] * len(prompt_ids), parameters)
        return [_drafted(output) for output in outputs]


def _drafted(output: Any) -> Drafted:
    if isinstance(output, str):
        return Drafted(np.empty(0, np.int32), error=output)
    ids = np.fromiter(output.token_ids, np.int32, len(output.token_ids))
    metrics = output.spec_decode_metrics
    return Drafted(ids, () if metrics is None else tuple(metrics.per_step_accepted))
