"""What a library makes of Ctrl-C, and an interrupt that Python cannot raise."""

import subprocess
import sys

import pytest

from mae_dat.config.interrupts import is_interrupt
from mae_dat.config.parse import run_command


def test_what_a_library_makes_of_an_interrupt_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def careless_import() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy.core failed to import") from None

    with pytest.raises(SystemExit) as stopped:
        run_command(careless_import)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted.\n"
    assert is_interrupt(KeyboardInterrupt())
    assert not is_interrupt(ImportError())
    assert not is_interrupt(None)


def test_an_interrupt_in_a_destructor_ends_the_process() -> None:
    """Python would print it and go on."""
    code = """
import os, signal
from mae_dat.config.interrupts import exit_on_interrupt, interruptible

class Careless:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

exit_on_interrupt()
with interruptible():
    careless = Careless()
    del careless
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted.\n")
