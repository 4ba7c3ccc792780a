"""Speed: that the two models take turns, what is timed, and what is returned."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectrim.measure import speed as module
from spectrim.measure.speed import speed

PROMPT, NEW, BATCH = 6, 3, 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(vocabulary: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def measure(model: LlamaForCausalLM, reference: LlamaForCausalLM, **options: Any) -> dict[str, Any]:
    return speed(model, reference, **({"prompt_tokens": PROMPT, "new_tokens": NEW, "batch": BATCH} | options))


class Clock:
    """A clock that stands still, but for the time forward passes are said to take, so much a token."""

    def __init__(self) -> None:
        self.time = 0.0
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.inputs: list[torch.Tensor] = []

    def watch(self, model: LlamaForCausalLM, name: str, seconds: list[float]) -> None:
        """seconds: factor on the time of each turn of this model; a turn is a prefill and what follows it."""
        turn = -1

        def note(_module: Any, _args: Any, options: dict[str, Any]) -> None:
            nonlocal turn
            ids = options["input_ids"]
            turn += ids.shape[1] > 1
            self.calls.append((name, tuple(ids.shape)))
            self.inputs.append(ids)
            self.time += seconds[turn] * ids.shape[1]
            assert not module.torch.is_grad_enabled()

        model.register_forward_pre_hook(note, with_kwargs=True)


def test_turns_medians_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.time)
    model, reference = tiny(), tiny()
    clock.watch(model, "model", [1000.0, 1.0, 9.0, 2.0, 3.0, 2.0])  # the first turn warms up and must not count
    clock.watch(reference, "reference", [1000.0, 6.0, 5.0, 7.0, 6.0, 6.0])
    result = measure(model, reference)

    turn = [(BATCH, PROMPT)] + [(BATCH, 1)] * NEW
    assert clock.calls == [(name, shape) for _ in range(6) for name in ("reference", "model") for shape in turn]
    per_turn = len(turn)
    first = torch.cat(clock.inputs[:per_turn], dim=1)
    for start in range(0, len(clock.inputs), per_turn):  # both models, every turn: the same tokens
        assert torch.equal(torch.cat(clock.inputs[start : start + per_turn], dim=1), first)
    assert int(first.max()) < 64 and len(first.unique()) > 5

    for phase, tokens in (("prefill", PROMPT), ("decode", NEW)):
        assert result[phase] == {
            "ratio": 3.0,
            "model_seconds": 2.0 * tokens,
            "model_spread": (9.0 - 1.0) / 2.0,
            "reference_seconds": 6.0 * tokens,
            "reference_spread": pytest.approx((7.0 - 5.0) / 6.0),
        }
    assert {key: value for key, value in result.items() if key not in ("prefill", "decode")} == {
        "repeats": 5,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "shapes": {"batch": BATCH, "prompt_tokens": PROMPT, "new_tokens": NEW},
    }
    json.dumps(result)


def test_decode_uses_the_cache() -> None:
    """One token with the cache gives the logits of the whole text, at every step."""
    model = tiny()
    ids = torch.randint(64, (BATCH, PROMPT + NEW))
    steps: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _module, _args, output: steps.append(output.logits[:, -1]))
    with torch.inference_mode():
        module._prefill_and_decode(model, ids, PROMPT)
        handle.remove()
        expected = model(ids).logits[:, PROMPT - 1 :]
    assert torch.allclose(torch.stack(steps, dim=1), expected, atol=1e-5)


def test_prefill_computes_only_the_last_logits() -> None:
    model = tiny()
    shapes = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: shapes.append(tuple(args[0].shape)))
    measure(model, tiny())
    assert set(shapes) == {(BATCH, 1, 32)}


def test_a_slower_reference_shows() -> None:
    reference = tiny()
    reference.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.02))
    result = measure(tiny(), reference)
    assert result["prefill"]["ratio"] > 1.5
    assert result["decode"]["ratio"] > 1.5
    assert result["decode"]["reference_seconds"] > NEW * 0.02


def test_threads_and_training_mode_are_put_back() -> None:
    seen = []
    model = tiny().train()
    model.register_forward_pre_hook(lambda *_: seen.append((torch.get_num_threads(), model.training)))
    result = measure(model, tiny(), threads=2)
    assert result["threads"] == 2 and set(seen) == {(2, False)}
    assert torch.get_num_threads() == 1 and model.training


def test_another_vocabulary_is_no_obstacle() -> None:
    assert statistics.fmean([measure(tiny(), tiny(40))[phase]["ratio"] for phase in ("prefill", "decode")]) > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"repeats": 4}, "median of 4 repeats"),
        ({"new_tokens": 0}, r"new_tokens \(0\)"),
        ({"threads": 0}, r"threads \(0\)"),
        ({"prompt_tokens": 30}, "30 tokens of prompt and 3 new ones exceed the 32 positions of the reference"),
    ],
)
def test_bad_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(tiny(), tiny(), **options)


def test_unlike_models() -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16 on cpu, the reference torch\.float32 on cpu"):
        measure(tiny().bfloat16(), tiny())


def test_no_cache() -> None:
    model = tiny()

    def without_cache(_module: Any, _args: Any, output: Any) -> Any:
        output.past_key_values = None
        return output

    model.register_forward_hook(without_cache)
    with pytest.raises(ValueError, match="LlamaForCausalLM returns no KV cache"):
        measure(model, tiny())
