"""What `compress`, `evaluate` and `demo` do beyond one call: pick, load, measure, and gather the figures."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim import pipeline
from spectrim.core.progress import Progress, silent
from spectrim.measure import evaluate as measures
from spectrim.measure.curve import curve
from spectrim.measure.speed import speed as measure_speed
from spectrim.model import loading
from spectrim.model.checkpoint import moved, quiet
from spectrim.model.files import read_config, read_tokenizer, resolve, weight_files
from spectrim.recipe import Recipe
from spectrim.sizes import only_one

PROMPT = "Once upon a time"
WINDOW = 256  # what the bundled model was trained on


def how_small(
    ratio: float | None,
    budget: str | None,
    parameters: float | None,
    max_loss: float | None = None,
    ratios: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What is given beside a recipe's ratio, by name. Raises RecipeError for more than one."""
    others = {"budget": budget, "parameters": parameters, "max_loss": max_loss, "ratios": ratios}
    only_one({f"--{name.replace('_', '-')}": value for name, value in {"ratio": ratio, **others}.items()})
    return {name: value for name, value in others.items() if value is not None}


def compress(model: str, asked: Recipe, how_small: Mapping[str, Any], out: Path, **options: Any) -> Any:
    """A curve where `how_small` has ratios, else one compression, to what it has (see `pipeline.compress`)."""
    if "ratios" not in how_small:
        return pipeline.compress(model, asked, out=out, **how_small, **options)
    return curve(model, asked, how_small["ratios"], options.pop("text"), out, **options)


def evaluate(
    model: str,
    text: str | None = None,
    window: int | None = None,
    limit: int | None = None,
    reference: str | None = None,
    speed: bool = False,
    prompt: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Figures of one model directory, as JSON data. dtype None: float32 on a CPU, else as stored.

    Without `text` the bundled model is measured on its own text; others are an error, as is bad input generally
    (ValueError). With `speed` and no `reference`, the dense model is this one folded back to dense weights.
    """
    directory = resolve(model)
    text = text or ("reference-evaluation" if model == "reference" else None)
    if text is None:
        raise ValueError("give the text to measure on: --text FILE")
    dtype = dtype or pipeline.compute_dtype(device)
    loaded = open_model(directory, device, dtype, trust_remote_code)
    tokenizer = read_tokenizer(directory, trust_remote_code)
    dense = None if reference is None else open_model(resolve(reference), device, dtype, trust_remote_code)
    found = measures.evaluate(
        loaded, tokenizer, text, window, limit, reference=dense,
        progress=lambda done, total: progress("evaluate", done, total), sample_prompt=prompt or PROMPT,
    )  # fmt: skip
    report = {"model": model, **found.to_json(), "stored": measures.parameters(directory)}
    described = directory / "spectrim.json"
    if described.exists():
        summary = json.loads(described.read_text(encoding="utf-8"))
        report |= {key: summary[key] for key in ("ratio_actual",) if key in summary}  # a tuned dense model has none
    if speed:
        report["speed"] = measure_speed(loaded, dense if dense is not None else folded(loaded))
    return report


def open_model(
    directory: Path, device: str, dtype: torch.dtype | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model of a directory, compressed or not. Raises ValueError for damaged or missing files."""
    read_config(directory, trust_remote_code)
    weight_files(directory)
    with quiet():
        model = loading.load(directory, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    return moved(model, torch.device(device)).eval()


def folded(model: PreTrainedModel) -> PreTrainedModel:
    """A dense copy of a compressed model."""
    dense = copy.deepcopy(model)
    if getattr(dense, "hf_quantizer", None) is None:
        return dense
    dense.dequantize()
    return dense


def demo(out: Path | None, ratio: float, progress: Progress = silent) -> dict[str, Any]:
    """Compress the bundled model with the default recipe, and measure both on text that calibration did not see."""
    with tempfile.TemporaryDirectory(prefix="spectrim-demo-") as folder:
        target = out or Path(folder) / "compressed"
        made = pipeline.compress(
            "reference", ratio=ratio, out=target, work=Path(folder) / "work", length=WINDOW, progress=progress
        )
        dense = evaluate("reference", window=WINDOW, progress=progress)
        compressed = evaluate(str(target), "reference-evaluation", WINDOW, reference="reference", progress=progress)
    sides = {
        name: {
            "parameters": report["stored"]["total"],
            "bytes": report["stored"]["bytes"],
            "perplexity": report["perplexity"],
            "nll": report["nll"],
            "kl": report["kl"],
            "sample": report["sample"],
        }
        for name, report in (("dense", dense), ("compressed", compressed))
    }
    return {**sides, "protocol": dense["protocol"], "ratio_actual": made.summary["ratio_actual"]}
