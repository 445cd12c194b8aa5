"""What a run's student keeps of its teacher, where the run file leaves the choice to the run.

Rank 0 chooses layers and widths once, on a few training prompts that the plain teacher answers, and
writes ``layers.json``. Later starts and the other ranks keep the same.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raystill.base.run_folder import LAYERS, TRAIN_PROMPTS
from raystill.config.student import StudentConfig
from raystill.model.files import ModelFolder
from raystill.model.on_node import Keep, ModelSource, student_needs
from raystill.model.sampling import resolve_sampling
from raystill.run import Run
from raystill.train.evaluation.free_running import FreeRunning, generate
from raystill.train.start.shape import (
    NUM_JUDGED,
    Chosen,
    Shape,
    choose_shape,
    record_shape,
    recorded_shape,
)
from raystill.train.start.streamed import fits_whole, one_layer_at_a_time, whole_on
from raystill.train.start.texts import Texts
from raystill.train.step.ranks import Ranks
from raystill.train.student import build
from raystill.train.student.export import Base
from raystill.train.student.module import cpu_has_bfloat16

logger = logging.getLogger(__name__)

PROMPT_TOKENS, ANSWER_TOKENS = 256, 32
"""Longest prompt that is used, and tokens that the teacher writes to each."""
REFIT_PROMPTS, REFIT_TOKENS = 128, 16
"""Prompts, and tokens of each answer, where weights are fitted to what the teacher does on them.
Many prompts with short answers fit better than few with long ones (docs/decisions.md)."""
ROWS_PER_BATCH = 64
"""Prompts that the teacher answers at a time; they are short."""


def run_shape(
    run: Run, teacher_folder: str, ranks: Ranks, device: torch.device, model: nn.Module
) -> Shape:
    """What to keep of ``model``, the whole teacher; the same at every start. Collective."""
    if ranks.first and not run.folder.exists(LAYERS):
        _choose(run, teacher_folder, device, model)
    ranks.from_first(None)  # The others read what the first one has recorded.
    return recorded_shape(run.folder)


def known_shape(run: Run, ranks: Ranks) -> Shape | None:
    """What an earlier start has chosen; None where there is none, or no choice. Collective."""
    if not run.config.student.chosen_by_run:
        return None
    recorded = ranks.from_first(run.folder.exists(LAYERS) if ranks.first else None)
    return recorded_shape(run.folder) if recorded else None


def read_student(run: Run, ranks: Ranks, device: torch.device) -> tuple[nn.Module | None, str]:
    """The untrained student on the host, and a folder here with the teacher's files. Collective.

    None where rank 0 alone reads the student. Where the run file leaves a choice to the run, rank 0
    alone reads the whole teacher, and the others what it has chosen.
    """
    config, teacher = run.config, run.teacher
    known = known_shape(run, ranks)
    by_one = build.read_by_one_rank(config, ranks.world_size)
    if not ranks.first and by_one:
        return None, teacher.on_this_node(student_needs(config, reads=False))
    if not ranks.first and known is None and config.student.chosen_by_run:
        ranks.from_first(None)  # As `run_shape` does on rank 0.
        known = recorded_shape(run.folder)
    folder = teacher.on_this_node(student_needs(config), kept(config.student, known))
    choose = partial(run_shape, run, folder, Ranks() if by_one else ranks, device)
    seed, rest = config.section_seeds()["student"], partial(teacher.on_this_node, "all")
    return build.build_student(config, folder, seed, choose, known, rest), folder


def kept(student: StudentConfig, known: Shape | None) -> Keep | None:
    """The teacher's layers that are read; None: all."""
    if known is not None:
        return known.kept_layers
    return None if student.chosen_by_run else student.kept_layers


def base_of(student: StudentConfig, teacher: ModelSource, teacher_folder: str) -> Base:
    """The model that the student's adapters belong to, by a name that others can load it by.

    teacher_folder: on this node.
    """
    if student.model is not None:
        return Base(student.model, student.revision)
    number = ModelFolder(teacher.name, Path(teacher_folder)).num_layers or 0
    if student.narrowed or student.kept_layers(number) != list(range(number)):
        return Base(None)
    downloaded = teacher.commit is not None
    return Base(teacher.name if downloaded else teacher.folder, teacher.commit)


def _choose(run: Run, teacher_folder: str, device: torch.device, model: nn.Module) -> None:
    was_training, student = model.training, run.config.student
    model.eval()
    # Widths are chosen by weights of all layers too.
    whole = fits_whole(model, device) or student.narrowed
    if not whole:
        logger.info("the teacher is judged one layer at a time: %s has no room for it", device)
    with (whole_on if whole else one_layer_at_a_time)(model, device), float32_on_cpu(model, device):
        chosen = _judge(run, teacher_folder, device, model)
    model.train(was_training)
    record_shape(run.folder, chosen, run.config.student.layers)
    logger.info("keeps the teacher's layers %s", chosen.shape.layers)
    for number, fit in chosen.fits.items():
        before, after = fit.error_before, fit.error_after
        logger.info("layer %d fitted: error of its stream %.3f to %.3f", number, before, after)


def _judge(run: Run, teacher_folder: str, device: torch.device, model: nn.Module) -> Chosen:
    student = run.config.student
    count, tokens = NUM_JUDGED, ANSWER_TOKENS
    if student.refit:
        count, tokens = REFIT_PROMPTS, REFIT_TOKENS
    prompts = _some_prompts(run, count)
    settings = FreeRunning(
        rows=len(prompts),
        max_tokens=tokens,
        sampling=resolve_sampling(run.config.teacher, teacher_folder),
        seed=run.config.section_seeds()["student"],
        compute_dtype=torch.float32,
        rows_per_batch=ROWS_PER_BATCH,
    )
    answers = [np.array(ids, np.int64) for ids in generate(model, prompts, settings, device)]
    return choose_shape(student, model, Texts.of(prompts, answers).to(device))


@contextmanager
def float32_on_cpu(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Weights in float32 while a CPU runs the model; afterwards in their own dtypes, unchanged.

    A CPU without bfloat16 instructions takes about six times as long in bfloat16. One that has them
    runs the weights as they are.
    """
    if device.type != "cpu" or cpu_has_bfloat16():
        yield
        return
    own = [(tensor, tensor.dtype) for tensor in model.parameters() if tensor.is_floating_point()]
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    model.float()
    try:
        yield
    finally:
        for tensor, dtype in own:
            tensor.data = tensor.data.to(dtype)
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer)


def _some_prompts(run: Run, count: int) -> list[np.ndarray]:
    """So many of the training prompts, int32 [P] each, drawn by the run's seed."""
    table = run.folder.read_table(TRAIN_PROMPTS, columns=["prompt_ids"])
    order = np.random.default_rng(run.config.section_seeds()["student"]).permutation(len(table))
    column, prompts = table["prompt_ids"], []
    for row in order:
        ids = column[int(row)].values.to_numpy()
        if 0 < len(ids) <= PROMPT_TOKENS:
            prompts.append(ids)
        if len(prompts) == count:
            break
    if not prompts:
        return [column[int(row)].values.to_numpy()[:PROMPT_TOKENS] for row in order[:count]]
    return prompts
