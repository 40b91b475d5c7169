"""The README's commands of three phases and their samples, at full size, which takes minutes."""

import re

import numpy as np

import checkpoint
from process import PATH, end, spawn
from tiny_data import make_vae
from tiny_videos import write_video
from training import ROOT

# What the test changes: ranks, steps, batches, the VAE and the number of evaluations
CHANGES = {
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--nproc_per_node=1": "--nproc_per_node=2",
    "0050000.pt": "0000002.pt",
    "0100000.pt": "0000004.pt",
    "--max-steps 50000": "--max-steps 2",
    "--max-steps 100000": "--max-steps 4",
    "--max-steps 150000": "--max-steps 6",
    "--global-batch-size 256": "--global-batch-size 8",
    "--global-batch-size 128": "--global-batch-size 4",
    "--global-batch-size 64": "--global-batch-size 2",
    "EqM/train.py": "EqM/train.py --vae tiny-vae",
    "EqM/sample_gd.py": "EqM/sample_gd.py --num-sampling-steps 2",
}


def test_the_readme_trains_three_phases_on_two_ranks_and_samples_16_and_24_frames(tmp_path):
    blocks = (ROOT / "README.md").read_text().split("```")
    (commands,) = [block for block in blocks if "torchrun" in block and block.startswith("bash\n")]
    (lines,) = [block for block in blocks if block.startswith("\nresults/EXP/")]
    for written, run in CHANGES.items():
        assert written in commands
        commands = commands.replace(written, run)
    (tmp_path / "EqM").symlink_to(ROOT / "EqM")
    make_vae(  # as Stable Diffusion's VAE, but narrow: downsampling 8
        tmp_path / "tiny-vae",
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 8, 8, 8),
    )
    for name in ("a", "b"):
        write_video(tmp_path / f"datasets/ucf-101/{name}.mp4")

    process = spawn(
        "bash",
        "-euc",
        commands.removeprefix("bash\n"),
        environment={"PATH": PATH, "PET_STANDALONE": "1"},  # --standalone: others run torchrun, too
        cwd=tmp_path,
    )
    output = end(process, timeout=1800)
    for line in lines.strip().split("\n"):
        pattern = re.sub(r"(validation loss) [\d.]+", r"\1 [0-9.]+", re.escape(line))
        assert line == "..." or re.search(f"^{pattern}$", output, re.M), output

    for index, frames in enumerate((4, 8, 16)):
        name = f"00{index}-EqM-S-4-f{frames}-rope"
        state = checkpoint.load(tmp_path / "results/EXP" / name / "checkpoints/best.pt")
        assert state["phase"]["first_step"] == 2 * index  # steps are global
        assert state["phase"]["best_step"] == 2 * index + 2
        assert state["phase"]["position"] == 64 // frames
    for frames in (16, 24):
        samples = np.load(tmp_path / f"samples/EXP-f{frames}/samples.npz")["arr_0"]
        assert samples.shape == (16, frames, 256, 256, 3)
