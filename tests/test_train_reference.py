"""tools/train_reference.py: what it trains learns, loads anywhere, and comes out the same twice."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.train_reference import (
    END,
    WARMUP_STEPS,
    Schedule,
    Shape,
    pack,
    read_documents,
    run,
    save,
    train_tokenizer,
    windows,
)

SHAPE = Shape(hidden=32, layers=1, heads=4, kv_heads=2, ffn=64, vocab=300, length=32)
SCHEDULE = Schedule(steps=60, batch=8, lr=1e-2, seed=3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of a few words: easy to learn, and none of anybody else's text."""
    draw = random.Random(seed)
    words = ["the", "small", "red", "boat", "sails", "over", "a", "calm", "lake", "and", "turns", "home"]
    return [" ".join(draw.choices(words, k=12)) + "." for _ in range(count)]


def write_texts(folder: Path) -> list[Path]:
    plain, rows = folder / "plain.txt", folder / "rows.jsonl"
    plain.write_text("\n".join(sentences(80, 0)), encoding="utf-8")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(40, 1)), encoding="utf-8")
    return [plain, rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path, list[float]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("train")
    texts = write_texts(folder)
    return texts, folder / "model", run(texts, folder / "model", SHAPE, SCHEDULE)


def test_loss_falls(trained: tuple[list[Path], Path, list[float]]) -> None:
    losses = trained[2]
    assert len(losses) == SCHEDULE.steps
    assert losses[0] > 5  # ln 300 = 5.7: it starts knowing nothing
    assert sum(losses[-5:]) / 5 < losses[0] - 1


def test_loads_with_auto_classes_and_keeps_what_it_learnt(trained: tuple[list[Path], Path, list[float]]) -> None:
    texts, out, losses = trained
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads == 2 and model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 0
    assert tokenizer.convert_tokens_to_ids(END) == 0 == tokenizer.bos_token_id == tokenizer.eos_token_id
    text = "the boat — ünïcode, and bytes"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    batch = pack(read_documents(texts), tokenizer)[None, : SHAPE.length]
    with torch.inference_mode():
        loss = model.float()(input_ids=batch, labels=batch).loss.item()
    assert loss < losses[0] - 1


def test_same_seed_same_bytes(trained: tuple[list[Path], Path, list[float]], tmp_path: Path) -> None:
    texts, first, losses = trained
    again = tmp_path / "again"
    assert run(texts, again, SHAPE, SCHEDULE) == losses
    names = sorted(path.name for path in first.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert sorted(path.name for path in again.iterdir()) == names
    assert [name for name in names if (first / name).read_bytes() != (again / name).read_bytes()] == []


def test_another_seed_gives_other_weights(trained: tuple[list[Path], Path, list[float]], tmp_path: Path) -> None:
    texts, first, _ = trained
    run(texts, tmp_path / "other", SHAPE, Schedule(steps=1, batch=8, seed=4))
    assert (tmp_path / "other/model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_every_document_follows_the_end_token(tmp_path: Path) -> None:
    documents = read_documents(write_texts(tmp_path))
    assert len(documents) == 41  # one plain file, 40 rows
    tokenizer = train_tokenizer(documents, 300)
    stream = pack(documents, tokenizer)
    starts = (stream == 0).nonzero().flatten().tolist()
    assert starts[0] == 0 and len(starts) == 41
    assert tokenizer.decode(stream[starts[7] + 1 : starts[8]]) == documents[7]


def test_windows_lie_inside_the_stream_and_reach_both_ends() -> None:
    draw = windows(torch.arange(10), length=8, batch=64, seed=0)
    batch = next(draw)
    assert batch.shape == (64, 8)
    assert torch.equal(batch - batch[:, :1], torch.arange(8).expand(64, 8))
    assert set(batch[:, 0].tolist()) == {0, 1, 2}
    assert not torch.equal(batch, next(draw))


def test_rate_warms_up_holds_and_falls() -> None:
    schedule = Schedule(steps=1000, lr=2.0)
    assert schedule.rate(0, 0.0) == pytest.approx(2.0 / WARMUP_STEPS)
    assert schedule.rate(WARMUP_STEPS, 0.1) == schedule.rate(399, 0.4) == 2.0
    assert schedule.rate(700, 0.7) == pytest.approx(2.0 * (1 + 0.02) / 2)
    assert schedule.rate(1000, 1.0) == pytest.approx(0.04)


def test_minutes_measure_progress_by_the_clock() -> None:
    assert Schedule(minutes=2.0).progress(step=5, seconds=30.0) == pytest.approx(0.25)
    assert Schedule(steps=20).progress(step=5, seconds=1e9) == pytest.approx(0.25)


def test_a_killed_save_leaves_nothing_under_the_name(
    trained: tuple[list[Path], Path, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained[1])
    tokenizer = AutoTokenizer.from_pretrained(trained[1])
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(model, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--heads"):
        Shape(hidden=30, heads=4)
    with pytest.raises(ValueError, match="--kv-heads"):
        Shape(hidden=32, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="--vocab"):
        Shape(vocab=256)
    with pytest.raises(ValueError, match="steps or minutes"):
        Schedule(steps=1, minutes=1.0)
    with pytest.raises(ValueError, match="--length"):
        next(windows(torch.arange(3), length=8, batch=1, seed=0))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        read_documents([rows])
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n")
    with pytest.raises(ValueError, match=r"blank\.txt"):
        read_documents([blank])
    with pytest.raises(ValueError, match="--out"):
        run([rows], tmp_path, SHAPE, SCHEDULE)
