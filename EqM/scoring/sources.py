"""The clips that evaluate.py scores: generated clips of a sample folder, real clips of a data set.

A stream yields the clips of this rank: (index, clip uint8 (T, H, W, 3), class name, time scale in
seconds per frame, video). A generated clip that continues no video is its own video: its index.
"""

import hashlib
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from given import frame_ranges
from runtime import distributed
from runtime.cli import Bar, UserError, plural, say
from runtime.runs import results_of
from runtime.untrusted import file_sha256
from video.actions import NONE
from video.clips import Clips, collate
from video.drawing import drawable
from video.index import split_videos
from video.loader import batches_of, worker_settings
from video.samples import NO_LABEL, class_name, read_samples, time_scales_of
from video.source import open_source

# of the start frames of real clips: predictions are compared with the clips they continue
REAL_SEED = 0
RESIZE = (
    "short side to image_size (bilinear, antialiased), center crop; a detector resizes further by "
    "itself"
)


class Samples:
    """A sample folder: its clips, mapped into memory, and what its samples.json says.

    Raises UserError.
    """

    def __init__(self, folder, flag="--samples"):
        self.folder = Path(folder)
        self.place = f"{flag} {folder}"
        self.about, self.clips, labels = read_samples(self.place, self.folder)
        self.source = self.about["source"]
        self.classes = self.about["classes"]
        self.time_scale = self.about["time_scale"]
        self.labels = labels.tolist()
        # None: without a class
        self.names = [class_name(self.classes, label) for label in self.labels]
        self.num_frames, self.image_size = self.clips.shape[1:3]
        given = self.about.get("given", ())
        # numbers of frames
        self.given = [frame_ranges(entry["frames"]) for entry in given] or [()] * len(labels)
        self.time_scales = time_scales_of(self.about, len(labels))
        self.videos = [entry["source"] for entry in given] or range(len(labels))
        # of the model that guides instead of the class, or None
        self.weak = self.source.get("weak_sha256")
        # the labels of each sample's patches
        self.spans = self.about.get("spans") or [[label] for label in self.labels]
        self.guidance = None  # the user did not choose it
        if not self.has_conditions() and not self.weak:
            self.guidance = 1.0
        elif self.source.get("guidance_chosen"):
            self.guidance = self.source.get("guidance")

    def __len__(self):
        return len(self.clips)

    def has_conditions(self):
        """Whether some sample has a class or an action, which guidance can amplify."""
        labels = itertools.chain.from_iterable(self.spans)
        actions = itertools.chain.from_iterable(self.about.get("actions") or ())
        return bool({*labels} - {NO_LABEL} or {*actions} - {NONE})

    def shown_class(self, name):
        """The name of a class, or None, as a picture can show it."""
        if not name:
            return "no class"
        number = self.classes.index(name) if name in self.classes else "unknown"
        return drawable(name, f"class {number}")

    def check(self, metric, keep_background):
        """Raise UserError unless they can be scored with --metric and --keep-background."""
        problem = next(self.problems(metric, keep_background), None)
        if problem:
            raise UserError(f"{self.place}: {problem}")

    def check_classes(self, known, place):
        """Raise UserError unless all of their classes are among the known ones of a place."""
        unknown = set(self.classes) - set(known)
        if unknown:
            raise UserError(
                f"{self.place}: has class {min(unknown)}, {place} has {', '.join(known)}; pass the "
                "data set that the model was trained on"
            )

    def problems(self, metric, keep_background):
        least = 2 if metric in ("fvd", "fid", "consistency", "nearest") else 1
        if len(self) < least:
            yield f"has {plural(len(self), 'clip')}, --metric {metric} needs at least {least}"
        if self.num_frames == 1 and metric != "fid":
            yield f"holds images, --metric {metric} needs videos of at least 2 frames"
        if metric in ("fvd", "fid") and self.guidance is None:
            yield (
                f"--metric {metric} depends on the guidance; "
                "sample again with --cfg-scale (1 turns it off)"
            )
        if metric in ("motion", "classifier", "census"):
            if None in self.names:
                yield f"has samples without a class, --metric {metric} needs the class of each"
            if any(len({*labels}) > 1 for labels in self.spans):
                yield (
                    f"has samples whose class changes, --metric {metric} needs one class for "
                    "each; sample again with whole videos of a class"
                )
        if metric == "consistency" and "temporal_patch_size" not in self.source:
            yield "its samples.json does not say the temporal_patch_size of the model; sample again"
        if metric == "prediction" and self.image_size < 11:  # its window
            yield f"has clips of {self.image_size} px, SSIM needs at least 11; use another metric"
        if metric in ("prediction", "world"):
            again = "sample again with --given DATA --given-split val --no-keep-background"
            real = self.about.get("real")
            if real is None:
                yield f"does not continue the clips of a data set; {again}"
            count = real["num_clips"] * real["samples_per_clip"]
            if len(self) != count:
                yield (
                    f"does not have {real['samples_per_clip']} samples "
                    f"for each of {real['num_clips']} clips; {again} --num-samples {count}"
                )
            if self.source.get("keep_background") and not keep_background:
                yield (
                    "was sampled with --keep-background, which adds real detail; "
                    f"{again}, or add the flag here"
                )

    def provenance(self):
        """The manifest's record: how they were made (samples.json), and samples.npz's SHA-256."""
        folder = self.folder.resolve()
        record = {
            # sample_gd.py removes the scores of the folder's name, which "." does not tell
            "samples": str(self.folder if self.folder.name == folder.name else folder),
            "samples_sha256": file_sha256(self.folder / "samples.npz"),
        }
        for name, value in self.about.items():
            if name not in ("classes", "given"):
                record[name] = value
        return record | {
            "num_clips": len(self),
            "num_frames": self.num_frames,
            "image_size": self.image_size,
        }


def find_real(
    data_path,
    split,
    val_fraction,
    num_frames,
    time_scale,
    image_size,
    ckpt=None,
    images=False,
):
    """(Clips of the real videos of a split, training videos that are long enough, a description of
    the Clips for JSON).

    Call it on one rank, as it may open all videos. The interval is the integer closest to
    time_scale. Raises UserError.
    """
    source = open_source(data_path, image_size, images, results_of(ckpt))
    for path in source.scan.unreadable:
        say(f"{path} can't be opened; it is skipped")
    # before any is skipped, as in train.py
    train, val = split_videos(data_path, source.videos(), val_fraction)
    videos = {
        "train": train,
        "val": val,
        "all": [*train, *val],
    }[split]
    fps = statistics.median(video.fps for video in videos)
    interval = max(1, round(time_scale * fps))
    span = (num_frames - 1) * interval + 1
    usable = [video for video in videos if video.num_frames >= span]
    if not usable:
        longest = max(video.num_frames for video in videos)
        raise UserError(
            f"--data-path {data_path}: the longest video of --split {split} has "
            f"{plural(longest, 'frame')}; expected at least {span} for {num_frames} frames that "
            f"are {interval} apart; sample fewer frames"
        )
    distances = [interval / video.fps for video in usable]
    off = [seconds for seconds in distances if abs(seconds - time_scale) > 0.01 * time_scale]
    if off:
        say(
            f"note: frames are {min(off):.3g} to {max(off):.3g} s apart in {len(off)} of "
            f"{plural(len(usable), 'real video')}, generated frames {time_scale:.3g} s"
        )
    clips = Clips(
        source=source,
        videos=usable,
        num_frames=num_frames,
        frame_interval=(interval,),
        flip=False,
        seed=REAL_SEED,
        stream="real",
    )
    about = {
        "data_path": str(data_path),
        "split": split,
        "val_fraction": val_fraction,
        "num_videos": len(usable),
        "videos_sha256": videos_sha256(source, usable),
        "num_frames": num_frames,
        "frame_interval": interval,
        "fps": fps,
        "image_size": image_size,
        "resize": RESIZE,
        "flip": False,
        "seed": REAL_SEED,
    }
    return clips, [video for video in train if video.num_frames >= num_frames], about


def videos_sha256(source, videos):
    """The SHA-256 of the names and sizes of videos of a source."""
    return json_sha256([(video.path, source.stamp(video)[0]) for video in videos])


def json_sha256(value):
    """The SHA-256 of a plain value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def generated_stream(samples):
    """The stream of Samples."""
    indices = distributed.own_indices(len(samples))
    for index in Bar(
        indices,
        desc="generated clips",
        unit="clip",
        leave=False,
    ):
        yield (
            index,
            np.array(samples.clips[index]),
            samples.names[index],
            samples.time_scales[index],
            samples.videos[index],
        )


def real_stream(clips, indices, args, corrupt, title="real clips"):
    """The stream of a Clips at indices; adds the paths of corrupt videos to the list `corrupt`."""
    loader = DataLoader(
        clips,
        batch_size=args.batch_size,  # as handing over takes time
        sampler=indices,
        collate_fn=collate,
        **worker_settings(args.num_workers),
    )
    with Bar(
        desc=title,
        total=len(indices),
        unit="clip",
        leave=False,
    ) as progress:
        for batch in batches_of(loader):
            corrupt += batch["corrupt"]
            names = [clips.classes[label] for label in batch["y"]]
            yield from zip(
                batch["indices"].tolist(),
                batch["clips"].movedim(1, -1).numpy(),
                names,
                batch["time_scales"].tolist(),
                batch["videos"],
                strict=True,
            )
            progress.update(len(names))
