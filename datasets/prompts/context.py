"""The teacher's prompt where it sees more than the student: a system message, or documents.

The student is then trained on its own prompt, and its responses are those to the teacher's. A row's
signal belongs to response tokens, so nothing else changes: token t of the response has one
distribution of the teacher's after its prompt, and one of the student's after its own.

`prompt_ids` of the prompt tables are the teacher's, since the keys of answers are made of them, and
what is stored is an answer to them. `student_prompt_ids` is a further column.
"""

from dataclasses import replace
from typing import Any

from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.read import RawPrompt

SYSTEM_ROLES = ("system", "developer")


def teacher_view(raw: RawPrompt, prompts: PromptsConfig) -> RawPrompt:
    """The prompt as the teacher reads it.

    The row's own ``teacher_messages``, else the student's prompt, whose system message
    ``prompts.teacher_system`` replaces. It does not replace that of ``teacher_messages``.
    """
    messages: list[dict[str, Any]] = (
        raw.teacher_messages or raw.messages or [{"role": "user", "content": raw.text}]
    )
    system = prompts.teacher_system
    if system is not None:
        has_own = messages[0].get("role") in SYSTEM_ROLES
        if has_own and raw.teacher_messages is None:
            messages, has_own = messages[1:], False
        if not has_own:
            messages = [{"role": "system", "content": system}, *messages]
    return replace(raw, text=None, messages=messages)
