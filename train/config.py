"""Configuration of the student, its objective and its training."""

from typing import Literal

from pydantic import model_validator

from raystill.cluster.model import ConfigModel, LabelSelector, PositiveInt, identity, operational

TERMS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "cross_entropy",
)
"""What an objective is a weighted sum of."""


class StudentConfig(ConfigModel):
    """The model that is trained, and where its first weights come from."""

    init: Literal["model", "from_teacher"] = identity(
        "from_teacher",
        description="model: a Hugging Face model; from_teacher: keep some of its layers.",
    )
    model: str | None = identity(
        None, description="Local folder or Hugging Face id; needed with init: model."
    )
    revision: str | None = identity(None, description="Hub revision of student.model.")
    trust_remote_code: bool = identity(False, description="Run code that comes with the model.")
    layers: tuple[int, ...] | None = identity(
        None, description="Teacher layers kept, from 0, in this order (init: from_teacher)."
    )
    layer_stride: PositiveInt | None = identity(
        None, description="Keep every so-manyth teacher layer, from 0 (init: from_teacher)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "StudentConfig":
        if self.init == "model":
            if self.model is None:
                raise ValueError("init is 'model' but model is unset; name the student's model")
            if self.layers is not None or self.layer_stride is not None:
                raise ValueError(
                    "layers and layer_stride belong to init: from_teacher; remove them"
                )
        else:
            if self.model is not None:
                raise ValueError(
                    f"model ({self.model!r}) is set but init is 'from_teacher'; "
                    "set init: model to train that model, or remove it"
                )
            if (self.layers is None) == (self.layer_stride is None):
                raise ValueError(
                    "init: from_teacher needs exactly one of layers (a list) and layer_stride"
                )
            if self.layers is not None and len(self.layers) == 0:
                raise ValueError("layers is empty; name at least one teacher layer")
        return self


class TokenWeightsConfig(ConfigModel):
    """How much each response token counts; the sum of all weights is what a step's loss is over."""

    truncated_rows: float = identity(
        1.0, ge=0, le=100, description="Weight of rows whose answer was cut off by max_tokens."
    )
    by: Literal["none", "entropy", "confidence"] = identity(
        "none",
        description="Shares a row's weight among its tokens in proportion to the teacher's entropy "
        "(over ids and tail, so with a truncated signal a lower bound) or to its best id's "
        "probability (with kind sampled the drawn id's); each row keeps its sum. With kind hidden "
        "this takes the teacher's logits once more.",
    )


class ObjectiveConfig(ConfigModel):
    """What the student minimises: a weighted sum; a weight of 0 leaves a term out."""

    forward_kl: float = identity(
        0.0, ge=0, description="Weight of KL(teacher || student) on the signal's partition."
    )
    reverse_kl: float = identity(
        0.0, ge=0, description="Weight of KL(student || teacher) on the signal's partition."
    )
    jsd: float = identity(
        0.0,
        ge=0,
        description="Weight of the Jensen-Shannon divergence: jsd_beta KL(teacher || mixture) + "
        "(1 - jsd_beta) KL(student || mixture).",
    )
    jsd_beta: float = identity(
        0.5,
        gt=0,
        lt=1,
        description="The teacher's share in jsd's mixture; instead of the ends 0 and 1 give "
        "forward_kl or reverse_kl a weight.",
    )
    skew_forward_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of KL(teacher || skew_alpha teacher + (1 - skew_alpha) student).",
    )
    skew_reverse_kl: float = identity(
        0.0,
        ge=0,
        description="Weight of KL(student || skew_alpha student + (1 - skew_alpha) teacher).",
    )
    skew_alpha: float = identity(
        0.1,
        gt=0,
        lt=1,
        description="What a skew divergence mixes of its first distribution into its second; "
        "instead of the end 0 give forward_kl or reverse_kl a weight (at 1 nothing is learned).",
    )
    total_variation: float = identity(
        0.0, ge=0, description="Weight of half the sum of |teacher - student|: 1 - acceptance."
    )
    cross_entropy: float = identity(
        0.0, ge=0, description="Weight of cross entropy on the response tokens."
    )

    temperature: float = identity(
        1.0,
        gt=0,
        le=100,
        description="Divides both sides' logits in every divergence, not in cross_entropy; other "
        "than 1 with signal.kind: hidden only.",
    )
    temperature_squared: bool = identity(
        False,
        description="Multiply divergences by the squared temperature, so that their gradients keep "
        "their size.",
    )

    token_weights: TokenWeightsConfig = identity(
        TokenWeightsConfig(), description="How much each response token counts."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ObjectiveConfig":
        if not self.weights:
            *others, last = TERMS
            raise ValueError(
                f"every weight is 0; give {', '.join(others)} or {last} a weight above 0"
            )
        if self.temperature != 1.0 and not self.divergences:
            raise ValueError(
                f"temperature is {self.temperature:g}, which changes divergences only, and just "
                "cross_entropy has a weight; set temperature: 1, or give a divergence a weight"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Terms with a weight above zero, by name."""
        return {name: weight for name in TERMS if (weight := getattr(self, name)) > 0}

    @property
    def factors(self) -> dict[str, float]:
        """What each term in use is multiplied by: its weight, and T^2 for a divergence if asked."""
        squared = self.temperature**2 if self.temperature_squared else 1.0
        weights = self.weights.items()
        return {name: w if name == "cross_entropy" else w * squared for name, w in weights}

    @property
    def divergences(self) -> list[str]:
        """Terms in use that compare the student with the teacher's probabilities."""
        return [name for name in self.weights if name != "cross_entropy"]


class TrainingConfig(ConfigModel):
    """The optimisation: steps, rates, precision, checkpoints."""

    epochs: PositiveInt = operational(1, description="Passes over all rows.")
    rows_per_step: PositiveInt = identity(
        32, description="Rows of one optimizer step, over all workers."
    )
    max_failures: int = operational(
        3,
        ge=0,
        description="Times the workers are restarted from the last checkpoint after one has died.",
    )
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = operational(
        1,
        description="Student worker processes; [min, max]: as many as the cluster has room for, "
        "more or fewer as nodes come and go.",
    )
    resize_every_s: float = operational(
        60.0,
        gt=0,
        description="Seconds between looks for room for more workers, with [min, max]; growing "
        "restarts the workers from the last checkpoint.",
    )
    startup_timeout_s: float = operational(
        1800.0,
        gt=0,
        description="Longest wait for the workers' places, seconds: at the start, and when nodes "
        "have gone.",
    )
    learning_rate: float = identity(1e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "constant"] = identity(
        "cosine", description="Learning rate after warm-up."
    )
    warmup_steps: int = identity(0, ge=0, description="Steps of linear warm-up.")
    min_learning_rate_ratio: float = identity(
        0.1, ge=0, le=1, description="Cosine's end, as a share of the peak."
    )
    weight_decay: float = identity(0.0, ge=0, description="AdamW weight decay (matrices only).")
    beta1: float = identity(0.9, ge=0, lt=1, description="AdamW first-moment decay.")
    beta2: float = identity(0.95, ge=0, lt=1, description="AdamW second-moment decay.")
    epsilon: float = identity(1e-8, gt=0, description="AdamW epsilon.")
    max_grad_norm: float | None = identity(1.0, gt=0, description="Clipping bound; null: off.")
    normalise: Literal["token", "row"] = identity(
        "token", description="token: every response token counts the same; row: every row does."
    )
    tokens_per_micro_batch: PositiveInt = operational(
        4096,
        description="Budget of one forward pass: prompt and response tokens, padding included.",
    )
    packing: bool | Literal["auto"] = operational(
        "auto",
        description="Rows of a pass in one sequence, none sees another; auto: with FlashAttention.",
    )
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "sdpa", "eager"] = (
        operational(
            "auto",
            description="The student's attention; auto: FlashAttention on GPUs where it is "
            "installed, else SDPA (eager for models that cap attention logits).",
        )
    )
    param_dtype: Literal["float32", "float64"] = identity(
        "float32", description="Precision of parameters, optimizer and reductions."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = identity(
        "auto",
        description="Precision of matrix products; auto: bfloat16 on GPUs and CPUs with AMX, "
        "else float32.",
    )
    strategy: Literal["ddp", "fsdp"] = operational(
        "ddp",
        description="ddp: a whole copy a worker; fsdp: parameters, gradients and optimizer state "
        "sharded over the workers (FSDP2), gathered whole only while the student is measured.",
    )
    activation_checkpointing: bool = operational(
        False, description="Recompute layer activations in the backward pass to save memory."
    )
    compile: bool = operational(False, description="Use torch.compile on the student.")
    checkpoint_every_steps: int = operational(
        100, ge=0, description="Steps between checkpoints; 0: only when stopped and at the end."
    )
    num_checkpoints_to_keep: PositiveInt = operational(2, description="Newest checkpoints kept.")
    export_dtype: Literal["bfloat16", "float16", "float32"] = operational(
        "bfloat16", description="Precision of the finished model in student/."
    )
    gpus_per_worker: float | None = operational(
        None, ge=0, description="GPUs of one worker; default: 1 where the cluster has GPUs, else 0."
    )
    cpus_per_worker: float = operational(1.0, gt=0, description="CPUs of one worker.")
    cpu_cores: tuple[int, ...] | Literal["all"] | None = operational(
        None,
        description="Cores of the workers on a CPU node; default: the second half. all: every "
        "core, for a run whose answers are all in the store.",
    )
    resources_per_worker: dict[str, float] = operational(
        {}, description="Custom Ray resources a worker asks for, e.g. {student: 1}."
    )
    accelerator_type: str | None = operational(None, description="Ray accelerator type, e.g. H100.")
    label_selector: LabelSelector = operational(
        {}, description="Labels of the nodes that workers may run on, e.g. {role: student}."
    )

    @model_validator(mode="after")
    def _precision_of_attention(self) -> "TrainingConfig":
        precision = "float64" if self.param_dtype == "float64" else self.compute_dtype
        if self.attention.startswith("flash") and precision in ("float32", "float64"):
            raise ValueError(
                f"attention is {self.attention}, which computes in bfloat16, but matrix products "
                f"are in {precision}; set compute_dtype: bfloat16, or attention: auto"
            )
        return self

    @model_validator(mode="after")
    def _bounds_of_workers(self) -> "TrainingConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"num_workers is {list(self._worker_bounds)}, expected [min, max]; "
                f"set it to [{self.max_workers}, {self.min_workers}]"
            )
        return self

    @property
    def _worker_bounds(self) -> tuple[int, int]:
        n = self.num_workers
        return (n, n) if isinstance(n, int) else n

    @property
    def min_workers(self) -> int:
        """Fewest workers the run goes on with."""
        return self._worker_bounds[0]

    @property
    def max_workers(self) -> int:
        """Most workers the run has at a time."""
        return self._worker_bounds[1]
