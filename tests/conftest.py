"""Tests run as in a terminal, also under nohup or in the background: ignored signals would be ignored by children."""

import signal

for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)
