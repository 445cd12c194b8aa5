"""Makes the engine of a run's service."""

from pathlib import Path
from typing import Any

from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.run import RunConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.reasoning import markers_of
from raystill.datasets.rows.schema import of_one
from raystill.datasets.rows.signal import held_out_signal, signal_of
from raystill.model.files import ModelFolder
from raystill.model.sampling import ResolvedSampling
from raystill.model.tokenizer import (
    chat_template,
    control_tokens,
    read_settings,
    shared_tokenizer,
)
from raystill.serve.api.engine import ApiEngine, TextReader
from raystill.serve.api.ids import IdsEngine
from raystill.serve.api.limits import Limits, Spending
from raystill.serve.api.probe import Expected
from raystill.serve.api.service import Service
from raystill.serve.batch.batches import Batches
from raystill.serve.batch.engine import BatchEngine
from raystill.serve.batch.journal import BatchJournal
from raystill.serve.pace import ActorPace


def api_engine(
    config: RunConfig,
    folder: str,
    sampling: ResolvedSampling,
    run_folder: RunFolder,
    coordinator: Any,
    store_path: str,
    name: str = "",
    pace: tuple[Any, str] | None = None,
) -> ApiEngine | IdsEngine:
    """The engine of a run's service, which goes on with what earlier starts have spent.

    folder: that of the tokenizer. coordinator: is told the counters; None: nobody is. store_path:
    of the teacher store, beside which batches are noted. name: that of the teacher among several.
    pace: the actor that keeps the service's pace where others ask it too, and its salt.
    """
    teacher = at_batch_prices(config.teacher)
    spending = Spending(run_folder, name)

    def report(counters: dict[str, float], batch: str | None = None) -> None:
        spending.add(counters, batch)
        if coordinator is not None:
            own = {of_one(name, one): count for one, count in counters.items()} if name else {}
            coordinator.add.remote(counters | own)

    place = Path(folder)
    shared = None if pace is None else ActorPace(pace[0], name, teacher.api, pace[1])
    service = Service(
        teacher, Limits(teacher.api, spending.cost, report, shared=shared), spending.close
    )
    if teacher.api.ids:
        tokenizer = shared_tokenizer(place, read_settings(place)).tokenizer
        expected = expected_server(config, ModelFolder(teacher.model, place))
        return IdsEngine(teacher, sampling, tokenizer, service, expected)
    messages = run_folder.read_table(MESSAGES)
    reader, kind = text_reader(place), BatchEngine if teacher.api.batch else ApiEngine
    cut = ModelFolder(teacher.model, place).shorter_context(teacher.max_model_len)
    engine = kind(teacher, sampling, reader, messages, service, cut)
    if not isinstance(engine, BatchEngine):
        return engine
    journal = BatchJournal(store_path)
    engine.batches = Batches(teacher.api, service, journal, run_folder.path, spending)
    return engine


def text_reader(folder: Path) -> TextReader:
    """What an answer's text becomes ids with. folder: of the student's tokenizer."""
    settings = read_settings(folder)
    shared, template = shared_tokenizer(folder, settings), chat_template(folder, settings)
    control = control_tokens(shared.tokenizer, settings, folder, template)
    plain, added = shared.plain_text(control.always), shared.tokenizer.get_added_tokens_decoder()
    markers = markers_of({token.content: index for index, token in added.items()}, template)
    inside = None
    if markers is not None and markers.ids is not None:
        inside = shared.plain_text(control.all | set(markers.ids))
    return TextReader(shared.tokenizer, plain, control.always, markers, inside)


def at_batch_prices(teacher: TeacherConfig) -> TeacherConfig:
    """The same teacher, with what an answer in a batch costs where it answers in batches."""
    api = teacher.api
    if api.batch is None or api.prices is None:
        return teacher
    prices = api.prices.times(api.batch.price_factor)
    return teacher.model_copy(update={"api": api.model_copy(update={"prices": prices})})


def expected_server(config: RunConfig, model: ModelFolder) -> Expected:
    """What a run by ids takes its server for."""
    limits = (config.teacher.max_model_len, model.context_tokens)
    signals = [signal_of(config.signal, model.config)]
    if config.evaluation.enabled:
        signals.append(held_out_signal(config))
    return Expected(
        model=config.teacher.model,
        vocab_size=model.vocab_size,
        context=min((limit for limit in limits if limit is not None), default=None),
        logprobs=max((one.width for one in signals if one.kind != "text"), default=None),
    )
