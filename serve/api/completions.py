"""One request by token ids to ``/completions`` of a vLLM server.

The fields beyond OpenAI's are those of vLLM 0.32 (``vllm/entrypoints/openai/completion``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raystill.config.base import ApiConfig
from raystill.serve.api.parsed import plain
from raystill.serve.api.service import Request, posted

TOKEN = "token_id:"
"""Before an id, where the server names tokens by ids in place of their text."""

R = TypeVar("R")


@dataclass(frozen=True)
class IdsRequest:
    """What is asked of a prompt, which may be a text where its ids are asked for.

    logprobs: ids to name for each token beside the drawn one; None: no logprobs. more: further
    fields. The defaults are those of a request whose tokens do not matter.
    """

    prompt: list[int] | str
    max_tokens: int = 1
    logprobs: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: list[int] = field(default_factory=list)
    more: Mapping[str, Any] = field(default_factory=dict)

    def body(self, api: ApiConfig) -> dict[str, Any]:
        """The JSON of the request. What the server would take from its model is stated."""
        neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        return {
            **neutral,
            **api.extra_body,
            "model": api.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": True,  # Only the resolved ids end an answer.
            "logprobs": self.logprobs,
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **self.more,
        }


def completion(
    api: ApiConfig, request: IdsRequest, read: Callable[[Mapping[str, Any]], R | str]
) -> Request[R]:
    """The request as `Service.ask` takes it. read: from its one choice to the result."""
    body = request.body(api)

    def first(answer: Any) -> Mapping[str, Any]:
        choice: Mapping[str, Any] = answer["choices"][0]
        return choice

    async def send(client: Any) -> Any:
        return plain(await posted(client, "/completions", body))

    return Request(
        send=send,
        read=lambda answer: read(first(answer)),
        written=lambda answer: len(first(answer)["token_ids"]),
        prompt_tokens=len(request.prompt),
        max_tokens=request.max_tokens,
        named=1 + max(request.logprobs or 0, request.more.get("prompt_logprobs", 0)),
    )
