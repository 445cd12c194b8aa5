"""``driver.py store export`` and ``import``: answers out of a teacher store, and into it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from raystill.base import formatting
from raystill.base.console import open_named, print_lines
from raystill.base.errors import ConfigError, RunError, config_error, shown
from raystill.base.run_folder import require_path
from raystill.cluster.check.prepared import keyed_engine
from raystill.cluster.check.teachers import context_tokens
from raystill.cluster.commands.as_json import print_json
from raystill.cluster.commands.store import opened_store, refused_json, status, tell
from raystill.config.load import load_config, named_teacher
from raystill.config.prompts import PromptsConfig
from raystill.config.run import RunConfig
from raystill.datasets.exchange.chats import ChatReader
from raystill.datasets.exchange.export import FORMATS, export
from raystill.datasets.exchange.given import read_given
from raystill.datasets.exchange.importing import Imported, Importer, StatedTeacher
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.store.footer import Origin, name_of_teacher
from raystill.datasets.store.store import TeacherStore
from raystill.model.files import fetch_model, find_model
from raystill.model.identity import identity_of_teacher, keyed_dtype
from raystill.model.sampling import resolve_sampling

EXIT_NOTHING = 1


@dataclass(frozen=True)
class Export:
    """What is to be written, and where; see the options of the command."""

    store: str
    out: str
    form: str
    teacher: str | None
    model: str | None


def export_command(wanted: Export, as_json: bool) -> int:
    """Write a store's answers as a data set; the exit status, of the worst unusable segment.

    Raises RunError.
    """
    if wanted.form not in FORMATS:
        raise RunError(f"--format is {wanted.form!r}; expected one of {', '.join(FORMATS)}")
    out = require_path(wanted.out)
    with opened_store(wanted.store) as store:
        done = export(store, out, wanted.form, wanted.teacher, lambda o: _reader(o, wanted.model))
    if as_json:
        rows = {"rows": dict(done.rows), "left_out": dict(done.left_out)}
        more = {"control_tokens": done.control_tokens, "refused": refused_json(done.refused)}
        print_json({"store": store.path, "out": wanted.out, **rows, **more})
        return status(done.refused)
    tell(done.refused)
    splits = sorted(done.rows.items(), reverse=True)
    rows_of = (f"{formatting.plural(n, 'row')} of {split}" for split, n in splits if n)
    print(f"{', '.join(rows_of)} written to {shown(wanted.out)}")
    print_lines(
        f"{formatting.plural(number, 'row')} left out: {reason}"
        for reason, number in done.left_out.items()
    )
    if done.control_tokens:
        print(
            f"note: {formatting.plural(done.control_tokens, 'response')} with the text of a control"
            " token; train on completion_ids, or leave them out: a chat template takes the text in "
            "messages for the token"
        )
    return status(done.refused)


def import_command(
    path: str,
    files: Sequence[str],
    who: tuple[str, str | None],
    overrides: Sequence[str],
    as_json: bool,
) -> int:
    """Import answers under the teacher of a run file; exit status 1 where no row could be used.

    who: the run file, and which of its teachers is meant where there are several.
    Raises ConfigError and RunError.
    """
    run_file, name = who
    config = load_config(run_file, overrides)
    teacher = _stated_teacher(config.by_teacher[named_teacher(config, name)])
    store = TeacherStore(open_named(path).path)
    try:
        new = not store.folder.names()
    except OSError as error:
        raise RunError(
            f"{formatting.path(store.path)} cannot be a teacher store ({error}); name the folder "
            "of one, or a new one"
        ) from None
    with nullcontext(store) if new else opened_store(path) as store:
        rows = read_given(tuple(files), teacher.tokeniser.prompts)
        try:
            done = Importer(store, teacher).take(rows)
        except OSError as error:
            raise RunError(
                f"the answers could not be stored in {store.path} ({error}); make room or mend it, "
                "and import again: what is imported stays, and is not imported twice"
            ) from error
    if as_json:
        numbers = {"imported": dict(done.rows), "there": done.there, "cut": done.cut}
        more = {"left_out": dict(done.left_out), "first": done.first}
        print_json({"store": store.path, "teacher_identity": teacher.keyed[0], **numbers, **more})
    else:
        _tell_imported(done, teacher)
    return 0 if done.rows or done.there else EXIT_NOTHING


def _tell_imported(done: Imported, teacher: StatedTeacher) -> None:
    kinds = ", ".join(f"{number} with {kind}" for kind, number in sorted(done.rows.items()))
    number = formatting.plural(sum(done.rows.values()), "answer")
    print(
        f"{number} imported under {shown(teacher.name)} (identity {teacher.keyed[0][:12]})"
        + (f": {kinds}" if kinds else "")
    )
    if done.there:
        print(f"{formatting.plural(done.there, 'answer')} in the store already")
    if done.cut:
        print(f"{formatting.plural(done.cut, 'answer')} cut at teacher.sampling.max_tokens")
    print_lines(
        f"{formatting.plural(count, 'row')} left out: {reason} (the first is {done.first[reason]})"
        for reason, count in sorted(done.left_out.items())
    )


def _stated_teacher(config: RunConfig) -> StatedTeacher:
    """The teacher of a run file, as a run of it makes its keys. Raises ConfigError and RunError."""
    settings, prompts = config.teacher, config.prompts
    if any(
        [prompts.teacher_messages_field, *(s.teacher_messages_field for s in prompts.sources or ())]
    ):
        raise config_error(
            "prompts.teacher_messages_field",
            "is set, but rows to import bring no chat that the teacher alone reads, so that no run "
            "of this file would find them; leave it out for rows that the teacher read as they are",
        )
    found = find_model(settings.model, settings.revision)
    if found.model is None:
        raise config_error("teacher.model", str(found.problem or found.notice))
    if settings.engine == "vllm":  # The identity is of the weights.
        fetch_model(settings.model, settings.revision)
    folder = found.model.path
    tokeniser = PromptTokeniser(folder, config.prompts)
    sizes = (found.model.vocab_size, tokeniser.tokenizer.get_vocab_size(with_added_tokens=True))
    return StatedTeacher(
        name=name_of_teacher(
            settings.model, settings.api.model if settings.engine == "api" else None
        ),
        keyed=(
            identity_of_teacher(settings, folder),
            keyed_dtype(settings, folder),
            settings.quantization,
            resolve_sampling(settings, folder).keyed(),
        ),
        engine=keyed_engine(config, found.model),
        tokeniser=tokeniser,
        longest_prompt=context_tokens(config, found.model) - 1,
        vocab_size=max(size for size in sizes if size is not None),
        has_signal=settings.scores,
    )


def _reader(origin: Origin, model: str | None) -> ChatReader:
    """Reads prompts with the tokenizer of a stored teacher, or of ``model``. Raises RunError."""
    name = model or origin.tokenizer
    found = find_model(name, None)
    if found.model is None:
        raise RunError(
            f"the tokenizer of {name} is not to be had ({found.problem or found.notice}); name a "
            "folder with the teacher's tokenizer and chat template with --model"
        )
    try:
        return ChatReader(PromptTokeniser(Path(found.model.path), PromptsConfig(path="none")))
    except ConfigError as error:
        reason = "; ".join(str(problem) for problem in error.problems)
        raise RunError(f"prompts cannot be read as chats with {name}: {reason}") from error
