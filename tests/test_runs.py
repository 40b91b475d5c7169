"""Run folders: their numbers, what is kept in them, what is cleaned up."""

from runtime import runs


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_folders_are_numbered_and_none_is_used_twice(tmp_path):
    root = tmp_path / "results" / "exp"
    first, second = (runs.make_run_folder(root, name) for name in ("EqM-S-4-f4-rope", "EqM-B-2-f8"))
    assert [first.name, second.name] == ["000-EqM-S-4-f4-rope", "001-EqM-B-2-f8"]
    assert names(first) == ["checkpoints", "samples"]
    (root / "notes.txt").write_text("")
    (root / "041-EqM-S-4-f4-rope").mkdir()
    assert runs.make_run_folder(root, "x").name == "042-x"


def test_the_newest_run_is_the_last_of_its_name(tmp_path):
    assert runs.newest_run(tmp_path / "missing", "a") is None
    folders = [runs.make_run_folder(tmp_path, name) for name in ("a", "a", "a", "a-rope")]
    assert [folder.name for folder in folders] == ["000-a", "001-a", "002-a", "003-a-rope"]
    assert runs.newest_run(tmp_path, "a") == folders[2]


def test_the_last_checkpoints_are_kept_with_best_and_latest(tmp_path):
    folder = runs.make_run_folder(tmp_path, "a") / "checkpoints"
    for name in ("0000010.pt", "0000020.pt", "0000030.pt", "9999999.pt", "best.pt", "latest.pt"):
        (folder / name).touch()
    before = sorted(folder.iterdir())
    runs.keep_last(folder.parent, None)
    assert sorted(folder.iterdir()) == before
    runs.keep_last(folder.parent, 2)
    assert {path.name for path in folder.iterdir()} == {"0000030.pt", "9999999.pt", "best.pt", "latest.pt"}


def test_what_a_killed_process_was_writing_is_cleaned_up(tmp_path):
    folder = runs.make_run_folder(tmp_path, "a")
    for name in ("checkpoints/latest.pt.tmp", "metrics.jsonl.tmp", "checkpoints/latest.pt"):
        (folder / name).touch()
    runs.remove_temporary_files(folder)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["latest.pt"]
