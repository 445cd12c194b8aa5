"""One engine at a time, measured: the teacher, the student, and the teacher with the student as its
draft.

Where it sits: ``cluster/worth/draft.py`` places a `DraftBench` for each engine, where a teacher
replica would be, and ends it before the next. Answers go from one to the next through Ray's object
store; the driver sees figures alone. Everything is greedy: each token is the most probable one.

Legend: T tokens of an answer, k drafted tokens of a verification.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.serve.bench.acceptance import MOST_DRAFTED, count, first_difference, steps_of, walk
from raystill.serve.bench.engine import WIDTH, BenchSettings, EngineBench, Ids, speed
from raystill.serve.engine.arguments import EngineSettings
from raystill.serve.engine.speculative import SpeculativeEngine, with_draft

BEST = Signal("topk", WIDTH)
PACE_TOKENS = 32
"""Length of the answers by which the time of a token is measured."""
PACE_BATCHES = 12
"""Least number of times that such answers are written at once; prompts repeat."""


@dataclass(frozen=True)
class TeacherAnswers:
    """The teacher's greedy answers, written without a draft, and how sure it was of each token.

    ``margins``: float32 [T], nats, by how much the most probable token is ahead of the second by a
    pass over the finished answer. Both are None for a prompt that has no answer.
    """

    ids: list[Ids | None]
    margins: list[NDArray[np.float32] | None]


class DraftBench(EngineBench):
    """An actor that runs one engine. ``num_drafted``: k; 0: no draft model.

    ``model``: "teacher" or "student", which is to write by itself.
    """

    _engine: SpeculativeEngine

    def __init__(self, settings: BenchSettings, model: str, num_drafted: int = 0) -> None:
        super().__init__(settings, model)
        self._k = num_drafted

    def _engine_of(self, settings: EngineSettings) -> SpeculativeEngine:
        if self._k:
            settings = with_draft(settings, self.student_folder, self._k)
        return SpeculativeEngine(settings)

    async def alone(self, prompts: list[Ids]) -> dict[str, Any]:
        """Write answers without a draft, for the speed alone: of whole answers, and of a token.

        ``token_s``: seconds of a token, the median over answers of `PACE_TOKENS` to the same
        prompts, as many at once as the engine takes. Neither the length of a model's own answers
        counts nor the reading of prompts: see `paces`.
        """
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

    async def _alone(self, prompts: list[Ids]) -> tuple[dict[str, Any], list[Answer]]:
        await self._warm_up()
        started = time.perf_counter()
        answers = await self._engine.sample(prompts, Signal("text"))
        seconds = time.perf_counter() - started
        reasons = [answer.error for answer in answers if answer.error]
        if len(reasons) == len(answers):
            raise RunError(f"none of {len(answers)} prompts was answered: {reasons[0]}")
        answered = [p for p, a in zip(prompts, answers, strict=True) if not a.error]
        figures = {"token_s": await self._token_s(answered), "dropped": len(reasons)}
        return {**speed(answers, seconds), **figures}, answers

    async def _token_s(self, prompts: Sequence[Ids]) -> float:
        """Median seconds of a token of answers that do not end early."""
        at_once = self._settings.config.teacher.max_num_seqs
        batches = [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
        found: list[float] = []
        for batch in islice(cycle(batches), max(PACE_BATCHES, len(batches))):
            asked = (self._engine.token_times(prompt, PACE_TOKENS) for prompt in batch)
            found += paces(await asyncio.gather(*asked))
        if not found:
            raise RunError(
                "no held-out prompt leaves room for two tokens, so the time of a token is not "
                "known; raise teacher.max_model_len"
            )
        return statistics.median(found)

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


def paces(times: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of a token of each answer, from when its tokens came; all were asked at once.

    Counted is from the latest first token: before, some answers wait while prompts are read. An
    answer without a token after that has no pace.
    """
    begin = max(of[0] for of in times)
    later = [[time for time in of if time > begin] for of in times]
    return [(of[-1] - begin) / len(of) for of in later if of]
