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


@pytest.mark.skipif(sys.platform != "linux", reason="thresholds are glibc's")
def test_the_innermost_threshold_counts_and_the_one_around_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(heap, "_glibc", lambda name: lambda parameter, value: seen.append(value))
    with heap.small(), heap.small(heap.TIGHT):
        pass
    assert seen[0] == seen[2] > seen[1] == heap.TIGHT and seen[3] > seen[2]


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_a_skeleton_leaves_no_holes_in_the_heap() -> None:
    said = """
from pathlib import Path
import torch, transformers
from spectrim.model import blocks, checkpoint, targets

def heap():
    lines = Path("/proc/self/smaps").read_text().split("\\n")
    first, last = next(line for line in lines if line.endswith("[heap]")).split()[0].split("-")
    return int(last, 16) - int(first, 16)

sizes = dict(hidden_size=1024, intermediate_size=1024, num_attention_heads=4, vocab_size=64)
make = lambda layers: transformers.LlamaConfig(num_hidden_layers=layers, **sizes)
checkpoint.skeleton(make(1), torch.float32)
before = heap()
model = checkpoint.skeleton(make(24), torch.float32)
blocks.share_inputs(model, targets.find(model))
print(heap() - before)
"""
    environment = {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    made = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    # 168 matrices of 4 MiB
    assert int(made.stdout) < 2**24
