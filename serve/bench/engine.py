"""One engine in an actor of its own, for measuring: the teacher or the finished student.

Where it sits: ``cluster/worth/bench.py`` places an `EngineBench` where a teacher replica would be,
and ends it before the next. Both models get the same settings, those of the run's teacher.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raystill.base.logs import redirect_output
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.model.on_node import ModelSource
from raystill.model.sampling import ResolvedSampling, resolve_sampling
from raystill.placement.requests import teacher_cores
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.engine.speculative import Drafted
from raystill.serve.engine.vllm import VllmEngine

Ids = NDArray[np.int32]
WARM_UP_TOKENS = 8
WIDTH = 2
"""Most logprobs a token that an engine is asked for."""


@dataclass(frozen=True)
class BenchSettings:
    """What a `DraftBench` is given.

    Attributes:
        config: The run's configuration; ``teacher.max_num_seqs`` is the answers written at once.
        teacher: The teacher's files.
        student: The finished student's files.
        gpus: GPUs of the engine; 0: it runs on the cores of a teacher replica.
        log: Log file of the engine; None: Ray's own.
    """

    config: RunConfig
    teacher: ModelSource
    student: ModelSource
    gpus: int
    log: str | None


class EngineBench:
    """An actor that runs one engine. ``model``: "teacher" or "student", the one that writes."""

    teacher_folder: str
    student_folder: str
    _engine: VllmEngine

    def __init__(self, settings: BenchSettings, model: str) -> None:
        # All else is in `start`: of an error here Ray would only say that the actor has died.
        self._settings, self._model = settings, model

    async def start(self) -> dict[str, Any]:
        """Load the models; which engine it is. Raises RunError where this node lacks their files.

        Sets this process up before vllm is imported, so it can be called once.
        """
        settings, config = self._settings, self._settings.config
        if settings.log is not None:
            redirect_output(settings.log)
        self.teacher_folder = settings.teacher.on_this_node("all")
        self.student_folder = settings.student.on_this_node("all")
        cores = None
        if settings.gpus == 0:
            cores = teacher_cores(config, sorted(os.sched_getaffinity(0)))
        prepare_process(cores)
        os.environ["HF_HUB_OFFLINE"] = "1"
        teacher = config.teacher
        if self._model == "student":  # Its weights are plain ones.
            teacher = teacher.model_copy(update={"quantization": None})
        arguments = EngineSettings(
            teacher=teacher,
            model=self.teacher_folder if self._model == "teacher" else self.student_folder,
            sampling=greedy(resolve_sampling(config.teacher, self.teacher_folder)),
            seed=config.section_seeds()["engine"],
            max_top_k=WIDTH,
            cores=cores,
        )
        self._engine = engine = self._engine_of(arguments)
        await engine.start()
        facts = {"engine": engine.name, "version": engine.version, "dtype": engine.dtype}
        return {**facts, "cores": None if cores is None else len(cores)}

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _engine_of(self, settings: EngineSettings) -> VllmEngine:
        return VllmEngine(settings)

    async def _warm_up(self) -> None:
        """Let the engine do each kind of work once. No prompt, whose cache would then be warm."""
        await self._engine.sample([np.zeros(WARM_UP_TOKENS, np.int32)], Signal("text"))


def greedy(sampling: ResolvedSampling) -> ResolvedSampling:
    """The same lengths and stop ids, and always the most probable token.

    vLLM refuses min_p with a draft model.
    """
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)


def speed(answers: Sequence[Answer | Drafted], seconds: float) -> dict[str, Any]:
    """Tokens, seconds and tokens/s of answers."""
    tokens = sum(len(answer.response_ids) for answer in answers)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
