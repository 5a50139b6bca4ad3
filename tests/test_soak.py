"""A small part of the soak, as CI has time for it."""

import os
import subprocess
import sys

import pytest
from script_runs import ROOT


@pytest.mark.slow
def test_runs_that_are_killed_resume_bit_for_bit():
    """Online while a checkpoint is written, offline, the evaluation, online by two processes."""
    command = [sys.executable, "-m", "tests.soak", "--seed", "1", "--kills", "4"]
    command += ["--stalls", "0", "--corruptions", "0", "--full_disks", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=570)
    assert done.returncode == 0 and "4 of 4 trials" in done.stdout, done.stdout[-5000:]
