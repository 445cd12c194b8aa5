"""What the student writes by itself: whether it stops, how long its answers are, what it repeats.

The student answers some held-out prompts with the teacher's sampling. Its answers are compared with
the teacher's to the same prompts. Penalties of the student's folder are not applied, as the
teacher's own are not. Shares are pooled over all answers, not averaged by answer.

``stop_rate``: share of answers that ended with a stop id. ``length_ratio``: mean length of the
student's answers over the mean of the teacher's. ``repeated_4gram_share``: of all 4-grams, those
that occurred earlier in the same answer. The teacher's own figures are given too.

``score_answers`` has the teacher score the student's answers, for the KL on contexts that the
student wrote: on teacher-written ones it never meets the mistakes that it makes itself. *Waits for*
the teacher, which scores each answer by one prefill.

Legend: P prompt tokens, T tokens the student wrote, K teacher ids kept for each.
"""

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from raystill.base.run_folder import HELD_OUT_PROMPTS, RunFolder
from raystill.datasets.rows.answers import require_none_fatal
from raystill.datasets.rows.schema import TOKEN_IDS, student_prompts
from raystill.datasets.rows.signal import held_out_signal
from raystill.datasets.stream.teacher_calls import TeacherCalls
from raystill.model.sampling import ResolvedSampling
from raystill.run import Run
from raystill.train.batch.rows import Row, rows_from_table
from raystill.train.evaluation.one_query import quick_writing
from raystill.train.start.texts import shared_beginning
from raystill.train.step.ranks import Ranks
from raystill.train.student.attention import FLEX
from raystill.train.student.row_by_row import ROW_BY_ROW

ROWS_PER_BATCH = 16
LEAST_SAVED = 1024
"""Tokens of a beginning that all prompts share, over all prompts but one: fewer are computed."""
WRITES_WITH = {FLEX: "eager", ROW_BY_ROW: "sdpa"}
"""The kernel that writes for a student that is trained with another: FlexAttention would be
compiled for each length of an answer, and SDPA has `quick_writing`."""
Written = Sequence[tuple[Row, list[int]]]
"""Held-out rows with what the student answered, token ids."""

SUMS = ("answers", "stops", "tokens", "repeated", "ngrams")


@dataclass(frozen=True)
class FreeRunning:
    """How the student's answers are drawn; ``max_tokens`` counts response tokens.

    rows_per_batch: how many are written at a time.
    """

    rows: int
    max_tokens: int
    sampling: ResolvedSampling
    seed: int
    compute_dtype: torch.dtype = torch.float32
    rows_per_batch: int = ROWS_PER_BATCH


class Prompted(Protocol):
    """A row, as far as its answer is concerned: its number, and prompt_ids [P]."""

    @property
    def row(self) -> int: ...
    @property
    def prompt_ids(self) -> np.ndarray: ...


class HeldOutPrompt(NamedTuple):
    """A held-out row that the teacher need not have answered yet."""

    row: int
    prompt_ids: np.ndarray


P = TypeVar("P", bound=Prompted)


def choose_rows(rows: Sequence[P], count: int, seed: int) -> list[P]:
    """``count`` rows with a prompt, drawn by ``seed``, the same at every evaluation, in order."""
    rows = [row for row in rows if len(row.prompt_ids)]
    if count >= len(rows):
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), size=count, replace=False)
    return [rows[i] for i in sorted(chosen)]


def repeated_ngrams(ids: Sequence[int], n: int = 4) -> tuple[int, int]:
    """(n-grams that occurred earlier in ``ids``, all n-grams)."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(ngrams) - len(set(ngrams)), len(ngrams)


def held_out_prompts(folder: RunFolder) -> list[HeldOutPrompt]:
    """What the student reads of all held-out rows, by their number."""
    table = folder.read_table(HELD_OUT_PROMPTS).combine_chunks()
    column = student_prompts(table)
    prompts = [column[i].values.to_numpy() for i in range(len(table))]
    return sorted(map(HeldOutPrompt, table["row"].to_pylist(), prompts), key=lambda row: row.row)


def write_free(
    model: Any,
    rows: Sequence[Prompted],
    settings: FreeRunning,
    device: torch.device,
    ranks: Ranks,
    together: bool = False,
) -> dict[int, list[int]]:
    """The student's answers to this rank's part of the chosen rows, by row number.

    together: the model is sharded, and gathers its layers in each pass: all ranks run as many
    passes as the one whose answers are longest.
    """
    chosen = choose_rows(rows, settings.rows, settings.seed)
    mine = chosen[ranks.rank :: ranks.world_size]
    # The first rank has the most.
    batches = -(-len(chosen[:: ranks.world_size]) // settings.rows_per_batch) if together else None
    answers = generate(model, [row.prompt_ids for row in mine], settings, device, batches)
    return {row.row: answer for row, answer in zip(mine, answers, strict=True)}


def has_all(
    written: Mapping[int, list[int]], rows: Sequence[Prompted], settings: FreeRunning, ranks: Ranks
) -> bool:
    """Whether ``written`` has this rank's part of the chosen rows."""
    chosen = choose_rows(rows, settings.rows, settings.seed)
    return all(row.row in written for row in chosen[ranks.rank :: ranks.world_size])


def run_free(
    model: Any,
    rows: Sequence[Row],
    settings: FreeRunning,
    device: torch.device,
    ranks: Ranks,
    written: Mapping[int, list[int]] | None = None,
) -> tuple[dict[str, float | None], list[tuple[Row, list[int]]]]:
    """Figures on every rank, and on rank 0 (Row, student's response ids) of all chosen rows.

    ``rows`` are all held-out rows; each rank answers every world_size-th of the chosen ones.
    written: what ``write_free`` gave for the same weights; used where it holds all of them.
    """
    chosen = choose_rows(rows, settings.rows, settings.seed)
    mine = chosen[ranks.rank :: ranks.world_size]
    if written is None or not has_all(written, rows, settings, ranks):
        written = write_free(model, rows, settings, device, ranks)
    answers = [written[row.row] for row in mine]
    sums = _sums("student", answers, settings)
    sums |= _sums("teacher", [row.response_ids.tolist() for row in mine], settings)
    gathered = ranks.gather([(row.row, answer) for row, answer in zip(mine, answers, strict=True)])
    by_row = {number: answer for part in gathered or [] for number, answer in part}
    pairs = [(row, by_row[row.row]) for row in chosen] if ranks.first else []
    return figures(ranks.sum(sums)), pairs


def figures(sums: dict[str, float]) -> dict[str, float | None]:
    """The figures from sums of both sides (``student_tokens`` and the like); None: 0 of 0."""

    def share(part: str, whole: str) -> float | None:
        return sums[part] / sums[whole] if sums[whole] else None

    return {
        "stop_rate": share("student_stops", "student_answers"),
        "length_ratio": share("student_tokens", "teacher_tokens"),
        "repeated_4gram_share": share("student_repeated", "student_ngrams"),
        "teacher_stop_rate": share("teacher_stops", "teacher_answers"),
        "teacher_repeated_4gram_share": share("teacher_repeated", "teacher_ngrams"),
        "free_running_rows": int(sums["student_answers"]),
    }


def _sums(who: str, answers: Sequence[Sequence[int]], settings: FreeRunning) -> dict[str, float]:
    """Counts of one side's answers, which are cut to ``max_tokens`` so that lengths compare."""
    sums = dict.fromkeys(SUMS, 0.0)
    stops = set(settings.sampling.stop_token_ids)
    for whole in answers:
        answer = list(whole)[: settings.max_tokens]
        repeated, ngrams = repeated_ngrams(answer)
        sums["answers"] += 1
        sums["stops"] += bool(answer) and answer[-1] in stops
        sums["tokens"] += len(answer)
        sums["repeated"] += repeated
        sums["ngrams"] += ngrams
    return {f"{who}_{name}": value for name, value in sums.items()}


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    settings: FreeRunning,
    device: torch.device,
    batches: int | None = None,
) -> list[list[int]]:
    """The student's answers to ``prompts`` ([P] each, P > 0), stop id included where it stopped.

    Prompts are padded on the left and masked by length, those of like length together. What all of
    many prompts begin with is computed once. The process's random state is left as it was:
    evaluating does not change training.

    batches: of a sharded model, how many batches all ranks write, each in passes that they run
    together; where this rank has fewer, it answers a prompt of one token and forgets the answer.
    """
    was_training, was_caching = model.training, getattr(model.config, "use_cache", True)
    # transformers fills what is not set from the model's own settings, such as a repetition penalty
    # of its folder. The teacher's answers were drawn without: so are the student's.
    own_generation, model.generation_config = model.generation_config, GenerationConfig()
    kernel = model.config._attn_implementation
    model.set_attn_implementation(WRITES_WITH.get(kernel, kernel))
    model.eval()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), _autocast(settings, device), quick_writing(device):
            torch.manual_seed(settings.seed)
            answers: list[list[int]] = [[] for _ in prompts]
            rows, order = settings.rows_per_batch, list(range(len(prompts)))
            if len(order) > rows:
                order.sort(key=lambda i: len(prompts[i]))
            beginning = None if batches else _beginning(model, prompts, device)
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                some = [prompts[i] for i in batch]
                written = _generate_batch(model, some, settings, device, beginning, bool(batches))
                for i, answer in zip(batch, written, strict=True):
                    answers[i] = answer
            for _ in range((batches or 0) - -(-len(order) // rows)):
                _generate_batch(model, [np.zeros(1, np.int32)], settings, device, None, True)
            return answers
    finally:
        model.set_attn_implementation(kernel)
        model.generation_config = own_generation
        model.config.use_cache = was_caching
        model.train(was_training)


def _beginning(
    model: Any, prompts: Sequence[np.ndarray], device: torch.device
) -> DynamicCache | None:
    """Keys and values of what all prompts begin with; None where that saves little.

    None too for a model whose cache is more than keys and values of all tokens.
    """
    shared = shared_beginning(prompts) if len(prompts) > 1 else 0
    if shared * (len(prompts) - 1) < LEAST_SAVED or getattr(model, "_is_stateful", False):
        return None
    cache = DynamicCache(config=model.config.get_text_config())
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    ids = torch.from_numpy(np.array(prompts[0][:shared], dtype=np.int64))[None]
    model.get_decoder()(input_ids=ids.to(device), past_key_values=cache, use_cache=True)
    return cache if cache.get_seq_length() == shared else None


def _generate_batch(
    model: Any,
    prompts: Sequence[np.ndarray],
    settings: FreeRunning,
    device: torch.device,
    beginning: DynamicCache | None,
    together: bool = False,
) -> list[list[int]]:
    """Answers to a batch. beginning: as `_beginning` gives it; it stays as it is. together: pass
    by pass with the other ranks, until all have theirs.
    """
    width = max(len(prompt) for prompt in prompts)
    shared = 0 if beginning is None else beginning.get_seq_length()
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # The padding stands after what is computed already.
        ids, start = torch.from_numpy(np.array(prompt, dtype=np.int64)), width - len(prompt)
        input_ids[i, :shared], input_ids[i, start + shared :] = ids[:shared], ids[shared:]
        mask[i, :shared], mask[i, start + shared :] = 1, 1
    stops = list(settings.sampling.stop_token_ids)
    past: dict[str, Any] = {}
    if beginning is not None:
        past["past_key_values"] = copy.deepcopy(beginning)
        past["past_key_values"].batch_repeat_interleave(len(prompts))
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        **past,
        generation_config=_generation_config(settings, stops),
        synced_gpus=together,  # Else a rank has as many passes as its own rows need.
    )
    return [_until_stop(ids, set(stops)) for ids in output[:, width:].tolist()]


def _autocast(settings: FreeRunning, device: torch.device) -> Any:
    """The precision the student is trained in."""
    if settings.compute_dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(device.type, dtype=settings.compute_dtype)


def _generation_config(settings: FreeRunning, stops: list[int]) -> GenerationConfig:
    sampling = settings.sampling
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": max(0, sampling.top_k),
            "min_p": sampling.min_p or None,
        }
    return GenerationConfig(
        max_new_tokens=settings.max_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
        **drawn,
    )


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """``ids`` up to and including the first stop id; what follows is padding."""
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return ids


GROUP_ROWS = 8


def score_answers(run: Run, written: Written) -> list[Row]:
    """What the student wrote as rows with the teacher's ``topk`` signal (evaluation.top_k).

    Empty answers, and such as the teacher cannot read, are left out. Raises RunError as
    `TeacherCalls` does.
    """
    config = run.config
    wanted = held_out_signal(config)
    calls = TeacherCalls(run.app, wanted, config.stream.max_attempts, run.coordinator)
    prompts_of = teacher_prompts(run)
    written = [(row, ids) for row, ids in written if ids]
    groups = [written[i : i + GROUP_ROWS] for i in range(0, len(written), GROUP_ROWS)]

    async def score_all() -> list[pa.Table]:
        return await asyncio.gather(*(_score(calls, group, prompts_of) for group in groups))

    rows = [row for table in asyncio.run(score_all()) for row in rows_from_table(table)]
    return rows


def teacher_prompts(run: Run) -> Callable[[Row], np.ndarray]:
    """What the teacher reads before its answer to a held-out row, int32 [P]."""
    if not run.config.prompts.teacher_sees_more:
        return lambda row: row.prompt_ids
    prompts = run.folder.read_table(HELD_OUT_PROMPTS, ["prompt_ids"])["prompt_ids"]
    return lambda row: prompts[row.row].values.to_numpy()


async def _score(
    calls: TeacherCalls, group: Written, prompts_of: Callable[[Row], np.ndarray]
) -> pa.Table:
    prompts = pa.array([prompts_of(row) for row, _ in group], TOKEN_IDS)
    responses = pa.array([np.array(ids, np.int32) for _, ids in group], TOKEN_IDS)
    numbers = pa.array([row.row for row, _ in group], pa.int64())
    scored = await calls.score(prompts, responses)
    require_none_fatal(scored)
    usable = pc.is_null(scored["error"])
    own = pa.array([row.prompt_ids for row, _ in group], TOKEN_IDS)
    table = scored.append_column("prompt_ids", own)
    for name in ("row", "position"):
        table = table.append_column(name, numbers)
    return table.filter(usable).combine_chunks()
