"""The shell scripts: --help, words and variables that they do not know, and whose line comes last."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from training import ROOT

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("scripts/*.sh"), *ROOT.glob("datasets/*.sh")))
SCRIPTS.remove("scripts/common.sh")


def write_commands(folder, commands):
    for name, code in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def bash(tmp_path):
    """A function that runs a copy of a script, where only a few commands exist, and none that does anything."""
    for folder in ("scripts", "datasets"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("[!.]*.py", "stud*", "*.html"))
    (tmp_path / "bin").mkdir()
    for name in ("bash", "awk", "dirname", "basename", "cat", "rm", "mktemp", "ls", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))

    def run(script, *arguments, commands=None, **environment):
        write_commands(tmp_path / "bin", commands or {})
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        environment |= {"PATH": str(tmp_path / "bin"), "TMPDIR": str(tmp_path), "SLURM_SUBMIT_DIR": "."}
        command = [shutil.which("bash"), script, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return done

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_help_with_its_variables_and_does_nothing_else(script, bash):
    done = bash(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 100 and "#!" not in done.stdout and "set -e" not in done.stdout
    for name in set(re.findall(r"\b([A-Z][A-Z0-9_]*)=\$\{\1:-", (ROOT / script).read_text())):
        assert re.search(rf"\b{name}\b", done.stdout), name
    assert bash(script, "--other", "-h").stdout == done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "words"),
    [
        ("setup.sh", "dev x", {}, ["dev\\ x", "expected dev or nothing"]),
        *((f"{name}.sh", "please", {}, ["please", "--help"]) for name in ("quickstart", "weizmann")),
        *((f"{name}.sh", "demo", {}, ["demo", "--help"]) for name in ("sample", "train_progressive", "train_slurm")),
        ("faults.sh", "many", {}, ["many", "a number first"]),
        ("sample.sh", "", {"FRAME": "3"}, ["FRAME: ", "EXP CKPT FRAMES SAMPLES OUT GPUS"]),
        ("train_progressive.sh", "", {"DATA_PATH": "x"}, ["DATA_PATH: ", "DATA GPUS"]),
        ("sample.sh", "", {}, ["no torch here: run scripts/setup.sh first"]),
        ("train_progressive.sh", "", {}, ["no torch here: run scripts/setup.sh first"]),
    ],
)
def test_what_a_script_does_not_know_or_lacks_is_one_line(script, arguments, variables, words, bash):
    done = bash(f"scripts/{script}", *arguments.split(), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ") and all(word in line for word in words)


@pytest.mark.parametrize("script", ["sample.sh", "train_progressive.sh"])
def test_one_process_is_python_and_of_several_our_line_comes_last(script, bash):
    wrong = '[[ -z ${EQM_ERROR_FILE:-} ]] || echo "wrong flag" >>"$EQM_ERROR_FILE"'
    commands = {"python": 'echo "python $1"; exit 2', "torchrun": f'{wrong}\necho "a long report" >&2; exit 1'}
    done = bash(f"scripts/{script}", commands=commands, GPUS="1", CACHE="0")
    assert (done.returncode, done.stderr) == (2, "") and done.stdout.startswith("python EqM/")
    done = bash(f"scripts/{script}", commands=commands, GPUS="2", CACHE="0")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "a long report\nwrong flag\n")


def test_ctrl_c_reaches_a_run_of_one_process(bash, tmp_path):
    code = "trap 'echo saved; exit' TERM; echo started; while true; do sleep 0.05; done"
    write_commands(tmp_path / "bin", {"python": code, "torchrun": ""})
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "scripts/train_progressive.sh"], cwd=tmp_path, start_new_session=True, text=True,
        env=os.environ | {"PATH": path, "GPUS": "1", "CACHE": "0", "EXP": "x"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        found, _ = process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "saved" in found and "interrupted; the same command continues" in found
    assert process.returncode == 143
