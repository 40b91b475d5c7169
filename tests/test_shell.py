"""The shell scripts: --help, mistakes, signals, the commands that they run; and recipes."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import cache_latents
import evaluate
import sample_gd
import train
from process import end, spawn, write_commands
from test_odd_names import ODD
from training import ROOT, snapshot

SHARED = {"scripts/common.sh", "scripts/experiment.sh"}
PATHS = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("datasets/*.sh")]
SCRIPTS = sorted({str(path.relative_to(ROOT)) for path in PATHS} - SHARED)
COMMANDS = "bash awk dirname basename cat rm mktemp ls env grep tail sort uniq sleep"


@pytest.fixture
def bash(tmp_path):
    """A function that runs a copy of a script with only a few harmless commands; the script may
    change no file.
    """
    for folder in ("scripts", "datasets", "bin"):
        (tmp_path / folder).mkdir()
    for script in [*SCRIPTS, *SHARED]:
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


def test_a_script_answers_help_with_its_variables_and_does_nothing_else(bash):
    for script in SCRIPTS:
        done = bash(script, "--other", "-h" if "sample" in script else "--help")
        assert (done.returncode, done.stderr) == (0, ""), script
        assert len(done.stdout) > 100
        assert not re.search("#!|set -e", done.stdout)
        for name in set(re.findall(r"\b([A-Z][A-Z0-9_]*)=\$\{\1:-", (ROOT / script).read_text())):
            assert re.search(rf"\b{name}\b", done.stdout), (script, name)


def test_a_script_that_another_shell_runs_says_in_one_line_to_use_bash():
    shell = shutil.which("dash") or "sh"
    for script in SCRIPTS:
        done = subprocess.run([shell, script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stdout == ""
        name = script.rpartition("/")[2]
        assert done.stderr == f"{name}: error: needs bash; run: bash {script}\n"


MISTAKES = r"""
setup.sh dev x => dev\ x; expected dev or nothing
PYTHON=false setup.sh => older than 3.11
quickstart.sh please => please; --help
weizmann.sh please => please; --help
sprites.sh please => please; --help
world.sh please => please; --help
faults.sh many => many; a number first
train_slurm.sh => sbatch scripts/train_slurm.sh
CKPT=x sample.sh => no torch found: run 'bash scripts/setup.sh' first
CKPT=x score.sh => no torch found: run 'bash scripts/setup.sh' first
train_progressive.sh => no torch found: run 'bash scripts/setup.sh' first
EXP='no such' sample.sh => EXP=no\ such: ; set CKPT
METRIC=prediction REAL=many score.sh => REAL=many: ; at least 1
METRIC='fvd fun' score.sh => METRIC=fvd\ fun: ; expected metrics
METRIC='motion fvd' score.sh => no detector; set DETECTOR
GPUS=0 weizmann.sh => GPUS=0:
HOURS=two weizmann.sh => HOURS=two: not a number
HOURS=two sprites.sh => HOURS=two: not a number
SEED=a sprites.sh => SEED=a: not a seed
SEED=08 world.sh => SEED=08: not a seed
VAE=none sprites.sh => VAE=none: no such folder; unset VAE
few.sh please => please; --help
CKPT=none.pt few.sh => CKPT=none.pt: not found; expected a checkpoint
EVALUATIONS=few CKPT=scripts few.sh => EVALUATIONS=few: not counts
METRIC=fvd few.sh => METRIC=fvd: not a metric
RECIPE=none CKPT=scripts few.sh => RECIPE=none: no such file
REAL=none RECIPE=scripts/few.sh CKPT=scripts few.sh => REAL=none: no such folder
DATA=none RECIPE=scripts/few.sh CKPT=scripts few.sh => DATA=none: no such folder
GPUS=0 quickstart.sh => GPUS=0:
STEPS_1='1 2' quickstart.sh => STEPS_1=1\ 2:
STEPS_1=$'1\n' quickstart.sh => STEPS_1=$'1\n':
VIDEOS=0 quickstart.sh => VIDEOS=0:
EVALUATIONS=four world.sh => EVALUATIONS=four: not counts
SCHEDULE=2:500 world.sh => SCHEDULE=2:500: not phases
CLIPS=0 world.sh => CLIPS=0:
FRAMES=130 world.sh => FRAMES=130: expected 2 to 129 frames
EXP=demo few.sh => EXP=demo: holds the teacher CKPT
CDPATH=bin:. SCRIPT=x HELP=y few.sh please => please; --help
FRAMES='a[$(touch hacked)]' quickstart.sh => FRAMES=
SCHEDULE='4:a[$(touch hacked)]:8' train_progressive.sh => SCHEDULE=; FRAMES:LAST_STEP:CLIPS
SCHEDULE='4:9:8 8:10:8 4:11:8' train_progressive.sh => two phases have the same frames
STEPS_2=9 train_progressive.sh => STEPS_2: no longer a variable; use SCHEDULE
BATCH_3=9 train_progressive.sh => BATCH_3: no longer a variable; use SCHEDULE
FRAMES_1=2 train_progressive.sh => FRAMES_1: no longer a variable; use SCHEDULE
MODEL=EqM-S/4 train_progressive.sh => MODEL: no longer a variable; use --model
ONE_RUN=0 train_progressive.sh => ONE_RUN: no longer a variable; use train.py --frames-schedule
train_progressive.sh --lr 1 --max-steps=5 => --max-steps: ; SCHEDULE
train_progressive.sh --ckpt x => --ckpt: ; START
"""


def test_a_mistake_or_a_missing_environment_is_one_line(bash):
    for row in MISTAKES.strip().splitlines():
        command, _, words = row.partition(" => ")
        assignments, script, arguments = re.fullmatch(r"(.* )?(\w+\.sh)(.*)", command).groups()
        variables = dict(word.split("=", 1) for word in shlex.split(assignments or ""))
        variables = {name: value.replace("$1\\n", "1\n") for name, value in variables.items()}
        done = bash(f"scripts/{script}", *arguments.split(), **variables)
        assert (done.returncode, done.stdout) == (2, ""), row
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{script}: error: ")
        assert all(word in line for word in words.split("; ")), (row, line)


IS_CHECK = "[[ $* == *--dry-run* ]]"  # of all phases, in one process that knows the number of ranks


@pytest.mark.parametrize(
    "script, settings",
    [
        (
            "sprites.sh",
            r"HOURS=0.5 DATA=my\ data SEED=0 OBJECTIVE=eqm VAE_STEPS=1350 STEPS_1=375 STEPS_2=2750 "
            "WEAK=1250 SAMPLES=2592 PREDICTIONS=2664",
        ),
        (
            "weizmann.sh",
            r"HOURS=0.5 DATA=my\ data HOLD_OUT=7\ 8 VAE_STEPS=2500 STEPS_1=1200 STEPS_2=2400 "
            "STEPS_3=4000 SAMPLES=96 LONG=16 REAL=64 CLASSIFIER_STEPS=250",
        ),
        ("quickstart.sh", r"DATA=my\ data VIDEOS=60 SEED=0"),
    ],
)
def test_an_experiment_keeps_all_variables_that_determine_its_results(
    script, settings, bash, tmp_path
):
    (tmp_path / "results/mine").mkdir(parents=True)
    (tmp_path / "results/mine/settings").write_text("HOURS=1\n")
    done = bash(f"scripts/{script}", EXP="mine", HOURS="0.5", DATA="my data")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"EXP=mine: made with HOURS=1, got {settings}; set another EXP" in done.stderr


def test_weizmann_refuses_data_that_holds_out_others(recorded, tmp_path):
    (tmp_path / "scripts/setup.sh").write_text("")
    for name in ("weizmann", "weizmann-more"):
        lists = tmp_path / f"datasets/{name}/ucfTrainTestlist"
        lists.mkdir(parents=True)
        (lists / "trainlist01.txt").touch()
        (lists / "testlist01.txt").write_text("Bend/person7.mkv\nWave/person7.mkv\n")
    settings = {"GPUS": "1", "PRECISION": "fp32"}
    _, calls = recorded("weizmann.sh", status=2, HOLD_OUT="7 8", **settings)
    assert calls == []
    # without mkdir here, this ends later
    _, (vae, *_) = recorded("weizmann.sh", status=127, HOLD_OUT="7", **settings)
    assert vae[0] == "EqM/train_vae.py"


@pytest.mark.parametrize("script", ["sample.sh", "train_progressive.sh"])
def test_one_process_is_python_and_of_several_our_line_comes_last(script, bash):
    wrong = '[[ -z ${EQM_ERROR_FILE:-} ]] || echo "wrong flag" >>"$EQM_ERROR_FILE"'
    python = f'{IS_CHECK} || {{ echo "python $1"; exit 2; }}'
    commands = {"python": python, "torchrun": f'{wrong}\necho "a long report" >&2; exit 1'}
    done = bash(f"scripts/{script}", commands=commands, GPUS="1", CACHE="0", CKPT="x")
    assert done.returncode == 2
    assert done.stderr == ""
    assert done.stdout.startswith("python EqM/")
    done = bash(f"scripts/{script}", commands=commands, GPUS="2", CACHE="0", CKPT="x")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "a long report\nwrong flag\n"


def test_mistakes_in_any_phase_are_found_before_the_cache(bash):
    python = f'{IS_CHECK} && echo "$WORLD_SIZE ranks, $*" >&2; exit 2'
    commands = {"python": python, "torchrun": "exit 9"}
    done = bash("scripts/train_progressive.sh", "--lr", "1", commands=commands, GPUS="2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("2 ranks, EqM/train.py ")
    assert "--lr 1 " in done.stderr
    assert "--frames-schedule=4:50000:256,8:100000:128,16:150000:64 " in done.stderr


@pytest.mark.parametrize("status, precision", [(0, "bf16"), (1, "fp32")])
def test_a_cpu_without_fast_bf16_trains_in_fp32(status, precision):
    code = (
        f"set -eu; grep() {{ return {status}; }}; source scripts/experiment.sh; suit; echo $GPUS "
        "$PRECISION $MIXED"
    )
    process = spawn("bash", "-c", code, cwd=ROOT, environment={"PATH": "/usr/bin:/bin"})
    assert end(process, 0) == f"2 {precision} --precision={precision}\n"


@pytest.mark.parametrize("name, ending, status", [("INT", "exit 1", 130), ("TERM", "exit", 143)])
def test_a_signal_reaches_a_run_of_one_process_once_and_the_last_line_gives_advice(
    name, ending, status, bash, tmp_path
):
    code = f"trap 'echo saved; {ending}' {name}; echo started; while true; do sleep 0.05; done"
    write_commands(tmp_path / "bin", {"python": f"{IS_CHECK} && exit\n{code}", "torchrun": ""})
    settings = {"GPUS": "1", "CACHE": "0", "EXP": "x"}
    settings["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    script = "scripts/train_progressive.sh"
    process = spawn("bash", script, cwd=tmp_path, environment=settings, stderr=None)
    assert process.stdout.readline() == "started\n"
    send = os.killpg if name == "INT" else os.kill  # a terminal sends SIGINT to the whole group
    send(process.pid, signal.Signals[f"SIG{name}"])
    advice = "train_progressive.sh: stopped; to continue, run the same command again\n"
    assert end(process, status, timeout=20) == f"saved\n{advice}"


def test_an_interrupted_training_is_not_sampled(bash, tmp_path):
    (tmp_path / "scripts/setup.sh").write_text("")
    training = "trap 'echo saved; exit' INT; echo started; while true; do sleep 0.05; done"
    fake = f"case $1 in EqM/train.py) {training};; EqM/*) echo went on;; esac"
    write_commands(tmp_path / "bin", {"python": fake, "torchrun": ""})
    settings = {
        "GPUS": "1",
        "PRECISION": "fp32",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    process = spawn("bash", "scripts/world.sh", cwd=tmp_path, environment=settings)
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert end(process, 130, timeout=20) == "saved\n"


# The commands that the scripts run ----------------------------------------------------------------


@pytest.fixture
def recorded(bash, tmp_path_factory):
    """A function that runs a script with a python and a torchrun that only record their arguments.

    It returns (what the script printed, the arguments of each call).
    """
    record = tmp_path_factory.mktemp("record") / "calls"
    commands = dict.fromkeys(("python", "torchrun"), 'printf "%s\\0" "$@" $\'\\1\' >>"$RECORD"')

    def run(script, *arguments, status=0, **environment):
        record.write_text("")
        environment["RECORD"] = str(record)
        done = bash(f"scripts/{script}", *arguments, commands=commands, **environment)
        assert done.returncode == status, done.stderr
        calls = record.read_text().split("\1\0")[:-1]
        return done.stdout, [call.removesuffix("\0").split("\0") for call in calls]

    return run


PHASES = {"EXP": ODD, "CACHE": "0", "SCHEDULE": "4:50:256 8:90:128 16:91:64"}
LAST_STEPS = {4: "0000050", 8: "0000090"}


def make_run(root, frames, *names, ending=""):
    """Make a run of one phase with these checkpoints."""
    folder = root / f"results/{ODD}/{frames:03d}-EqM-S-4-f{frames}-rope{ending}/checkpoints"
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.pt").touch()


@pytest.mark.parametrize("ending", ["", "-causal"])
@pytest.mark.parametrize(
    "runs, frames",
    [  # {frames: checkpoints}; the frames of the phases that it trains
        ({4: []}, [4, 8, 16]),
        ({4: ["0000050"], 8: []}, [4, 8, 16]),
        ({4: ["0000050"], 8: ["latest"]}, [8, 16]),
        ({8: ["best"]}, [8, 16]),
        ({4: ["0000050"], 16: ["best", "latest"]}, [16]),
    ],
)
def test_train_progressive_repeats_no_phase_before_one_with_checkpoints(
    runs, frames, ending, recorded, tmp_path
):
    for number, names in runs.items():
        make_run(tmp_path, number, *names, ending=ending)
    _, (check, *calls) = recorded("train_progressive.sh", **PHASES)
    assert "--dry-run" in check
    for call, number in zip(calls, frames, strict=True):
        assert f"--num-frames={number}" in call
        before = number // 2
        if number == 4:  # from scratch
            assert call[-1] == "--resume"
        elif before in runs:
            folder = f"results/{ODD}/{before:03d}-EqM-S-4-f{before}-rope{ending}"
            assert call[-1] == f"--ckpt={folder}/checkpoints/{LAST_STEPS[before]}.pt"


def test_train_progressive_passes_odd_names_and_flags_in_order(recorded, tmp_path):
    (tmp_path / f"{ODD}.txt").touch()
    names = {"DATA": f"{ODD}data", "CACHE": f"{ODD}latents", "RECIPE": f"{ODD}.txt"}
    flags = [f"--rest={ODD}", "--max-bad-fraction", "0.5"]
    printed, (check, first, cache, *calls) = recorded(
        "train_progressive.sh", *flags, GPUS="1", **PHASES | names
    )
    given = " ".join([f"@{ODD}.txt", *flags, f"--data-path={ODD}"])
    assert f"{given}data" in " ".join(check)
    assert "--num-frames=4" in first and "--dry-run" in first
    assert cache[0] == "EqM/cache_latents.py"
    assert f"{given}data --out={ODD}latents" in " ".join(cache)
    every = [["--val-every=3", "--sample-every=3"], ["--val-every=2", "--sample-every=2"], []]
    for call, periods in zip(calls, every, strict=True):
        assert call[0] == "EqM/train.py"
        assert {f"--results-dir=results/{ODD}", "--lr-decay-end=91", *periods} <= set(call)
        assert f"{given}latents" in " ".join(call)
    _, _, command = printed.splitlines()[-1].partition("with: ")
    process = spawn("bash", "-c", command.replace("bash", "printenv EXP #"))
    assert end(process, 0) == f"{ODD}\n"


def test_train_progressive_compiles_on_a_gpu_and_an_image_model_keeps_its_positions(
    recorded, tmp_path
):
    _, calls = recorded("train_progressive.sh", **PHASES)
    for call in calls:
        assert "@scripts/recipes/ours.txt" in call
        assert not {"--compile", "--rope-speed=0"} & set(call)
    write_commands(tmp_path / "bin", {"nvidia-smi": ""})
    _, calls = recorded("train_progressive.sh", "--rope-speed=1", START=ODD, **PHASES)
    for index, call in enumerate(calls):
        assert "--compile" in call
        recipe = call.index("@scripts/recipes/ours.txt")
        assert call[recipe : recipe + 3] == [call[recipe], "--rope-speed=0", "--rope-speed=1"]
        # the check of all phases, and the first phase
        assert ({f"--inflate={ODD}", "--new-classes"} <= set(call)) == (index < 2)


def test_quickstart_trains_its_recipe_in_one_run_or_in_phases(recorded, tmp_path):
    (tmp_path / "scripts/setup.sh").write_text("")
    settings = {"GPUS": "1", "STEPS_1": "5", "BATCH_3": "4", "FORCING": "0.3", "PRECISION": "fp32"}
    # sample.sh finds no model, and ends it
    _, (_, call) = recorded("quickstart.sh", status=2, **settings)
    assert call[0] == "EqM/train.py"
    assert "@scripts/recipes/quickstart.txt" in call
    assert "--frames-schedule=4:5:32,8:1680:16,16:2200:4" in call
    assert call[-4:] == ["--forcing=0.3", "--precision=fp32", "--global-seed", "0"]
    _, (_, check, *phases) = recorded("quickstart.sh", status=2, ONE_RUN="0", **settings)
    assert "--frames-schedule=4:5:32,8:1680:16,16:2200:4" in check
    lengths = ["--num-frames=4", "--num-frames=8", "--num-frames=16"]
    for call, length in zip(phases, lengths, strict=True):
        assert {length, "@scripts/recipes/quickstart.txt", "--forcing=0.3", "--mix"} <= set(call)


def test_world_compares_numbers_of_evaluations_on_the_same_walks(recorded, tmp_path):
    (tmp_path / "scripts/setup.sh").write_text("")
    settings = {"GPUS": "1", "PRECISION": "fp32", "EVALUATIONS": "2 4", "CLIPS": "3", "DATA": ODD}
    _, (*_, making, training, two, score_two, four, score_four, page) = recorded(
        "world.sh", **settings
    )
    assert page[0] == "scripts/export.py"
    assert page[-2:] == ["--html", "results/world/world.html"]
    assert making == ["datasets/make_world.py", f"--out={ODD}"]
    assert {"@scripts/recipes/world.txt", f"--data-path={ODD}"} <= set(training)
    for samples, scores, evaluations in ((two, score_two, 2), (four, score_four, 4)):
        folder = f"samples/world-{evaluations}"
        expected = {
            "num_sampling_steps": evaluations + 1,
            "actions": [f"{ODD}/walks.npy"],
            "given": ODD,
            "num_samples": 6,
            "samples_per_clip": 2,
            "given_frames": (0,),
        }
        assert vars(sample_gd.parse_args(samples[1:])).items() >= expected.items()
        expected = {"metric": "world", "samples": [folder], "out": f"{folder}.json"}
        assert vars(evaluate.parse_args(scores[1:])).items() >= expected.items()


def test_sample_passes_odd_names_unchanged_and_uses_the_newest_model(recorded, bash, tmp_path):
    for time, run in ((1, "a"), (3, "b"), (2, "c")):
        path = tmp_path / f"results/{ODD}/{run}\nx/checkpoints/best.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    _, (call,) = recorded("sample.sh", f"--rest={ODD}", EXP=ODD)
    ckpt = f"--ckpt=results/{ODD}/b\nx/checkpoints/best.pt"
    assert {ckpt, f"--folder=samples/{ODD}-f16", f"--rest={ODD}"} <= set(call)
    _, (call,) = recorded("sample.sh", EXP="x", CKPT=f"-{ODD}", OUT=f"-{ODD}")
    assert {f"--ckpt=-{ODD}", f"--folder=-{ODD}-f16"} <= set(call)
    _, (call,) = recorded("sample.sh", EXP="x", CKPT="y", FRAMES="16 7", GPUS="2")
    assert "--num-frames 16 7 --" in " ".join(call)
    assert "--folder=samples/x" in call
    (line,) = bash("scripts/sample.sh", EXP="mi\nne").stderr.splitlines()
    assert line.startswith("sample.sh: error: EXP=$'mi\\nne': no model; ")
    (tmp_path / "results/export").mkdir()
    (tmp_path / "results/export/model.safetensors").touch()
    _, (call,) = recorded("sample.sh", EXP="export")
    assert "--ckpt=results/export" in call


# Recipes ------------------------------------------------------------------------------------------


def flags_of(monkeypatch, *words, script=train):
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--data-path", "DIR"])
    return script.parse_args()


def test_a_recipe_is_a_text_of_flags_and_later_flags_win(monkeypatch, tmp_path):
    recipe = tmp_path / "my.txt"
    text = "# all of it's mine\n--lr 1 --ckpt 'a b#c'  # why\n\n--video # --shard\n  --lr 2"
    recipe.write_text(text)
    flags = flags_of(monkeypatch, "--lr", "5", f"@{recipe}", "--save-minutes", "3")
    assert (flags.lr, flags.ckpt, flags.video, flags.shard) == (2, "a b#c", True, False)
    assert flags.typed == {"lr", "ckpt", "video", "save_minutes", "data_path"}
    assert flags.recipe == text
    assert flags_of(monkeypatch, f"@{recipe}", "--lr", "7").lr == 7
    assert flags_of(monkeypatch).recipe is None


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/recipes/*.txt")), ids=lambda p: p.stem)
def test_train_takes_our_recipes(path, monkeypatch):
    assert flags_of(monkeypatch, f"@{path}").typed > {"data_path"}


def test_a_cache_takes_what_concerns_it_from_the_flags_of_a_training(monkeypatch):
    words = shlex.split("--out x --with-flips @scripts/recipes/ours.txt --lr 1 --vae mse")
    monkeypatch.chdir(ROOT)
    flags = flags_of(monkeypatch, *words, "--skip-others", script=cache_latents)
    assert flags.vae == "mse"
    assert flags.image_size == 256
    assert flags.with_flips is True
    flags = flags_of(monkeypatch, *words, "--no-flip", "--skip-others", script=cache_latents)
    assert flags.with_flips is False
