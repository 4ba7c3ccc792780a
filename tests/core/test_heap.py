"""The peak of this process's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spectrim.core import heap
from tests.processes import SOURCE

SIZE = 2**28


def test_it_grows_with_what_is_held() -> None:
    before = heap.peak()
    held = torch.ones(SIZE, dtype=torch.uint8)
    assert 0 < before <= heap.peak() and heap.peak() >= int(held.sum())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss is all there is")
def test_what_the_parent_held_is_not_counted() -> None:
    held = torch.ones(2 * SIZE, dtype=torch.uint8)
    said = "from spectrim.core import heap; print(heap.peak())"
    made = subprocess.run([sys.executable, "-c", said], env={"PYTHONPATH": SOURCE}, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert int(made.stdout) < heap.peak() - int(held[:SIZE].sum())
