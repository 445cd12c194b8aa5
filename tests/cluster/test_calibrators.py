"""The processes of a calibration as Ray's actors: one group, which one failure ends."""

import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError

from raystill.cluster.commands.calibrators import Calibrators
from raystill.model.on_node import ModelSource
from tests.train.test_calibrate_together import (
    OBJECTIVE,
    config_of,
    found_by,
    numbers,
    one_core,
    write_teacher,
)


@pytest.mark.ray
def test_two_actors_find_what_one_process_finds_and_end_together(
    tmp_path: Path, ray_cluster: None
) -> None:
    rows = write_teacher(tmp_path)
    config, source = config_of(tmp_path, 24), ModelSource.of("teacher", tmp_path / "teacher")
    with one_core():
        alone = found_by(tmp_path, 24, trained=False)
    with Calibrators(config, source, ray.put(rows), 24) as calibrators:
        assert calibrators.all("load", None) == alone["parameters"]
        assert calibrators.first("describe") == alone["described"]
        expected = pytest.approx(numbers(alone["compared"]), abs=1e-6, rel=1e-6, nan_ok=True)
        assert numbers(calibrators.all("compare", OBJECTIVE)) == expected
        # The first one alone reads a student: the second waits for its outline.
        with pytest.raises(RayTaskError, match="nowhere"):
            calibrators.all("load", str(tmp_path / "nowhere"))
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        time.sleep(0.1)  # They are gone, the one that waited too.
