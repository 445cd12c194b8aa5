"""One engine at a time, measured: the teacher, the student, and the teacher with the student as its
draft.

Where it sits: ``cluster/commands/draft.py`` places a `DraftBench` for each engine, where a teacher
replica would be, and ends it before the next. Answers go from one to the next through Ray's object
store; the driver sees figures alone. Everything is greedy: each token is the most probable one.

Legend: T tokens of an answer, k drafted tokens of a verification.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raystill.base.errors import RunError
from raystill.base.logs import redirect_output
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.model.on_node import ModelSource
from raystill.model.sampling import ResolvedSampling, resolve_sampling
from raystill.placement.requests import teacher_cores
from raystill.serve.draft.acceptance import MOST_DRAFTED, count, first_difference, steps_of, walk
from raystill.serve.engine.arguments import EngineSettings, prepare_process
from raystill.serve.engine.speculative import Drafted, SpeculativeEngine, with_draft

Ids = NDArray[np.int32]
WARM_UP_TOKENS = 8
BEST = Signal("topk", 2)


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


@dataclass(frozen=True)
class TeacherAnswers:
    """The teacher's greedy answers, written without a draft, and how sure it was of each token.

    ``margins``: float32 [T], nats, by how much the most probable token is ahead of the second by a
    pass over the finished answer. Both are None for a prompt that has no answer.
    """

    ids: list[Ids | None]
    margins: list[NDArray[np.float32] | None]


class DraftBench:
    """An actor that runs one engine. ``num_drafted``: k; 0: no draft model.

    ``model``: "teacher" or "student", which is to write by itself.
    """

    _engine: SpeculativeEngine

    def __init__(self, settings: BenchSettings, model: str, num_drafted: int = 0) -> None:
        # All else is in `start`: of an error here Ray would only say that the actor has died.
        self._settings, self._model, self._k = settings, model, num_drafted

    async def start(self) -> dict[str, Any]:
        """Load the models; which engine it is. Raises RunError where this node lacks their files.

        Sets this process up before vllm is imported, so it can be called once.
        """
        settings, config = self._settings, self._settings.config
        if settings.log is not None:
            redirect_output(settings.log)
        teacher_folder = settings.teacher.on_this_node("all")
        student_folder = settings.student.on_this_node("all")
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
            model=teacher_folder if self._model == "teacher" else student_folder,
            sampling=greedy(resolve_sampling(config.teacher, teacher_folder)),
            seed=config.section_seeds()["engine"],
            max_top_k=BEST.width,
            cores=cores,
        )
        if self._k:
            arguments = with_draft(arguments, student_folder, self._k)
        self._engine = engine = SpeculativeEngine(arguments)
        await engine.start()
        facts = {"engine": engine.name, "version": engine.version, "dtype": engine.dtype}
        return {**facts, "cores": None if cores is None else len(cores)}

    async def alone(self, prompts: list[Ids]) -> dict[str, Any]:
        """Write answers without a draft, for the speed alone."""
        return (await self._alone(prompts))[0]

    async def answer(self, prompts: list[Ids]) -> tuple[dict[str, Any], TeacherAnswers]:
        """The figures of `alone`, and the answers.

        ``read_otherwise``: tokens that are not the most probable ones when the teacher reads its
        finished answer in one pass: the engine's own rounding, without any draft.
        """
        figures, answers = await self._alone(prompts)
        ids = [None if a.error else a.response_ids for a in answers]
        scored = await self._best(prompts, ids)
        margins: list[NDArray[np.float32] | None] = [None] * len(ids)
        otherwise = 0
        for row, (own, best) in enumerate(zip(ids, scored, strict=True)):
            if own is None or best is None:
                continue
            assert best.topk_ids is not None and best.topk_logprobs is not None
            margins[row] = best.topk_logprobs[:, 0] - best.topk_logprobs[:, 1]
            otherwise += int((best.topk_ids[:, 0] != own).sum())
        return {**figures, "read_otherwise": otherwise}, TeacherAnswers(ids, margins)

    async def agreement(self, prompts: list[Ids], answers: TeacherAnswers) -> dict[str, Any]:
        """Where the student's most probable token is the teacher's, and what follows for each k."""
        scored = await self._best(prompts, answers.ids)
        matches = [
            (best.topk_ids[:, 0] == ids).tolist()
            for ids, best in zip(answers.ids, scored, strict=True)
            if ids is not None and best is not None and best.topk_ids is not None
        ]
        drafted = [match for one in matches for match in one[1:]]
        by_k = {
            k: count([(len(one), walk(one, k)) for one in matches], k).to_dict()
            for k in range(1, MOST_DRAFTED + 1)
        }
        return {"top1_agreement": float(np.mean(drafted)) if drafted else None, "by_k": by_k}

    async def drafted(self, prompts: list[Ids], answers: TeacherAnswers) -> dict[str, Any]:
        """Write the answers with the draft, and compare them token by token."""
        asked = [i for i, ids in enumerate(answers.ids) if ids is not None]
        await self._warm_up()
        started = time.perf_counter()
        outputs = await self._engine.sample_drafted([prompts[i] for i in asked])
        seconds = time.perf_counter() - started
        if failed := [output.error for output in outputs if output.error]:
            raise RunError(f"{len(failed)} answers failed with the draft: {failed[0]}")
        differences = []
        for row, output in zip(asked, outputs, strict=True):
            ids, margins = answers.ids[row], answers.margins[row]
            assert ids is not None and margins is not None
            position = first_difference(ids.tolist(), output.response_ids.tolist())
            if position is not None:
                margin = float(margins[position]) if position < len(margins) else None
                differences.append({"row": row, "position": position, "margin_nats": margin})
        steps = [(len(o.response_ids), steps_of(o.accepted, len(o.response_ids))) for o in outputs]
        whole = [(num_tokens, found) for num_tokens, found in steps if found is not None]
        return {
            "k": self._k,
            **speed(outputs, seconds),
            "identical_answers": len(asked) - len(differences),
            "differences": differences,
            "answers_not_counted": len(steps) - len(whole),
            **count(whole, self._k).to_dict(),
        }

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    async def _alone(self, prompts: list[Ids]) -> tuple[dict[str, Any], list[Answer]]:
        await self._warm_up()
        started = time.perf_counter()
        answers = await self._engine.sample(prompts, Signal("text"))
        seconds = time.perf_counter() - started
        reasons = [answer.error for answer in answers if answer.error]
        if len(reasons) == len(answers):
            raise RunError(f"none of {len(answers)} prompts was answered: {reasons[0]}")
        return {**speed(answers, seconds), "dropped": len(reasons)}, answers

    async def _warm_up(self) -> None:
        """Let the engine do each kind of work once. No prompt, whose cache would then be warm."""
        await self._engine.sample([np.zeros(WARM_UP_TOKENS, np.int32)], Signal("text"))

    async def _best(
        self, prompts: list[Ids], answers: Sequence[Ids | None]
    ) -> list["Answer | None"]:
        """The engine's two most probable tokens at each token of the answers, by one pass."""
        asked = [i for i, ids in enumerate(answers) if ids is not None]
        responses = [ids for ids in answers if ids is not None]
        scored = await self._engine.score([prompts[i] for i in asked], responses, BEST)
        if failed := [answer.error for answer in scored if answer.error]:
            raise RunError(f"{len(failed)} answers could not be read back: {failed[0]}")
        found: list[Answer | None] = [None] * len(answers)
        for row, answer in zip(asked, scored, strict=True):
            found[row] = answer
        return found


def greedy(sampling: ResolvedSampling) -> ResolvedSampling:
    """The same lengths and stop ids, and always the most probable token.

    vLLM refuses min_p with a draft model.
    """
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)


def speed(answers: Sequence[Answer | Drafted], seconds: float) -> dict[str, Any]:
    """Tokens, seconds and tokens/s of answers."""
    tokens = sum(len(answer.response_ids) for answer in answers)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
