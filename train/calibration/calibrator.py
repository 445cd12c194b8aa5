"""`Calibrator`: compares signals, with the rows, the teacher's head and a student.

`cluster.commands.calibrators` places one on each student worker's resources. All of them together
hold one student: sharded, whatever ``training.strategy`` is, and whole for a single one. Each has
all sampled positions. ``load`` and what follows it are collective; rank 0 gives the figures.
Imports no Ray.
"""

import os
import platform
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from raystill.base.errors import RunError
from raystill.config.objective import ObjectiveConfig
from raystill.config.run import RunConfig
from raystill.config.training import TrainingConfig
from raystill.datasets.rows.answers import answers_table
from raystill.datasets.rows.signal import Signal
from raystill.model.on_node import ModelSource
from raystill.train.batch.batch import signal_column
from raystill.train.batch.rows import rows_from_table
from raystill.train.calibration import compare
from raystill.train.calibration.cost import bytes_per_token
from raystill.train.calibration.positions import Positions, read_positions, sample_positions
from raystill.train.loss.teacher_head import TeacherHead, read_teacher_head
from raystill.train.start.cut import layer_list
from raystill.train.start.precision import cast_weights
from raystill.train.start.shape import Shape, choose_shape
from raystill.train.start.texts import Texts
from raystill.train.step.ranks import Ranks
from raystill.train.student.build import Outline, build_student, num_classes, read_by_one_rank
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import gathering_passes, place_student

POSITIONS_PER_ROW = 16
"""Most positions of one answer.

Tokens of one answer are alike, so few of each say more. Fewer would need more rows, and each row is
a forward pass of the whole student.
"""
CHOICE_ROWS = 16
"""Answers on which a student is cut out of the teacher, where the run file leaves that open."""
PLACED = TrainingConfig(strategy="fsdp", compute_dtype="float32", packing=False)
"""How the student is placed: in float32, since gradients that differ little are compared."""


class Calibrator:
    """Compares signals in float32 on the answers of one teacher. Call ``load`` first."""

    def __init__(
        self,
        config: RunConfig,
        teacher: ModelSource,
        rows: pa.Table,
        num_positions: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Take the answers and sample ``num_positions`` of them.

        rows: a table of `datasets.rows.schema.row_schema` with the ``hidden`` signal, the same on
        all ranks.
        """
        on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._ranks = ranks or Ranks()
        if not on_gpu:  # Ray sets OMP_NUM_THREADS to the actor's CPUs, which is 1 by default.
            torch.set_num_threads(self._cores())
        again = {"activation_checkpointing": config.training.activation_checkpointing}
        self._config = config.model_copy(update={"training": PLACED.model_copy(update=again)})
        self._tokens_budget = config.training.tokens_per_micro_batch
        self._source = teacher
        reads = self._ranks.first or not read_by_one_rank(self._config, self._ranks.world_size)
        cut = reads and config.student.init == "from_teacher"
        keep = None if config.student.chosen_by_run else config.student.kept_layers
        self._teacher_folder = teacher.on_this_node("all" if cut else "head", keep)
        seed = config.section_seeds()["evaluation"]
        self._sampled = sample_positions(
            rows_from_table(rows.combine_chunks()), num_positions, POSITIONS_PER_ROW, seed
        )
        self._module: StudentModule
        self._teacher: TeacherHead
        self._positions: Positions
        self._hidden: torch.Tensor | None

    def load(self, folder: str | None) -> int:
        """Load the student in ``folder``; None: the run file's untrained one. Collective.

        Returns its number of parameters. Raises RunError if the teacher's head does not give the
        log probabilities that its engine gave.
        """
        config, device = self._config, self._device
        self._module = self._place(folder)
        self._module.eval()  # With dropout each signal would be compared on another student.
        if config.training.activation_checkpointing:
            recompute_in_eval(self._module.model)
        vocab = num_classes(self._module.model, self._teacher_folder)
        self._teacher = read_teacher_head(
            self._teacher_folder, vocab, device=device, engine_dtype=config.teacher.dtype
        )
        self._require_agreement()
        head, width = self._teacher, self._teacher.hidden_size
        more = [config.signal.top_k] if config.signal.kind == "topk" else []
        signals = compare.signals_to_compare(len(head.weight), width, more)
        self._positions = read_positions(self._sampled, head, signals, self._tokens_budget, vocab)
        self._hidden = compare.hidden_states(self._module, self._positions, self._ranks)
        return sum(p.numel() for p in self._module.parameters())

    def _place(self, folder: str | None) -> StudentModule:
        """The student on its device: whole, or this rank's shards of it."""
        ranks = self._ranks
        by_one = read_by_one_rank(self._config, ranks.world_size)
        model: Any = None
        if ranks.first or not by_one:
            model = cast_weights(self._read(folder), torch.float32)
        if by_one:
            outline = ranks.from_first(model and Outline.of(model))
            model = model or outline.hollow()
        return place_student(model, self._config.training, self._device, ranks.world_size, by_one)

    def _read(self, folder: str | None) -> Any:
        config = self._config
        if folder is None:
            seed = config.section_seeds()["student"]
            rest = partial(self._source.on_this_node, "all")
            folder = self._teacher_folder
            return build_student(config, folder, seed, self._choose_shape, rest=rest)
        trust = config.student.trust_remote_code or config.teacher.trust_remote_code
        return AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust, use_safetensors=True
        )

    def _cores(self) -> int:
        """Of this process: its node's, shared with the other ranks there."""
        names = self._ranks.from_first(self._ranks.gather(platform.node()))
        return max(1, len(os.sched_getaffinity(0)) // names.count(platform.node()))

    def _choose_shape(self, model: nn.Module) -> Shape:
        """What to keep where the run file leaves it to the run, by the teacher's answers."""
        rows = list({id(one.row): one.row for one in self._sampled}.values())[:CHOICE_ROWS]
        texts = Texts.of([r.prompt_ids for r in rows], [r.response_ids for r in rows])
        return choose_shape(self._config.student, model.float().eval(), texts).shape

    def describe(self) -> dict[str, Any]:
        """Return the numbers of positions and rows, and figures of each signal. Not collective.

        bytes_per_token: in the teacher store. teacher_mass: the teacher's probability of the ids
        that the signal names, mean over positions; None for ``text``.
        """
        positions = self._positions
        return {
            "positions": positions.tokens.num_tokens,
            "rows": len(positions.lengths),
            "signals": {
                str(signal): {
                    "kind": signal.kind,
                    "width": signal.width,
                    "bytes_per_token": self._bytes(signal),
                    "teacher_mass": self._teacher_mass(signal),
                }
                for signal in positions.partitions
            },
        }

    def compare(self, objective: ObjectiveConfig) -> dict[str, Any]:
        """Return the full signal's loss, nats per token, and figures of each signal. Collective.

        loss_ratio: the signal's loss by the full one. cosine_logits, cosine_parameters: of the
        signal's gradient with the full one. student_mass: as in `OnLogits`. Empty on all ranks but
        the first.
        """
        inputs = (self._positions, objective, self._teacher)
        logits = {}
        with gathering_passes(self._module):
            if self._hidden is not None:
                logits = compare.compare_logits(self._hidden, self._module.head(), *inputs)
        parameters = compare.compare_parameters(self._module, *inputs, self._ranks)
        if not logits:
            return {}
        (full,) = (figures.loss for signal, figures in logits.items() if signal.kind == "hidden")
        return {
            "full_loss": full,
            "signals": {
                str(signal): {
                    "loss_ratio": figures.loss / full if signal.kind != "text" and full else None,
                    "cosine_logits": figures.cosine,
                    "cosine_parameters": parameters[signal],
                    "student_mass": figures.student_mass,
                }
                for signal, figures in logits.items()
            },
        }

    def costs(self, objective: ObjectiveConfig) -> dict[str, Any]:
        """Return time and memory of each signal's loss over all positions. Collective.

        Empty on all ranks but the first.
        """
        with gathering_passes(self._module):
            if self._hidden is None:
                return {}
            costs = compare.loss_costs(
                self._hidden, self._module.head(), self._positions, objective, self._teacher
            )
        return {str(signal): cost._asdict() for signal, cost in costs.items()}

    def _require_agreement(self) -> None:
        """Raise RunError if head and hidden states do not give the engine's log probabilities."""
        rows = [sampled.row for sampled in self._sampled]
        hidden = signal_column(rows, "hidden").view(torch.bfloat16).to(self._device)
        drawn = torch.cat([torch.from_numpy(r.response_ids[-r.num_targets :]) for r in rows])
        logprobs = signal_column(rows, "sampled_logprobs").to(self._device)
        gap = self._teacher.mean_gap(hidden, drawn.long().to(self._device), logprobs)
        self._teacher.require_agreement(gap)

    def _bytes(self, signal: Signal) -> float:
        answers = self._positions.answers(signal)
        return bytes_per_token(answers_table(answers, signal), signal)

    def _teacher_mass(self, signal: Signal) -> float | None:
        truncated = self._positions.truncated
        if signal.kind == "sampled":
            return truncated.drawn.exp().mean().item()
        if signal.kind == "topk":
            return truncated.topk[signal.width].logprobs.exp().sum(dim=1).mean().item()
        return 1.0 if signal.kind == "hidden" else None


def recompute_in_eval(model: Any) -> bool:
    """Has the layers of a model in eval mode compute their activations again; whether they do.

    transformers does so in training mode only. The mode of a layer itself, and not of what is in
    it, is changed: nothing is dropped. A model with a dropout of its own stays as it is.
    """
    settings = model.config.get_text_config().to_dict()
    if any(value for name, value in settings.items() if "drop" in name and value):
        return False
    for layer in layer_list(model)[2]:
        layer.training = True
    return True


def require_answers(rows: pa.Table, num_prompts: int) -> None:
    """Raise RunError if no prompt was answered."""
    if len(rows) == 0:
        raise RunError(
            f"the teacher answered none of {num_prompts} prompts, so there is nothing to compare "
            "signals on; see the teacher's log files, or choose other prompts"
        )
