"""The shell scripts: --help, unknown arguments and variables, mistakes, and which line comes last."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from training import ROOT

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("scripts/*.sh"), *ROOT.glob("datasets/*.sh")))
SCRIPTS.remove("scripts/common.sh")
NEED_TORCH = ("sample", "score", "train_progressive", "train_slurm")  # the others run setup.sh
NO_TORCH = "no torch found: run 'bash scripts/setup.sh' first"


def write_commands(folder, commands):
    for name, code in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def bash(tmp_path):
    """A function that runs a copy of a script with only a few harmless commands; the script may change no file."""
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
        *((f"{name}.sh", "", {"CKPT": "x"}, [NO_TORCH]) for name in NEED_TORCH),
        *((f"{name}.sh", "", {"GPUS": "0"}, ["GPUS=0: "]) for name in ("quickstart", "weizmann")),
        *((f"{name}.sh", "", {"EXP": "x"}, ["EXP=x: ", "expected one of: (none yet)"]) for name in ("sample", "score")),
        ("score.sh", "", {"METRIC": "prediction", "REAL": "many"}, ["REAL=many: ", "at least 1"]),
        *(
            ("train_progressive.sh", flags, dict(pair.split("=") for pair in variables.split()), words)
            for flags, variables, words in [
                ("", "BATCH_3=0", ["BATCH_3=0: ", "at least 1"]),
                ("", "STEPS_2=9 STEPS_1=9", ["STEPS_2=9: not above STEPS_1=9"]),
                ("", "STEPS_3=100000", ["STEPS_3=100000: not above STEPS_2=100000"]),
                ("", "FRAMES_3=4", ["FRAMES_3=4: ", "ONE_RUN=1"]),
                ("", "CACHE=yes", ["CACHE=yes: ", "0 or 1"]),
                ("--max-steps=5", "", ["--max-steps: ", "STEPS_3"]),
                ("--ckpt x", "", ["--ckpt: ", "ONE_RUN=1"]),
            ]
        ),
    ],
)
def test_a_mistake_or_a_missing_environment_is_one_line(script, arguments, variables, words, bash):
    done = bash(f"scripts/{script}", *arguments.split(), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ") and all(word in line for word in words)


@pytest.mark.parametrize("script", ["sample.sh", "train_progressive.sh"])
def test_one_process_is_python_and_of_several_our_line_comes_last(script, bash):
    wrong = '[[ -z ${EQM_ERROR_FILE:-} ]] || echo "wrong flag" >>"$EQM_ERROR_FILE"'
    python = '[[ $* == *--dry-run* ]] || { echo "python $1"; exit 2; }'
    commands = {"python": python, "torchrun": f'{wrong}\necho "a long report" >&2; exit 1'}
    done = bash(f"scripts/{script}", commands=commands, GPUS="1", CACHE="0", CKPT="x")
    assert (done.returncode, done.stderr) == (2, "") and done.stdout.startswith("python EqM/")
    done = bash(f"scripts/{script}", commands=commands, GPUS="2", CACHE="0", CKPT="x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "a long report\nwrong flag\n")


def test_a_mistake_of_any_phase_ends_the_script_before_the_cache(bash):
    """The check runs in one process, which knows the number of ranks."""
    python = '[[ $* == *--dry-run* ]] || exit 9; echo "$WORLD_SIZE ranks, $*" >&2; exit 2'
    commands = {"python": python, "torchrun": "exit 9"}
    done = bash("scripts/train_progressive.sh", "--lr", "x", commands=commands, GPUS="2")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("2 ranks, EqM/train.py")
    assert "--frames-schedule=4:50000:256,8:100000:128,16:150000:64 --vae=ema --image-size=256 --lr x" in done.stderr


def test_more_processes_than_gpus_are_refused(bash):
    commands = {"nvidia-smi": 'echo "GPU 0: a"; echo "GPU 1: b"', "torchrun": "echo started"}
    done = bash("scripts/sample.sh", commands=commands, GPUS="3", CKPT="x")
    assert (done.returncode, done.stderr) == (2, "sample.sh: error: GPUS=3: this machine has 2; set GPUS=2\n")
    assert bash("scripts/sample.sh", GPUS="2", CKPT="x").stdout == "started\n"


@pytest.mark.parametrize("script", ["sample.sh", "score.sh"])
def test_an_unknown_experiment_lists_the_models(script, bash, tmp_path):
    for name in ("results/mine/000-a/checkpoints/best.pt", "results/mine/001-b/checkpoints/best.pt",
                 "results/export/model.safetensors", "results/begun/000-a/checkpoints/latest.pt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    done = bash(f"scripts/{script}", EXP="mien")
    assert done.returncode == 2 and "EXP=mien: " in done.stderr and "one of: export mine;" in done.stderr
    commands = {"python": 'echo "$*"', "torchrun": ""}
    assert "--ckpt=results/export " in bash(f"scripts/{script}", commands=commands, EXP="export").stdout


def test_ctrl_c_reaches_a_run_of_one_process(bash, tmp_path):
    code = "trap 'echo saved; exit' TERM; echo started; while true; do sleep 0.05; done"
    code = f"[[ $* == *--dry-run* ]] && exit\n{code}"
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
