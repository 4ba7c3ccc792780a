"""Peak memory of a streamed run on a checkpoint of about a billion parameters, and on one of twice the blocks.

The checkpoint is written block by block, and never held whole here either. The run happens in a fresh process; what
that process holds once everything is imported is taken off its peak. The bound is the sum of what a run has to hold:

| term | bytes |
| --- | --- |
| embedding | vocabulary · hidden, in the dtype computed in |
| three blocks' weights | in the dtype computed in (float32 on a CPU); also given as stored (bfloat16) |
| statistics | the Grams of one block, float64: one for each distinct input |
| factorisation | float64: three matrices of the largest weight's size, five of its smaller side squared |
| activations | hidden states of all windows; four tensors of (in + out) · tokens for the widest matrix |

In a decomposition are alive: the weight, its product with the metric or its QR, and the directions; then the matrix,
its eigenvectors, their reversed copy, and the two matrices LAPACK's `syevd` works in.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Bound, Case

RATIO = 0.2
WITHIN = Bound("at most", 1.0)
WINDOWS = (4, 128)
THREADS = 2
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 4096, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
NARROW = {
    **LARGE, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 16,
}  # fmt: skip


def matrices(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name → (out, in) of every matrix in a block."""
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    small = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (small, hidden),
        "v_proj": (small, hidden),
        "o_proj": (hidden, hidden),
    }
    ffns = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in ffns.items()}


def generate(directory: Path, shape: dict[str, Any]) -> int:
    """Write a Llama of random bfloat16 weights, a shard a block; the number of its parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    torch.manual_seed(0)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(directory)
    where: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(_shards(shape)):
        file = f"model-{number:05d}.safetensors"
        tensors = {
            name: torch.ones(size) if len(size) == 1 else torch.randn(size) * 0.02 for name, size in shapes.items()
        }
        save_file({k: t.to(torch.bfloat16) for k, t in tensors.items()}, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.numel() for t in tensors.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _shards(shape: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    for index in range(shape["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in matrices(shape).items()}
        block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        yield {f"model.layers.{index}.{name}": size for name, size in block.items()}
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    yield {**dict.fromkeys(ends, (vocabulary, hidden)), "model.norm.weight": (hidden,)}


def terms(shape: dict[str, Any], windows: tuple[int, int], weight_bytes: int) -> dict[str, int]:
    """The bytes a streamed run has to hold, by cause; weight_bytes: of one weight."""
    sizes = list(matrices(shape).values())
    hidden, tokens = shape["hidden_size"], windows[0] * windows[1]
    inputs = (hidden, hidden, hidden, shape["intermediate_size"])  # of q, k, v; of o; of gate, up; of down
    return {
        "embedding": shape["vocab_size"] * hidden * weight_bytes,
        "three_blocks": 3 * sum(m * n for m, n in sizes) * weight_bytes,
        "statistics": sum(8 * width**2 for width in inputs),
        "factorisation": max(8 * (3 * m * n + 5 * min(m, n) ** 2) for m, n in sizes),
        "activations": 4 * tokens * (hidden + 4 * max(m + n for m, n in sizes)),
    }


def child(model: Path, windows: tuple[int, int], match: list[str], threads: int, report: Path) -> None:
    """One run in this process; writes what it held after imports, at its peak, and at the peak of each stage so far."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  would else be imported by the run

    import spectrim.methods  # noqa: F401
    from spectrim import pipeline

    torch.set_num_threads(threads)
    imports, stages = common.peak_bytes(), {}

    def progress(stage: str, done: int, total: int) -> None:
        stages[stage] = common.peak_bytes() - imports

    ids = torch.randint(100, windows, generator=torch.Generator().manual_seed(0))
    settings = [f"groups.0.match={json.dumps(match)}"]
    out = model.parent / "compressed"
    made = pipeline.compress(model, "whitened", RATIO, ids, out, settings=settings, progress=progress)
    content = {"imports": imports, "peak": common.peak_bytes(), "peak_over_imports_until": stages}
    common.write(report, {**content, "timings": made.run["timings"]})


def case(shape: dict[str, Any], windows: tuple[int, int], every: bool, threads: int) -> Case:
    """Peak over bound of one checkpoint; every: decompose all blocks, else the first and the last."""
    count = shape["num_hidden_layers"]
    match = ["*"] if every else [f"model.layers.{index}.*" for index in sorted({0, count - 1})]
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        (model := Path(folder) / "dense").mkdir()
        parameters = generate(model, shape)
        report = Path(folder) / "report.json"
        sizes = [str(number) for number in windows]
        arguments = ["--model", str(model), "--windows", *sizes, "--match", *match, "--threads", str(threads)]
        common.run_module("memory", str(report), *arguments, threads=threads)
        measured = json.loads(report.read_text(encoding="utf-8"))
    used = measured["peak"] - measured["imports"]
    stored, allowed = terms(shape, windows, 2), terms(shape, windows, 4)
    bound, decomposed = sum(allowed.values()), count if every else len(match)
    details = {
        "parameters": parameters,
        "peak_over_imports": used,
        "bound": bound,
        "bound_terms": allowed,
        "as_stored": {"terms": stored, "bound": sum(stored.values()), "ratio": used / sum(stored.values())},
        "decomposed_blocks": decomposed,
        **measured,
    }
    name = f"{parameters / 1e9:.2f} B, hidden {shape['hidden_size']}, {count} blocks, {decomposed} decomposed"
    return Case(name, (used / bound,), threads, "peak / bound", WITHIN, details)


def measure(every: bool = False) -> dict[str, object]:
    """A billion parameters with two blocks decomposed; narrower blocks, n and 2n, all decomposed.

    every: instead the billion parameters, and twice the blocks, with all decomposed: an hour on two cores.
    """
    if every:
        cases = [case(_longer(LARGE, times), WINDOWS, True, THREADS) for times in (1, 2)]
    else:
        cases = [case(LARGE, WINDOWS, False, THREADS)]
        cases += [case(_longer(NARROW, times), WINDOWS, True, THREADS) for times in (1, 2)]
    settings = {"recipe": "whitened", "ratio": RATIO, "windows": list(WINDOWS), "dtypes": "bfloat16, run in float32"}
    return common.result("memory", cases, settings)


def _longer(shape: dict[str, Any], times: int) -> dict[str, Any]:
    return {**shape, "num_hidden_layers": times * shape["num_hidden_layers"]}


def main() -> None:
    """Measure everything, or, with --model, be the process that is measured."""
    parser = argparse.ArgumentParser(description="Peak memory of a streamed run.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--every", action="store_true", help="decompose every block of the large checkpoints")
    parser.add_argument("--model", type=Path, help="a checkpoint: only run it in this process")
    parser.add_argument("--windows", type=int, nargs=2, default=WINDOWS)
    parser.add_argument("--match", nargs="+", default=["*"])
    parser.add_argument("--threads", type=int, default=THREADS)
    asked = parser.parse_args()
    if asked.model is None:
        common.write(asked.report, measure(asked.every))
    else:
        child(asked.model, tuple(asked.windows), asked.match, asked.threads, asked.report)


if __name__ == "__main__":
    main()
