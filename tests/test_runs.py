"""Run folders: their numbers, what is kept in them, what is cleaned up."""

from runtime import runs


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_folders_are_numbered_none_is_used_twice_and_the_last_is_found(tmp_path):
    root = tmp_path / "results" / "exp"
    assert runs.newest_run(root, "a") is None
    folders = [runs.make_run_folder(root, name) for name in ("a", "a", "a-rope")]
    assert [folder.name for folder in folders] == ["000-a", "001-a", "002-a-rope"]
    assert names(folders[0]) == ["checkpoints", "lock", "samples"]
    assert runs.newest_run(root, "a") == folders[1]
    (root / "notes.txt").write_text("")
    (root / "041-a-rope").mkdir()
    assert runs.make_run_folder(root, "x").name == "042-x"


def test_the_last_checkpoints_are_kept_with_those_that_have_a_meaning(tmp_path):
    folder = runs.make_run_folder(tmp_path, "a") / "checkpoints"
    for name in ("0000010.pt", "0000020.pt", "0000030.pt", "10000000.pt", "best.pt", "latest.pt"):
        (folder / name).touch()
    before = names(folder)
    runs.keep_last(folder.parent, None)
    assert names(folder) == before
    runs.keep_last(folder.parent, 2, always={10})
    assert names(folder) == ["0000010.pt", "0000030.pt", "10000000.pt", "best.pt", "latest.pt"]


def test_what_a_killed_process_was_writing_is_cleaned_up(tmp_path):
    folder = runs.make_run_folder(tmp_path, "a")
    for name in ("checkpoints/latest.pt.tmp", "metrics.jsonl.tmp", "checkpoints/latest.pt"):
        (folder / name).touch()
    runs.remove_temporary_files(folder)
    assert [path.name for path in folder.rglob("*.*")] == ["latest.pt"]
