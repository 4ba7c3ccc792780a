"""Peak memory of tuning a compressed model: its weights once, the adapters, and what one step needs.

A Llama of random weights is written to disk, and the same with random factors in place of its matrices, of the ranks
that a uniform plan gives: memory does not depend on their values. `spectrim.tune` (`rank_preserving`, LoRA on both
factors of every matrix) tunes the second for a few steps in a fresh process, in float32. What that process holds once
everything is imported is taken off its peak. Pages of programs and libraries that are read from disk as parts of them
run for the first time count in it, and are told beside it (`program`). The bound is the sum of what it has to hold:

| term | bytes |
| --- | --- |
| weights | of the compressed model, once, float32 |
| adapters | 16 a number: itself, its gradient, AdamW's two moments, float32 |
| activations | measured apart, see below |
| inputs of adapters | what LoRA keeps for its own gradients, float32: see `inputs` |

Activations are the most that another process holds above the compressed model's weights in one pass forwards and
backwards over as many windows as a step has, weights frozen, with the cross entropy of transformers; its gradient goes
back to the embeddings. Frozen linear layers keep none of their inputs, hence the last term. There every tensor leaves
the process once it is freed: what a heap keeps in holes between tensors is no part of the bound.

In a third process PEFT's LoRA of the same rank, on every linear layer of the blocks, tunes the dense model under a
plain Trainer, for as many steps of as many windows, in float32: the second figure is the first peak over that one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, memory, training
from benchmarks.common import Bound, Case

RATIO = 0.4
RANK = 8
STEPS = 3
WINDOWS = (4, 128)
THREADS = 2
WITHIN = Bound("at most", 1.0)
DENSE = Bound("at most", 1.0)
SHAPE = training.SHAPE
# distinct inputs of the matrices of a block, by a matrix that reads each: q, k and v share one, gate and up another
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")

Layout = Mapping[str, Mapping[str, Any]]


def adapters(layout: Layout, rank: int) -> int:
    """Numbers in the adapters of all factors: for each that is m × k, q (m + k), q at most its smaller side."""
    return sum(min(rank, each["rank"]) * (each["out"] + each["in"] + 2 * each["rank"]) for each in layout.values())


def inputs(shape: dict[str, Any], layout: Layout, rank: int, tokens: int) -> int:
    """Bytes of what adapters keep of one pass, float32.

    A token: the distinct inputs of the matrices; for each matrix its coordinates in the rank, which are the inputs of
    left, and in both adapters.
    """
    width = shape["num_hidden_layers"] * sum(memory.matrices(shape)[name][1] for name in INPUTS)
    width += sum(each["rank"] + 2 * min(rank, each["rank"]) for each in layout.values())
    return 4 * tokens * width


def prepare(folder: Path, shape: dict[str, Any], windows: tuple[int, int], steps: int) -> dict[str, int]:
    """Write `dense`, `compressed` and the text to tune on; their parameters."""
    from benchmarks import inference
    from spectrim.measure.evaluate import parameters
    from spectrim.model import loading, modules

    (dense := folder / "dense").mkdir()
    memory.generate(dense, shape)
    model = inference.compressed_model(loading.load(dense), RATIO, "plain").bfloat16()
    specs = {name: modules.spec_of(module) for name, module in model.named_modules()}
    loading.attach(model, {name: spec for name, spec in specs.items() if spec is not None})
    loading.save(model, folder / "compressed")
    words = [f"w{number}" for number in range(shape["vocab_size"])]
    one_word_a_token(words, folder / "compressed")
    text = random.Random(0).choices(words, k=steps * windows[0] * windows[1])
    (folder / "words.txt").write_text(" ".join(text), encoding="utf-8")
    return {name: parameters(folder / name)["total"] for name in ("dense", "compressed")}


def one_word_a_token(words: list[str], directory: Path) -> None:
    """Write a tokenizer that knows these words, and puts nothing before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab={word: number for number, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token=words[0]).save_pretrained(directory)


def tuned(folder: Path, windows: tuple[int, int], steps: int) -> dict[str, Any]:
    """Tune the compressed model in this process: what it held after imports, at its peak, and after each step."""
    import peft  # noqa: F401  these would else be imported by the run
    import transformers.models.llama.modeling_llama  # noqa: F401

    import spectrim.finetune  # noqa: F401
    from spectrim import tuning

    imports, program, stages = common.peak_bytes(), common.program_bytes(), {}

    def progress(stage: str, done: int, total: int) -> None:
        stages[f"{stage} {done}"] = common.peak_bytes() - imports

    made = tuning.tune(
        folder / "compressed", str(folder / "words.txt"), folder / "tuned", "rank_preserving", steps=steps,
        batch_size=windows[0], window=windows[1], settings=[f"method.rank={RANK}"], progress=progress,
    )  # fmt: skip
    found = {**told(imports, program), "peak_over_imports_until": stages}
    losses = [entry["loss"] for entry in made.record["history"]]
    return {**found, "adapters": made.record["trainable_parameters"], "losses": losses, "timings": made.run["timings"]}


def lora(folder: Path, windows: tuple[int, int], steps: int) -> dict[str, Any]:
    """Tune the dense model by PEFT's LoRA in this process: what it held after imports, and at its peak."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  would else be imported by the run
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    imports, program = common.peak_bytes(), common.program_bytes()
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    # the type of task says which linear layer is the head, and no part of a block
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(dense, config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = tokens((steps * windows[0], windows[1]), dense.config.vocab_size)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder / "lora"), max_steps=steps, per_device_train_batch_size=windows[0], learning_rate=2e-4,
        optim="adamw_torch", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    done = Trainer(model=model, args=arguments, train_dataset=rows).train()
    return {**told(imports, program), "adapters": count, "loss": done.training_loss}


def told(imports: int, program: int) -> dict[str, int]:
    """What this process held after its imports and at its peak, and its program's pages that came between these."""
    return {"imports": imports, "peak": common.peak_bytes(), "program": common.program_bytes() - program}


def passed(folder: Path, windows: tuple[int, int], steps: int) -> dict[str, Any]:
    """One pass forwards and backwards of the compressed model in this process: the most held above its weights."""
    import torch

    from spectrim.core import heap
    from spectrim.model import loading

    without_holes()
    model = loading.load(folder / "compressed", dtype=torch.float32).requires_grad_(False)
    ids = tokens(windows, model.config.vocab_size)
    entering = model.get_input_embeddings()(ids).requires_grad_()
    heap.give_back()
    before, program = training.held_bytes(), common.program_bytes()
    forget_peak()
    model(inputs_embeds=entering, labels=ids, use_cache=False).loss.backward()
    peak, program = common.peak_bytes(), common.program_bytes() - program
    return {"weights": before, "activations": peak - before, "program": program}


def without_holes() -> None:
    """From now on tensors of 256 KiB or more leave this process when freed (glibc only)."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**18)  # M_MMAP_THRESHOLD of malloc.h


def forget_peak() -> None:
    """Let the peak of this process begin anew: loading reads weights as stored, beside those computed with."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # 5: the peak alone (proc(5))


def tokens(windows: tuple[int, int], vocabulary: int) -> Any:
    """Random windows of tokens."""
    import torch

    return torch.randint(vocabulary, windows, generator=torch.Generator().manual_seed(0))


Run = Callable[[Path, tuple[int, int], int], dict[str, Any]]
RUNS: dict[str, Run] = {"tuned": tuned, "lora": lora, "passed": passed}


def cases(shape: dict[str, Any], windows: tuple[int, int], steps: int, threads: int) -> list[Case]:
    """Peak over bound of one tuning, and over that of tuning the dense model."""
    from spectrim.model import loading

    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as name:
        folder = Path(name)
        sizes = prepare(folder, shape, windows, steps)
        layout, report = loading.read_layout(folder / "compressed"), folder / "report.json"
        options = ["--folder", name, "--windows", *map(str, windows), "--steps", str(steps), "--threads", str(threads)]
        found: dict[str, dict[str, Any]] = {}
        for run in RUNS:
            common.run_module("finetune", str(report), "--run", run, *options, threads=threads)
            found[run] = json.loads(report.read_text(encoding="utf-8"))
    terms = {
        "weights": 4 * sizes["compressed"],
        "adapters": 16 * adapters(layout, RANK),
        "activations": found["passed"]["activations"],
        "inputs_of_adapters": inputs(shape, layout, RANK, windows[0] * windows[1]),
    }
    used, dense = (found[run]["peak"] - found[run]["imports"] for run in ("tuned", "lora"))
    bound = sum(terms.values())
    facts = {"parameters": sizes, "peak_over_imports": used}
    one = {
        **facts,
        "program_of_activations": found["passed"]["program"],
        "bound": bound,
        "bound_terms": terms,
        **found["tuned"],
    }
    other = {**facts, "dense_peak_over_imports": dense, "dense": found["lora"]}
    what = f"{sizes['dense'] / 1e6:.0f} M at ratio {RATIO:g}, {windows[0]} × {windows[1]} tokens"
    return [
        Case(f"{what} / what it holds", (used / bound,), threads, "peak / bound", WITHIN, one),
        Case(f"{what} / LoRA on the dense model", (used / dense,), threads, "peak / peak", DENSE, other),
    ]


def measure() -> dict[str, object]:
    """A hundred million parameters, a few steps."""
    settings = {
        "ratio": RATIO, "format": "plain", "method": "rank_preserving", "rank": RANK, "steps": STEPS,
        "windows": list(WINDOWS), **SHAPE, "dtypes": "bfloat16, tuned in float32",
    }  # fmt: skip
    return common.result("finetune", cases(SHAPE, WINDOWS, STEPS, THREADS), settings)


def main() -> None:
    """Measure everything, or, with --run, be a process that is measured."""
    parser = argparse.ArgumentParser(description="Peak memory of tuning a compressed model.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--run", choices=RUNS, help="only do this in this process")
    parser.add_argument("--folder", type=Path, help="of the models and the text, with --run")
    parser.add_argument("--windows", type=int, nargs=2, default=WINDOWS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=THREADS)
    asked = parser.parse_args()
    if asked.run is None:
        common.write(asked.report, measure())
        return
    if asked.folder is None:
        parser.error("--run needs --folder")
    import torch

    torch.set_num_threads(asked.threads)
    common.write(asked.report, RUNS[asked.run](asked.folder, tuple(asked.windows), asked.steps))


if __name__ == "__main__":
    main()
