"""What README and docs say is so: commands parse, links lead somewhere, numbers are those of the files in results/."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from training import ROOT

PAGES = [ROOT / "README.md", ROOT / "datasets/README.md", ROOT / "results/README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "results/demo/README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NO_FILE = ("model", "`--forcing`")  # first words of tables whose numbers were measured without a file in results/


def commands():
    """(page, script, words) of every Python script that is called in a block of shell code."""
    for page in PAGES:
        for block in re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(), flags=re.S):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                line = re.sub(r'\[[-a-z].*?\]|"\$\{FLAGS\[@\]\}"', "", line)  # what may be left out
                words = shlex.split(line, comments=True)
                scripts = [word for word in words if re.fullmatch(r"(EqM|scripts|datasets)/.*\.py", word)]
                if scripts and "..." not in words:
                    yield page, scripts[0], words[words.index(scripts[0]) + 1 :]


def test_every_command_is_parsed_by_its_script(monkeypatch):
    found = list(commands())
    assert len(found) > 30
    for page, script, words in found:
        assert (ROOT / script).is_file(), (page, script)
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(sys, "argv", [script, *words])
        try:
            module.parse_args()
        except SystemExit:
            pytest.fail(f"{page.name}: {script} {shlex.join(words)}")


def test_links_lead_to_files_and_shell_scripts_exist():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), (page, target)
        for script in re.findall(r"\b(?:scripts|datasets)/\w+\.sh\b", text):
            assert (ROOT / script).exists(), (page, script)


# Numbers.


def tables(path):
    """The rows of all tables of a page, each a list of its cells."""
    found = re.findall(r"^(?:\|.*\n)+", path.read_text(), flags=re.M)
    lines = [line for table in found if not table.startswith(tuple(f"| {word} |" for word in NO_FILE))
             for line in table.splitlines()]  # fmt: skip
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def decimals(text):
    return re.findall(r"(?<![\w.])-?\d+\.\d+", text)


def test_every_decimal_number_in_a_table_is_one_of_those_in_results():
    known = {number for path in (ROOT / "results").rglob("*.md") for number in decimals(path.read_text())}
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for row in tables(page):
            assert set(decimals(" ".join(row))) <= known, (page.name, row)


def test_the_rows_of_the_benchmark_and_of_the_demo_are_those_of_their_files():
    rows = {row["ratio"]: row for row in json.loads((ROOT / "results/benchmark.json").read_text())["rows"]}
    for row in tables(ROOT / "results/benchmark.md") + [row for page in PAGES for row in tables(page)]:
        if row[0] in rows:
            assert float(row[1]) == pytest.approx(rows[row[0]]["median"], rel=6e-3), row
    header = ["frames", "direction right", "shape right", "speed / true", "area / true"]
    for page in PAGES:
        found = tables(page)
        for start in (number for number, row in enumerate(found) if row == header):
            for frames, *cells in found[start + 2 : start + 7]:
                values = json.loads((ROOT / f"results/demo/motion-{frames.split(',')[0]}.json").read_text())["values"]
                shown = [f"{values['direction_accuracy']:.1%}", f"{values['shape_accuracy']:.1%}"]
                shown += [f"{values['speed_ratio']:.2f}", f"{values['area_ratio']:.2f}"]
                assert [cell.split(" ")[0] for cell in cells] == shown, (page.name, frames)
