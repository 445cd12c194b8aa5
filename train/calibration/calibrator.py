"""`Calibrator`: compares signals in one process, with the rows, the teacher's head and a student.

`cluster.commands.calibrate` makes it an actor with the resources of a student worker. It calls
``load`` for each student and ``compare`` for each objective, and gets a few figures back. Imports
no Ray.
"""

import os
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from raystill.base.errors import RunError
from raystill.config.objective import ObjectiveConfig
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import answers_table
from raystill.datasets.rows.signal import Signal
from raystill.model.on_node import ModelSource
from raystill.train.batch.batch import signal_column
from raystill.train.batch.rows import rows_from_table
from raystill.train.calibration import compare
from raystill.train.calibration.cost import bytes_per_token
from raystill.train.calibration.positions import Positions, read_positions, sample_positions
from raystill.train.loss.teacher_head import TeacherHead, read_teacher_head
from raystill.train.start.shape import Shape, choose_shape
from raystill.train.start.texts import Texts
from raystill.train.student.build import build_student, num_classes
from raystill.train.student.module import StudentModule

POSITIONS_PER_ROW = 16
"""Most positions of one answer.

Tokens of one answer are alike, so few of each say more. Fewer would need more rows, and each row is
a forward pass of the whole student.
"""
CHOICE_ROWS = 16
"""Answers on which a student is cut out of the teacher, where the run file leaves that open."""


class Calibrator:
    """Compares signals in float32 on the answers of one teacher. Call ``load`` first."""

    def __init__(
        self, config: RunConfig, teacher: ModelSource, rows: pa.Table, num_positions: int
    ) -> None:
        """Take the answers and sample ``num_positions`` of them.

        rows: a table of `datasets.rows.schema.row_schema` with the ``hidden`` signal.
        """
        on_gpu = torch.cuda.is_available()
        if not on_gpu:  # Ray sets OMP_NUM_THREADS to the actor's CPUs, which is 1 by default.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._config = config
        self._teacher_folder = teacher.on_this_node(
            "all" if config.student.init == "from_teacher" else "head"
        )
        seed = config.section_seeds()["evaluation"]
        self._sampled = sample_positions(
            rows_from_table(rows.combine_chunks()), num_positions, POSITIONS_PER_ROW, seed
        )
        self._module: StudentModule
        self._teacher: TeacherHead
        self._positions: Positions
        self._hidden: torch.Tensor

    def load(self, folder: str | None) -> int:
        """Load the student in ``folder``; None: the run file's untrained one.

        Returns its number of parameters. Raises RunError if the teacher's head does not give the
        log probabilities that its engine gave.
        """
        config, device = self._config, self._device
        if folder is None:
            seed = config.section_seeds()["student"]
            model = build_student(config, self._teacher_folder, seed, self._choose_shape)
        else:
            trust = config.student.trust_remote_code or config.teacher.trust_remote_code
            model = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=trust, use_safetensors=True
            )
        self._module = StudentModule(model.to(device, torch.float32))
        self._module.eval()  # With dropout each signal would be compared on another student.
        vocab = num_classes(model, self._teacher_folder)
        self._teacher = read_teacher_head(
            self._teacher_folder, vocab, device=device, engine_dtype=config.teacher.dtype
        )
        self._require_agreement()
        head, width = self._teacher, self._teacher.hidden_size
        more = [config.signal.top_k] if config.signal.kind == "topk" else []
        signals = compare.signals_to_compare(len(head.weight), width, more)
        budget = config.training.tokens_per_micro_batch
        self._positions = read_positions(self._sampled, head, signals, budget, vocab)
        self._hidden = compare.hidden_states(self._module, self._positions)
        return sum(p.numel() for p in self._module.parameters())

    def _choose_shape(self, model: nn.Module) -> Shape:
        """What to keep where the run file leaves it to the run, by the teacher's answers."""
        rows = list({id(one.row): one.row for one in self._sampled}.values())[:CHOICE_ROWS]
        texts = Texts.of([r.prompt_ids for r in rows], [r.response_ids for r in rows])
        return choose_shape(self._config.student, model.float().eval(), texts).shape

    def describe(self) -> dict[str, Any]:
        """Return the numbers of positions and rows, and figures of each signal.

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
        """Return the full signal's loss, nats per token, and figures of each signal.

        loss_ratio: the signal's loss by the full one. cosine_logits, cosine_parameters: of the
        signal's gradient with the full one. student_mass: as in `OnLogits`.
        """
        inputs = (self._positions, objective, self._teacher)
        logits = compare.compare_logits(self._hidden, self._module.head(), *inputs)
        parameters = compare.compare_parameters(self._module, *inputs)
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
        """Return time and memory of each signal's loss over all positions."""
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


def require_answers(rows: pa.Table, num_prompts: int) -> None:
    """Raise RunError if no prompt was answered."""
    if len(rows) == 0:
        raise RunError(
            f"the teacher answered none of {num_prompts} prompts, so there is nothing to compare "
            "signals on; see the teacher's log files, or choose other prompts"
        )
