"""Ray Train's trainer, as a run needs it: one part less, and one more."""

import atexit
import signal
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

EXIT_S = 10


class SureExit(ControllerCallback):
    """Ends the process of Ray Train's controller where its own exit hangs.

    Ray 2.60 can lock itself up as it takes the controller's core worker down: the destructor of an
    object's publisher posts to the queue whose lock its caller holds. Without this, 4 of 11 runs
    with two workers left a process of 400 MB behind that nothing ends. The kernel's alarm, set as
    the interpreter begins to exit, needs neither it nor a thread.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train in the controller's process."""
        atexit.register(signal.alarm, EXIT_S)


class Trainer(TorchTrainer):
    """With `SureExit`, without Ray Train's actor that frees places should its controller die.

    The driver ends its job then, with which Ray frees them (not tested). An idle actor takes a
    hundredth of a core, on a machine of two from teacher and student.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
        return [*kept, SureExit()]
