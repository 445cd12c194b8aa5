"""What the driver says of a run that ends otherwise than it should."""

from pathlib import Path

import pytest

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.job.watch import failure, nothing_to_keep


@pytest.mark.ray
def test_what_a_task_says_in_a_sentence_is_shown_without_its_traceback(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def task() -> None:
        raise RunError("the served teacher and the plain model disagree")

    with pytest.raises(RunError, match=r"test_watch\.py") as raised:
        ray.get(task.remote())
    told = failure("the teacher", raised.value, RunFolder(str(tmp_path)))
    assert str(told) == "the served teacher and the plain model disagree"


def test_an_error_of_ours_is_shown_as_it_is_and_another_with_the_log_folder(tmp_path: Path) -> None:
    folder, ours = RunFolder(str(tmp_path)), RunError("no disk is left")
    assert failure("the student", ours, folder) is ours
    other = failure("the student", ValueError("first line\nlast line"), folder)
    assert str(other).startswith("the student failed: last line; the whole output is in ")


def test_a_stop_before_the_first_step_says_what_is_kept() -> None:
    assert nothing_to_keep(0) == "nothing was trained yet, so there is nothing to keep"
    assert nothing_to_keep(40) == "nothing was trained since the checkpoint of step 40"
