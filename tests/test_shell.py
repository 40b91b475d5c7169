"""The shell scripts: --help, unknown arguments and variables, mistakes, and which line comes
last.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest

from process import end, spawn, write_commands
from test_odd_names import ODD
from training import ROOT, snapshot

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("scripts/*.sh"), *ROOT.glob("datasets/*.sh"))
)
SCRIPTS.remove("scripts/common.sh")
COMMANDS = "bash awk dirname basename cat rm mktemp ls env grep tail"


@pytest.fixture
def bash(tmp_path):
    """A function that runs a copy of a script with only a few harmless commands; the script may
    change no file.
    """
    for folder in ("scripts", "datasets", "bin", "datasets/ucf-101", f"{ODD}data"):
        (tmp_path / folder).mkdir()
    for script in [*SCRIPTS, "scripts/common.sh"]:
        shutil.copy(ROOT / script, tmp_path / script)
    for name in COMMANDS.split():
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))

    def run(script, *arguments, commands=(), **environment):
        write_commands(tmp_path / "bin", dict(commands))
        before = snapshot(tmp_path)
        environment |= {
            "PATH": str(tmp_path / "bin"),
            "TMPDIR": str(tmp_path),
            "SLURM_SUBMIT_DIR": ".",
        }
        command = [shutil.which("bash"), script, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert snapshot(tmp_path) == before
        return done

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_help_with_its_variables_and_does_nothing_else(script, bash):
    done = bash(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 100
    assert not re.search("#!|set -e", done.stdout)
    for name in set(re.findall(r"\b([A-Z][A-Z0-9_]*)=\$\{\1:-", (ROOT / script).read_text())):
        assert re.search(rf"\b{name}\b", done.stdout), name
    assert bash(script, "--other", "-h").stdout == done.stdout


SH = shutil.which("dash") or "sh"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_another_shell_runs_says_in_one_line_to_use_bash(script):
    done = subprocess.run([SH, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    name = script.rpartition("/")[2]
    assert done.stderr == f"{name}: error: needs bash; run: bash {script}\n"


@pytest.mark.parametrize("shell", ["bash", SH])
def test_the_shared_functions_are_no_script(shell):
    done = subprocess.run([shell, ROOT / "scripts/common.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "common.sh: error: this is a library; run one of the other scripts\n"


MISTAKES = r"""
setup.sh dev x => dev\ x; expected dev or nothing
PYTHON=false setup.sh => older than 3.11
quickstart.sh please => please; --help
weizmann.sh please => please; --help
sprites.sh please => please; --help
sample.sh demo => demo; --help
train_progressive.sh demo => demo; --help
train_slurm.sh demo => demo; --help
faults.sh many => many; a number first
FRAME=3 sample.sh => FRAME: ; EXP CKPT FRAMES SAMPLES OUT GPUS
DATA_PATH=x train_progressive.sh => DATA_PATH: ; DATA GPUS
CKPT=x sample.sh => no torch found: run 'bash scripts/setup.sh' first
CKPT=x score.sh => no torch found: run 'bash scripts/setup.sh' first
CKPT=x train_progressive.sh => no torch found: run 'bash scripts/setup.sh' first
CKPT=x train_slurm.sh => no torch found: run 'bash scripts/setup.sh' first
EXP=/x sample.sh => EXP=/x: not inside results/
EXP=/x score.sh => EXP=/x: not inside results/
EXP=/x train_progressive.sh => EXP=/x: not inside results/
EXP=/x quickstart.sh => EXP=/x: not inside results/
EXP=/x weizmann.sh => EXP=/x: not inside results/
EXP=/x sprites.sh => EXP=/x: not inside results/
EXP='no such' sample.sh => EXP=no\ such: ; expected one of: (none yet); or set CKPT
EXP='no such' score.sh => EXP=no\ such: ; expected one of: (none yet); or set CKPT
METRIC=prediction REAL=many score.sh => REAL=many: ; at least 1
GPUS=0 weizmann.sh => GPUS=0:
GPUS=0 sprites.sh => GPUS=0:
HOURS=two weizmann.sh => HOURS=two: not a number
HOURS=two sprites.sh => HOURS=two: not a number
SEED=a sprites.sh => SEED=a: not a seed
SEED=-1 quickstart.sh => SEED=-1:
VAE=none sprites.sh => VAE=none: no such folder; unset VAE
GPUS=0 quickstart.sh => GPUS=0:
STEPS_1='1 2' quickstart.sh => STEPS_1=1\ 2:
MODEL=x quickstart.sh => MODEL=x:
LR_DECAY=x quickstart.sh => LR_DECAY=x:
VIDEOS=0 quickstart.sh => VIDEOS=0:
FRAMES='7 0' quickstart.sh => FRAMES=7\ 0:
FRAMES='a[$(touch hacked)]' quickstart.sh => FRAMES=
PRECISION=x quickstart.sh => PRECISION=x:
STEPS_1='a[$(touch hacked)]' train_progressive.sh => STEPS_1=
BATCH_3=0 train_progressive.sh => BATCH_3=0:
STEPS_1=9 STEPS_2=9 train_progressive.sh => STEPS_2=9: not above STEPS_1=9
STEPS_3=100000 train_progressive.sh => STEPS_3=100000: not above STEPS_2=100000
RECIPE=big train_progressive.sh => RECIPE=big: ; expected ours
FRAMES_3=4 train_progressive.sh => FRAMES_3=4: ; ONE_RUN=1
CACHE=yes train_progressive.sh => CACHE=yes: ; 0 or 1
DATA=none train_progressive.sh => DATA=none: no such folder; set DATA
LR_DECAY=2 train_progressive.sh => LR_DECAY=2: ; from 0 to 1
MODEL=S train_progressive.sh => MODEL=S: ; EqM-S/4
train_progressive.sh --mix 0.1 => --mix: ; ONE_RUN=1
train_progressive.sh --max-steps=5 => --max-steps: ; STEPS_3
train_progressive.sh --lr-decay 0.5 => --lr-decay: ; LR_DECAY
train_progressive.sh --ckpt x => --ckpt: ; ONE_RUN=1
train_progressive.sh --vae=none => --vae: ; CACHE=0
train_progressive.sh --image-size 64 => --image-size: ; CACHE=0
train_progressive.sh --inflate x => --inflate: ; START
"""


@pytest.mark.parametrize("row", MISTAKES.strip().splitlines())
def test_a_mistake_or_a_missing_environment_is_one_line(row, bash):
    command, _, words = row.partition(" => ")
    assignments, script, arguments = re.fullmatch(r"(.* )?(\w+\.sh)(.*)", command).groups()
    variables = dict(word.split("=", 1) for word in shlex.split(assignments or ""))
    done = bash(f"scripts/{script}", *arguments.split(), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ")
    assert all(word in line for word in words.split("; "))


@pytest.mark.parametrize("script", ["quickstart.sh", "train_progressive.sh"])
def test_a_line_break_in_a_variable_is_shown_in_one_line(script, bash):
    done = bash(f"scripts/{script}", STEPS_1="1\n")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: error: STEPS_1=$'1\\n': ")


IS_CHECK = "[[ $* == *--dry-run* ]]"  # of all phases, in one process that knows the number of ranks


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "sprites.sh",
            "SEED=0 OBJECTIVE=eqm VAE_STEPS=7 STEPS_1=375 STEPS_2=2750 WEAK=1250 SAMPLES=2592 "
            "PREDICTIONS=2664",
        ),
        (
            "weizmann.sh",
            r"HOLD_OUT=7\ 8 VAE_STEPS=7 STEPS_1=1200 STEPS_2=2400 STEPS_3=4000 SAMPLES=96 "
            "LONG=16 REAL=64 CLASSIFIER_STEPS=250",
        ),
    ],
)
def test_an_experiment_keeps_all_variables_that_determine_its_results(
    script, expected, bash, tmp_path
):
    (tmp_path / "results/mine").mkdir(parents=True)
    (tmp_path / "results/mine/settings").write_text("HOURS=1\n")
    done = bash(f"scripts/{script}", EXP="mine", HOURS="0.5", VAE_STEPS="7", DATA="my data")
    settings = rf"HOURS=0.5 DATA=my\ data {expected}"
    assert (done.returncode, done.stdout) == (2, "")
    assert f"EXP=mine: made with HOURS=1, got {settings}; set another EXP" in done.stderr


@pytest.mark.parametrize("script", ["sample.sh", "train_progressive.sh"])
def test_one_process_is_python_and_of_several_our_line_comes_last(script, bash):
    wrong = '[[ -z ${EQM_ERROR_FILE:-} ]] || echo "wrong flag" >>"$EQM_ERROR_FILE"'
    python = f'{IS_CHECK} || {{ echo "python $1"; exit 2; }}'
    commands = {"python": python, "torchrun": f'{wrong}\necho "a long report" >&2; exit 1'}
    done = bash(f"scripts/{script}", commands=commands, GPUS="1", CACHE="0", CKPT="x")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("python EqM/")
    done = bash(f"scripts/{script}", commands=commands, GPUS="2", CACHE="0", CKPT="x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "a long report\nwrong flag\n")


@pytest.mark.parametrize(
    ("python", "settings", "status", "line"),
    [
        (  # before the cache
            f'{IS_CHECK} && echo "$WORLD_SIZE ranks, $*" >&2; exit 2',
            {"GPUS": "2"},
            2,
            "2 ranks, EqM/train.py .* --frames-schedule=4:50000:256,8:100000:128,16:150000:64 "
            "--vae=ema .*=256 --lr 1 .*",
        ),
        (
            'echo "train.py: error: --frames-schedule 2: too few" >"$EQM_ERROR_FILE"; exit 2',
            {"GPUS": "1"},
            2,
            ".*2: too few; to change --frames-schedule, set FRAMES_1, FRAMES_2 and FRAMES_3",
        ),
        (
            f"{IS_CHECK} || kill -KILL $$",
            {"GPUS": "1", "CACHE": "0"},
            137,
            r".*\.sh: error: killed \(often out of memory\): lower BATCH_n or --num-workers; the "
            "same command continues",
        ),
    ],
)
def test_one_line_says_why_a_training_does_not_start_or_was_killed(
    python, settings, status, line, bash
):
    commands = {"python": python, "torchrun": "exit 9"}
    script = "scripts/train_progressive.sh"
    done = bash(script, "--lr", "1", commands=commands, **settings)
    assert (done.returncode, done.stdout) == (status, "")
    assert re.fullmatch(line, done.stderr.removesuffix("\n"))


@pytest.mark.parametrize(("status", "precision"), [(0, "bf16"), (1, "fp32")])
def test_a_cpu_without_avx512_trains_in_fp32(status, precision):
    code = (
        f"set -eu; grep() {{ return {status}; }}; source scripts/common.sh; suit; echo $GPUS "
        "$PRECISION $MIXED"
    )
    process = spawn("bash", "-c", code, cwd=ROOT, environment={"PATH": "/usr/bin:/bin"})
    assert end(process, 0) == f"2 {precision} --precision={precision}\n"


def test_more_processes_than_gpus_are_refused(bash):
    commands = {"nvidia-smi": 'echo "GPU 0: a"; echo "GPU 1: b"', "torchrun": "echo started"}
    done = bash("scripts/sample.sh", commands=commands, GPUS="3", CKPT="x")
    assert done.returncode == 2
    assert done.stderr == "sample.sh: error: GPUS=3: this machine has 2; set GPUS=2\n"
    assert bash("scripts/sample.sh", GPUS="2", CKPT="x").stdout == "started\n"


@pytest.mark.parametrize("script", ["sample.sh", "score.sh"])
def test_an_unknown_experiment_lists_the_models(script, bash, tmp_path):
    for name in (
        "mine/000-a/checkpoints/best.pt",
        "mine/001-b/checkpoints/best.pt",
        "export/model.safetensors",
        "begun/000-a/checkpoints/latest.pt",
    ):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True)
        path.touch()
    done = bash(f"scripts/{script}", EXP="mi\nen")
    assert done.returncode == 2
    assert "EXP=$'mi\\nen': " in done.stderr
    assert "one of: export mine;" in done.stderr
    commands = {"python": 'echo "$*"', "torchrun": ""}
    done = bash(f"scripts/{script}", commands=commands, EXP="export")
    assert "--ckpt=results/export " in done.stdout


@pytest.mark.parametrize(
    ("name", "ending", "status", "printed"),
    [
        ("INT", "echo $EQM_ADVICE; exit", 130, ""),
        ("INT", "exit 1", 130, "train_progressive.sh: interrupted; to continue, "),
        ("TERM", "echo $EQM_ADVICE; exit", 143, ""),
    ],
)
def test_a_signal_reaches_a_run_of_one_process_and_one_line_gives_advice(
    name, ending, status, printed, bash, tmp_path
):
    code = f"trap '{ending}' {name}; echo started; while true; do sleep 0.05; done"
    write_commands(tmp_path / "bin", {"python": f"{IS_CHECK} && exit\n{code}", "torchrun": ""})
    settings = {"GPUS": "1", "CACHE": "0", "EXP": "x", "DATA": "datasets/ucf-101"}
    settings["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    script = "scripts/train_progressive.sh"
    process = spawn("bash", script, cwd=tmp_path, environment=settings, stderr=None)
    assert process.stdout.readline() == "started\n"
    send = os.killpg if name == "INT" else os.kill  # a terminal sends SIGINT to the whole group
    send(process.pid, signal.Signals[f"SIG{name}"])
    assert end(process, status, timeout=20) == f"{printed}run the same command again\n"


# The flags that the scripts pass on ---------------------------------------------------------------


@pytest.fixture
def recorded(bash, tmp_path_factory):
    """A function that runs a script with a python and a torchrun that only record their arguments.

    It returns (the process, the arguments of each call).
    """
    record = tmp_path_factory.mktemp("record") / "calls"
    commands = dict.fromkeys(("python", "torchrun"), 'printf "%s\\0" "$@" $\'\\1\' >>"$RECORD"')

    def run(script, *arguments, **environment):
        record.write_text("")
        environment["RECORD"] = str(record)
        done = bash(f"scripts/{script}", *arguments, commands=commands, **environment)
        calls = record.read_text().split("\1\0")[:-1]
        return done, [call.removesuffix("\0").split("\0") for call in calls]

    return run


PHASES = {"EXP": ODD, "CACHE": "0", "STEPS_1": "050", "STEPS_2": "90", "STEPS_3": "91"}


def run_folder(frames):
    return f"results/{ODD}/{frames:03d}-EqM-S-4-f{frames}-rope"


def make_run(root, frames, *names):
    """A run of one phase with these checkpoints; returns its folder."""
    folder = root / run_folder(frames)
    (folder / "checkpoints").mkdir(parents=True)
    for name in names:
        (folder / f"checkpoints/{name}.pt").touch()
    return folder


@pytest.mark.parametrize(
    ("runs", "calls"),
    [  # {frames: checkpoints}; frames, --resume, --ckpt of each phase it starts
        ({}, [(4, False)]),
        ({4: []}, [(4, True)]),
        ({4: ["0000050"]}, [(4, True), (8, False, 4, "0000050")]),
        ({4: ["0000050"], 8: []}, [(4, True), (8, True, 4, "0000050")]),
        ({4: ["0000050"], 8: ["latest"]}, [(8, True, 4, "0000050")]),
        ({4: [], 8: ["0000090"]}, [(8, True, 8, "0000090"), (16, False, 8, "0000090")]),
        ({8: ["best"]}, [(8, True, 8, "best")]),
        ({4: ["0000050"], 16: ["best", "latest"]}, [(16, True, 16, "latest")]),
    ],
)
def test_train_progressive_repeats_no_phase_before_one_with_checkpoints(
    runs, calls, recorded, tmp_path
):
    for frames, names in runs.items():
        make_run(tmp_path, frames, *names)
    done, made = recorded("train_progressive.sh", **PHASES)
    assert ("--dry-run" in made[0]) == (not any(runs.values()))
    made = [call for call in made if "--dry-run" not in call]
    for call, (frames, resumes, *ckpt) in zip(made, calls, strict=True):
        path = [f"--ckpt={run_folder(ckpt[0])}/checkpoints/{ckpt[1]}.pt"] if ckpt else []
        assert [word for word in call if word.startswith("--ckpt")] == path
        assert f"--num-frames={frames}" in call
        assert ("--resume" in call) == resumes
        assert not any(word.startswith("--lr-decay-end") for word in call)  # as LR_DECAY is 0
    # 2: a phase has saved nothing, as python is a stand-in
    assert done.returncode == (0 if calls[-1][0] == 16 else 2)


def test_train_progressive_passes_odd_names_unchanged(recorded, tmp_path):
    make_run(tmp_path, 4, "0000050")
    make_run(tmp_path, 8, "0000090")
    names = {"DATA": f"{ODD}data", "LATENTS": f"{ODD}latents", "VAE": f"{ODD}vae"}
    settings = PHASES | names | {"CACHE": "1", "LR_DECAY": "0.4"}
    flags = [f"--rest={ODD}", "--max-bad-fraction", "0.5"]
    done, calls = recorded("train_progressive.sh", *flags, **settings)
    assert done.returncode == 0, done.stderr
    cache, *phases = calls
    assert [call[2] for call in calls] == ["EqM/cache_latents.py"] + 2 * ["EqM/train.py"]
    assert {f"--data-path={ODD}data", f"--out={ODD}latents", f"--vae={ODD}vae"} <= set(cache)
    assert "--max-bad-fraction=0.5" in cache
    expected = {f"--data-path={ODD}latents", f"--results-dir=results/{ODD}", f"--rest={ODD}"}
    for call in phases:
        assert {*expected, "--lr-decay-end=91"} <= set(call)
    _, _, command = done.stdout.splitlines()[-1].partition("with: ")
    process = spawn("bash", "-c", command.replace("bash", "printenv EXP #"))
    assert end(process, 0) == f"{ODD}\n"


def test_train_progressive_can_train_all_phases_in_one_run(recorded):
    settings = {"CACHE": "0", "ONE_RUN": "1", "LR_DECAY": "0.4", "GPUS": "2"}
    settings |= {"STEPS_1": "10", "STEPS_2": "20", "STEPS_3": "30", "BATCH_1": "40"}
    _, (call,) = recorded("train_progressive.sh", "--more", **settings)
    every = ["--val-every=1", "--sample-every=1"]
    assert call[-4:-1] == [*every, "--frames-schedule=4:10:40,8:20:128,16:30:64"]
    assert call[call.index("--lr-decay") + 1] == "0.4"
    others = ("--num-frames", "--ckpt", "--lr-decay-", "--resume")
    assert not any(flag.startswith(others) for flag in call)


POSITIONS = ["--position-table", "space", "--rope-speed", "0.5"]
INTERVALS = "--frame-interval 1 2"
SMALL = (
    f"{INTERVALS} --optimizer muon --gamma-shift 3 --sampler ngd --num-sampling-steps 24 "
    "--stepsize 0.0217 --cfg-scale 1.5"
)


@pytest.mark.parametrize(
    ("settings", "on_gpu", "flags", "share", "compiled"),
    [
        ({}, False, INTERVALS, "0.75", []),
        ({"RECIPE": "ours"}, True, INTERVALS, "0.75", ["--compile"]),
        ({"COMPILE": "0"}, True, INTERVALS, "0.75", []),
        ({"RECIPE": "small"}, False, SMALL, "0.75", []),
        # the rest are the defaults of train.py
        ({"RECIPE": "published"}, False, "--cfg-scale 4", "0", []),
        ({"RECIPE": "published", "FORCING": "0.5"}, False, "--cfg-scale 4", "0.5", []),
    ],
)
def test_each_recipe_passes_its_flags_and_our_positions(
    settings, on_gpu, flags, share, compiled, recorded, tmp_path
):
    if on_gpu:
        write_commands(tmp_path / "bin", {"nvidia-smi": ""})
    # phase 1 saves nothing: the script ends
    _, (check, call) = recorded("train_progressive.sh", CACHE="0", **settings)
    _, (_, energy) = recorded("train_progressive.sh", "--ebm", "dot", CACHE="0", **settings)
    assert "--compile" not in energy
    assert energy[-2:] == ["--ebm", "dot"]
    expected = [*flags.split(), *POSITIONS, "--forcing", share, "--lr-decay", "0", *compiled]
    for words in (check, call):
        start = words.index("--results-dir=results/progressive_rope_training") + 1
        assert words[start : words.index("--data-path=datasets/ucf-101")] == expected
    assert {"--num-frames=4", "--val-every=2500", "--sample-every=2500"} <= set(call)


def test_train_progressive_leaves_positions_and_forcing_to_a_checkpoint(recorded, tmp_path):
    def check(expected, **environment):
        """Check the positions and the forcing of each call; phase 1 saves nothing."""
        _, calls = recorded("train_progressive.sh", **PHASES | environment)
        assert calls
        for call in calls:
            assert " ".join(expected) in " ".join(call)
            assert ("--rope-speed" in call) == (len(expected) > 2)

    check([*POSITIONS, "--forcing", "0.75"])
    check([*POSITIONS, "--forcing", "0.2"], FORCING="0.2")
    config = make_run(tmp_path, 8, "0000090") / "config.json"
    config.write_text('{"training": {"lr": 1}}')  # older than --forcing
    check(["--forcing", "0"])
    config.write_text('{"training": {"forcing": 0.5}}')
    check(["--forcing", "0.5"])
    check([*POSITIONS, "--forcing", "0.75"], ONE_RUN="1")  # which does not continue that run


@pytest.mark.parametrize("one_run", ["0", "1"])
def test_train_progressive_starts_only_phase_1_from_an_image_model_with_its_positions(
    one_run, recorded, tmp_path
):
    settings = PHASES | {"START": ODD, "ONE_RUN": one_run}
    _, (*_, call) = recorded("train_progressive.sh", **settings)  # phase 1, which saves nothing
    if one_run == "0":
        config = make_run(tmp_path, 4, "0000050") / "config.json"
        config.write_text('{"inflate": null}')
        done, calls = recorded("train_progressive.sh", **settings)
        assert (calls, done.returncode) == ([], 2)
        assert "did not start from an image model; set EXP" in done.stderr
        config.write_text('{"inflate": "image.pt"}')
        _, (resumed, later) = recorded("train_progressive.sh", **settings)
        assert f"--inflate={ODD}" in resumed
        assert not any(flag.startswith(("--inflate", "--new")) for flag in later)
    assert {f"--inflate={ODD}", "--new-classes"} < set(call)
    assert not set(POSITIONS) & set(call)


def test_sample_passes_odd_names_unchanged_and_uses_the_newest_model(recorded, tmp_path):
    for time, run in ((1, "a"), (3, "b"), (2, "c")):
        path = tmp_path / f"results/{ODD}/{run}\nx/checkpoints/best.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    done, (call,) = recorded("sample.sh", f"--rest={ODD}", EXP=ODD)
    assert done.returncode == 0, done.stderr
    ckpt = f"--ckpt=results/{ODD}/b\nx/checkpoints/best.pt"
    assert {ckpt, f"--folder=samples/{ODD}-f16", f"--rest={ODD}"} <= set(call)
    _, (call,) = recorded("sample.sh", EXP="x", CKPT=f"-{ODD}", OUT=f"-{ODD}")
    assert {f"--ckpt=-{ODD}", f"--folder=-{ODD}-f16"} <= set(call)
    _, (call,) = recorded("sample.sh", EXP="x", CKPT="y", FRAMES="16 7", GPUS="2")
    assert "--num-frames 16 7 --" in " ".join(call)
    assert "--folder=samples/x" in call
