"""Videos and images that several tests read.

Frame k of a video shows k: its left half is gray 4 * k, its right half white (unless flipped).
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from video.clips import Clips
from video.files import Video, read_frames


def write_video(
    path,
    num_frames=20,
    rate=25,
    codec="mpeg4",
    times=None,
    size=(64, 48),
    sound=False,
    pixel_format="yuv420p",
    tag=None,
    noise=0,
    **options,
):
    """times: a time stamp in ms for each frame, for a variable frame rate; size: width, height in
    px. tag: the name of the codec in the file; noise: in the right half, which moves. Options are
    those of the codec."""
    right = 255 - np.random.default_rng(0).integers(
        0, noise + 1, (size[1], size[0] - size[0] // 2, 3)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        (stream.width, stream.height) = size
        stream.pix_fmt = pixel_format
        stream.gop_size = 10
        stream.bit_rate = 2_000_000
        stream.options = options
        if tag:
            stream.codec_context.codec_tag = tag
        if sound:
            add_sound(file)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            pixels = np.full((size[1], size[0], 3), 4 * index, np.uint8)
            pixels[:, size[0] // 2 :] = np.roll(right, (index, 2 * index), (0, 1))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts = times[index]
                frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_sound(path):
    with av.open(str(path), "w") as file:
        add_sound(file)


def add_sound(file):
    """A second of silence."""
    stream = file.add_stream("aac", rate=16000)
    frame = av.AudioFrame.from_ndarray(
        np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
    )
    frame.sample_rate = 16000
    file.mux([*stream.encode(frame), *stream.encode()])


def scribble(path, offset=0):
    """Overwrite 200 bytes of packet 10."""
    with av.open(str(path)) as file:
        position = [packet.pos for packet in file.demux(video=0) if packet.size][10] + offset
    data = bytearray(path.read_bytes())
    data[position : position + 200] = bytes(range(200))
    path.write_bytes(data)


def truncate(path):
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_mixed_videos(root):
    """Two classes, five videos, three frame rates. Returns root."""
    write_video(root / "Run" / "a.avi", 40)
    write_video(root / "Run" / "b.mp4", 60, codec="libx264")
    write_video(root / "Run" / "c.mkv", 30, rate=30)
    write_video(root / "Jump" / "d.mov", 20, rate=30000 / 1001)
    write_video(root / "Jump" / "e.avi", 20)
    return root


def write_equal_videos(root, num_frames=20, **options):
    """Two classes, four videos. Returns root."""
    for name in ("A/one", "A/two", "B/three", "B/four"):
        write_video(root / f"{name}.avi", num_frames, **options)
    return root


def decode(file):
    """(frames of a video, uint8 (T, H, W, 3); frames per second). file: a path or a file object."""
    with av.open(str(file) if isinstance(file, Path) else file) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        return np.stack(frames), float(video.streams.video[0].average_rate)


def halves(frames):
    """Mean gray of the left and right edge of frames (..., H, W)."""
    frames = torch.as_tensor(frames).float()
    return frames[..., :8].mean((-2, -1)), frames[..., -8:].mean((-2, -1))


def clips_of(source, num_frames, **settings):
    """Clips of all videos of a source."""
    return Clips(source, source.videos(), num_frames, **settings)


def frame_indices_of(clip):
    """Which frames of its video a clip (C, T, H, W) shows."""
    left, right = halves(clip[0])
    return (torch.minimum(left, right) / 4).round().int().tolist()


def read_frame_indices(root, video, frame_indices):
    """Which frames read_frames returns for these indices."""
    frames = read_frames(root, video, frame_indices)
    return (halves(frames[..., 0])[0] / 4).round().int().tolist()


def make_video(key, num_frames=20, suffix=".avi"):
    """A Video without a file."""
    return Video(key + suffix, key.split("/")[0], num_frames, 25.0, 48, 64)


def picture(height=40, width=56, seed=0):
    """uint8 (height, width, 3): smooth, so that JPEG preserves it, and different from all its
    mirror images.
    """
    colors = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def write_images(root):
    """Two classes, five images, one of each suffix. Returns root."""
    for seed, name in enumerate(("A/a.jpg", "A/b.jpeg", "A/c.png", "B/d.webp", "B/e.PNG")):
        save(root / name, picture(seed=seed))
    return root


def write_ucf_list(folder, keys):
    (folder / "ucfTrainTestlist").mkdir(parents=True, exist_ok=True)
    (folder / "ucfTrainTestlist" / "trainlist01.txt").write_text(
        "".join(f"{key}.avi 1\n" for key in keys)
    )
