"""The teachers of a run, each as if it were alone: contexts, slots and costs; and what several
teachers must have in common.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow.compute as pc

from raystill.base.errors import ConfigError, Problem
from raystill.cluster.check.models import check_tokenizers
from raystill.cluster.check.trackers import limit_of
from raystill.config.run import RunConfig
from raystill.config.teacher import section_of
from raystill.datasets.filters.reasoning import cutter_of, markers_in
from raystill.datasets.judging.question import Judging
from raystill.datasets.prompts.select import UNBOUNDED
from raystill.datasets.prompts.tables import PromptTables
from raystill.datasets.rows.reasoning import CHANNELS, PAIRS, TAIL_IDS
from raystill.datasets.rows.schema import student_prompts
from raystill.datasets.rows.signal import hidden_size
from raystill.datasets.rows.token_bytes import NoBytes
from raystill.model.files import ModelFolder
from raystill.model.sampling import resolve_sampling
from raystill.model.tokenizer import read_settings, shared_tokenizer
from raystill.placement import memory
from raystill.placement.services import RATES, least_rates, same_account


def of_teacher(name: str, problems: Iterable[Problem]) -> list[Problem]:
    """The problems of ``teacher`` as those of ``teachers.NAME``; unchanged for ""."""
    return [Problem(_renamed(name, one.where), _renamed(name, one.message)) for one in problems]


def notices_of(name: str, notices: Iterable[str]) -> list[str]:
    """As `of_teacher`, of notices, which begin with the name."""
    return [f"{name}: {_renamed(name, one)}" if name else one for one in notices]


def _renamed(name: str, text: str) -> str:
    """Settings of ``teacher`` in a text as those of ``teachers.NAME``."""
    return re.sub(r"\bteacher\.(?=[a-z])", f"teachers.{name}.", text) if name else text


def check_alike(config: RunConfig, teachers: Mapping[str, ModelFolder]) -> list[Problem]:
    """Several teachers must have one tokenizer and one chat template: prompts are tokenised once,
    and an id must be the same token for all. So are given responses, which end with a stop token.
    """
    answering = {n: one for n, one in teachers.items() if n not in config.only_judges}
    (first, one), *others = answering.items()
    problems = []
    fields = [one.response_field for one in config.prompts.sources or ()]
    given = any([config.prompts.response_field, *fields])
    stops = {
        name: sorted(resolve_sampling(view.teacher, teachers[name].path).stop_token_ids)
        for name, view in config.by_teacher.items()
        if given and name in answering
    }
    for name, other in others:
        where = f"teachers.{name}.model"
        remedy = (
            f"give {first} and {name} the same, or reach {name} through an API "
            "(engine: api, signal: {kind: text}), whose text is read by any tokenizer"
        )
        if check_tokenizers(one, other):
            message = f"{name} ({other.name}) has another tokenizer than {first} ({one.name})"
            problems.append(Problem(where, f"{message}; {remedy}"))
        elif _template(one) != _template(other):
            message = f"{name} ({other.name}) has another chat template than {first} ({one.name})"
            problems.append(Problem(where, f"{message}; {remedy}"))
        elif given and stops[name] != stops[first]:
            message = (
                f"are {stops[name]}, but those of {first} are {stops[first]}, and "
                "prompts.response_field is set: a given response ends with the same stop token, "
                "whoever scores it; set both teachers' stop_token_ids to one list"
            )
            problems.append(Problem(f"teachers.{name}.sampling.stop_token_ids", message))
    return problems + _check_batches(config)


def check_judges(config: RunConfig, teachers: Mapping[str, ModelFolder]) -> Iterator[Problem]:
    """Can each judge of the filters be asked, and its reply be read?"""
    views = config.by_teacher
    for number, rule in enumerate(config.filters.rules):
        if (judge := rule.judge) is None or judge.teacher not in teachers:
            continue
        view, where = views[judge.teacher], f"filters.rules.{number}.judge"
        try:
            judging = Judging(judge, view, teachers[judge.teacher].path)
        except ConfigError as error:
            yield from (Problem(f"{where}.{one.where}", one.message) for one in error.problems)
            continue
        most = view.teacher.sampling.max_tokens
        if judging.signal.kind != "text" and judge.teacher in config.only_judges and most > 1:
            yield Problem(
                f"teachers.{judge.teacher}.sampling.max_tokens",
                f"is {most}, but of a judge's reply the first token is read; set it to 1",
            )


def check_reasoning(config: RunConfig, teachers: Mapping[str, ModelFolder]) -> Iterator[Problem]:
    """Can the student be given what ``prompts.reasoning`` says, of each teacher of rows?"""
    wish, where = config.prompts.reasoning, "prompts.reasoning"
    if wish == "keep" and config.prompts.chat_template_kwargs.get("enable_thinking") is False:
        message = "is 'keep', but prompts.chat_template_kwargs has enable_thinking: false, with "
        yield Problem(where, f"{message}which prompts leave no room for it; remove one of them")
    for name, view in config.by_teacher.items() if wish is not None else ():
        if name in config.only_judges or name not in teachers:
            continue
        teacher, folder = view.teacher, teachers[name]
        markers = markers_in(folder.path)
        told = f"is {wish!r}, but {folder.name} has"
        remedy = "leave prompts.reasoning out"
        if wish == "drop" and markers is None and CHANNELS in (_template(folder) or ""):
            why = "its reasoning in messages of its own, which are not cut off"
            yield Problem(where, f"{told} {why}; {remedy}")
        elif wish == "drop":
            try:
                cutter_of(folder.path)
            except NoBytes as error:
                why = f"a tokenizer whose ids do not stand for bytes ({error})"
                yield Problem(where, f"{told} {why}, so that no reasoning can be cut off; {remedy}")
        elif teacher.engine == "api" and not teacher.api.ids and config.signal.kind != "text":
            yield Problem(
                where,
                f"is 'keep', but signal.kind is {config.signal.kind!r}, and {section_of(name)} "
                "tells probabilities of its answers alone, not of reasoning that comes apart from "
                "them; set signal.kind: text, or reasoning: drop",
            )
        elif teacher.engine == "api" and not teacher.api.ids and markers is None:
            yield Problem(
                where,
                f"{told} no markers for it, neither tokens nor in its chat template (such as "
                f"{' and '.join(PAIRS[0])}); name a teacher.model that has, or {remedy}",
            )


def reasoning_notices(
    config: RunConfig, folder: ModelFolder, tables: PromptTables
) -> Iterator[str]:
    """Where the prompts begin reasoning that the student's answers do not go on with."""
    markers = markers_in(folder.path) if config.prompts.reasoning == "drop" else None
    if markers is None or not tables.train.num_rows:
        return
    prompt = student_prompts(tables.train.slice(0, 1))[0].values.to_pylist()
    tokenizer = shared_tokenizer(folder.path, read_settings(folder.path)).tokenizer
    if (
        tokenizer.decode(prompt[-TAIL_IDS:], skip_special_tokens=False)
        .rstrip()
        .endswith(markers.start)
    ):
        yield (
            f"the chat template begins reasoning in each prompt ({markers.start}), which the "
            "student reads before answers that have none (prompts.reasoning: drop); set "
            "prompts.chat_template_kwargs so that it does not, where the template can"
        )


def shared_notices(config: RunConfig) -> Iterator[str]:
    """Which teachers share the limits of one service and key, and what these are."""
    views = config.by_teacher
    for names in same_account(config):
        apis = {name: views[name].teacher.api for name in names}
        bounds, differ = [], False
        for field, least in zip(RATES, least_rates(apis), strict=True):
            what = field.replace("_", " ").replace("per", "a")
            bounds.append(f"{least:,} {what}" if least is not None else f"no limit of {what}")
            differ |= len({getattr(api, field) for api in apis.values()}) > 1
        told = ", of what each sets the smallest" if differ else ""
        yield (
            f"{' and '.join(names)} ask {apis[names[0]].base_url} with one key, and keep its "
            f"limits together: {', '.join(bounds)}{told}"
        )


def judge_notices(
    config: RunConfig, name: str, folder: ModelFolder, tables: PromptTables
) -> Iterator[str]:
    """How often a teacher may be asked as a judge, and what that costs at most, for a person."""
    view = config.by_teacher[name]
    asked = [rule.judge for rule in config.filters.rules if rule.judge is not None]
    rows, reads = 0, 0
    for judge in (one for one in asked if one.teacher == name):
        try:
            judging = Judging(judge, view, folder.path)
        except ConfigError:  # `check_judges` has told of it.
            return
        around = judging.chat([], "", dict.fromkeys(judge.columns, ""))
        rows += tables.train.num_rows
        reads += tables.train.num_rows * len(judging.encode(around))
        reads += int(pc.sum(pc.list_value_length(tables.train["prompt_ids"])).as_py() or 0)
    if not rows:
        return
    told = f"as a judge it is asked about up to {rows:,} answers an epoch"
    api = view.teacher.api
    if view.teacher.engine != "api" or api.prices is None:
        yield told + (", which is not counted" if view.teacher.engine == "api" else "")
        return
    reads += rows * config.max_response_tokens
    writes = rows * view.teacher.sampling.max_tokens
    most = (reads * api.prices.input + writes * api.prices.output) / 1e6
    yield (
        f"{told}, which may cost up to {most:,.4g} ({reads:,} prompt tokens of its own, where "
        f"each answer has {config.max_response_tokens:,}, at {api.prices.input:g} and {writes:,} "
        f"response tokens at {api.prices.output:g} a million; without fields of the prompt file); "
        + limit_of(api)
    )


def _check_batches(config: RunConfig) -> list[Problem]:
    """The journal of batches beside a store belongs to one service."""
    views = config.by_teacher.items()
    users = [n for n, view in views if view.teacher.engine == "api" and view.teacher.api.batch]
    return [
        Problem(
            f"teachers.{name}.api.batch",
            f"is set, and {users[0]} works in batches already; one teacher of a run may: leave it "
            "out for the others",
        )
        for name in users[1:]
    ]


def _template(model: ModelFolder) -> Any:
    path = model.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    return read_settings(model.path).get("chat_template")


def check_rows_ahead(config: RunConfig) -> Iterator[Problem]:
    """Is ``max_rows_ahead`` enough to fill a step, and to keep all replicas busy?"""
    rows, needed, advised = config.rows_ahead, config.min_rows_ahead, config.advised_rows_ahead
    bound = max(needed, advised)
    if rows < needed:
        yield Problem(
            "stream.max_rows_ahead",
            f"({rows}) is less than rows_per_step + 2 * num_workers * group_rows ({needed}), so a "
            f"step could wait for ever; set it to {bound} or more, or lower the others",
        )
        return
    views = config.by_teacher.items()
    set_by_hand = [name for name, one in views if one.teacher.target_ongoing_requests is not None]
    if rows < advised and set_by_hand:
        lower = " and ".join(f"{section_of(n)}.target_ongoing_requests" for n in set_by_hand)
        yield Problem(
            "stream.max_rows_ahead",
            f"({rows}) is less than max replicas * target_ongoing_requests * group_rows + 2 * "
            f"rows_per_step ({advised}), so replicas would be idle; set it to {bound} or more, or "
            f"lower {lower}",
        )


def context_tokens(config: RunConfig, teacher: ModelFolder) -> int:
    """Most tokens of a prompt and its answer together."""
    limits = [config.teacher.max_model_len, teacher.context_tokens]
    return min((limit for limit in limits if limit is not None), default=UNBOUNDED)


def check_written_fit(config: RunConfig, tables: PromptTables, context: int) -> Iterator[Problem]:
    """Can a teacher with prompts of its own read whatever the student writes?

    With the same prompts the sampler has the teacher's context, which cuts what is too long.
    """
    if not (config.policy.enabled and config.prompts.teacher_sees_more):
        return
    longest, most = tables.longest_prompt_tokens, config.policy.max_tokens
    most = most or config.teacher.sampling.max_tokens
    if longest + most > context:
        yield Problem(
            "policy.max_tokens",
            f"is {most}, and the longest prompt ({longest} tokens) leaves room for "
            f"{context - longest} in the teacher's context of {context}, so that it could not "
            f"score what the student writes; set policy.max_tokens: {context - longest}, or raise "
            "teacher.max_model_len where the model allows",
        )


def slots_notices(config: RunConfig) -> Iterator[str]:
    """Where the bound on rows ahead keeps the teacher from having all its slots filled."""
    bound, views = config.stream.max_rows_ahead, config.by_teacher
    short = {
        name
        for name, one in views.items()
        if one.teacher.target_ongoing_requests is None
        and one.teacher.engine != "synthetic"
        and one.groups_per_replica < one.full_groups
    }
    if bound is None or not short:
        return
    rows, full = (
        config.stream.group_rows
        * sum(
            one.teacher.max_replicas
            * (one.full_groups if filled and name in short else one.groups_per_replica)
            for name, one in views.items()
        )
        for filled in (False, True)
    )
    yield (
        f"stream.max_rows_ahead ({bound}) leaves room for {rows} rows in flight, of the {full} "
        "that keep the engine's slots filled while the longest answer of a group is waited for; "
        f"set it to {full + 2 * config.training.rows_per_step} or more, or lower "
        + " and ".join(f"{section_of(name)}.max_num_seqs" for name in views if name in short)
    )


def truncation_notices(
    config: RunConfig, tables: PromptTables, teacher: ModelFolder
) -> Iterator[str]:
    """Where the context cuts answers before ``max_tokens`` does."""
    context, longest = context_tokens(config, teacher), tables.longest_asked_prompt
    max_tokens = config.teacher.sampling.max_tokens
    if longest is not None and longest + max_tokens > context:
        yield (
            f"the longest prompt ({longest} tokens) leaves its answer {context - longest} of "
            f"{max_tokens} tokens in a context of {context}"
        )


def capture_notices(config: RunConfig, teachers: Mapping[str, ModelFolder]) -> list[str]:
    """The memory that captured hidden states take at most beside each teacher's engine."""
    if config.signal.kind != "hidden":
        return []
    notices = []
    for name, view in config.by_teacher.items():
        teacher, size = view.teacher, hidden_size(teachers[name].config)
        rows, tokens = teacher.max_num_seqs, teacher.sampling.max_tokens
        most = memory.captured_bytes(rows, tokens, size, bool(teacher.gpus_per_replica))
        told = (
            f"a replica of the teacher keeps at most {most / 1e9:.2f} GB of hidden states in its "
            f"machine's memory until they are read ({rows} rows of {tokens:,} tokens at a width of "
            f"{size:,}); a smaller teacher.max_num_seqs or teacher.sampling.max_tokens needs less"
        )
        notices += notices_of(name, [told])
    return notices
