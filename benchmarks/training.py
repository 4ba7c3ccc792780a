"""Peak memory of a SoCo training: the factors are held once, in place of the dense weights.

A Llama of random weights is written to disk, and `spectrim.compress` trains on it for a few steps in a fresh process,
computing in float32; what that process holds once everything is imported is taken off its peak. The bound is

    2.5 × dense weights (float32) + activations.

Factors have (in + out) · min(in, out) numbers a matrix: 1.58 times the weights of a block of the shape measured here.
2.5 leaves room for the rest of the model and for what is held while the factors take the place of the weights, but not
for a second copy of the factors, nor for gradients or AdamW's moments of anything but one number a direction.

Activations are measured apart, in another process: the most that it holds above the dense model's weights in one pass
forwards and backwards over as many windows as a step runs at once, weights frozen, with the gradient of the divergence
going back to the embeddings. A gated matrix keeps one tensor more than a dense one for the way back, the coordinates
of its inputs in its directions: min(in, out) numbers a token, computed and added.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common, memory
from benchmarks.common import Bound, Case

RATIO = 0.2
WEIGHTS = 2.5
WITHIN = Bound("at most", 1.0)
STEPS = 3
WINDOWS = (4, 128)
THREADS = 2
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 8192, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def coordinates(shape: dict[str, Any], tokens: int) -> int:
    """Bytes of the inputs' coordinates in all directions of all matrices, float32."""
    each = sum(min(m, n) for m, n in memory.matrices(shape).values())
    return 4 * tokens * shape["num_hidden_layers"] * each


def factors(shape: dict[str, Any]) -> int:
    """Bytes of the factors of all matrices, float32."""
    each = sum((m + n) * min(m, n) for m, n in memory.matrices(shape).values())
    return 4 * shape["num_hidden_layers"] * each


def held_bytes() -> int:
    """The memory that this process holds now."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def trained(model: Path, windows: tuple[int, int], steps: int, report: Path) -> None:
    """One run in this process; writes what it held after imports, at its peak, and at the peak of each stage so far."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  would else be imported by the run

    import spectrim.methods  # noqa: F401
    from spectrim import pipeline

    imports, stages = common.peak_bytes(), {}

    def progress(stage: str, done: int, total: int) -> None:
        stages[stage.partition(":")[0]] = common.peak_bytes() - imports

    ids = torch.randint(100, windows, generator=torch.Generator().manual_seed(0))
    settings = [f"groups.0.allocate.steps={steps}", f"groups.0.allocate.batch={windows[0]}"]
    settings.append(f"calibrate.batch={windows[0]}")
    out = model.parent / "compressed"
    made = pipeline.compress(model, "soco", RATIO, ids, out, settings=settings, progress=progress)
    content = {"imports": imports, "peak": common.peak_bytes(), "peak_over_imports_until": stages}
    common.write(report, {**content, "timings": made.run["timings"], "curves": made.plan.to_json()["curves"]})


def passed(shape: dict[str, Any], windows: tuple[int, int], report: Path) -> None:
    """One pass forwards and backwards of the dense model in this process; writes the most held above its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from spectrim.core import heap
    from spectrim.learn.training import divergence

    with heap.small():
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
        heap.give_back()
        before = held_bytes()
        ids = torch.randint(100, windows, generator=torch.Generator().manual_seed(0))
        entering = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=entering, use_cache=False).logits
        divergence(logits.detach().log_softmax(-1), logits).backward()
        common.write(report, {"weights": before, "activations": common.peak_bytes() - before})


def case(shape: dict[str, Any], windows: tuple[int, int], steps: int, threads: int) -> Case:
    """Peak over bound of one training."""
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        (model := Path(folder) / "dense").mkdir()
        parameters = memory.generate(model, shape)
        sizes = ["--windows", *(str(number) for number in windows), "--threads", str(threads)]
        found = []
        for more in (["--model", str(model), "--steps", str(steps)], ["--shape", json.dumps(shape)]):
            report = Path(folder) / "report.json"
            common.run_module("training", str(report), *sizes, *more, threads=threads)
            found.append(json.loads(report.read_text(encoding="utf-8")))
    run, dense = found
    terms = {
        "dense_weights": int(WEIGHTS * 4 * parameters),
        "activations": dense["activations"],
        "coordinates": coordinates(shape, windows[0] * windows[1]),
    }
    used, bound = run["peak"] - run["imports"], sum(terms.values())
    details = {
        "parameters": parameters, "dense_bytes": 4 * parameters, "factor_bytes": factors(shape),
        "peak_over_imports": used, "over_dense_weights": (used - bound + terms["dense_weights"]) / (4 * parameters),
        "bound": bound, "bound_terms": terms, **run,
    }  # fmt: skip
    name = f"{parameters / 1e6:.0f} M, hidden {shape['hidden_size']}, {windows[0]} × {windows[1]} tokens"
    return Case(name, (used / bound,), threads, "peak / bound", WITHIN, details)


def measure() -> dict[str, object]:
    """A hundred million parameters, a few steps."""
    made = [case(SHAPE, WINDOWS, STEPS, THREADS)]
    settings = {"recipe": "soco", "ratio": RATIO, "steps": STEPS, "windows": list(WINDOWS), "weights": WEIGHTS, **SHAPE}
    return common.result("training", made, {**settings, "dtypes": "bfloat16, run in float32"})


def main() -> None:
    """Measure everything, or, with --model or --shape, be a process that is measured."""
    parser = argparse.ArgumentParser(description="Peak memory of a training.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--model", type=Path, help="a checkpoint: only train on it in this process")
    parser.add_argument("--shape", type=json.loads, help="a configuration: only run that model in this process")
    parser.add_argument("--windows", type=int, nargs=2, default=WINDOWS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=THREADS)
    asked = parser.parse_args()
    if asked.model is None and asked.shape is None:
        common.write(asked.report, measure())
        return
    import torch

    torch.set_num_threads(asked.threads)
    if asked.model is not None:
        trained(asked.model, tuple(asked.windows), asked.steps, asked.report)
    else:
        passed(asked.shape, tuple(asked.windows), asked.report)


if __name__ == "__main__":
    main()
