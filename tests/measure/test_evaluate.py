"""The evaluation protocol against calculations that share no code with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from spectrim.measure import evaluate as module
from spectrim.measure.evaluate import DEFAULT_WINDOW, evaluate, generate_sample, parameters

SHARED = Path(__file__).resolve().parents[2] / "../shared"
POSITIONS = 48
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # 63, and <s>


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0} | {"Ġ" if c == " " else c: i for i, c in enumerate(LETTERS, start=1)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<s>")


def tiny(seed: int = 0, tied: bool = False, dropout: float = 0.0, vocabulary: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,  # far from uniform predictions: a wrong shift or mean shows
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three documents: 1 + 30, 1 + 0 and 1 + 70 tokens."""
    letters = np.random.default_rng(0).choice(list(LETTERS), 100)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = ["".join(letters[:30]), "", "".join(letters[30:])]
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    return str(path)


def stream_of(text: str) -> list[int]:
    """By hand: one <s> before every document, then the letters' places in LETTERS, from 1."""
    stream = []
    for line in Path(text).read_text(encoding="utf-8").split("\n"):
        stream += [0] + [1 + LETTERS.index(letter) for letter in json.loads(line)["text"]]
    return stream


def log_probabilities(model: LlamaForCausalLM, window: list[int]) -> np.ndarray:
    """(positions × vocabulary), each position computed from its own prefix alone, in float64."""
    rows = []
    for end in range(1, len(window)):
        with torch.no_grad():
            logits = model(torch.tensor([window[:end]])).logits[0, -1].double().numpy()
        rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return np.stack(rows)


def brute_force(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, stream: list[int], window: int, limit: int
) -> tuple[float, float, int]:
    """(token-mean loss, token-mean KL(reference ‖ model), tokens), one prediction at a time."""
    losses, divergences = [], []
    for start in range(0, len(stream) - window + 1, window)[:limit]:
        ids = stream[start : start + window]
        log_q, log_p = log_probabilities(model, ids), log_probabilities(reference, ids)
        for i in range(window - 1):
            losses.append(-log_q[i, ids[i + 1]])
            divergences.append(sum(math.exp(p) * (p - q) for p, q in zip(log_p[i], log_q[i], strict=True)))
    return float(np.mean(losses)), float(np.mean(divergences)), len(losses)


class TestAgainstBruteForce:
    @pytest.mark.parametrize(
        "window, limit, windows", [(12, None, 8), (12, 3, 3), (34, None, 3), (48, 99, 2), (2, 5, 5)]
    )
    def test_loss_and_divergence(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        text: str,
        window: int,
        limit: int | None,
        windows: int,
    ) -> None:
        reference = tiny(seed=1)
        nll, kl, tokens = brute_force(model, reference, stream_of(text), window, limit or 10**6)
        result = evaluate(model, tokenizer, text, window=window, limit=limit, batch=2, reference=reference)
        assert (result.windows, result.window, result.tokens) == (windows, window, tokens)
        assert result.nll == pytest.approx(nll, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
        assert kl > 0.1 and result.kl == pytest.approx(kl, rel=1e-4)

    def test_batch_and_chunk_do_not_matter(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        text: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        reference = tiny(seed=1)
        whole = evaluate(model, tokenizer, text, window=12, batch=100, reference=reference)
        monkeypatch.setattr(module, "_CHUNK", 3 * 64)  # 3 positions at a time, 11 predictions: an uneven end
        parts = evaluate(model, tokenizer, text, window=12, batch=3, reference=reference)
        assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
        assert parts.kl == pytest.approx(whole.kl, rel=1e-5)

    def test_chunks_bound_the_log_probabilities(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        text: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sizes = []
        original = module.F.log_softmax

        def noted(logits: torch.Tensor, dim: int) -> torch.Tensor:
            sizes.append((logits.dtype, logits.shape[0]))
            return original(logits, dim)

        monkeypatch.setattr(module, "_CHUNK", 3 * 64)
        monkeypatch.setattr(module.F, "log_softmax", noted)
        evaluate(model, tokenizer, text, window=12)
        assert {dtype for dtype, _ in sizes} == {torch.float32}
        assert max(rows for _, rows in sizes) == 3

    def test_whole_txt_is_one_document(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_text("the quick brown fox jumps over the lazy dog", encoding="utf-8")
        stream = [0] + [1 + LETTERS.index(letter) for letter in path.read_text(encoding="utf-8")]
        expected, _, _ = brute_force(model, model, stream, 10, 10**6)
        assert evaluate(model, tokenizer, str(path), window=10).nll == pytest.approx(expected, rel=1e-5)


class TestResult:
    def test_fields(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        calls: list[tuple[int, int]] = []
        result = evaluate(
            model,
            tokenizer,
            text,
            window=12,
            limit=5,
            batch=2,
            progress=lambda done, total: calls.append((done, total)),
            sample_prompt="ab",
        )
        assert calls == [(2, 5), (4, 5), (5, 5)]
        assert result.text == text and result.kl is None and result.parameters == parameters(model)
        assert result.sample == generate_sample(model, tokenizer, "ab")
        for piece in ("special tokens", "12 tokens", "tail dropped", "first 5 of 8", "11 next-token", "float32 model"):
            assert piece in result.protocol
        assert "all 8" in evaluate(model, tokenizer, text, window=12).protocol
        assert json.loads(json.dumps(result.to_json())) == result.to_json()
        assert result.to_json()["perplexity"] == result.perplexity

    def test_divergence_from_itself_is_zero(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
    ) -> None:
        assert evaluate(model, tokenizer, text, window=12, reference=model).kl == 0.0

    def test_default_window(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, tmp_path: Path
    ) -> None:
        assert evaluate(model, tokenizer, text).window == POSITIONS
        torch.manual_seed(0)
        unlimited = BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=64))
        long = tmp_path / "long.txt"
        long.write_text("a" * 2 * DEFAULT_WINDOW, encoding="utf-8")
        assert evaluate(unlimited, tokenizer, str(long), limit=1).window == DEFAULT_WINDOW

    def test_training_mode_is_left_as_found_and_not_used(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
    ) -> None:
        noisy = tiny(dropout=0.5)
        noisy.train()
        noisy.model.layers[0].eval()
        before = [part.training for part in noisy.modules()]
        expected = evaluate(model, tokenizer, text, window=12).nll
        assert evaluate(noisy, tokenizer, text, window=12).nll == pytest.approx(expected, rel=1e-6)
        assert [part.training for part in noisy.modules()] == before

    def test_bfloat16_model(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        model = tiny().bfloat16()
        result = evaluate(model, tokenizer, text, window=12)
        assert "bfloat16 model, float32 loss" in result.protocol
        assert result.nll == pytest.approx(evaluate(tiny(), tokenizer, text, window=12).nll, rel=0.05)


class TestErrors:
    def test_not_finite_names_the_window(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        stream = stream_of(text)
        windows = [stream[start : start + 12] for start in range(0, 96, 12)]
        first = next(i for i, ids in enumerate(windows) if LETTERS.index("Q") + 1 in ids[:-1])
        assert first > 0  # or the test would not show that the number is the window's
        model = tiny()
        with torch.no_grad():
            model.model.embed_tokens.weight[LETTERS.index("Q") + 1] = math.nan
        with pytest.raises(ValueError, match=rf"window {first} .*the loss is nan"):
            evaluate(model, tokenizer, text, window=12, batch=3)
        with pytest.raises(ValueError, match=rf"window {first} .*the divergence from the reference is nan"):
            evaluate(tiny(), tokenizer, text, window=12, batch=3, reference=model)

    def test_window(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        with pytest.raises(ValueError, match="window 49 is longer than the 48 positions"):
            evaluate(model, tokenizer, text, window=49)
        with pytest.raises(ValueError, match="at least 2 tokens"):
            evaluate(model, tokenizer, text, window=1)
        with pytest.raises(ValueError, match="batch must be at least 1"):
            evaluate(model, tokenizer, text, batch=0)

    def test_text_too_short(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("abc", encoding="utf-8")
        with pytest.raises(ValueError, match="has 4 tokens, one window needs 12"):
            evaluate(model, tokenizer, str(path), window=12)

    def test_another_vocabulary(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        with pytest.raises(ValueError, match="reference has a vocabulary of 80, the model of 64"):
            evaluate(model, tokenizer, text, window=12, reference=tiny(vocabulary=80))

    def test_no_finite_perplexity(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        model = tiny()
        with torch.no_grad():
            model.lm_head.weight *= 1e4
        with pytest.raises(ValueError, match="has no finite perplexity"):
            evaluate(model, tokenizer, text, window=12)


class TestParameters:
    @pytest.mark.parametrize("tied", [False, True])
    def test_model_and_directory_agree(self, tied: bool, tmp_path: Path) -> None:
        model = tiny(tied=tied).bfloat16()
        attention = 32 * 32 + 2 * 16 * 32 + 32 * 32
        total = 64 * 32 * (1 if tied else 2) + 2 * (attention + 3 * 48 * 32 + 2 * 32) + 32
        expected = {"total": total, "bytes": 2 * total, "index_bytes": 0}
        assert parameters(model) == expected
        model.save_pretrained(tmp_path / "one")
        assert parameters(tmp_path / "one") == expected
        model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        assert parameters(str(tmp_path / "shards")) == expected

    def test_indices_guards_and_mixed_types(self, tmp_path: Path) -> None:
        tensors = {
            "left.weight": torch.zeros(3, 4),
            "right.weight": torch.zeros(5, 2, dtype=torch.float16),
            "scale": torch.tensor(1.0, dtype=torch.float64),
            "eighth": torch.zeros(7, dtype=torch.float8_e4m3fn),
            "order": torch.arange(6),
            "columns": torch.arange(3, dtype=torch.int32),
            "mask": torch.ones(5, dtype=torch.bool),
            "weight": torch.zeros(0),
        }
        save_file(tensors, tmp_path / "model.safetensors")
        save_file({"more": torch.zeros(9)}, tmp_path / "plan.safetensors")  # no part of the model
        expected = {"total": 12 + 10 + 1 + 7, "bytes": 48 + 20 + 8 + 7, "index_bytes": 48 + 12 + 5}
        assert parameters(tmp_path) == expected
        holder = torch.nn.Module()
        for name, tensor in tensors.items():
            holder.register_buffer(name.replace(".", "_"), tensor)
        holder.register_buffer("recomputed", torch.zeros(11), persistent=False)
        assert parameters(holder) == expected

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
            parameters(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
        with pytest.raises(ValueError, match=r"model-1\.safetensors is missing"):
            parameters(tmp_path)


class TestSample:
    def test_greedy(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = tiny()
        # what a model directory may bring along, and greedy decoding must not use
        model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.5, repetition_penalty=1.8)
        ids = [0, 1, 2, 3]
        for _ in range(10):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = "abc" + "".join(LETTERS[i - 1] for i in ids[4:] if i > 0)
        assert len(set(ids[4:])) < 10  # repeats itself, so that the penalty would show
        assert generate_sample(model, tokenizer, "abc", max_new_tokens=10) == expected
        assert generate_sample(model, tokenizer, "abc", max_new_tokens=10) == expected

    def test_too_long_or_empty(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="11 tokens of prompt and 40 new ones exceed the model's 48 positions"):
            generate_sample(model, tokenizer, "a" * 10)
        bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
        with pytest.raises(ValueError, match="gives no token"):
            generate_sample(model, bare, "")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder `shared` beside the repository")
def test_trained_model_gives_the_known_perplexity() -> None:
    """The figure comes from a calculation of its own, in float64, window by window."""
    directory = SHARED / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = str(SHARED / "data" / "tinystories" / "heldout.jsonl")
    result = evaluate(model, tokenizer, text, window=256, limit=100, sample_prompt="Once upon a time, there was")
    assert result.perplexity == pytest.approx(5.14, abs=0.02)
    assert result.tokens == 100 * 255
    assert result.parameters == parameters(directory) == {"total": 260_032, "bytes": 1_040_128, "index_bytes": 0}
    assert result.sample is not None and result.sample.startswith("Once upon a time, there was a little girl")
