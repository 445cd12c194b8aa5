"""The layers that a run's student keeps, where the run file leaves the choice to the run.

Rank 0 chooses once, on a few training prompts that the plain teacher answers, and writes
``layers.json``. Later starts and the other ranks keep the same layers.
"""

import json
import logging

import numpy as np
import torch
from torch import nn

from raystill.base.run_folder import LAYERS, TRAIN_PROMPTS
from raystill.config.student import LayerChoice
from raystill.model.sampling import resolve_sampling
from raystill.run import Run
from raystill.train.evaluation.free_running import FreeRunning, generate
from raystill.train.step.ranks import Ranks
from raystill.train.student.importance import ChosenLayers, Texts, choose_layers

logger = logging.getLogger(__name__)

NUM_PROMPTS = 6
PROMPT_TOKENS, ANSWER_TOKENS = 256, 32
"""Longest prompt that is used, and tokens that the teacher writes to each."""


def run_layers(
    run: Run, teacher_folder: str, ranks: Ranks, device: torch.device, model: nn.Module
) -> list[int]:
    """Layers of ``model``, the whole teacher, to keep; the same at every start. Collective."""
    layers: list[int] | None = None
    if ranks.first:
        if run.folder.exists(LAYERS):
            layers = json.loads(run.folder.read_text(LAYERS))["layers"]
        else:
            layers = _choose(run, teacher_folder, device, model)
    return ranks.from_first(layers)


def _choose(run: Run, teacher_folder: str, device: torch.device, model: nn.Module) -> list[int]:
    choice = run.config.student.layers
    assert isinstance(choice, LayerChoice), "the run file names the layers"
    was_training = model.training
    model.to(device).eval()
    prompts = _some_prompts(run)
    settings = FreeRunning(
        rows=len(prompts),
        max_tokens=ANSWER_TOKENS,
        sampling=resolve_sampling(run.config.teacher, teacher_folder),
        seed=run.config.section_seeds()["student"],
        compute_dtype=torch.float32,
    )
    answers = [np.array(ids, np.int64) for ids in generate(model, prompts, settings, device)]
    texts = Texts.of(prompts, answers).to(device)
    chosen = choose_layers(model, texts, choice.keep, search=choice.by == "importance")
    model.to("cpu").train(was_training)
    _record(run, choice, chosen)
    return chosen.layers


def _some_prompts(run: Run) -> list[np.ndarray]:
    """A few of the training prompts, int32 [P] each, drawn by the run's seed."""
    table = run.folder.read_table(TRAIN_PROMPTS, columns=["prompt_ids"])
    order = np.random.default_rng(run.config.section_seeds()["student"]).permutation(len(table))
    column, prompts = table["prompt_ids"], []
    for row in order:
        ids = column[int(row)].values.to_numpy()
        if 0 < len(ids) <= PROMPT_TOKENS:
            prompts.append(ids)
        if len(prompts) == NUM_PROMPTS:
            break
    if not prompts:
        return [column[int(row)].values.to_numpy()[:PROMPT_TOKENS] for row in order[:NUM_PROMPTS]]
    return prompts


def _record(run: Run, choice: LayerChoice, chosen: ChosenLayers) -> None:
    record = {
        "layers": chosen.layers,
        "by": choice.by,
        "kl_nats_per_token": chosen.kl,
        "influence": chosen.influence,
    }
    run.folder.write_text(LAYERS, json.dumps(record, indent=2) + "\n")
    logger.info("keeps the teacher's layers %s", chosen.layers)
