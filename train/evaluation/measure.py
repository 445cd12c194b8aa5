"""Measuring the student during a run: all figures of one evaluation, written where they belong.

Consumes ``held_out.parquet`` and, for the baselines, the pair counts of the rows trained. Writes,
on rank 0, one line of ``evaluation.jsonl`` and the student's own answers to ``answers.jsonl``.
Every rank calls every method. Imports no Ray.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from raystill.base.records import MetricsLog, read_lines
from raystill.base.run_folder import ANSWERS, EVALUATION, HELD_OUT
from raystill.model.sampling import ResolvedSampling
from raystill.run import Run
from raystill.train.batch.rows import Row, rows_from_table
from raystill.train.evaluation.baselines import HeldOutTokens, PairCounts, measure_baselines
from raystill.train.evaluation.checks import run_checks
from raystill.train.evaluation.free_running import (
    FreeRunning,
    Prompted,
    Written,
    choose_rows,
    has_all,
    held_out_prompts,
    run_free,
    write_free,
)
from raystill.train.evaluation.own_contexts import measure_own_contexts
from raystill.train.evaluation.teacher_forced import TokenKl, evaluate, micro_batches
from raystill.train.step.ranks import Ranks
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import gathering_passes, room_for_whole, whole_weights

logger = logging.getLogger(__name__)

MOST_ROWS_BY_TOKEN = 32
"""Answers of one evaluation whose tokens are recorded one by one, for the page of the run."""
MOST_TOKENS_BY_TOKEN = 512
"""Tokens of one answer that are recorded so."""


@dataclass(frozen=True)
class LocalStudent:
    """The student as one rank has it, and what measuring it needs beside the run.

    Attributes:
        module: The student on this rank; with FSDP its shard.
        vocab: Number of ids that are classes of the student (``num_classes``).
        device: Where the module is.
        ranks: The group of workers.
        teacher_folder: The teacher's folder on this node.
        sampling: The teacher's sampling, which the student answers with.
    """

    module: StudentModule
    vocab: int
    device: torch.device
    ranks: Ranks
    teacher_folder: str
    sampling: ResolvedSampling


class Measurer:
    """Measures one student of a run on its held-out rows."""

    def __init__(
        self,
        run: Run,
        student: LocalStudent,
        score: Callable[[Written], list[Row]] | None = None,
    ) -> None:
        """score: has the teacher score what the student wrote; needed by rank 0 where the
        configuration wants it.
        """
        self._score = score
        self._config = run.config
        self._folder = run.folder
        self._student = student
        self._ranks = student.ranks
        free = run.config.evaluation.free_running
        self._free_during = free.during
        self._free_running = FreeRunning(
            rows=free.rows,
            max_tokens=free.max_tokens or run.config.teacher.sampling.max_tokens,
            sampling=student.sampling,
            seed=run.config.section_seeds()["evaluation"],
            compute_dtype=student.module.compute_dtype,
        )
        self._rows: list[Row] | None = None
        self._written: dict[int, list[int]] | None = None

    @property
    def rows(self) -> list[Row]:
        """All held-out rows, by their number, read once; they must have been answered."""
        if self._rows is None:
            rows = rows_from_table(self._folder.read_table(HELD_OUT).combine_chunks())
            self._rows = sorted(rows, key=lambda row: row.row)
        return self._rows

    def discard_beyond(self, step: int) -> None:
        """Move aside the records of steps after ``step``, which will be trained again."""
        if self._ranks.first:
            for name in (EVALUATION, ANSWERS):
                MetricsLog(self._folder, name).discard_beyond(step)

    def is_measured(self, step: int) -> bool:
        """Whether ``evaluation.jsonl`` holds figures of the weights after ``step`` steps."""
        measured = False
        if self._ranks.first:
            measured = any(r["step"] == step for r in read_lines(self._folder, EVALUATION))
        return self._ranks.from_first(measured)

    def write_ahead(self) -> None:
        """Let the student answer for the next ``measure`` now, where its weights stay until then.

        The teacher need not have answered yet.
        """
        if self._free_running.rows > 0:
            self._written = self._write(held_out_prompts(self._folder))

    def _write(self, prompts: Sequence[Prompted]) -> dict[int, list[int]]:
        """The student's answers to some of the prompts; by all ranks together where no rank has
        room for all weights.
        """
        student, settings = self._student, self._free_running
        whole = self._ranks.all(room_for_whole(student.module, student.device))
        placed = whole_weights if whole else gathering_passes
        with placed(student.module):
            return write_free(
                student.module.model, prompts, settings, student.device, self._ranks, not whole
            )

    def measure(
        self, step: int, when: str, weights: str, counts: PairCounts | None = None
    ) -> dict[str, Any]:
        """Figures of the student after ``step`` steps; ``counts`` (rank 0) adds the baselines.

        ``when`` is before, during or after; ``weights`` says which weights were measured.
        """
        record: dict[str, Any] = {"step": step, "when": when, "weights": weights}
        runs_free = self._free_running.rows > 0 and (when != "during" or self._free_during)
        tokens = TokenKl(self._rows_by_token() if runs_free else frozenset())
        record |= self._evaluate(self.rows, tokens)
        if runs_free:
            record |= self._run_free(step, tokens)
        if self._ranks.first:
            if counts is not None and self.rows[0].topk_ids is not None:
                record["baselines"] = self._measure_baselines(counts)
            log = MetricsLog(self._folder, EVALUATION)
            log.append(record)
            log.upload()
            logger.info("evaluation %s", record)
        return record

    def _rows_by_token(self) -> frozenset[int]:
        """Numbers of the held-out rows whose tokens are recorded: some that the student answers."""
        chosen = choose_rows(self.rows, self._free_running.rows, self._free_running.seed)
        return frozenset(row.row for row in chosen[:MOST_ROWS_BY_TOKEN])

    def _run_free(self, step: int, tokens: TokenKl) -> dict[str, Any]:
        model, device, settings = (
            self._student.module.model,
            self._student.device,
            self._free_running,
        )
        written, self._written = self._written or {}, None
        # One answer for all ranks: they may have to write together.
        if not self._ranks.all(has_all(written, self.rows, settings, self._ranks)):
            written = self._write(self.rows)
        found, pairs = run_free(model, self.rows, settings, device, self._ranks, written)
        figures: dict[str, Any] = dict(found)
        own = TokenKl(tokens.rows)
        if self._config.scores_student_answers:
            figures |= self._scored_by_teacher(pairs, own)
        gathered = self._ranks.gather((tokens.nats, own.nats)) or []
        if self._ranks.first:
            teachers = {row: nats for part, _ in gathered for row, nats in part.items()}
            students = {row: nats for _, part in gathered for row, nats in part.items()}
            said: dict[int, dict[str, Any]] = {}
            if checks := self._config.evaluation.checks:
                text, longest = text_of(self._student.teacher_folder), self._free_running.max_tokens
                folder = self._folder
                figures["checks"], said = run_checks(checks, folder, pairs, text, longest)
            self._write_answers(step, pairs, (teachers, students), said)
        return figures

    def _scored_by_teacher(self, pairs: Written, tokens: TokenKl) -> dict[str, Any]:
        """Figures of `own_contexts` on the answers that rank 0 has of all ranks."""
        rows: list[Row] = []
        if self._ranks.first:
            assert self._score is not None, "somebody must ask the teacher"
            rows = self._score(pairs)
        return measure_own_contexts(
            self._student.module,
            self._ranks.from_first(rows),
            tokens_budget=self._config.training.tokens_per_micro_batch,
            student_vocab=self._student.vocab,
            device=self._student.device,
            ranks=self._ranks,
            tokens=tokens,
        )

    def _evaluate(self, rows: list[Row], tokens: TokenKl) -> dict[str, Any]:
        return evaluate(
            self._student.module,
            rows,
            tokens_budget=self._config.training.tokens_per_micro_batch,
            student_vocab=self._student.vocab,
            device=self._student.device,
            ranks=self._ranks,
            tokens=tokens,
        )

    def _write_answers(
        self,
        step: int,
        pairs: list[tuple[Row, list[int]]],
        nats: tuple[dict[int, list[float]], dict[int, list[float]]],
        said: dict[int, dict[str, Any]],
    ) -> None:
        """nats: KL by row at the tokens of the teacher's and the student's answer; said: by row
        what each check says of both.
        """
        teachers, students = nats
        log = MetricsLog(self._folder, ANSWERS)
        log.discard_beyond(step - 1)  # A restart may measure the same step again.
        text = text_of(self._student.teacher_folder)
        for row, answer in pairs:
            texts = {
                "prompt": text(row.prompt_ids.tolist()),
                "teacher": text(row.response_ids.tolist()),
                "student": text(answer),
            }
            by_token = tokens_of("teacher", row.response_ids.tolist(), teachers.get(row.row), text)
            by_token |= tokens_of("student", answer, students.get(row.row), text)
            checked = {"checks": said[row.row]} if said.get(row.row) else {}
            log.append({"step": step, "row": row.row, **texts, **by_token, **checked})
        log.upload()

    def _measure_baselines(self, counts: PairCounts) -> dict[str, dict[str, float]]:
        budget = self._config.training.tokens_per_micro_batch
        parts = []
        for batch in micro_batches(self.rows, budget, self._student.vocab):
            assert batch.partition is not None, "held-out rows carry the topk signal"
            before = batch.input_ids.flatten()[batch.logit_index]
            ids, log_p = batch.partition.ids, batch.partition.log_p
            parts.append(HeldOutTokens(before.numpy(), ids.numpy(), log_p.numpy()))
        return measure_baselines(parts, counts)


def text_of(teacher_folder: str) -> Callable[[list[int]], str]:
    """Text of token ids without special tokens; the ids themselves where nothing names them."""
    path = Path(teacher_folder) / "tokenizer.json"
    if not path.exists():
        return lambda ids: " ".join(map(str, ids))
    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def tokens_of(
    who: str, ids: list[int], nats: list[float] | None, text: Callable[[list[int]], str]
) -> dict[str, Any]:
    """An answer token by token: ``<who>_tokens``, texts, and ``<who>_kl``, nats; {} without nats.

    Only tokens with a loss, at most ``MOST_TOKENS_BY_TOKEN``. Joined, the texts are the answer's
    text; a token that has none by itself (a special one, the first bytes of a character) has ''.
    """
    if not nats:
        return {}
    first = len(ids) - len(nats)
    end = min(len(ids), first + MOST_TOKENS_BY_TOKEN)
    texts, before = [], text(ids[:first])
    for place in range(first, end):
        now = text(ids[: place + 1])
        # A character whose bytes are not all there yet is decoded as the replacement character.
        now = now if not now.endswith("\ufffd") or place + 1 == len(ids) else before
        texts.append(now[len(before) :] if now.startswith(before) else "")
        before = now
    kl = [round(value, 4) for value in nats[: end - first]]
    return {f"{who}_tokens": texts, f"{who}_kl": kl}
