"""What a student worker needs of a GPU's memory, and whether the GPU has it.

From the run file and the headers of weight files: no weights, no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raystill.base.errors import Problem
from raystill.cluster.check.ahead.teacher_memory import unknown_gpu
from raystill.config.run import RunConfig
from raystill.config.student import StudentConfig
from raystill.config.training import TrainingConfig
from raystill.datasets.prompts.tables import PromptTables
from raystill.model.adapters import trained_numbers
from raystill.model.files import ModelFolder
from raystill.model.head import read_header, stored_tensors
from raystill.model.sizes import Sizes
from raystill.model.weights import size_of
from raystill.placement import memory


def check_memory(
    config: RunConfig, student: ModelFolder, tables: PromptTables
) -> tuple[list[Problem], list[str]]:
    """What a student worker needs on a GPU and has there, where it is to have one."""
    training = config.training
    if training.gpus_per_worker == 0:
        return [], []
    if not training.gpus_per_worker and training.accelerator_type is None:
        return [], []
    if (found := student_sizes(config, student)) is None:
        return [], []
    parts, decoder = found
    workers = training.min_workers
    tokens = pass_tokens(config, tables)
    needed = memory.need(training, parts, decoder, workers=workers, tokens=tokens)
    told = f"a student worker needs about {memory.describe(needed)} for passes of {tokens:,} tokens"
    kind = training.accelerator_type
    if kind is None:
        return [], [f"{told}; set training.accelerator_type to have it compared with the GPU's"]
    has = memory.GPU_BYTES.get(kind)
    if has is None:
        return [], [f"{told}; {unknown_gpu('training.accelerator_type', kind)}"]
    has *= min(1.0, training.gpus_per_worker or 1.0)
    whole = config.student.chosen_by_run and size_of(student.path).get("bytes")
    more: list[str] = []
    if whole and whole > has:
        room = f"{whole / 1e9:.0f} GB of weights, but {kind} has {has / 1e9:.0f} GB"
        if config.student.narrowed:
            message = (
                "widths are chosen with the whole teacher on the first worker's GPU: "
                f"{room}; leave hidden_size, ffn_size and num_heads out"
            )
            return [Problem("student", message)], []
        more.append(f"the teacher is judged one layer at a time, which takes longer: {room}")
    more += _written_together(training, parts, needed, has, config)
    longest = memory.longest_pass(training, parts, decoder, workers=workers, has=has)
    if needed.device <= has:
        enough = f"{told}; {kind} has {has / 1e9:.0f} GB, enough for {longest:,} tokens"
        return [], [enough, *more]
    fits = f"tokens_per_micro_batch and rows of at most {longest:,} tokens" if longest >= 64 else ""
    others = memory.remedies(training, parts, decoder, workers=workers, tokens=tokens, has=has)
    remedy = "; or ".join([text for text in (*others, fits) if text]) or "a smaller student"
    problem = f"{told}, but {kind} has {has / 1e9:.0f} GB; possible: {remedy}"
    return [Problem("training", problem)], []


def _written_together(
    training: TrainingConfig,
    parts: memory.Parts,
    needed: memory.Need,
    has: float,
    config: RunConfig,
) -> list[str]:
    """Where a worker has no room for all weights, with which it would write answers alone."""
    evaluation = config.evaluation
    if not evaluation.enabled or not evaluation.free_running.rows or not needed.gathered:
        return []
    whole = memory.gathered_whole(training, parts)
    kept = needed.weights + needed.gradients + needed.optimizer + needed.reserve
    if training.strategy != "fsdp" or training.min_workers == 1 or kept + whole <= has:
        return []
    return [
        f"the student writes its own answers sharded, {whole / 1e9:.0f} GB gathered for each token "
        "of a batch; evaluation.free_running.rows: 0 leaves them out"
    ]


def pass_tokens(config: RunConfig, tables: PromptTables) -> int:
    """Tokens of the largest forward pass."""
    row = tables.longest_prompt_tokens + config.max_response_tokens
    return max(config.training.tokens_per_micro_batch, row)


def student_sizes(
    config: RunConfig, student: ModelFolder
) -> tuple[memory.Parts, memory.Decoder] | None:
    """Of the student, by the headers of its files; None where they are not here or do not say."""
    kept = None
    if config.student.init == "from_teacher":
        kept = config.student.kept_layers(student.num_layers or 0)
    sizes = student.config
    files = sorted({file for file in stored_tensors(student.path).values() if file.exists()})
    headers = [read_header(file) for file in files]
    shapes = [(name, entry["shape"]) for header in headers for name, entry in header.items()]
    if config.student.narrowed and (narrow := _narrowed(config.student, student.config)):
        whole, few = narrow
        shapes = [(name, whole.reshaped(name, shape, few)) for name, shape in shapes]
        sizes = {**sizes, **few.config()}
    decoder = memory.Decoder.of(sizes)
    if decoder is None or not shapes or student.vocab_size is None:
        return None
    parts = memory.Parts.of(shapes, student.vocab_size * decoder.hidden, kept)
    if (lora := config.student.lora) is not None:
        trained = trained_numbers(student, lora, kept)
        stored = {str(entry["dtype"]) for header in headers for entry in header.values()}
        base = 2 if stored <= {"BF16", "F16"} else 4
        if lora.base_dtype != "auto":
            base = memory.WIDTHS[lora.base_dtype]
        parts = replace(parts, adapters=memory.Adapters(trained or 0, base))
    return parts, decoder


def _narrowed(student: StudentConfig, teacher: Mapping[str, Any]) -> tuple[Sizes, Sizes] | None:
    """The teacher's sizes and the student's; None where the teacher's are not named."""
    try:
        sizes = Sizes.of(teacher)
    except ValueError:  # `_check_widths` says so.
        return None
    return sizes, sizes.narrowed(student.hidden_size, student.ffn_size, student.num_heads)
