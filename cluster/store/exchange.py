"""``driver.py store export`` and ``import``: answers out of a teacher store, and into it."""

from dataclasses import dataclass
from pathlib import Path

from raystill.base import formatting
from raystill.base.errors import ConfigError, RunError
from raystill.base.redact import redact
from raystill.cluster.commands.as_json import print_json
from raystill.cluster.commands.store import opened_store, refused_json, status, tell
from raystill.config.prompts import PromptsConfig
from raystill.datasets.exchange.chats import ChatReader
from raystill.datasets.exchange.export import FORMATS, export
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.store.segment import Origin
from raystill.model.files import find_model


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
    with opened_store(wanted.store) as store:
        done = export(
            store, wanted.out, wanted.form, wanted.teacher, lambda o: _reader(o, wanted.model)
        )
    if as_json:
        rows = {"rows": dict(done.rows), "left_out": dict(done.left_out)}
        more = {"control_tokens": done.control_tokens, "refused": refused_json(done.refused)}
        print_json({"store": store.path, "out": wanted.out, **rows, **more})
        return status(done.refused)
    tell(done.refused)
    splits = sorted(done.rows.items(), reverse=True)
    rows_of = (f"{formatting.plural(n, 'row')} of {split}" for split, n in splits if n)
    print(f"{', '.join(rows_of)} written to {redact(wanted.out)}")
    for reason, number in done.left_out.items():
        print(f"{formatting.plural(number, 'row')} left out: {reason}")
    if done.control_tokens:
        print(
            f"note: {formatting.plural(done.control_tokens, 'response')} with the text of a control"
            " token; train on completion_ids, or leave them out: a chat template takes the text in "
            "messages for the token"
        )
    return status(done.refused)


def _reader(origin: Origin, model: str | None) -> ChatReader:
    """Reads prompts with the tokenizer of a stored teacher, or of ``model``. Raises RunError."""
    name = model or origin.teacher
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
