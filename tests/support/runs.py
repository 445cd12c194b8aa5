"""A `Run` for tests: what the driver would make, with stand-ins for what a test does not use."""

from typing import Any

from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.model.on_node import ModelSource
from raystill.run import Run


def run_of(config: RunConfig, folder: RunFolder, teacher: str = "nowhere", **more: Any) -> Run:
    """A run named ``run`` of one row, whose store is in its folder; ``more``: other fields."""
    fields: dict[str, Any] = {
        "id": "run",
        "teacher": ModelSource.of(config.teacher.model, teacher),
        "teacher_identity": "identity",
        "store_path": folder.join("store"),
        "num_rows": 1,
    }
    return Run(config=config, folder=folder, **fields | more)
