"""The teacher's output head at the student's worker: from its hidden states to its logits.

A ``hidden`` signal carries what the teacher's head was given (the state after the final norm), in
bfloat16; each worker holds the head, read once from the teacher's folder, and `hidden_objective`
rebuilds the logits of some tokens at a time. No other tensor of the teacher is read.

Legend: N response tokens, D the teacher's hidden size, V rows of its head.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.model.files import ModelFolder
from raystill.model.head import StoredTensor, find_head, logit_transform
from raystill.train.loss.head_loss import OutputHead
from raystill.train.loss.log_probs import sum_dtype

MOST_GAP = {"float32": 0.02, "auto": 0.2, "bfloat16": 0.2, "float16": 0.2}
"""Mean |rebuilt - stored| log probability of drawn tokens that precision explains, nats, by the
engine's ``teacher.dtype``. Measured with SmolLM2-135M on 1,023 tokens: 0.005 for a float32 teacher,
whose states the signal rounds to bfloat16; 0.025 for a bfloat16 one, which rounds its logits too.
Logits scaled by 1.1 give 0.2 and by 2 give 2.2, states from before the final norm 8.5."""

FEWEST_TOKENS = 16
"""Fewer tokens are taken for so many: a single one's rounding can be ten times the mean."""


@dataclass(frozen=True, kw_only=True)
class TeacherHead(OutputHead):
    """The head, and which of its rows the student is compared on.

    num_classes: ids below it are outcomes of their own: both heads have them and the tokenizer
    names them. Further rows of either head (padding) are one outcome together. name: the folder,
    for messages; most_gap: see `require_agreement`.
    """

    num_classes: int
    name: str = "the teacher"
    most_gap: float = MOST_GAP["auto"]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.weight.shape[1]

    @torch.no_grad()
    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden W^T [n, V] in the compute precision, without bias, scale and cap.

        hidden [n, D] in bfloat16; ``out`` is memory to use.
        """
        self._require_size(hidden)
        return torch.mm(hidden.to(self.weight.dtype), self.weight.T, out=out)

    def mean_gap(self, hidden: Tensor, drawn: Tensor, logprobs: Tensor) -> float:
        """Mean |rebuilt - stored| log probability, nats, of the drawn tokens.

        hidden bfloat16 [N, D]; drawn int64 [N] token ids; logprobs [N] as the engine gave them, NaN
        where it gave none (answers that were scored for their states): those are left out.
        """
        self._require_size(hidden)
        known = ~logprobs.isnan()
        hidden, drawn, logprobs = hidden[known], drawn[known], logprobs[known]
        gaps = [logprobs.new_zeros(0)]
        for rows, z in self.logit_chunks(hidden):
            rebuilt = torch.log_softmax(z, dim=1).gather(1, drawn[rows, None]).squeeze(1)
            gaps.append((rebuilt - logprobs[rows].to(z.dtype)).abs())
        return torch.cat(gaps).sum().item() / max(FEWEST_TOKENS, len(hidden))

    def require_agreement(self, gap: float) -> None:
        """RunError where the states and this head cannot be of the model that answered.

        gap: the largest `mean_gap` of all ranks, so that all of them go on or none does.
        """
        if not gap <= self.most_gap:
            raise RunError(
                f"the log probabilities of the drawn tokens, rebuilt from the hidden states with "
                f"the output head in {self.name}, differ from those that the teacher's engine gave "
                f"by {gap:.3g} nats on average; expected at most {self.most_gap}: the folder is "
                "not the model that answered, or it scales its logits in a way that is not known "
                "here; correct teacher.model, or set signal.kind: topk"
            )

    def _require_size(self, hidden: Tensor) -> None:
        if hidden.shape[1] != self.hidden_size:
            raise RunError(
                f"the signal's hidden states have {hidden.shape[1]} components, but the output "
                f"head in {self.name} takes {self.hidden_size}; correct teacher.model"
            )


def head_of_signal(
    config: RunConfig,
    folder: str,
    student_vocab: int,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> TeacherHead | None:
    """The head that the run's signal needs: None unless its kind is ``hidden``. Raises RunError."""
    if config.signal.kind != "hidden":
        return None
    try:
        return read_teacher_head(folder, student_vocab, compute_dtype, device, config.teacher.dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"the teacher's output head cannot be read: {error}") from error


def read_teacher_head(
    folder: str | Path,
    student_vocab: int,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    engine_dtype: str = "auto",
) -> TeacherHead:
    """The head of the model in ``folder``, in the precision of the student's matrix products.

    student_vocab as in `batch.collate`; engine_dtype is ``teacher.dtype``. Raises ValueError where
    the folder has no plain head, or it does not fit its own configuration.
    """
    model = ModelFolder(str(folder), Path(folder))
    tensors = find_head(model)
    weight = _read(tensors.weight).to(device, compute_dtype)
    bias = None
    if tensors.bias is not None:
        bias = _read(tensors.bias).to(device, sum_dtype(compute_dtype))
    return TeacherHead(
        weight,
        bias,
        logit_transform(model.config),
        compute_dtype,
        num_classes=min(student_vocab, len(weight)),
        name=str(folder),
        most_gap=MOST_GAP[engine_dtype],
    )


def _read(tensor: StoredTensor) -> Tensor:
    """One tensor, without reading the others of its file."""
    with safe_open(tensor.file, framework="pt") as file:
        return file.get_tensor(tensor.name)
