"""New weights for a running engine: the worker's side of `vllm.VllmEngine.reload`.

vLLM adds `Reloadable` to its workers (``worker_extension_cls``), so that its own layer-wise reload
runs in the process that has the model.
"""

from typing import Any

from raystill.serve.engine.capture import Capture

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
