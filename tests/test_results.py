"""Each file in results/ says how it was made: commit, command, date and machine, also if a script
writes it today.
"""

import csv
import itertools
import re
import shutil
import subprocess

import pytest

import benchmark
import lab
from runtime.untrusted import read_json
from training import ROOT, run_main

RESULTS = ROOT / "results"
FOLDERS = [RESULTS, *RESULTS.glob("studies/*")]
FILES = sorted(path for folder in FOLDERS for path in folder.glob("[!.]*.[jc]s*"))
KEYS = "code", "command", "date", "machine"


def records_of(path):
    """What a result file says about how it was made: a dict per row, per command of a csv, or the
    only one.
    """
    path = path.with_suffix(".json")
    if not path.exists():
        return []
    content = read_json(path)
    return content if isinstance(content, list) else [content.get("made", {})]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_the_numbers_of_a_result_file_can_be_made_again_as_it_says_how(path):
    records = records_of(path)
    assert records, "says nothing"
    for record in records:
        assert record["command"] and record["machine"]
        assert re.fullmatch("[0-9a-f]{40}", record["code"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            codes = {row["code"] for row in csv.DictReader(file)}
        assert codes <= {record["code"] for record in records}


def test_every_table_has_its_numbers_or_its_command_beside_it():
    tables = [path for folder in FOLDERS for path in folder.glob("[!R]*.md")]
    assert len(tables) > 10
    for path in tables:
        assert path.with_suffix(".json").exists(), path.name


def git(*words, lines=""):
    """What git prints about the repository."""
    words = ["git", "-C", str(ROOT), *words]
    return subprocess.run(words, input=lines, capture_output=True, text=True).stdout


def has_full_history():
    return shutil.which("git") and git("rev-parse", "--is-shallow-repository") == "false\n"


def test_the_commits_of_results_exist_and_have_the_script_that_made_them():
    asked = set()
    for record in itertools.chain.from_iterable(map(records_of, FILES)):
        script = re.search(r"\S+\.(py|sh)\b", record["command"])
        asked.add(f"{record['code']}:{script[0]}")
    if has_full_history():  # neither a shallow clone nor an archive
        printed = git("cat-file", "--batch-check", lines="\n".join(asked))
        assert printed.count(" blob ") == len(asked), printed
    assert len(asked) > 10


# What scripts write -------------------------------------------------------------------------------


def test_the_command_is_the_words_of_the_process_with_quotes_and_variables(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "scripts/studies/study.py"), "--only", "16 fixed"])
    monkeypatch.setenv("GPUS", "1")
    monkeypatch.delenv("PRECISION", raising=False)
    made = benchmark.made()
    assert [*made] == [*KEYS]
    assert made["command"] == "GPUS=1 python scripts/studies/study.py --only '16 fixed'"
    assert made["machine"] == benchmark.machine() and re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"])


def test_rows_say_how_they_were_made(tmp_path):
    lab.add_rows(tmp_path / "rows.json", [{"value": 1}])
    assert [{*row} for row in lab.read_rows(tmp_path / "rows.json")] == [{"value", *KEYS}]


def test_the_benchmark_says_how_it_was_made(tmp_path, monkeypatch):
    (tmp_path / "results/studies/speed").mkdir(parents=True)
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(
        benchmark, "PARTS", {"step": lambda args, report: report.add("a / b", [1.0])}
    )
    run_main(benchmark)
    content = read_json(tmp_path / "results/studies/speed/benchmark.json")
    assert content["made"]["command"].endswith("benchmark.py") and content["rows"][0]["median"] == 1
