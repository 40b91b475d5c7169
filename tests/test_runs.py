"""Run folders: their numbers, what is kept in them, what is cleaned up."""

import json
import os
from unittest.mock import Mock

import pytest

from run import Run
from runtime import runs
from runtime.cli import UserError
from training import names, no_space


def test_run_folders_have_unique_numbers_and_the_newest_is_found(tmp_path):
    root = tmp_path / "results/exp"
    assert runs.newest_run(root, "a") is None
    folders = [runs.make_run_folder(root, name) for name in ("a", "a", "a-rope")]
    assert [folder.name for folder in folders] == ["000-a", "001-a", "002-a-rope"]
    assert names(folders[0]) == ["checkpoints", "lock", "samples"]
    assert runs.newest_run(root, "a") == folders[1]
    (root / "notes.txt").write_text("")
    (root / "041-a-rope").mkdir()
    assert runs.make_run_folder(root, "x").name == "042-x"


def test_a_config_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text("old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left"):
        Run.write_config(Mock(folder=tmp_path), {"new": 1})
    assert config.read_text() == "old"


@pytest.mark.parametrize(
    "name, flag",
    [
        ("EqM-S-4-f8", "--use-rope"),
        ("EqM-S-4-f4-8-16-rope", "--num-frames"),
        ("EqM-XL-2-f8-rope", "--model"),
        ("EqM-S-4-f8-rope-causal", "--causal"),
    ],
)
def test_a_run_that_differs_in_one_flag_is_named(name, flag, tmp_path):
    for other in (f"001-{name}", "002-EqM-XL-2-f4-rope", "003-VAE-64px-f8-rope", "notes"):
        (tmp_path / other).mkdir()
    text = runs.name_similar(tmp_path, "EqM-S-4-f8-rope")
    assert text == f"; 001-{name} differs only in {flag}: change it to resume that run"
    assert runs.name_similar(tmp_path, "VAE-1px") == ""
    assert "--model" not in runs.name_similar(tmp_path, "EqM-*-f8-rope")  # not known yet


def test_a_restarted_rank_waits_until_the_lock_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    lock = tmp_path / "lock"
    lock.write_text("")  # rank 0 is writing it

    def write(seconds):
        lock.write_text(json.dumps({"job": runs.job_name()}))

    monkeypatch.setattr(runs.time, "sleep", write)
    assert runs.is_restarted(tmp_path)


def test_a_restarted_job_finds_its_own_run_beside_a_newer_one(tmp_path, monkeypatch):
    for job in (runs.job_name(), "another"):
        folder = runs.make_run_folder(tmp_path, "a")
        (folder / "lock").write_text(json.dumps({"job": job}))
    assert runs.newest_run(tmp_path, "a") == folder
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert runs.newest_run(tmp_path, "a") == tmp_path / "000-a"


def test_a_file_system_without_locks_is_noted_once(tmp_path, monkeypatch, capsys):
    no_locks = Mock(side_effect=OSError(38, "Function not implemented"))
    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    folder = runs.make_run_folder(tmp_path, "a")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {folder} is not protected against a second writer")
    assert "no file locks" in line


def test_the_last_checkpoints_and_those_of_phases_are_kept_and_half_written_files_removed(tmp_path):
    folder = runs.make_run_folder(tmp_path, "a") / "checkpoints"
    for name in ("0000010.pt", "0000020.pt", "0000030.pt", "10000000.pt", "best.pt", "latest.pt"):
        (folder / name).touch()
    before = names(folder)
    runs.keep_last(folder.parent, None, step=10**7)
    assert names(folder) == before
    runs.keep_last(folder.parent, 1, step=20)
    assert names(folder) == before[1:]  # those after step 20 are of a run that went back
    (folder / "0000010.pt").touch()
    runs.keep_last(folder.parent, 2, step=10**7, always={10})
    assert names(folder) == ["0000010.pt", "0000030.pt", "10000000.pt", "best.pt", "latest.pt"]
    kept = names(folder)
    # of a killed process
    (folder / "latest.pt.tmp").touch()
    (folder.parent / "metrics.jsonl.tmp").touch()
    runs.remove_temporary_files(folder.parent)
    assert names(folder) == kept
    assert names(folder.parent) == ["checkpoints", "lock", "samples"]
