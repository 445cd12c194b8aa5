"""A student is pushed to a server that plays the Hub: what goes there, what stays, what is told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import driver
from raystill.base.run_folder import RunFolder
from raystill.cluster.lineage import hub as pushing
from raystill.cluster.lineage.hub import check_hub, push_finished, push_student
from raystill.config.run import RunConfig
from raystill.config.training import HubConfig
from tests.support.hub import TOKEN, XET_TOKEN, Hub, Repository, serve
from tests.support.json_service import JsonHandler, Server, serving

MINE = HubConfig(repo="me/small")
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 5000,
    "README.md": b"---\nlicense: mit\n---\n# small\n",
    "LICENSES/a.txt": b"MIT",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub of huggingface_hub, without Xet, whose protocol is not HTTP alone."""
    hub = Hub()
    server = serve(hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(pushing, "PAUSE_S", 0.01)
    yield hub
    server.shutdown()
    server.server_close()


class Storage(JsonHandler):
    """A server of Xet's that refuses everybody; what it was shown is in ``asked``."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.refuse()

    def do_POST(self) -> None:
        self.refuse()

    def refuse(self) -> None:
        shown = f"{self.headers}{self.body().decode(errors='replace')}"
        self.asked.append((self.path, shown))
        self.send(401, {})


@pytest.fixture
def asked_of_xet(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """hf_xet itself, and what it asks of its servers."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    kind = type("Mine", (Storage,), {"asked": []})
    with serving(Server(("127.0.0.1", 0), kind)) as storage:
        hub.storage = f"http://127.0.0.1:{storage.server_address[1]}"
        yield kind.asked


def finished(tmp_path: Path, **files: bytes) -> RunFolder:
    folder = RunFolder(str(tmp_path / "run")).ensure()
    for name, content in {**FILES, **files}.items():
        path = tmp_path / "run" / "student" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def remote(hub: Hub, name: str = "me/small") -> dict[str, bytes]:
    files = hub.repositories[name].files
    return {path: content for path, (content, _) in files.items() if path != ".gitattributes"}


def test_all_files_go_in_one_commit_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    folder = finished(tmp_path)
    record = push_student(folder, MINE)
    assert remote(hub) == FILES
    repository = hub.repositories["me/small"]
    assert repository.private and len(repository.commits) == 2
    assert repository.files["model.safetensors"][1]  # As a large file, not in the commit.
    assert record == json.loads(folder.read_text("hub.json"))
    assert record["commit"] == repository.commits[-1] and record["sent"] == 4
    assert TOKEN not in folder.read_text("hub.json")
    again = push_student(folder, MINE)
    assert again["sent"] == 0 and len(repository.commits) == 2


def test_a_student_that_went_on_replaces_what_we_pushed(hub: Hub, tmp_path: Path) -> None:
    push_student(finished(tmp_path), MINE)
    folder = finished(tmp_path, **{"model.safetensors": b"more"})
    (tmp_path / "run/student/config.json").unlink()
    assert push_student(folder, MINE)["sent"] == 1
    assert "config.json" not in remote(hub) and remote(hub)["model.safetensors"] == b"more"
    hub.repositories["me/small"].commits.append("b" * 40)  # Somebody else has pushed since.
    with pytest.raises(pushing.PushRefused, match="files that are not this student's"):
        push_student(finished(tmp_path, **{"model.safetensors": b"again"}), MINE)


def test_a_repository_with_other_files_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    theirs = {"README.md": (b"mine!", False), "pytorch_model.bin": (b"y", True)}
    hub.repositories["me/small"] = Repository(True, dict(theirs))
    folder = finished(tmp_path)
    with pytest.raises(pushing.PushRefused, match=r"\(README.md, pytorch_model.bin\).*--replace"):
        push_student(folder, MINE)
    assert hub.repositories["me/small"].files == theirs and not folder.exists("hub.json")
    push_student(folder, MINE, replace=True)
    assert remote(hub) == FILES


@pytest.mark.parametrize("place", ["note.txt", "LICENSES/b.txt", "more", "."])
def test_a_link_is_not_pushed(hub: Hub, tmp_path: Path, place: str) -> None:
    folder, private = finished(tmp_path), tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("of whoever pushes")
    student = tmp_path / "run/student"
    if place == ".":
        student.rename(tmp_path / "elsewhere")
        student.symlink_to(private)
    else:
        (student / place).symlink_to(private if place == "more" else private / "key")
    with pytest.raises(pushing.PushRefused, match=r"is a link to .*links are not pushed"):
        push_student(folder, MINE)
    assert "me/small" not in hub.repositories and not folder.exists("hub.json")


def test_a_public_repository_takes_no_private_student(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/small"] = Repository(False)
    with pytest.raises(pushing.PushRefused, match="is there and public"):
        push_student(finished(tmp_path), MINE, replace=True)
    push_student(finished(tmp_path), HubConfig(repo="me/small", private=False))
    assert remote(hub) == FILES


def test_a_student_that_owes_a_prefix_is_handed_on_with_it_alone(hub: Hub, tmp_path: Path) -> None:
    folder = finished(tmp_path)
    terms = {"duties": [["name_prefix", "HyperCLOVA X"]], "distributed": True}
    folder.write_text("manifest.json", json.dumps({"terms": terms}))
    with pytest.raises(pushing.PushRefused, match="such as me/HyperCLOVA-X-small"):
        push_student(folder, MINE)
    assert not hub.repositories
    push_student(folder, HubConfig(repo="me/hyperclova-x-small"))
    folder.write_text("manifest.json", json.dumps({"terms": {**terms, "distributed": False}}))
    (tmp_path / "run/hub.json").unlink()
    push_student(folder, MINE)
    with pytest.raises(pushing.PushRefused, match="begins with HyperCLOVA X"):
        push_student(folder, HubConfig(repo="me/open", private=False))


@pytest.mark.parametrize(
    ("part", "statuses", "said"),
    [
        ("create", [401], "does not accept the token"),
        ("create", [403], "may not write to me"),
        ("commit", [403], "may not write to me"),
        ("commit", [409], "changed by somebody else"),
        ("commit", [412], "changed by somebody else"),
        ("create", [400], "the Hub failed"),
        ("commit", [500] * 30, "the Hub failed"),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_remedy(
    hub: Hub, tmp_path: Path, part: str, statuses: list[int], said: str
) -> None:
    """And the same push goes through as soon as nothing is in its way."""
    hub.fail[part] = list(statuses)
    folder = finished(tmp_path)
    with pytest.raises(pushing.PushRefused, match=said) as caught:
        push_student(folder, MINE)
    assert TOKEN not in str(caught.value) and not folder.exists("hub.json")
    hub.fail.clear()
    push_student(folder, MINE)
    assert remote(hub) == FILES


def test_failures_that_pass_are_sat_out_and_no_large_file_is_sent_twice(
    hub: Hub, tmp_path: Path
) -> None:
    hub.fail = {"commit": [500, 502]}
    push_student(finished(tmp_path), MINE)
    assert remote(hub) == FILES and len(hub.repositories["me/small"].commits) == 2
    large = [name for name in hub.calls if name.startswith("PUT")]
    assert [hub.calls[name] for name in large] == [1]


def test_a_commit_of_which_the_answer_was_lost_is_not_made_again(hub: Hub, tmp_path: Path) -> None:
    """The push finds its own files there, and has nothing to send."""
    hub.lost = 1
    folder = finished(tmp_path)
    record = push_student(folder, MINE)
    repository = hub.repositories["me/small"]
    assert len(repository.commits) == 2 and record["commit"] == repository.commits[-1]
    (tmp_path / "run/hub.json").unlink()
    assert push_student(folder, MINE)["sent"] == 0
    assert len(repository.commits) == 2 and remote(hub) == FILES


def test_somebody_who_commits_at_the_same_time_loses_nothing(hub: Hub, tmp_path: Path) -> None:
    def theirs(repository: Repository) -> None:
        repository.files["README.md"] = (b"theirs", False)
        repository.commits.append("c" * 40)

    hub.before_commit = theirs
    with pytest.raises(pushing.PushRefused, match="changed by somebody else"):
        push_student(finished(tmp_path), MINE)
    assert remote(hub) == {"README.md": b"theirs"}


def test_an_upload_that_is_cut_is_sent_again(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 100
    push_student(finished(tmp_path), MINE)
    assert remote(hub) == FILES


def test_xets_servers_are_shown_no_token_of_the_hub_and_get_no_reports(
    hub: Hub, asked_of_xet: list[tuple[str, str]], tmp_path: Path
) -> None:
    """It goes there after what the push requires of the repository, and before any commit."""
    hub.repositories["me/open"] = Repository(False)
    with pytest.raises(pushing.PushRefused, match="is there and public"):
        push_student(finished(tmp_path), HubConfig(repo="me/open"))
    assert not asked_of_xet and not hub.calls["GET main"]
    with pytest.raises(pushing.PushRefused, match=r"Xet.*401.*HF_HUB_DISABLE_XET=1") as told:
        push_student(finished(tmp_path), MINE)
    assert asked_of_xet and hub.repositories["me/small"].private
    assert len(hub.repositories["me/small"].commits) == 1, "files are named that are not there"
    assert all(XET_TOKEN in shown and TOKEN not in shown for _, shown in asked_of_xet)
    assert not [path for path, _ in asked_of_xet if "telemetry" in path]
    assert TOKEN not in str(told.value) and XET_TOKEN not in str(told.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # As it says.
        push_student(finished(tmp_path), MINE)
    assert remote(hub) == FILES


@pytest.mark.parametrize(
    ("status", "said"), [(401, "does not accept the token"), (403, "may not write to me")]
)
def test_a_token_that_the_hub_refuses_for_xet_is_told_with_its_remedy(
    hub: Hub, asked_of_xet: list[tuple[str, str]], tmp_path: Path, status: int, said: str
) -> None:
    hub.fail["xet-write-token"] = [status]
    with pytest.raises(pushing.PushRefused, match=said):
        push_student(finished(tmp_path), MINE)
    assert not asked_of_xet and not hub.fail["xet-write-token"]


def test_a_run_is_finished_also_where_its_push_is_refused(hub: Hub, tmp_path: Path) -> None:
    told: list[str] = []
    push_finished(finished(tmp_path), config_of(repo="other/small"), told.append)
    assert "may not write to other" in told[0] and "push it later" in told[1]
    push_finished(finished(tmp_path), config_of(), told.append)
    assert told[2] == f"The student is at {hub.url}/me/small"
    push_finished(finished(tmp_path), RunConfig.model_validate(BASE), told.append)
    assert len(told) == 3


BASE: dict[str, Any] = {
    "teacher": {"model": "m"},
    "student": {"layers": [0]},
    "prompts": {"path": "p.jsonl"},
}


def config_of(repo: str = "me/small", distributed: bool = False, **more: Any) -> RunConfig:
    sections = {"output": {"hub": {"repo": repo, **more}}, "terms": {"distributed": distributed}}
    return RunConfig.model_validate(BASE | sections)


@pytest.mark.parametrize(
    "repo",
    ["small", "a/b/c", "me/", "/x", "me/x.git", "me/a--b", "me/..", "me/a b", "-me/x", "mé/x"],
)
def test_a_name_that_the_hub_does_not_take_is_refused(repo: str) -> None:
    with pytest.raises(ValueError, match="expected owner/name"):
        HubConfig(repo=repo)


def test_the_check_looks_before_anything_is_spent(hub: Hub, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "new"))
    assert check_hub(config_of(), folder) == ([], [])
    assert not hub.repositories  # It creates nothing.
    hub.repositories["me/small"] = Repository(True, {"x.bin": (b"1", True)})
    (problem,), _ = check_hub(config_of(), folder)
    assert problem.where == "output.hub" and "x.bin" in problem.message
    (problem,), _ = check_hub(config_of(private=False), folder)
    assert problem.where == "output.hub.private" and "terms.distributed" in problem.message
    hub.fail["models"] = [500] * 30
    problems, (notice,) = check_hub(config_of("me/other"), folder)
    assert not problems and "could not be asked about me/other" in notice
    hub.fail.clear()
    remote_folder = RunFolder("s3://bucket/run")
    (problem,), _ = check_hub(config_of("me/other"), remote_folder)
    assert "local run folder" in problem.message


def test_the_check_needs_a_token_and_tells_it_to_nobody(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(str(tmp_path / "new"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (problem,), _ = check_hub(config_of(), folder)
    assert "HF_HUB_OFFLINE is set" in problem.message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    (problem,), _ = check_hub(config_of(), folder)
    assert "set HF_TOKEN" in problem.message and TOKEN not in problem.message
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    problems, notices = check_hub(config_of(), folder)
    assert TOKEN not in str((problems, notices))


def test_the_command_pushes_a_finished_run(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path).path
    assert driver.main(["push", folder]) == driver.EXIT_REFUSED
    assert "--to" in capsys.readouterr().err
    assert driver.main(["push", folder, "--to", "me"]) == driver.EXIT_REFUSED
    assert driver.main(["push", folder, "--to", "me/small"]) == 0
    assert f"4 of 4 files sent: {hub.url}/me/small" in capsys.readouterr().out
    assert driver.main(["push", folder, "--to", "me/small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sent"] == 0
    assert driver.main(["push", str(tmp_path / "none"), "--to", "me/small"]) == driver.EXIT_FAILED
    told = capsys.readouterr()
    assert "has no folder student" in told.err and TOKEN not in told.err + told.out
