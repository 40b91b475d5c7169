"""The shell scripts: --help, unknown arguments and variables, mistakes, and which line comes
last.
"""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest

from process import end, spawn, write_commands
from test_odd_names import ODD
from training import ROOT

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("scripts/*.sh"), *ROOT.glob("datasets/*.sh"))
)
SCRIPTS.remove("scripts/common.sh")
NEED_TORCH = ("sample", "score", "train_progressive", "train_slurm")  # the others run setup.sh
NO_TORCH = "no torch found: run 'bash scripts/setup.sh' first"


@pytest.fixture
def bash(tmp_path):
    """A function that runs a copy of a script with only a few harmless commands; the script may
    change no file.
    """
    for folder in ("scripts", "datasets"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("[!.]*.py", "stud*", "*.html"),
        )
    for folder in ("bin", "datasets/ucf-101", f"{ODD}data"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (
        "bash",
        "awk",
        "dirname",
        "basename",
        "cat",
        "rm",
        "mktemp",
        "ls",
        "env",
        "grep",
        "tail",
    ):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))

    def run(script, *arguments, commands=None, **environment):
        write_commands(tmp_path / "bin", commands or {})
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        environment |= {
            "PATH": str(tmp_path / "bin"),
            "TMPDIR": str(tmp_path),
            "SLURM_SUBMIT_DIR": ".",
        }
        command = [shutil.which("bash"), script, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
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


SH = shutil.which("dash") or "sh"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_another_shell_runs_says_in_one_line_to_use_bash(script):
    name = script.rpartition("/")[2]
    for folder, path, arguments in (
        (ROOT, script, ["--help"]),
        (ROOT / script.partition("/")[0], name, []),
    ):
        done = subprocess.run([SH, path, *arguments], cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{name}: error: needs bash; run: bash {path}\n"


@pytest.mark.parametrize("shell", ["bash", SH])
def test_the_shared_functions_are_no_script(shell):
    done = subprocess.run([shell, ROOT / "scripts/common.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "common.sh: error: this is a library; run one of the other scripts\n"


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "words"),
    [
        ("setup.sh", "dev x", {}, ["dev\\ x", "expected dev or nothing"]),
        *(
            (f"{name}.sh", "please", {}, ["please", "--help"])
            for name in ("quickstart", "weizmann", "sprites")
        ),
        *(
            (f"{name}.sh", "demo", {}, ["demo", "--help"])
            for name in ("sample", "train_progressive", "train_slurm")
        ),
        ("faults.sh", "many", {}, ["many", "a number first"]),
        ("sample.sh", "", {"FRAME": "3"}, ["FRAME: ", "EXP CKPT FRAMES SAMPLES OUT GPUS"]),
        ("train_progressive.sh", "", {"DATA_PATH": "x"}, ["DATA_PATH: ", "DATA GPUS"]),
        *((f"{name}.sh", "", {"CKPT": "x"}, [NO_TORCH]) for name in NEED_TORCH),
        *(
            (f"{name}.sh", "", {"EXP": "/x"}, ["EXP=/x: not inside results/"])
            for name in (
                "sample",
                "score",
                "train_progressive",
                "quickstart",
                "weizmann",
                "sprites",
            )
        ),
        *((f"{name}.sh", "", {"GPUS": "0"}, ["GPUS=0: "]) for name in ("weizmann", "sprites")),
        *(
            (f"{name}.sh", "", {"HOURS": "two"}, ["HOURS=two: not a number"])
            for name in ("weizmann", "sprites")
        ),
        ("sprites.sh", "", {"SEED": "a"}, ["SEED=a: not a seed"]),
        ("sprites.sh", "", {"VAE": "none"}, ["VAE=none: no such folder; unset VAE"]),
        *(
            (
                f"{name}.sh",
                "",
                {"EXP": "no\nsuch"},
                ["EXP=$'no\\nsuch': ", "expected one of: (none yet); or set CKPT"],
            )
            for name in ("sample", "score")
        ),
        ("train_progressive.sh", "", {"RECIPE": "big"}, ["RECIPE=big: ", "expected ours"]),
        ("setup.sh", "", {"PYTHON": "false"}, ["older than 3.11"]),
        *(
            (f"{script}.sh", "", {name: value}, [f"{name}="])
            for script, names in (
                ("train_progressive", "STEPS_1 BATCH_3"),
                ("quickstart", "GPUS STEPS_1 MODEL LR_DECAY VIDEOS FRAMES PRECISION"),
            )
            for name in names.split()
            for value in ("0", "\n", "x", "1 2", "a[$(touch hacked)]")
            if (name, value) not in (("LR_DECAY", "0"), ("FRAMES", "1 2"), ("FRAMES", "\n"))
        ),
        ("quickstart.sh", "", {"SEED": "-1"}, ["SEED=-1: "]),
        ("score.sh", "", {"METRIC": "prediction", "REAL": "many"}, ["REAL=many: ", "at least 1"]),
        (
            "train_progressive.sh",
            "",
            {"STEPS_2": "9", "STEPS_1": "9"},
            ["STEPS_2=9: not above STEPS_1=9"],
        ),
        (
            "train_progressive.sh",
            "",
            {"STEPS_3": "100000"},
            ["STEPS_3=100000: not above STEPS_2=100000"],
        ),
        ("train_progressive.sh", "", {"FRAMES_3": "4"}, ["FRAMES_3=4: ", "ONE_RUN=1"]),
        ("train_progressive.sh", "", {"CACHE": "yes"}, ["CACHE=yes: ", "0 or 1"]),
        ("train_progressive.sh", "", {"DATA": "none"}, ["DATA=none: no such folder; set DATA"]),
        ("train_progressive.sh", "", {"LR_DECAY": "2"}, ["LR_DECAY=2: ", "from 0 to 1"]),
        ("train_progressive.sh", "", {"MODEL": "S"}, ["MODEL=S: ", "EqM-S/4"]),
        ("train_progressive.sh", "--mix 0.1", {}, ["--mix: ", "ONE_RUN=1"]),
        ("train_progressive.sh", "--max-steps=5", {}, ["--max-steps: ", "STEPS_3"]),
        ("train_progressive.sh", "--lr-decay 0.5", {}, ["--lr-decay: ", "LR_DECAY"]),
        ("train_progressive.sh", "--ckpt x", {}, ["--ckpt: ", "ONE_RUN=1"]),
        ("train_progressive.sh", "--vae=none", {}, ["--vae: ", "CACHE=0"]),
        ("train_progressive.sh", "--image-size 64", {}, ["--image-size: ", "CACHE=0"]),
        ("train_progressive.sh", "--inflate x", {}, ["--inflate: ", "START"]),
    ],
)
def test_a_mistake_or_a_missing_environment_is_one_line(script, arguments, variables, words, bash):
    done = bash(f"scripts/{script}", *arguments.split(), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ") and all(word in line for word in words)


IS_CHECK = "[[ $* == *--dry-run* ]]"  # of all phases, in one process that knows the number of ranks


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "sprites.sh",
            (
                "SEED=0 OBJECTIVE=eqm VAE_STEPS=7 STEPS_1=375 STEPS_2=2750 WEAK=1250 SAMPLES=2592 "
                "PREDICTIONS=2664"
            ),
        ),
        (
            "weizmann.sh",
            (
                r"HOLD_OUT=7\ 8 VAE_STEPS=7 STEPS_1=1200 STEPS_2=2400 STEPS_3=4000 SAMPLES=96 "
                "LONG=16 REAL=64 CLASSIFIER_STEPS=250"
            ),
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
    assert (done.returncode, done.stderr) == (2, "") and done.stdout.startswith("python EqM/")
    done = bash(f"scripts/{script}", commands=commands, GPUS="2", CACHE="0", CKPT="x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "a long report\nwrong flag\n")


@pytest.mark.parametrize(
    ("python", "settings", "status", "words"),
    [
        (
            f'{IS_CHECK} && echo "$WORLD_SIZE ranks, $*" >&2; exit 2',
            {"GPUS": "2"},
            2,  # before the cache
            [
                "2 ranks, EqM/train.py",
                "--frames-schedule=4:50000:256,8:100000:128,16:150000:64 --vae=ema ",
                "=256 --lr 1",
            ],
        ),
        (
            'echo "train.py: error: --frames-schedule 2: too few" >"$EQM_ERROR_FILE"; exit 2',
            {},
            2,
            ["2: too few; to change --frames-schedule, set FRAMES_1, FRAMES_2 and FRAMES_3\n"],
        ),
        (
            f"{IS_CHECK} || kill -KILL $$",
            {"CACHE": "0"},
            137,
            [
                (
                    "sh: error: killed (often out of memory): lower BATCH_n or --num-workers; the "
                    "same command continues\n"
                )
            ],
        ),
    ],
)
def test_one_line_says_why_a_training_does_not_start_or_was_killed(
    python, settings, status, words, bash
):
    commands = {"python": python, "torchrun": "exit 9"}
    done = bash(
        "scripts/train_progressive.sh", "--lr", "1", commands=commands, **{"GPUS": "1"} | settings
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert all(part in done.stderr for part in words)


@pytest.mark.parametrize(("status", "precision"), [(0, "bf16"), (1, "fp32")])
def test_a_cpu_without_avx512_trains_in_fp32(status, precision):
    words = (
        f"set -eu; grep() {{ return {status}; }}; source scripts/common.sh; suit; echo $GPUS "
        "$PRECISION $MIXED"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    shell = subprocess.run(
        ["bash", "-c", words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert shell.stdout == f"2 {precision} --precision={precision}\n", shell.stderr


def test_more_processes_than_gpus_are_refused(bash):
    commands = {"nvidia-smi": 'echo "GPU 0: a"; echo "GPU 1: b"', "torchrun": "echo started"}
    done = bash("scripts/sample.sh", commands=commands, GPUS="3", CKPT="x")
    assert (done.returncode, done.stderr) == (
        2,
        "sample.sh: error: GPUS=3: this machine has 2; set GPUS=2\n",
    )
    assert bash("scripts/sample.sh", GPUS="2", CKPT="x").stdout == "started\n"


@pytest.mark.parametrize("script", ["sample.sh", "score.sh"])
def test_an_unknown_experiment_lists_the_models(script, bash, tmp_path):
    for name in (
        "results/mine/000-a/checkpoints/best.pt",
        "results/mine/001-b/checkpoints/best.pt",
        "results/export/model.safetensors",
        "results/begun/000-a/checkpoints/latest.pt",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    done = bash(f"scripts/{script}", EXP="mien")
    assert (
        done.returncode == 2
        and "EXP=mien: " in done.stderr
        and "one of: export mine;" in done.stderr
    )
    commands = {"python": 'echo "$*"', "torchrun": ""}
    assert (
        "--ckpt=results/export "
        in bash(f"scripts/{script}", commands=commands, EXP="export").stdout
    )


@pytest.mark.parametrize(
    ("name", "ending", "status", "printed"),
    [
        ("INT", "echo $EQM_ADVICE; exit", 130, "run the same command again\n"),
        (
            "INT",
            "exit 1",
            130,
            "train_progressive.sh: interrupted; to continue, run the same command again\n",
        ),
        ("TERM", "echo $EQM_ADVICE; exit", 143, "run the same command again\n"),
    ],
)
def test_a_signal_reaches_a_run_of_one_process_and_one_line_gives_advice(
    name, ending, status, printed, bash, tmp_path
):
    code = f"trap '{ending}' {name}; echo started; while true; do sleep 0.05; done"
    (tmp_path / "data").mkdir()
    code = f"[[ $* == *--dry-run* ]] && exit\n{code}"
    write_commands(tmp_path / "bin", {"python": code, "torchrun": ""})
    settings = {"GPUS": "1", "CACHE": "0", "EXP": "x", "DATA": "data"}
    settings["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process = spawn(
        "bash", "scripts/train_progressive.sh", cwd=tmp_path, environment=settings, stderr=None
    )
    assert process.stdout.readline() == "started\n"
    send = os.killpg if name == "INT" else os.kill  # a terminal sends SIGINT to the whole group
    send(process.pid, signal.Signals[f"SIG{name}"])
    assert end(process, status, timeout=20) == printed


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
        done = bash(
            f"scripts/{script}", *arguments, commands=commands, RECORD=str(record), **environment
        )
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
    done, found = recorded("train_progressive.sh", **PHASES)
    assert ("--dry-run" in found[0]) == (not any(runs.values()))
    found = [call for call in found if "--dry-run" not in call]
    for call, (frames, resumes, *ckpt) in zip(found, calls, strict=True):
        path = [f"--ckpt={run_folder(ckpt[0])}/checkpoints/{ckpt[1]}.pt"] if ckpt else []
        assert [word for word in call if word.startswith("--ckpt")] == path
        assert f"--num-frames={frames}" in call and ("--resume" in call) == resumes
        assert not any(word.startswith("--lr-decay-end") for word in call)  # as LR_DECAY is 0
    assert done.returncode == (
        0 if calls[-1][0] == 16 else 2
    )  # 2: a phase has saved nothing, as python is a stand-in


def test_train_progressive_passes_odd_names_unchanged(recorded, tmp_path):
    make_run(tmp_path, 4, "0000050"), make_run(tmp_path, 8, "0000090")
    names = PHASES | {
        "DATA": f"{ODD}data",
        "LATENTS": f"{ODD}latents",
        "VAE": f"{ODD}vae",
        "CACHE": "1",
    }
    names["LR_DECAY"] = "0.4"
    done, calls = recorded(
        "train_progressive.sh", f"--rest={ODD}", "--max-bad-fraction", "0.5", **names
    )
    assert done.returncode == 0, done.stderr
    assert [call[2] for call in calls] == ["EqM/cache_latents.py"] + 2 * ["EqM/train.py"]
    assert {f"--data-path={ODD}data", f"--out={ODD}latents", f"--vae={ODD}vae"} <= set(calls[0])
    assert "--max-bad-fraction=0.5" in calls[0]
    for call in calls[1:]:
        assert "--lr-decay-end=91" in call
        assert {
            f"--data-path={ODD}latents",
            f"--results-dir=results/{ODD}",
            f"--rest={ODD}",
        } <= set(call)
    *_, next_command = done.stdout.splitlines()
    command = next_command.partition("with: ")[2].replace("bash", "printenv EXP #")
    assert subprocess.run(["bash", "-c", command], capture_output=True).stdout == os.fsencode(
        f"{ODD}\n"
    )


def test_train_progressive_can_train_all_phases_in_one_run(recorded):
    settings = {
        f"{name}_{phase}": str(10 * phase) for name in ("STEPS", "BATCH") for phase in (1, 2, 3)
    }
    settings |= {"CACHE": "0", "ONE_RUN": "1", "LR_DECAY": "0.4", "GPUS": "2"}
    _, (call,) = recorded("train_progressive.sh", "--more", **settings)
    assert call[-4:-1] == [
        "--val-every=1",
        "--sample-every=1",
        "--frames-schedule=4:10:10,8:20:20,16:30:30",
    ]
    assert call[call.index("--lr-decay") + 1] == "0.4"
    assert not any(
        flag.startswith(("--num-frames", "--ckpt", "--lr-decay-", "--resume")) for flag in call
    )


POSITIONS = ["--position-table", "space", "--rope-speed", "0.5"]
INTERVALS = ["--frame-interval", "1", "2"]
SMALL = ["--optimizer", "muon", "--gamma-shift", "3"]
SMALL += [
    "--sampler",
    "ngd",
    "--num-sampling-steps",
    "24",
    "--stepsize",
    "0.0217",
    "--cfg-scale",
    "1.5",
]


@pytest.mark.parametrize(
    ("settings", "on_gpu", "flags", "share", "compiled"),
    [
        ({}, False, INTERVALS, "0.75", []),
        ({"RECIPE": "ours"}, True, INTERVALS, "0.75", ["--compile"]),
        ({"COMPILE": "0"}, True, INTERVALS, "0.75", []),
        ({"RECIPE": "small"}, False, [*INTERVALS, *SMALL], "0.75", []),
        (
            {"RECIPE": "published"},
            False,
            ["--cfg-scale", "4"],
            "0",
            [],
        ),  # the rest are the defaults of train.py
        ({"RECIPE": "published", "FORCING": "0.5"}, False, ["--cfg-scale", "4"], "0.5", []),
    ],
)
def test_each_recipe_passes_its_flags_and_our_positions(
    settings, on_gpu, flags, share, compiled, recorded, tmp_path
):
    if on_gpu:
        write_commands(tmp_path / "bin", {"nvidia-smi": ""})
    _, (check, call) = recorded(
        "train_progressive.sh", CACHE="0", **settings
    )  # phase 1 saves nothing: the script ends
    _, (_, energy) = recorded("train_progressive.sh", "--ebm", "dot", CACHE="0", **settings)
    assert "--compile" not in energy and energy[-2:] == ["--ebm", "dot"]
    expected = [*flags, *POSITIONS, "--forcing", share, "--lr-decay", "0", *compiled]
    for words in (check, call):
        place = words.index("--results-dir=results/progressive_rope_training") + 1
        assert words[place : words.index("--data-path=datasets/ucf-101")] == expected
    assert {"--num-frames=4", "--val-every=2500", "--sample-every=2500"} <= set(call)


def test_train_progressive_leaves_positions_and_forcing_to_a_checkpoint(recorded, tmp_path):
    def choices(**environment):
        """(its flags of positions, the value of --forcing) of each call."""
        for call in recorded("train_progressive.sh", **PHASES | environment)[1]:
            place = call.index("--forcing") + 1
            share = call.pop(place)
            yield [flag for flag in call if flag in POSITIONS], share

    assert list(choices()) == 2 * [
        (POSITIONS, "0.75")
    ]  # the dry run and phase 1, which saves nothing
    assert list(choices(FORCING="0.2")) == 2 * [(POSITIONS, "0.2")]
    config = make_run(tmp_path, 8, "0000090") / "config.json"
    for training, share in (
        ({"lr": 1}, "0"),
        ({"forcing": 0.5}, "0.5"),
    ):  # the first is older than --forcing
        config.write_text(json.dumps({"training": training}))
        assert list(choices()) == 2 * [([], share)]
    assert list(choices(ONE_RUN="1")) == [(POSITIONS, "0.75")]  # which does not continue that run


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
        assert (
            not calls
            and done.returncode == 2
            and "did not start from an image model; set EXP" in done.stderr
        )
        config.write_text('{"inflate": "image.pt"}')
        _, (resumed, later) = recorded("train_progressive.sh", **settings)
        assert f"--inflate={ODD}" in resumed and not any(
            flag.startswith(("--inflate", "--new")) for flag in later
        )
    assert {f"--inflate={ODD}", "--new-classes"} < set(call) and not set(POSITIONS) & set(call)


def test_sample_passes_odd_names_unchanged_and_uses_the_newest_model(recorded, tmp_path):
    for time, run in ((1, "a"), (3, "b"), (2, "c")):
        path = tmp_path / f"results/{ODD}/{run}\nx/checkpoints/best.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    done, (call,) = recorded("sample.sh", f"--rest={ODD}", EXP=ODD)
    assert done.returncode == 0, done.stderr
    expected = {
        f"--ckpt=results/{ODD}/b\nx/checkpoints/best.pt",
        f"--folder=samples/{ODD}-f16",
        f"--rest={ODD}",
    }
    assert expected <= set(call)
    _, (call,) = recorded("sample.sh", EXP="x", CKPT=f"-{ODD}", OUT=f"-{ODD}")
    assert {f"--ckpt=-{ODD}", f"--folder=-{ODD}-f16"} <= set(call)
    _, (call,) = recorded("sample.sh", EXP="x", CKPT="y", FRAMES="16 7", GPUS="2")
    assert (
        call[call.index("--num-frames") :][:3] == ["--num-frames", "16", "7"]
        and "--folder=samples/x" in call
    )
