"""Settings that undo each other, or have no effect on the run: what nobody means to write.

A problem is what would end the run after it has spent; all else is a notice.
"""

from collections.abc import Iterator

from raystill.base.errors import Problem
from raystill.base.formatting import plural
from raystill.config.objective import PolicyConfig
from raystill.config.run import RunConfig
from raystill.config.teacher import section_of
from raystill.datasets.prompts.tables import PromptTables
from raystill.datasets.stream.plan import num_steps


def check_effects(config: RunConfig) -> Iterator[Problem]:
    """Does no setting end the run, or leave nothing of its answers, whatever the teacher says?"""
    stream, prompts = config.stream, config.prompts
    if any([prompts.response_field, *(one.response_field for one in prompts.sources or ())]):
        return  # Such answers have any length, and end where they end.
    if stream.on_truncated == "drop" and stream.max_drop_fraction == 0:
        yield Problem(
            "stream.on_truncated",
            "is 'drop', but stream.max_drop_fraction is 0, so that the first answer which "
            "teacher.sampling.max_tokens cuts off ends the run; set stream.max_drop_fraction to "
            "the share of answers that may be cut off",
        )
    if prompts.reasoning == "keep":  # It comes besides.
        return
    asked = {n: one for n, one in config.by_teacher.items() if n not in config.only_judges}
    most = max((one.teacher.sampling.max_tokens for one in asked.values()), default=0)
    for number, rule in enumerate(config.filters.rules):
        if rule.length is not None and rule.length.min_tokens > most:
            yield Problem(
                f"filters.rules.{number}.length.min_tokens",
                f"is {rule.length.min_tokens}, but no answer has more than {most} tokens "
                "(teacher.sampling.max_tokens), so that every answer is rejected; lower it, or "
                "raise max_tokens",
            )


def effect_notices(config: RunConfig, tables: PromptTables) -> Iterator[str]:
    """Which settings say something that the run will not do."""
    training, evaluation = config.training, config.evaluation
    steps = num_steps(tables.train.num_rows, training.rows_per_step) * training.epochs
    held_out = tables.held_out.num_rows
    if training.warmup_steps and training.warmup_steps >= steps:
        share = steps / training.warmup_steps
        yield (
            f"training.warmup_steps is {training.warmup_steps}, of a run of "
            f"{plural(steps, 'step')}: the learning rate rises to the end, up to {share:.2g} of "
            "training.learning_rate"
        )
    if evaluation.every_steps and not (evaluation.enabled and held_out):
        yield "evaluation.every_steps has no effect: there are no held-out rows"
    elif evaluation.enabled and evaluation.every_steps >= steps:
        yield (
            f"evaluation.every_steps is {evaluation.every_steps}, of a run of "
            f"{plural(steps, 'step')}: the student is measured before and after training alone"
        )
    yield from _objective_notices(config)
    for name, one in config.by_teacher.items():
        ranks = one.teacher.tensor_parallel_size * one.teacher.pipeline_parallel_size
        if one.teacher.engine == "api" and ranks > 1:
            yield f"{section_of(name)}: a service is not split: its parallel sizes have no effect"


def _objective_notices(config: RunConfig) -> Iterator[str]:
    objective, policy = config.objective, config.policy
    if "jsd_beta" in objective.model_fields_set and not objective.jsd:
        yield "objective.jsd_beta has no effect without objective.jsd"
    skewed = objective.skew_forward_kl or objective.skew_reverse_kl
    if "skew_alpha" in objective.model_fields_set and not skewed:
        yield "objective.skew_alpha has no effect without a skew KL divergence"
    if objective.temperature_squared and objective.temperature == 1.0:
        yield "objective.temperature_squared has no effect at objective.temperature 1"
    if not policy.enabled and policy != PolicyConfig():
        named = ", ".join(sorted(policy.model_fields_set - {"student_share"}))
        yield f"policy has no effect while policy.student_share is 0 (set: {named or 'its share'})"


def sharding_notices(config: RunConfig) -> Iterator[str]:
    """Where sharding saves no memory."""
    training = config.training
    if training.strategy == "fsdp" and training.min_workers == 1:
        yield (
            "training.strategy is fsdp, but training.num_workers allows one worker: a single "
            "worker holds the whole student and its optimizer's state"
        )


def tail_notices(config: RunConfig) -> Iterator[str]:
    """Where the student's own objective rests on what it does outside the teacher's K ids."""
    terms = set(config.policy.objective.divergences)
    reverse = {"reverse_kl", "skew_reverse_kl"}
    if config.policy.enabled and config.signal.kind == "topk" and terms and terms <= reverse:
        yield (
            f"policy.objective is {' and '.join(sorted(terms))} alone, which weighs ids by the "
            "student's probability, but signal.kind is 'topk', where all other ids are one number; "
            "signal.kind: hidden makes it exact; else watch student_tail_mass in metrics.jsonl"
        )
