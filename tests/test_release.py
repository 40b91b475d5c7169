"""A release: one version everywhere, the formats that it promises to read, and a workflow that checks it."""

import re
from pathlib import Path

import yaml

import checkpoint
from video import index, source

ROOT = Path(__file__).resolve().parents[1]
CHANGES = (ROOT / "CHANGELOG.md").read_text()


def test_the_newest_version_is_the_version_to_cite():
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((\S+)\)$", CHANGES, re.M)
    assert newest.groups() == (about["version"], str(about["date-released"]))


def test_the_promise_names_the_formats_that_the_code_writes():
    rows = re.findall(r"^\| (\w[\w ]*):.* \| (\d+|-) \|$", CHANGES, re.M)
    assert dict(rows) == {
        "checkpoint": str(checkpoint.VERSION), "exported folder": str(checkpoint.VERSION),
        "latent or pixel cache": str(source.LATENTS_FORMAT), "sample folder": "-",
        "index of a scan": str(index.INDEX_FORMAT),
    }  # fmt: skip


def test_github_runs_the_checks_of_a_clean_machine_on_pushes_and_pull_requests():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML reads the key `on` as true
    steps = workflow["jobs"]["run"]["steps"]
    assert steps[-1] == {"run": "bash .ci/run"} and (ROOT / ".ci/run").is_file()
    assert {"python-version": "3.11"} in [step.get("with") for step in steps]
