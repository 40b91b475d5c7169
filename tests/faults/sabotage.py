"""Runs train.py, in which one thing goes wrong: python sabotage.py WHAT EqM/train.py [FLAGS]."""

import os
import signal
import sys
import time

import torch


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on_rank_1():
    return os.environ.get("RANK") == "1"


def killed_in_save(count=2):
    """SIGKILL when half of the count-th checkpoint is written."""
    save = torch.save
    saves = []

    def half(state, file):
        saves.append(file.name)
        save(state, file)
        if len(saves) == count:
            file.flush()
            file.truncate(file.tell() // 2)
            die()

    torch.save = half


def killed_while_gathering():
    """SIGKILL of the second rank in the middle of gathering the second checkpoint of a sharded
    run.
    """
    import checkpoint

    write = checkpoint.Writer.write
    full_tensor = checkpoint.full_tensor
    saves = []
    gathered = []

    def noted_write(*arguments, **keywords):
        saves.append(1)
        write(*arguments, **keywords)

    def half(tensor):
        gathered.extend([1] if len(saves) == 2 else [])
        if len(gathered) == 20 and on_rank_1():
            die()
        return full_tensor(tensor)

    checkpoint.Writer.write = noted_write
    checkpoint.full_tensor = half


def votes_often():
    """The ranks vote on stops and saves ten times per second."""
    from runtime import signals

    signals.SECONDS_PER_VOTE = 0.1


def slow_disk():
    """It takes two seconds to write a checkpoint."""
    save = torch.save
    torch.save = lambda *arguments: (time.sleep(2), save(*arguments))


def hanging_decoder():
    """A video with a file .hang beside it is never decoded."""
    from video import source

    read = source.read_frames

    def read_frames(root, video, frames):
        while os.path.exists(os.path.join(root, video.path + ".hang")):
            time.sleep(1)
        return read(root, video, frames)

    source.read_frames = read_frames


def killed_while_it_starts_a_loader():
    """SIGKILL when a loader process has been started and has not come to its own code yet."""
    if __name__ == "__mp_main__":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(0.5)


def change_loss(change):
    """Replace the loss of a step by change(loss, number of the step), in which each rank has a loss
    of its own.
    """
    from transport import Objective

    losses = Objective.losses
    calls = []

    def changed(*arguments, **more):
        calls.append(1)
        loss, *others = losses(*arguments, **more)
        return change(loss, len(calls)), *others

    Objective.losses = changed


def nan_on_rank_1():
    """The second rank's loss is NaN from the third step on."""
    change_loss(lambda loss, step: loss * (float("nan") if step > 2 and on_rank_1() else 1))


def bug_in_a_step():
    """An unexpected error, at the third step, while the loader's processes are at work."""

    def fail(loss, step):
        if step == 3:
            raise RuntimeError("a bug")
        return loss

    change_loss(fail)


if __name__ == "__mp_main__":  # in a loader process
    globals()[os.environ["SABOTAGE"]]()

if __name__ == "__main__":
    _, os.environ["SABOTAGE"], script, *_ = sys.argv
    del sys.argv[:2]
    sys.path.insert(0, os.path.dirname(script))
    globals()[os.environ["SABOTAGE"]]()
    import train

    train.main()  # not by runpy: the loader processes have to find this file as their main module
