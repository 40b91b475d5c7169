"""What metrics.jsonl, TensorBoard and wandb get, also after a resume, and the statistics of the steps."""

import sys
import time
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.cli import UserError
from runtime.metrics import Metrics, StepStats, bar_text, device_stats, import_wandb, peak_tflops, read_metrics
from video.writers import write_gif


class FakeWandb(SimpleNamespace):
    """The part of the wandb package that is used; records its arguments."""

    def __init__(self):
        super().__init__(Error=RuntimeError, runs=[])

    def init(self, **arguments):
        run = SimpleNamespace(arguments=arguments, rows=[], finished=False)
        run.log = lambda row, step: run.rows.append((step, row))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run

    def Image(self, pixels):  # noqa: N802 (its name in wandb)
        return "Image", pixels

    def Video(self, path, format):  # noqa: N802
        return path, format


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def board(folder):
    """What TensorBoard got."""
    events = EventAccumulator(str(folder))
    return events.Reload()


def image(folder, name):
    """(step, PIL image) of the only image that TensorBoard got."""
    (event,) = board(folder).Images(name)
    return event.step, Image.open(BytesIO(event.encoded_image_string))


def test_each_call_appends_a_json_line_at_once_in_which_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log(10, loss=0.5, clips=32)
    assert lines(tmp_path) == ['{"step": 10, "loss": 0.5, "clips": 32}']  # while the file is still open
    metrics.log(20, **{"val/loss": torch.tensor(0.25)})
    metrics.log(30, a=float("nan"), b=float("inf"), c=torch.tensor(-float("inf")), d=1.0)
    metrics.close()
    assert lines(tmp_path)[1:] == [
        '{"step": 20, "val/loss": 0.25}', '{"step": 30, "a": null, "b": null, "c": null, "d": 1.0}'
    ]  # fmt: skip


def test_clips_reach_tensorboard_and_wandb_as_a_row_per_clip_and_a_column_per_frame_and_moving(tmp_path, wandb):
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    gif = BytesIO()
    write_gif(gif, clips[0], fps=10)
    metrics = Metrics(tmp_path, wandb=True)
    metrics.video(7, "samples", clips, gif.getvalue(), tmp_path / "a.mp4")
    metrics.close()
    expected = np.concatenate([np.concatenate(clip, axis=1) for clip in clips])
    step, sheet = image(tmp_path, "samples")
    assert step == 7
    assert np.array_equal(sheet, expected)
    step, moving = image(tmp_path, "samples_moving")
    assert (step, moving.n_frames) == (7, 3)
    ((step, row),) = wandb.runs[0].rows
    assert (step, row["samples"][0], row["samples_moving"]) == (7, "Image", (str(tmp_path / "a.mp4"), "mp4"))
    assert np.array_equal(row["samples"][1], expected)


@pytest.mark.parametrize(("number", "rows", "columns"), [(3, 1, 3), (19, 3, 8)])
def test_images_reach_tensorboard_and_wandb_as_a_grid_of_8_in_a_row(tmp_path, wandb, number, rows, columns):
    images = np.random.default_rng(0).integers(0, 255, (number, 1, 4, 5, 3), dtype=np.uint8)
    metrics = Metrics(tmp_path, wandb=True)
    metrics.video(7, "samples", images)
    metrics.close()
    _, sheet = image(tmp_path, "samples")
    ((_, row),) = wandb.runs[0].rows
    for grid in (np.asarray(sheet), row["samples"][1]):
        assert grid.shape == (rows * 4, columns * 5, 3)
        cells = grid.reshape(rows, 4, columns, 5, 3).swapaxes(1, 2).reshape(-1, 4, 5, 3)
        assert np.array_equal(cells[:number], images[:, 0])
        assert (cells[number:] == 255).all()


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    metrics = Metrics(tmp_path, resume_step=3, wandb=True)
    metrics.log(1, loss=1.0)
    metrics.video(1, "samples", np.zeros((1, 1, 2, 2, 3), np.uint8))
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_scalars_reach_tensorboard_and_after_a_resume_no_step_is_logged_twice(tmp_path):
    for resume_step, steps, loss in ((None, range(1, 8), 1), (4, range(5, 7), 2)):
        metrics = Metrics(tmp_path, resume_step)
        for step in steps:
            metrics.log(step, loss=loss)
        metrics.close()
    rows, torn = read_metrics(tmp_path / "metrics.jsonl")
    expected = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert [(row["step"], row["loss"]) for row in rows] == expected
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("loss")] == expected
    assert torn == metrics.torn == 0


def test_a_resume_drops_and_counts_a_line_torn_by_a_crash_and_does_not_change_earlier_ones(tmp_path):
    earlier = ['{"step": 1, "loss": 0.1, "val/loss": null}', '{"step": 1, "note": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*earlier, '{"step": 2, "lo']))
    metrics = Metrics(tmp_path, resume_step=2)
    metrics.log(3, loss=0.25)
    metrics.close()
    assert metrics.torn == 1
    assert lines(tmp_path) == [*earlier, '{"step": 3, "loss": 0.25}']


def test_a_resume_without_metrics_starts_a_new_file(tmp_path):
    metrics = Metrics(tmp_path, resume_step=100)
    metrics.log(101, loss=1.0)
    metrics.close()
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("torn_line", [b'{"step": 2, "loss": 0.', b"\xff\xfe{", b"\0\0\0\0"])
def test_torn_lines_are_left_out_and_counted(tmp_path, torn_line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n' + torn_line)
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1, "loss": 0.5}], 1)


def test_wandb_without_the_package_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match="--wandb.*pip install wandb"):
        import_wandb()
    with pytest.raises(UserError, match="--wandb.*pip install wandb"):
        Metrics(tmp_path, wandb=True)


def test_wandb_gets_the_config_and_the_scalars_and_a_resumed_run_keeps_its_id(tmp_path, wandb):
    for resume_step in (None, 5):
        metrics = Metrics(tmp_path, resume_step=resume_step, wandb=True, config={"lr": 1e-4})
        metrics.log(6, loss=0.5)
        metrics.close()
    first, second = wandb.runs
    assert first.arguments["config"] == {"lr": 1e-4}
    assert first.rows == second.rows == [(6, {"loss": 0.5})]
    assert first.finished
    assert first.arguments["id"] == second.arguments["id"]
    assert second.arguments["resume"] == "allow"


def test_a_wandb_run_that_cannot_start_is_a_user_error(tmp_path, wandb, monkeypatch):
    def init(**arguments):
        raise wandb.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match="--wandb: api_key not configured.*wandb login"):
        Metrics(tmp_path, wandb=True)


# StepStats ----------------------------------------------------------------------------------------------------------


def fill(stats, values, skipped=None):
    for number, value in enumerate(values):
        scalars = {"train_loss": torch.tensor(value), "grad_norm": torch.tensor(2 * value)}
        if skipped:
            scalars["skipped"] = torch.tensor(float(skipped[number]))
        stats.add([f"{number}.avi"], **scalars)
    return stats


def test_the_summary_has_the_means_of_the_steps():
    summary = fill(StepStats(), [1.0, 2.0, 6.0]).summary(step=3, global_batch=8)
    assert (summary["train_loss"], summary["grad_norm"]) == (3.0, 6.0)
    assert summary["clips_per_s"] > 0


def test_the_rate_of_a_rank_is_the_flops_of_all_over_seconds_and_ranks(monkeypatch):
    stats = StepStats()
    for _ in range(3):
        stats.add([], 5e12, train_loss=torch.tensor(1.0), grad_norm=torch.tensor(1.0))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(time, "monotonic", lambda now=stats.began + 10: now)
    assert stats.summary(3, 8)["tflops_per_s"] == pytest.approx(3 * 5 / 10 / 4)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA GB200", "bf16", 2500),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA H100 80GB HBM3", "fp32", None),  # no rate of matrix units to compare with
        ("NVIDIA GeForce GTX 1080", "bf16", None),
    ],
)
def test_the_peak_rate_of_a_gpu_is_found_by_its_name(name, precision, peak):
    assert peak_tflops(name, precision) == peak


def test_the_bar_shows_what_the_device_has_and_a_cpu_has_no_mfu(monkeypatch):
    row = {"train_loss": 1.25, "clips_per_s": 80.0, "tflops_per_s": 400.0}
    assert device_stats(torch.device("cpu"), "bf16", 400.0) == {}
    assert bar_text(row) == "loss 1.250, 80.0 clips/s, 400 TFLOP/s"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 31_200_000_000)
    stats = device_stats(torch.device("cuda", 0), "bf16", 400.0)
    assert stats == {"mfu": 400 / 989, "gpu_memory_gb": 31.2}
    assert bar_text(row | stats) == "loss 1.250, 80.0 clips/s, 400 TFLOP/s, 40% MFU, 31.2 GB"
    assert device_stats(torch.device("cuda", 0), "fp32", 40.0) == {"gpu_memory_gb": 31.2}


def test_an_interruption_changes_no_bit_of_the_means():
    values = torch.rand(7, generator=torch.Generator().manual_seed(0)).tolist()
    whole = fill(StepStats(), values).summary(step=7, global_batch=8)
    first = fill(StepStats(), values[:3])
    second = StepStats(first.averaged(step=3))
    assert len(second) == 3
    parts = fill(second, values[3:]).summary(step=7, global_batch=8)
    assert (whole["train_loss"], whole["grad_norm"]) == (parts["train_loss"], parts["grad_norm"])
    assert StepStats(second.averaged(step=7)).summary(7, 8)["train_loss"] == whole["train_loss"]  # at the very end


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_the_error_for_a_nonfinite_value_names_its_step_files_and_earlier_gradient_norms(value):
    stats = fill(StepStats(), [1.0, 2.0, value, 3.0])
    words = "the train_loss of step 103 is not finite, on rank 0, of 2.avi; gradient norms up to it: 2, 4, "
    with pytest.raises(UserError, match=words):
        stats.summary(step=104, global_batch=8)


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    stats = fill(StepStats(), [1.0, float("nan"), 3.0], skipped=[0, 1, 0])
    summary = stats.summary(step=3, global_batch=8)
    assert (summary["train_loss"], summary["skipped"]) == (2.0, 1)
    assert np.isnan(fill(StepStats(), [float("inf")], skipped=[1]).summary(1, 8)["train_loss"])  # no step left
    with pytest.raises(UserError, match="step 2 is not finite"):
        fill(StepStats(), [float("nan"), float("nan")], skipped=[1, 0]).summary(step=2, global_batch=8)
