"""Makes the engine of a run's service."""

from pathlib import Path
from typing import Any

from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.teacher import TeacherConfig
from raystill.model.sampling import ResolvedSampling
from raystill.model.tokenizer import chat_template, control_tokens, load_tokenizer, read_settings
from raystill.serve.api.engine import ApiEngine
from raystill.serve.api.limits import Limits, Spending
from raystill.serve.api.service import Service


def api_engine(
    teacher: TeacherConfig,
    folder: str,
    sampling: ResolvedSampling,
    run_folder: RunFolder,
    coordinator: Any,
) -> ApiEngine:
    """The engine of a run's service, which goes on with what earlier starts have spent.

    folder: that of the tokenizer. coordinator: is told the counters; None: nobody is.
    """
    spending = Spending(run_folder)

    def report(counters: dict[str, float]) -> None:
        spending.add(counters)
        if coordinator is not None:
            coordinator.add.remote(counters)

    place = Path(folder)
    settings = read_settings(place)
    tokenizer = load_tokenizer(place, settings)
    control = control_tokens(tokenizer, settings, place, chat_template(place, settings)).always
    service = Service(teacher, Limits(teacher.api, spending.cost, report))
    messages = run_folder.read_table(MESSAGES)
    return ApiEngine(teacher, sampling, (tokenizer, control), messages, service)
