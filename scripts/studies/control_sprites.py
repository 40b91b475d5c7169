"""The control study on Sprites: eqm, flow and told-w, each with the settings that suit it.

    python scripts/studies/control_sprites.py --data-path datasets/sprites \
        --latents results/sprites/latents --tune    each training shift, with a seed that does not
                                                    count
    (the same without --tune)                       the main runs, three seeds

Models, data and compute are those of positions.py, with the positions of the recipe. Of each arm,
the training shift and the guidance count that gave the most valid samples in tuning. Predictions
have no guidance, which does not help them. eqm takes the descent of the recipe, the others as many
Euler steps. A run takes about 40 minutes of one core. Hardly any sample was valid in tuning, so the
main table has a milder score, too: one body in all frames.

When all runs are sampled, the script scores them and writes control_sprites.md and .json in
results/studies/objectives, with --tune control_sprites_tuning.md and .json. Models, samples and
scores are in its folder runs (see lab.py).
"""

import itertools
from dataclasses import replace

import lab
import positions
from control import loss_scale
from lab import Column
from runtime.cli import UserError, one_line_errors
from shapes import TABLE

ARMS = {  # flags of train.py
    "eqm": "",
    "flow": "--objective flow --sampler euler",
    "told-w": "--objective told-w --sampler euler",
}
SHIFTS = (1, 2)  # of training
GUIDANCES = (1, 1.5, 2)
TUNING_SEED = 100
TUNING_SAMPLES = 288
SAMPLES = "samples"
PREDICTIONS = "predictions"
VALID = Column("valid samples (%)", "valid", task=SAMPLES)
COLUMNS = (
    VALID,
    Column("samples with one body in all frames (%)", "body", task=SAMPLES),
    Column("samples of the requested class (%)", "asked_class", task=SAMPLES),
    Column("different characters", "characters", factor=1, digits=0, task=SAMPLES),
    Column("one frame given: PSNR (dB)", "psnr", factor=1, digits=2, task=PREDICTIONS),
    Column("one frame given: the true clip (%)", "true_clip", task=PREDICTIONS),
)
COMPARED = (("told-w", "eqm"), ("flow", "eqm"))


def guidance_task(guidance):
    return f"{SAMPLES}, guidance {guidance:g}"


def make_run(args, name, shift, seed, tasks, table):
    """The lab.Run of an arm with a training shift. tasks: see positions.DataSet."""
    return positions.make_run(
        args,
        replace(positions.DATA_SETS["sprites"], name=table, tasks=tasks),
        about={"objective": name, "shift": shift, "seed": seed},
        flags=f"{TABLE} {ARMS[name]} --gamma-shift {shift} --clip-grad {loss_scale(name):g}",
    )


def tuning_run(args, name, shift):
    """The run that samples an arm with a training shift and each guidance."""
    tasks = {}
    for guidance in GUIDANCES:
        flags = f"--num-frames 8 --num-samples {TUNING_SAMPLES} --cfg-scale {guidance}"
        tasks[guidance_task(guidance)] = (flags, ("census",))
    return make_run(
        args,
        name,
        shift=shift,
        seed=TUNING_SEED,
        tasks=tasks,
        table="control_sprites_tuning",
    )


def main_run(args, name, seed, tuning):
    """The run of an arm with what tuning chose. tuning: the rows of the tuning runs."""
    shift, guidance = choose(tuning, name)
    usual = positions.DATA_SETS["sprites"].tasks
    flags, metrics = usual[SAMPLES]
    tasks = usual | {SAMPLES: (f"{flags} --cfg-scale {guidance}", metrics)}
    return make_run(
        args,
        name,
        shift=shift,
        seed=seed,
        tasks=tasks,
        table="control_sprites",
    )


def choose(rows, name):
    """(training shift, guidance) of an arm with the most valid samples in tuning.

    No sample of a model that diverged is valid. Raises UserError if a run is missing.
    """
    shares = {}
    for shift, guidance in itertools.product(SHIFTS, GUIDANCES):
        of_run = lab.rows_with({"objective": name, "shift": shift}, rows)
        if not of_run:
            raise UserError(f"{name}, training shift {shift}: not tuned yet; run with --tune first")
        shares[shift, guidance] = VALID.of(guidance_task(guidance)).number(of_run[0]) or 0.0
    return max(shares, key=shares.get)


def tuning_markdown(rows):
    lines = lab.heading(
        "Tuning of the control on Sprites",
        "`scripts/studies/control_sprites.py --tune` wrote this table. Cells: valid samples (%) of "
        f"{TUNING_SAMPLES}, one seed.",
    )
    arms = {}
    for name, shift in itertools.product(ARMS, SHIFTS):
        arms[f"{name}, training shift {shift}"] = {"objective": name, "shift": shift}
    columns = [
        replace(VALID, title=f"guidance {guidance:g}", task=guidance_task(guidance))
        for guidance in GUIDANCES
    ]
    return lines + lab.arm_table(rows, arms, columns)


def markdown(rows):
    lines = lab.heading(
        "The control on Sprites",
        "`scripts/studies/control_sprites.py` wrote this table. Cells hold the mean over seeds, "
        "and the range.",
    )
    arms = {name: {"objective": name} for name in ARMS}
    lines += lab.arm_table(rows, arms, COLUMNS)
    differences = []
    for column, pair in itertools.product(COLUMNS, COMPARED):
        values = lab.by_arm(rows, arms, column)
        differences.append((values, pair, column.title, column.digits + 1))
    return lines + lab.compare(differences)


def parse_args():
    parser = lab.study_parser(__doc__, "objectives", seeds=[0, 1, 2], tunes=True, arms=ARMS)
    positions.add_data_flags(parser, "the videos of Sprites", is_required=True)
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if args.tune:
        cases = itertools.product(args.arms, SHIFTS)
        runs = [tuning_run(args, name, shift) for name, shift in cases]
        lab.run_study(args, runs, tuning_markdown)
        return
    cases = itertools.product(args.seeds, args.arms)
    runs = lab.tuned_runs(args, "control_sprites_tuning", cases, main_run)
    lab.run_study(args, runs, markdown)


if __name__ == "__main__":
    main()
