"""The teacher's output head on a student worker: it turns stored hidden states into logits.

A ``hidden`` signal is the input of the teacher's head, the state after the final norm, in bfloat16.
Each worker reads the head once from the teacher's folder, and no other tensor of the teacher.
`full_vocabulary` computes the logits of some tokens at a time with it.

Legend: N response tokens, n of a chunk, D the teacher's hidden size, V rows of its head.
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
"""Nats, by ``teacher.dtype``: the largest `TeacherHead.mean_gap` that rounding can explain.

Measured with SmolLM2-135M on 1,023 tokens. A float32 teacher, whose states the signal rounds to
bfloat16, has 0.005. A bfloat16 teacher, which also rounds its logits, has 0.025. Mistakes have
more: logits scaled by 1.1 have 0.2 and by 2 have 2.2, states before the final norm have 8.5."""

FEWEST_TOKENS = 16
"""`TeacherHead.mean_gap` divides by at least this number of tokens: the rounding of a single token
can be ten times the mean, so the plain mean of a few tokens could stop a run without need."""


@dataclass(frozen=True, kw_only=True)
class TeacherHead(OutputHead):
    """The teacher's output head, and the ids on which the student is compared with it.

    Attributes:
        num_classes: Each id below this is a class of its own: both heads have it and the tokenizer
            names it. Further rows of either head are padding, which is one class together.
        name: The teacher's folder, for messages.
        most_gap: The largest `mean_gap` that `require_agreement` accepts, nats.
    """

    num_classes: int
    name: str = "the teacher"
    most_gap: float = MOST_GAP["auto"]

    @property
    def hidden_size(self) -> int:
        """D, the number of components of a hidden state."""
        return self.weight.shape[1]

    @torch.no_grad()
    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden W^T [n, V] in the compute dtype, without bias, scale and cap.

        hidden: bfloat16 [n, D]. out: memory to write the products to.
        """
        self._require_size(hidden)
        return torch.mm(hidden.to(self.weight.dtype), self.weight.T, out=out)

    def mean_gap(self, hidden: Tensor, drawn: Tensor, logprobs: Tensor) -> float:
        """Mean |log p of this head - log p of the engine| over the drawn tokens, nats.

        hidden: bfloat16 [N, D]. drawn: int64 [N], token ids. logprobs: [N], nats, as the teacher's
        engine gave them; NaN where it gave none, as for answers that it only read for their hidden
        states. Those tokens are left out. Raises RunError where the hidden states have another
        size than this head takes.
        """
        self._require_size(hidden)
        known = ~logprobs.isnan()
        hidden, drawn, logprobs = hidden[known], drawn[known], logprobs[known]
        gaps = [logprobs.new_zeros(0)]
        for rows, z in self.logit_chunks(hidden):
            own = torch.log_softmax(z, dim=1).gather(1, drawn[rows, None]).squeeze(1)
            gaps.append((own - logprobs[rows].to(z.dtype)).abs())
        return torch.cat(gaps).sum().item() / max(FEWEST_TOKENS, len(hidden))

    def require_agreement(self, gap: float) -> None:
        """Raises RunError where ``gap`` is larger than rounding can explain, or NaN.

        Hidden states and head are then not of the same model. gap: the largest `mean_gap` of all
        ranks, nats, so that either all ranks go on or all stop.
        """
        if not gap <= self.most_gap:
            raise RunError(
                f"the log probabilities of the drawn tokens, computed from the hidden states with "
                f"the output head in {self.name}, differ from those that the teacher's engine gave "
                f"by {gap:.3g} nats on average; expected at most {self.most_gap}: the folder holds "
                "another model than the one that answered, or a model that changes its logits in a "
                "way that is not supported; correct teacher.model, or set signal.kind: topk"
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
    """The teacher's head for a ``hidden`` signal; None for the other kinds.

    folder: the teacher's, on this node. The other arguments are those of `read_teacher_head`.
    Raises RunError where the head cannot be read.
    """
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
    """The output head of the model in ``folder``.

    student_vocab: as in `batch.collate`. compute_dtype: dtype of the student's matrix products, in
    which the teacher's logits are computed as well. engine_dtype: ``teacher.dtype``, by which
    ``most_gap`` is chosen. Raises ValueError where the folder has no head, several, or a quantised
    one, or where a setting of its logits is invalid.
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
    """Reads one tensor, without the others of its file."""
    with safe_open(tensor.file, framework="pt") as file:
        return file.get_tensor(tensor.name)
