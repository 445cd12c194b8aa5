"""Configuration of the student, its objective and its training."""

from typing import Literal

from pydantic import model_validator

from raystill.config.base import ConfigModel, LabelSelector, PositiveInt, identity, operational


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
