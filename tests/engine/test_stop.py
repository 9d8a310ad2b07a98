from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from farl_engine import stop
assert "torch" not in sys.modules
stop.install()
print("ready", flush=True)
began = time.monotonic()
while stop.requested() is None and time.monotonic() - began < 20:
    time.sleep(0.01)
print(stop.requested(), flush=True)
if "linger" in sys.argv:
    time.sleep(20)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_process_leaves_by_itself(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert output.strip() == number.name
    assert process.returncode == 0


def test_an_echo_of_the_same_keystroke_is_not_a_second_signal() -> None:
    process = start("linger")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_second_signal_leaves_at_once() -> None:
    process = start("linger")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert time.monotonic() - began < 2
    assert process.returncode == 128 + signal.SIGTERM
