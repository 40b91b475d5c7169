"""What a checkpoint's dict holds (checkpoint.py lists it), and whether its values are such as train.py writes.

A file may come from anybody, so nothing is taken for granted of what was read from it.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch

from runtime.untrusted import FPS

PARTS = ("model", "data", "training")  # of a checkpoint's config
NEEDED = {  # of those parts, to sample
    "data": {"vae", "image_size", "fps", "frame_interval", "classes"},
    "training": {"model", "num_frames", "video"},
}
CONFIG_BYTES = 2**24  # of what is said of a model, config.json


@dataclass
class Progress:
    """Where a run stands. Steps are global: a phase that starts from a checkpoint goes on counting."""

    step: int = 0
    first_step: int = 0  # of the phase; it also names the phase's stream of samples
    position: int = 0  # samples taken from that stream
    best_loss: float = math.inf  # lowest validation loss of the phase
    best_step: int = -1  # and its step
    skipped: int = 0  # steps in a row whose gradient was not finite
    seconds: float = 0.0  # of the run, interruptions left out
    flops: float = 0.0  # of the run's training steps
    pretrained: bool = False  # step 0 was a model from elsewhere, whose average is not to be forgotten

    def begin_phase(self):
        """From here on another phase: with a stream of its own, and its own best loss."""
        self.first_step, self.position, self.best_loss, self.best_step = self.step, 0, math.inf, -1

    def phase(self):
        """What a checkpoint says beside the step and the best loss."""
        return {name: value for name, value in asdict(self).items() if name not in ("step", "best_loss")}

    def last_step(self, max_steps, epochs, num_videos, batch_size):
        """The step to end at: max_steps or `epochs` of this phase, whichever comes first; without both, 1400 epochs."""
        if max_steps and not epochs:
            return max_steps
        by_epochs = self.first_step + math.ceil((epochs or 1400) * num_videos / batch_size)
        return min(by_epochs, max_steps or by_epochs)


def trained_time_scale(data):
    """Seconds per frame of the clips that a model was trained on, from the data part of its config."""
    return data["frame_interval"][0] / data["fps"]


def odd_part(state):
    """The name of the first part of a checkpoint that has not the kind of value it should have; None if all have."""
    kinds = {
        "config": is_config, "model": is_weights, "ema": is_weights, "optimizer": is_optimizer, "step": is_count,
        "phase": is_phase, "best_loss": is_loss, "run": is_run,
    }  # fmt: skip
    return next((name for name, is_right in kinds.items() if not is_right(state.get(name))), None)


def is_count(value, least=0):
    return isinstance(value, int) and least <= value < 2**53


def is_loss(value):
    return isinstance(value, (int, float)) and not math.isnan(value)


def is_weights(value):
    """Whether value is a dict of names and floating-point tensors in which each number has a place of its own.

    One that is repeated without end, or shared by many tensors, takes no place in a file but all of it in a model.
    """
    if not is_dict_of_names(value):
        return False
    tensors = list(value.values())
    if not all(torch.is_tensor(tensor) and tensor.is_floating_point() for tensor in tensors):
        return False
    places = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(tensor.nbytes for tensor in tensors) <= sum(places.values())


def is_phase(value):
    """Whether value holds fields of Progress, at least those that no run is without."""
    names = {field.name for field in fields(Progress)} - {"step", "best_loss"}
    if not isinstance(value, dict) or not {"first_step", "position"} <= value.keys() <= names:
        return False
    amounts = [value.get(name, 0.0) for name in ("seconds", "flops")]
    counts = [number for name, number in value.items() if name not in ("seconds", "flops")]
    return all(is_loss(amount) and amount >= 0 for amount in amounts) and all(is_count(number, -1) for number in counts)


def is_run(value):
    """Whether value is what a run that was interrupted has left of its window and its bad videos; None is nothing."""
    if value is None:
        return True
    if not isinstance(value, dict) or not is_texts(value.get("bad_videos")) or "window" not in value:
        return False
    window = value["window"]
    if window is None:
        return True
    if not isinstance(window, dict) or not is_texts(window.get("names")) or not torch.is_tensor(window.get("rows")):
        return False
    return window["rows"].shape[1:] == (len(window["names"]),) and is_weights({"rows": window["rows"]})


def is_texts(value):
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def is_optimizer(value):
    if value is None:
        return True
    if not isinstance(value, dict) or value.get("kind") not in ("adamw", "muon"):
        return False
    states = value.get("states")
    return isinstance(states, list) and all(isinstance(state, dict) for state in states)


def is_plain(value):
    """Whether value is what a flag can be: a number, a text, nothing, or a list of these."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, (str, int, float)) for part in parts)


def is_config(config):
    """Whether config has its three parts, and in them the values that sampling and training take from there."""
    if not isinstance(config, dict) or config.keys() != set(PARTS) or not all(map(is_dict_of_names, config.values())):
        return False
    if any(needed - config[part].keys() for part, needed in NEEDED.items()):
        return False
    data, training = config["data"], config["training"]
    interval, fps, classes = data["frame_interval"], data["fps"], data["classes"]
    return (
        isinstance(data["vae"], str)
        and (data["image_size"] is None or is_count(data["image_size"], 1))
        and isinstance(fps, (int, float)) and FPS[0] <= fps <= FPS[1]
        and isinstance(interval, list) and len(interval) in (1, 2) and all(is_count(part, 1) for part in interval)
        and is_texts(classes) and classes != []
        and isinstance(training["model"], str)
        and is_count(training["num_frames"], 1)
        and isinstance(training["video"], bool)
        and all(map(is_plain, training.values()))
        and sum(map(text_size, (*data.values(), *training.values()))) < CONFIG_BYTES
    )  # fmt: skip


def text_size(value):
    """How many letters a plain value has: a text that comes a million times is in a pickle only once."""
    return sum(len(part) if isinstance(part, str) else 8 for part in (value if isinstance(value, list) else [value]))


def is_dict_of_names(value):
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)
