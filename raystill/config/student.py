"""Configuration of the student: where its architecture and its first weights come from, what of it
is trained, and where it goes.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raystill.config.base import ConfigModel, PositiveInt, identity, operational


class LayerChoice(ConfigModel):
    """How many of the teacher's layers to keep, and how the run chooses them."""

    keep: PositiveInt = identity(description="Number of teacher layers to keep.")
    by: Literal["importance", "influence", "even"] = identity(
        "importance",
        description="importance: layers are removed one by one, each time the one without which "
        "the student stays closest to the teacher on a few prompts. influence: keep the layers "
        "that change their input most. even: evenly spaced, first and last layer included.",
    )

    @property
    def needs_model(self) -> bool:
        """Whether the choice is made with the teacher's weights, at the start of the run."""
        return self.by != "even"

    def evenly(self, num_layers: int) -> list[int]:
        """``keep`` layers, evenly spaced over ``num_layers``."""
        steps = max(1, self.keep - 1)
        return [round(i * (num_layers - 1) / steps) for i in range(self.keep)]


Names = tuple[Annotated[str, Field(min_length=1)], ...]


class LoraConfig(ConfigModel):
    """Low-rank adapters (LoRA): the student's weights are frozen, small matrices beside them learn.

    A matrix W [out, in] becomes W + alpha / rank B A, with A [rank, in] and B [out, rank] trained.
    """

    rank: PositiveInt = identity(16, description="Rank of the adapters: rows of A, columns of B.")
    alpha: float = identity(
        32.0, gt=0, description="Scale of the adapters: B A is multiplied by alpha / rank."
    )
    dropout: float = identity(
        0.0, ge=0, lt=1, description="Probability with which an adapter's input is set to 0."
    )
    target_modules: Names | Literal["all-linear"] = identity(
        "all-linear",
        description="Names of the linear modules that get an adapter, such as [q_proj, v_proj]; a "
        "dotted name picks one of several. all-linear: all of the decoder's, not the output head.",
    )
    modules_to_save: Names = identity(
        (),
        description="Names of modules that are trained whole beside the adapters, such as [norm]. "
        "Embeddings and output head only where the model does not tie them.",
    )
    base_dtype: Literal["auto", "float32", "bfloat16"] = identity(
        "auto",
        description="Precision of the frozen weights. auto: that of their files; of weights in 16 "
        "bits the precision of matrix products (training.compute_dtype), if it is another.",
    )

    @model_validator(mode="after")
    def _trains_something(self) -> "LoraConfig":
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty; name linear modules such as [q_proj, v_proj], or set "
                "target_modules: all-linear"
            )
        return self


class StudentConfig(ConfigModel):
    """The student, the model that is trained, and where its first weights come from."""

    init: Literal["model", "from_teacher"] = identity(
        "from_teacher",
        description="Where the first weights come from. from_teacher: a copy of the teacher with "
        "some of its layers. model: the model named by student.model.",
    )
    model: str | None = identity(
        None,
        description="Local folder or Hugging Face id of the student. Required with init: model.",
    )
    revision: str | None = identity(
        None,
        description="Branch, tag or commit of student.model on the Hub. Default: its main branch.",
    )
    trust_remote_code: bool = identity(
        False, description="Whether to run Python code that comes with student.model."
    )
    layers: tuple[int, ...] | LayerChoice | None = identity(
        None,
        description="Teacher layers to keep, counted from 0, in this order; or how many, and how "
        "the run chooses them: {keep: 22, by: importance}. With init: from_teacher, set either "
        "layers or layer_stride.",
    )
    layer_stride: PositiveInt | None = identity(
        None,
        description="Keep every n-th teacher layer, from layer 0 on: 2 keeps layers 0, 2, 4, and "
        "so on. With init: from_teacher, set either layers or layer_stride.",
    )

    hidden_size: PositiveInt | None = identity(
        None,
        description="Width of the residual stream: so many of the teacher's hidden units, those "
        "with the largest activations on a few prompts. With init: from_teacher.",
    )
    ffn_size: PositiveInt | None = identity(
        None,
        description="Feed-forward neurons of each layer to keep, chosen in the same way. With "
        "init: from_teacher.",
    )
    num_heads: PositiveInt | None = identity(
        None,
        description="Attention heads of each layer to keep, chosen in the same way: a multiple of "
        "the number of key-value heads, or whole groups that share one. With init: from_teacher.",
    )
    lora: LoraConfig | None = identity(
        None,
        description="Low-rank adapters (LoRA): they alone are trained, the student's own weights "
        "are frozen. Default: all weights are trained.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "StudentConfig":
        if self.init == "model":
            if self.model is None:
                raise ValueError("init is 'model' but model is unset; name the student's model")
            if self.layers is not None or self.layer_stride is not None or self.narrowed:
                raise ValueError(
                    "layers, layer_stride, hidden_size, ffn_size and num_heads belong to init: "
                    "from_teacher; remove them"
                )
        else:
            if self.model is not None:
                raise ValueError(
                    f"model ({self.model!r}) is set but init is 'from_teacher'; "
                    "set init: model to train that model, or remove it"
                )
            both = self.layers is not None and self.layer_stride is not None
            neither = self.layers is None and self.layer_stride is None
            if both or (neither and not self.narrowed):
                raise ValueError(
                    "init: from_teacher needs exactly one of layers (a list) and layer_stride, or "
                    "a width (hidden_size, ffn_size, num_heads) with all layers"
                )
            if self.layers == ():
                raise ValueError("layers is empty; name at least one teacher layer")
        return self

    @property
    def narrowed(self) -> bool:
        """Whether the student has fewer units, neurons or heads than its teacher."""
        return any(size is not None for size in (self.hidden_size, self.ffn_size, self.num_heads))

    @property
    def chosen_by_run(self) -> bool:
        """Whether what is kept of the teacher is chosen with its weights, at the run's start."""
        by_layers = isinstance(self.layers, LayerChoice) and self.layers.needs_model
        return by_layers or self.narrowed

    def kept_layers(self, num_layers: int) -> list[int]:
        """Teacher layers that the student keeps, in order, of ``num_layers`` (from_teacher).

        Of a choice that needs the teacher's weights: as many layers, evenly spaced, which stand
        in for it wherever only their number matters.
        """
        if isinstance(self.layers, LayerChoice):
            return self.layers.evenly(num_layers)
        if self.layers is not None:
            return list(self.layers)
        return list(range(0, num_layers, self.layer_stride or 1))


class HubConfig(ConfigModel):
    """The Hugging Face Hub. Its token is from HF_TOKEN or ``hf auth login``, never from here."""

    repo: str = operational(description="Repository, as owner/name; it is created if need be.")
    private: bool = operational(
        True,
        description="Whether the repository is private. false: everybody may read it, which needs "
        "terms.distributed: true.",
    )

    @field_validator("repo")
    @classmethod
    def _is_a_name(cls, repo: str) -> str:
        word = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
        if (
            not re.fullmatch(f"{word}/{word}", repo)
            or "--" in repo
            or ".." in repo
            or repo.endswith(".git")
        ):
            raise ValueError(f"is {repo!r}; expected owner/name of letters, digits, '-', '_', '.'")
        return repo
