"""What metrics.jsonl, TensorBoard and wandb get, also after a resume, and the statistics of the
steps.
"""

import sys
import time
from io import BytesIO
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.metrics import Metrics, StepStats, bar_text, device_stats, peak_tflops, read_metrics
from training import error_of
from video.writers import write_gif


@pytest.fixture
def wandb(monkeypatch):
    """In place of the wandb package, if it is installed at all."""
    fake = Mock(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def log(folder, *rows, **settings):
    """Log (step, scalars) rows in a run folder as one run does."""
    metrics = Metrics(folder, **settings)
    for step, scalars in rows:
        metrics.log(step, **scalars)
    metrics.close()


def board(folder):
    """What TensorBoard got."""
    return EventAccumulator(str(folder)).Reload()


def image(folder, name):
    """(step, PIL image) of the only image that TensorBoard got."""
    (event,) = board(folder).Images(name)
    return event.step, Image.open(BytesIO(event.encoded_image_string))


def show(folder, clips, *moving):
    """Log clips at step 7; returns (the sheet in TensorBoard, the sheet in wandb)."""
    folder.mkdir(exist_ok=True)
    metrics = Metrics(folder, wandb=True)
    metrics.video(7, "samples", clips, *moving)
    metrics.close()
    step, sheet = image(folder, "samples")
    assert step == 7
    return np.asarray(sheet), sys.modules["wandb"].Image.call_args.args[0]


def test_clips_are_logged_as_a_sheet_and_as_a_movie_and_images_as_a_row(tmp_path, wandb):
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    gif = BytesIO()
    write_gif(gif, clips[0], fps=10)
    expected = np.concatenate([np.concatenate(clip, axis=1) for clip in clips])
    for sheet in show(tmp_path, clips, gif.getvalue(), tmp_path / "a.mp4"):
        assert np.array_equal(sheet, expected)
    step, moving = image(tmp_path, "samples_moving")
    assert step == 7
    assert moving.n_frames == 3
    row = {"samples": wandb.Image.return_value, "samples_moving": wandb.Video.return_value}
    assert wandb.init.return_value.log.call_args_list == [call(row, step=7)]
    assert wandb.Video.call_args_list == [call(str(tmp_path / "a.mp4"), format="mp4")]
    images = clips.reshape(6, 1, 4, 5, 3)
    for sheet in show(tmp_path / "images", images):  # in a row
        assert np.array_equal(sheet, np.concatenate(images[:, 0], axis=1))


def test_after_a_resume_no_step_is_logged_twice_and_a_torn_line_is_gone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()  # as a run that was killed before its first line
    log(tmp_path, *[(step, {"loss": 1}) for step in range(1, 8)], resume_step=0)
    path.write_text(path.read_text() + '{"step": 4, "note": null}\n{"step": 8, "lo')
    (events,) = tmp_path.glob("events.out.*")
    events.rename(tmp_path / "events.out.tfevents.1.first")  # it began in an earlier second
    log(tmp_path, (5, {"loss": 2}), (6, {"loss": 2}), resume_step=4)
    lines = path.read_text().splitlines()
    assert lines[4] == '{"step": 4, "note": null}'
    assert len(lines) == 7
    rows, torn = read_metrics(path)
    expected = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert [(row["step"], row["loss"]) for row in rows] == expected
    assert torn == 0
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("loss")] == expected


def test_torn_lines_are_skipped_and_counted(tmp_path):
    text = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.\n\xff\xfe{\n[1]'
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1, "loss": 0.5}], 3)


def test_wandb_gets_config_and_scalars_a_resumed_run_keeps_its_id_and_a_missing_login_is_one_line(
    tmp_path, wandb
):
    for resume_step in (0, 5):
        log(tmp_path, (6, {"loss": 0.5}), resume_step=resume_step, wandb=True, config={"lr": 1e-4})
    first, second = [call.kwargs for call in wandb.init.call_args_list]
    assert first["config"] == {"lr": 1e-4}
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert wandb.init.return_value.log.call_args_list == [call({"loss": 0.5}, step=6)] * 2
    assert wandb.init.return_value.finish.call_count == 2
    wandb.init.side_effect = wandb.Error("api_key not configured")
    line = error_of(Metrics, tmp_path, wandb=True)
    assert line.startswith("--wandb: api_key not configured")
    assert "wandb login" in line


# StepStats ----------------------------------------------------------------------------------------


def fill(values, skipped=None):
    stats = StepStats()
    for number, value in enumerate(torch.tensor(values)):
        scalars = {"train_loss": value, "grad_norm": 2 * value}
        if skipped:
            scalars["skipped"] = torch.tensor(skipped[number])
        stats.add([f"{number}.avi"], flops=5e12, **scalars)
    return stats


def test_the_summary_has_the_means_of_the_steps_and_the_rates_per_rank(monkeypatch):
    stats = fill([1.0, 2.0, 6.0])
    batch = {"corrupt": ["a.avi"], "number": 3}
    now = [stats.began + 4]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("WORLD_SIZE", "4")

    def batches():
        now[0] += 1
        yield batch

    assert stats.next_batch(batches()) is batch
    assert stats.corrupt == ["a.avi"]
    now[0] = stats.began + 10
    summary = stats.summary(step=3, global_batch=8)
    rates = {"clips_per_s": 3 * 8 / 10, "tflops_per_s": 3 * 5 / 10 / 4, "wait_frac": 1 / 10}
    assert summary == pytest.approx({"train_loss": 3.0, "grad_norm": 6.0} | rates)


def test_a_gpu_has_a_peak_rate_by_its_name_and_the_bar_shows_its_statistics(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA A10G": 70,
        "NVIDIA GB200": 2500,
        "Tesla V100-SXM2-16GB": 125,
        "NVIDIA GeForce GTX 1080": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    }
    assert {name: peak_tflops(name, "bf16") for name in names} == names
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp16") == 312
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "tf32") == 156

    row = {"train_loss": 1.25, "clips_per_s": 80.0, "tflops_per_s": 400.0}
    assert device_stats(torch.device("cpu"), "bf16", 400.0) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 31_200_000_000)
    stats = device_stats(torch.device("cuda", 0), "bf16", 400.0)
    assert stats == {"mfu": 400 / 989, "gpu_memory_gb": 31.2}
    assert bar_text(row | stats) == "loss 1.250, 80.0 clips/s, 400 TFLOP/s, 40% MFU, 31.2 GB"
    assert device_stats(torch.device("cuda", 0), "fp32", 40.0) == {"gpu_memory_gb": 31.2}


def test_steps_from_before_a_resume_with_other_values_do_not_count():
    earlier = fill([1.0, 2.0]).averaged(2)
    assert (StepStats(earlier).averaged(2)["rows"] == earlier["rows"]).all()
    for name, means in (("grad_norm", (2.0, 2.0)), ("disp_loss", (3.0, 0.0))):
        stats = StepStats(earlier)
        stats.add(["a.avi"], **{"train_loss": torch.tensor(3.0), name: torch.tensor(0.0)})
        summary = stats.summary(step=3, global_batch=8)
        assert (summary["train_loss"], summary[name]) == means


def test_skipped_steps_are_counted_but_not_averaged():
    summary = fill([1.0, float("nan"), 3.0], skipped=[0, 1, 0]).summary(step=3, global_batch=8)
    assert summary["train_loss"] == 2.0
    assert summary["skipped"] == 1
    assert np.isnan(fill([float("inf")], skipped=[1]).summary(1, 8)["train_loss"])  # no step left
    failed = fill([float("nan"), float("nan")], skipped=[1, 0])
    assert "step 2 is not finite" in error_of(failed.summary, step=2, global_batch=8)
    of_one_rank = fill([float("nan")], skipped=[0.5])  # the mean: finite on one of two ranks
    assert "step 1 is not finite" in error_of(of_one_rank.summary, step=1, global_batch=8)
