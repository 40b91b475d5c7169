"""Run folders: their numbers, what is kept in them, what is cleaned up."""

from unittest.mock import Mock

import pytest

from runtime import runs


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_folders_have_unique_numbers_and_the_newest_is_found(tmp_path):
    root = tmp_path / "results" / "exp"
    assert runs.newest_run(root, "a") is None
    folders = [runs.make_run_folder(root, name) for name in ("a", "a", "a-rope")]
    assert [folder.name for folder in folders] == ["000-a", "001-a", "002-a-rope"]
    assert names(folders[0]) == ["checkpoints", "lock", "samples"]
    assert runs.newest_run(root, "a") == folders[1]
    (root / "notes.txt").write_text("")
    (root / "041-a-rope").mkdir()
    assert runs.make_run_folder(root, "x").name == "042-x"


NEAR = {  # runs that are there -> what a missing run EqM-S-4-f8-rope is told
    (
        "EqM-S-4-f8",
        "VAE-64px-f8-rope",
    ): "; 001-EqM-S-4-f8 differs only in --use-rope: change it to resume that run",
    (
        "EqM-S-4-f8",
        "EqM-S-4-f4-8-16-rope",
    ): "; 002-EqM-S-4-f4-8-16-rope differs only in --num-frames: change it",
    ("EqM-XL-2-f8-rope",): "; 001-EqM-XL-2-f8-rope differs only in --model: change it",
    ("EqM-XL-2-f4-rope", "VAE-64px-f4-c4-8-8-8", "notes"): "",
}


@pytest.mark.parametrize("found", NEAR)
def test_a_run_that_differs_in_one_flag_is_named(found, tmp_path):
    for number, name in enumerate(found, start=1):
        (tmp_path / f"{number:03d}-{name}").mkdir()
    text = runs.name_similar(tmp_path, "EqM-S-4-f8-rope")
    assert text.startswith(NEAR[found])
    assert bool(text) == bool(NEAR[found])
    assert runs.name_similar(tmp_path, "VAE-1px") == ""
    unknown_model = runs.name_similar(tmp_path, "EqM-*-f8-rope")
    assert ("--model" in unknown_model, "--use-rope" in unknown_model) == (
        False,
        "--use-rope" in text,
    )


def test_a_file_system_without_locks_is_noted_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        runs.fcntl, "flock", Mock(side_effect=OSError(38, "Function not implemented"))
    )
    folder = runs.make_run_folder(tmp_path, "a")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {folder} is not protected against a second writer")
    assert "no file locks" in line


def test_the_last_checkpoints_and_those_of_phases_are_kept_and_half_written_files_removed(tmp_path):
    folder = runs.make_run_folder(tmp_path, "a") / "checkpoints"
    for name in ("0000010.pt", "0000020.pt", "0000030.pt", "10000000.pt", "best.pt", "latest.pt"):
        (folder / name).touch()
    before = names(folder)
    runs.keep_last(folder.parent, None)
    assert names(folder) == before
    runs.keep_last(folder.parent, 2, always={10})
    assert names(folder) == ["0000010.pt", "0000030.pt", "10000000.pt", "best.pt", "latest.pt"]
    kept = names(folder)
    (
        (folder / "latest.pt.tmp").touch(),
        (folder.parent / "metrics.jsonl.tmp").touch(),
    )  # of a killed process
    runs.remove_temporary_files(folder.parent)
    assert names(folder) == kept
    assert names(folder.parent) == ["checkpoints", "lock", "samples"]
