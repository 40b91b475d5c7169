"""What all tests share: one thread each, and the usual signals."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the tests take the other cores

import signal

import pytest

# Tests run as in a terminal, also under nohup or in the background: ignored signals would be ignored by children.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def usual_signals():
    """A training run in this process installs handlers; this restores the ones before it."""
    from runtime.signals import STOP_SIGNALS

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Moving Shapes, 12 classes of 2 small videos."""
    from training import make_data

    return make_data(tmp_path_factory.mktemp("data") / "shapes")
