"""New weights for a running engine: whole ones, or an adapter beside those that it has.

Whole ones: vLLM adds `Reloadable` to its workers (``worker_extension_cls``), so that its own
layer-wise reload, which `reload_whole` asks for, runs in the process with the model.

Adapters: a request is finished with the adapter that it began with, and vLLM may read the adapter's
folder again as long as one is left. So `Adapters` deletes a folder when another adapter has taken
its place and the last of its requests has ended.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raystill.serve.engine.capture import Capture

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import WeightVersionSpan

EXTENSION = "raystill.serve.engine.weights.Reloadable"


class Reloadable(Capture):
    """A worker that takes new weights from a file."""

    def raystill_reload(self, path: str) -> None:
        """Load all weights from ``path``, a safetensors file with Hugging Face names."""
        from safetensors.torch import load_file
        from vllm.platforms import current_platform

        runner: Any = self.model_runner
        runner.reload_weights(weights_iterator=iter(load_file(path).items()))
        if not current_platform.is_cpu():
            return
        # On a CPU each matrix is packed into a closure when it is loaded. vLLM 0.32 leaves out the
        # head whose weight is tied to the embedding: it would go on with the old one.
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for module in runner.get_model().modules():
            if isinstance(module, VocabParallelEmbedding):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


async def reload_whole(engine: Any, path: str, version: int) -> None:
    """Let vLLM's engine take all weights from a file, with its requests held back meanwhile."""
    await engine.pause_generation(mode="keep", clear_cache=True)
    try:
        await engine.collective_rpc("raystill_reload", args=(path,))
        await engine.reset_prefix_cache()
        await name_version(engine, version)
    finally:
        await engine.resume_generation()


async def name_version(engine: Any, version: int) -> None:
    """Tell vLLM's engine which version of the weights writes its tokens from now on."""
    await engine.update_weight_version(str(version))


class Adapters:
    """The newest adapter of an engine, and those with requests that have not ended."""

    def __init__(self) -> None:
        self._newest: LoRARequest | None = None
        self._version = 0
        self._users: dict[int, int] = {}
        self._given: dict[int, LoRARequest] = {}

    async def take(self, engine: Any, number: int, folder: str, version: int) -> None:
        """Load an adapter into vLLM's engine, and `put` it. RuntimeError where vLLM does not."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest(f"adapter-{number}", number, folder)
        if not await engine.add_lora(adapter):
            raise RuntimeError(f"vLLM did not load the adapter in {folder}")
        self.put(adapter, version)

    def put(self, adapter: "LoRARequest", version: int) -> None:
        """From now on requests use ``adapter``, which must be of a folder of its own."""
        self._newest, self._version = adapter, version
        self._given[adapter.lora_int_id] = adapter
        self._users.setdefault(adapter.lora_int_id, 0)
        self._forget()

    @contextmanager
    def used(self) -> "Iterator[tuple[LoRARequest | None, int]]":
        """The newest adapter and its version, for one request; None where there has been none."""
        adapter = self._newest
        if adapter is None:
            yield None, 0
            return
        self._users[adapter.lora_int_id] += 1
        try:
            yield adapter, self._version
        finally:
            self._users[adapter.lora_int_id] -= 1
            self._forget()

    def _forget(self) -> None:
        """Delete the folders that no request can need any more."""
        for number, users in list(self._users.items()):
            adapter = self._given[number]
            if users == 0 and adapter is not self._newest:
                del self._users[number], self._given[number]
                shutil.rmtree(adapter.lora_path, ignore_errors=True)


def one_span(version: int, num_tokens: int) -> "list[WeightVersionSpan]":
    """What vLLM says of an answer that one version of the weights wrote."""
    from vllm.outputs import WeightVersionSpan

    return [WeightVersionSpan(str(version), 0, num_tokens)]
