"""Training files to rows: what carries loss, and which form a file has."""

from __future__ import annotations

import json
import random
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spectrim.data import text
from spectrim.data.instructions import IGNORED, Row, collate, fingerprint, pad_of, rows
from tests.data.rows import (
    BOS,
    END,
    EOS,
    FORGETTING,
    MARKED,
    REFUSING,
    TEMPLATE,
    TWO_TURNS,
    WIDE,
    make,
    random_text,
    said,
    trained,
    whole,
    write,
)


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerBase:
    """The bundled tokenizer: merges, <|endoftext|> at the end, nothing at the start."""
    return PreTrainedTokenizerFast.from_pretrained(str(resources.files("spectrim") / "assets" / "reference"))


class TestInstructions:
    def test_the_plain_form(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        name = write(
            tmp_path / "a.jsonl",
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "",
            {"instruction": "Greet.", "input": "", "output": " Hello\n"},
            {"instruction": "Greet.", "input": None, "output": "Hé", "more": 1},
        )
        first, second, third = rows(name, plain, WIDE)
        assert whole(first, plain) == "<s>### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>"
        assert whole(second, plain) == "<s>### Instruction:\nGreet.\n\n### Response:\n Hello\n</s>"
        assert [trained(row, plain) for row in (first, second, third)] == ["3</s>", " Hello\n</s>", "Hé</s>"]

    def test_json_list(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        name = write(tmp_path / "a.json", {"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"})
        assert [trained(row, plain) for row in rows(name, plain, WIDE, "instructions")] == ["b</s>", "d</s>"]

    @pytest.mark.parametrize("trim", [False, True])
    def test_any_text_is_trained_on_exactly(self, tmp_path: Path, trim: bool) -> None:
        tokenizer, source = make(trim=trim), random.Random(0)
        given = [
            {
                "instruction": random_text(source),
                "input": random_text(source) if source.random() < 0.5 else "",
                "output": random_text(source)[source.randrange(2) :] + "y" + random_text(source)[1:],
            }
            for _ in range(200)
        ]
        told = rows(write(tmp_path / "a.json", *given), tokenizer, WIDE)
        assert [trained(row, tokenizer) for row in told] == [row["output"] + "</s>" for row in given]
        assert all(row.ids[0] == BOS and (row.ids == BOS).sum() == (row.ids == EOS).sum() == 1 for row in told)

    def test_a_tokenizer_that_merges(self, tmp_path: Path, reference: PreTrainedTokenizerBase) -> None:
        outputs = ["Once upon a time, there was a cat.", "A dog  ran.\n\nThe end.\n", "The"]
        given = [{"instruction": "Tell a story.", "output": output} for output in outputs]
        told = rows(write(tmp_path / "a.json", *given), reference, WIDE)
        for row, output in zip(told, outputs, strict=True):
            assert trained(row, reference) == output + "<|endoftext|>"
            text = f"### Instruction:\nTell a story.\n\n### Response:\n{output}<|endoftext|>"
            assert row.ids.tolist() == reference(text)["input_ids"]  # tokenised as one
        assert (told[0].labels != IGNORED).sum() < len(outputs[0])  # it does merge

    def test_a_token_of_both_prompt_and_response_carries_loss(self, tmp_path: Path) -> None:
        tokenizer = make()
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["model"]["vocab"]["ĊĊ"] = 999
        state["model"]["merges"] = [["Ċ", "Ċ"]]
        core = Tokenizer.from_str(json.dumps(state))
        merging = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        row = rows(write(tmp_path / "a.json", {"instruction": "a", "output": "\n\nb"}), merging, WIDE)[0]
        assert trained(row, merging) == "\n\n\nb</s>"

    def test_an_end_token_of_the_tokenizer_itself_is_not_doubled(self, tmp_path: Path) -> None:
        tokenizer = make(ends=True)
        row = rows(write(tmp_path / "a.json", {"instruction": "a", "output": "b"}), tokenizer, WIDE)[0]
        assert tokenizer("a")["input_ids"][-1] == EOS
        assert whole(row, tokenizer) == "<s>### Instruction:\na\n\n### Response:\nb</s>"

    def test_no_end_token(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        row = rows(write(tmp_path / "a.json", {"instruction": "Say", "output": "hello you"}), tokenizer, WIDE)[0]
        assert tokenizer.eos_token is None
        assert trained(row, tokenizer) == "hello you" and row.ids[0] == tokenizer.bos_token_id

    def test_a_slow_tokenizer(self, tmp_path: Path) -> None:
        slow = ByT5Tokenizer()
        assert not slow.is_fast
        given = {"instruction": "Greet.", "input": "in é", "output": "Hé\n!"}
        row = rows(write(tmp_path / "a.json", given), slow, WIDE)[0]
        assert whole(row, slow) == "### Instruction:\nGreet.\n\n### Input:\nin é\n\n### Response:\nHé\n!</s>"
        assert trained(row, slow) == "Hé\n!</s>"
        row = rows(write(tmp_path / "b.json", TWO_TURNS), slow, WIDE)[0]
        assert trained(row, slow) == "yes</s>no é</s>"

    def test_a_chat_template_is_used(self, tmp_path: Path) -> None:
        tokenizer = make(TEMPLATE)
        given = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Greet.", "output": "Hi"}]
        first, second = rows(write(tmp_path / "a.json", *given), tokenizer, WIDE)
        assert whole(first, tokenizer) == "<s><|start|>user\nAdd.\n\n1 2<|end|>\n<|start|>assistant\n3<|end|>\n"
        assert [trained(row, tokenizer) for row in (first, second)] == ["3<|end|>", "Hi<|end|>"]


class TestChat:
    def test_the_plain_form(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        row = rows(write(tmp_path / "a.jsonl", TWO_TURNS), plain, WIDE)[0]
        assert whole(row, plain) == (
            "<s>### System:\nbe kind\n\n### User:\nhi\n\n### Assistant:\nyes</s>\n\n"
            "### User:\nmore\n\n### Assistant:\nno é</s>"
        )
        assert trained(row, plain) == "yes</s>no é</s>"

    @pytest.mark.parametrize("trim", [False, True])
    def test_a_template_without_marks(self, tmp_path: Path, trim: bool) -> None:
        tokenizer = make(TEMPLATE, trim=trim)
        row = rows(write(tmp_path / "a.jsonl", TWO_TURNS), tokenizer, WIDE)[0]
        ids = tokenizer.apply_chat_template(TWO_TURNS["messages"], return_dict=False)
        assert row.ids.tolist() == ids
        assert (row.ids == BOS).sum() == 1  # that of the template
        assert trained(row, tokenizer) == "yes<|end|>no é<|end|>"

    @pytest.mark.parametrize("trim", [False, True])
    def test_a_template_with_marks(self, tmp_path: Path, trim: bool) -> None:
        tokenizer = make(MARKED, trim=trim)
        given = said(("user", "hi"), ("assistant", " yes "), ("user", "more"), ("assistant", " no é"))
        row = rows(write(tmp_path / "a.jsonl", given), tokenizer, WIDE)[0]
        assert trained(row, tokenizer) == " yes <|end|>\n no é<|end|>\n"
        told = tokenizer.apply_chat_template(given["messages"], return_assistant_tokens_mask=True)
        assert row.ids.tolist() == told["input_ids"]
        # the tokenizer's own mask loses a passage whose first space no offset holds
        assert ((row.labels != IGNORED).long().tolist() == told["assistant_masks"]) is not trim

    @pytest.mark.parametrize("template", [TEMPLATE, MARKED])
    def test_a_slow_tokenizer(self, tmp_path: Path, template: str) -> None:
        slow = ByT5Tokenizer(chat_template=template.replace("bos_token", "''"))
        row = rows(write(tmp_path / "a.jsonl", TWO_TURNS), slow, WIDE)[0]
        break_ = "\n" if template is MARKED else ""
        assert trained(row, slow) == f"yes<|end|>{break_}no é<|end|>{break_}"
        assert whole(row, slow) == slow.apply_chat_template(TWO_TURNS["messages"], tokenize=False)

    @pytest.mark.parametrize("template", [None, TEMPLATE, MARKED])
    def test_any_chat_is_trained_on_exactly(self, tmp_path: Path, template: str | None) -> None:
        tokenizer, source = make(template), random.Random(1)
        given = [
            [(role, random_text(source)) for _ in range(source.randrange(1, 4)) for role in ("user", "assistant")]
            for _ in range(40)
        ]
        end = {None: "</s>", TEMPLATE: "<|end|>", MARKED: "<|end|>\n"}[template]
        told = rows(write(tmp_path / "a.json", *(said(*pairs) for pairs in given)), tokenizer, WIDE)
        for row, pairs in zip(told, given, strict=True):
            assert trained(row, tokenizer) == "".join(content + end for role, content in pairs if role == "assistant")

    def test_conversations(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        given = [("system", "be kind"), ("human", "hi"), ("gpt", "yes"), ("human", "more"), ("gpt", "no é")]
        named = {"id": 1, "conversations": [{"from": role, "value": content} for role, content in given]}
        first, second = rows(write(tmp_path / "a.jsonl", named, TWO_TURNS), plain, WIDE)
        assert torch.equal(first.ids, second.ids) and torch.equal(first.labels, second.labels)

    def test_white_space_that_ends_a_message_by_itself_is_kept(self, tmp_path: Path) -> None:
        tokenizer = make("{% for m in messages %}{{ m.role + ':' + (m.content | trim) + '\n' }}{% endfor %}")
        row = rows(write(tmp_path / "a.jsonl", said(("user", "a"), ("assistant", " b "))), tokenizer, WIDE)[0]
        assert trained(row, tokenizer) == "assistant:b\n"

    def test_a_template_that_cannot_be_followed(self, tmp_path: Path) -> None:
        name = write(tmp_path / "a.jsonl", said(("user", "a"), ("assistant", "b")), TWO_TURNS)
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: cannot tell where message 3 stands.*generation"):
            rows(name, make(FORGETTING), WIDE)
        with pytest.raises(ValueError, match=r"line 2: the tokenizer's chat template refuses .*no system here"):
            rows(name, make(REFUSING), WIDE)
        name = write(tmp_path / "b.jsonl", said(("assistant", "b")))
        with pytest.raises(ValueError, match=r"line 1: its first message is of the assistant"):
            rows(name, make(TEMPLATE), WIDE)
        never = MARKED.replace("== 'assistant'", "== 'nobody'")
        with pytest.raises(ValueError, match=r"line 1: no token of it carries loss"):
            rows(name, make(never), WIDE)


class TestText:
    def test_windows_of_the_stream(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        name = write(tmp_path / "a.jsonl", {"text": "one two"}, {"text": "three é"}, {"text": "four"})
        told = rows(name, plain, 5)
        windows = text.fixed_windows(text.token_stream(text.read_documents(name), plain), 5)
        assert torch.equal(torch.stack([row.ids for row in told]), windows) and len(told) == 4
        assert all(torch.equal(row.ids, row.labels) for row in told)

    def test_field_txt_strings_and_parquet(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": ["abc"]}), tmp_path / "a.parquet")
        names = [
            write(tmp_path / "a.txt", "abc"),
            write(tmp_path / "a.json", "abc"),
            str(tmp_path / "a.parquet"),
        ]
        assert [whole(rows(name, plain, 4)[0], plain) for name in names] == ["<s>abc"] * 3
        name = write(tmp_path / "b.jsonl", {"story": "abc"})
        assert whole(rows(name, plain, 4, field="story")[0], plain) == "<s>abc"

    def test_parquet_of_chats(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([TWO_TURNS]), tmp_path / "a.parquet")
        assert trained(rows(str(tmp_path / "a.parquet"), plain, WIDE)[0], plain) == "yes</s>no é</s>"


class TestKind:
    def test_auto(self, tmp_path: Path, plain: PreTrainedTokenizerBase, log: pytest.LogCaptureFixture) -> None:
        cases = [
            ({"text": "abcdef"}, "text"),
            ({"instruction": "a", "output": "b", "text": "a b"}, "instructions"),
            ({**TWO_TURNS, "text": "a"}, "chat"),
            ({"conversations": [{"from": "gpt", "value": "b"}]}, "chat"),
        ]
        for row, kind in cases:
            log.clear()
            name = write(tmp_path / "a.jsonl", row)
            told, asked = rows(name, plain, WIDE if kind != "text" else 4), rows(name, plain, 4, kind, "cut")
            assert f"a.jsonl: read as {kind}" in log.text
            assert len(told) == len(asked) == 1

    def test_unknown(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        name = write(tmp_path / "a.jsonl", {"question": "a", "output": "b"})
        with pytest.raises(
            ValueError, match=r"line 1: cannot tell .*'output', 'question'.*'text'.*'instruction'.*'messages'"
        ):
            rows(name, plain, WIDE)
        with pytest.raises(ValueError, match="type int"):
            rows(write(tmp_path / "a.jsonl", "3"), plain, WIDE)
        for kind in ("auto", "instructions", "chat"):
            with pytest.raises(ValueError, match="holds no rows"):
                rows(write(tmp_path / "a.jsonl", ""), plain, WIDE, kind)

    def test_mixed(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        one = {"instruction": "a", "output": "b"}
        with pytest.raises(ValueError, match=r"a\.jsonl, line 3: no 'instruction' in its keys \['messages'\]"):
            rows(write(tmp_path / "a.jsonl", one, "", TWO_TURNS), plain, WIDE)
        with pytest.raises(
            ValueError, match=r"a\.jsonl, line 2: no 'messages' in its keys \['instruction', 'output'\]"
        ):
            rows(write(tmp_path / "a.jsonl", TWO_TURNS, one), plain, WIDE)
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: has no 'text'"):
            rows(write(tmp_path / "a.jsonl", {"text": "a"}, one), plain, 2)


class TestDatasets:
    def test_rows(self, monkeypatch: pytest.MonkeyPatch, plain: PreTrainedTokenizerBase) -> None:
        class Rows(list[dict[str, Any]]):
            column_names = ("messages",)

        asked: list[tuple[Any, ...]] = []

        def load_dataset(name: str, config: str | None, split: str) -> Rows:
            asked.append((name, config, split))
            return Rows([TWO_TURNS, {"messages": []}] if config == "bad" else [TWO_TURNS])

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        assert trained(rows("org/set:en:test", plain, WIDE)[0], plain) == "yes</s>no é</s>"
        assert set(asked) == {("org/set", "en", "test")}
        with pytest.raises(ValueError, match="org/set:bad, row 2: messages must be a list"):
            rows("org/set:bad", plain, WIDE)


class TestCollate:
    def test_right_padding(self) -> None:
        first = Row(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 6, 7]))
        second = Row(torch.tensor([8]), torch.tensor([8]))
        batch = collate([first, second], pad=3)
        assert {name: value.tolist() for name, value in batch.items()} == {
            "input_ids": [[5, 6, 7], [8, 3, 3]],
            "attention_mask": [[1, 1, 1], [1, 0, 0]],
            "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
        }
        assert all(value.dtype == torch.int64 for value in batch.values())
        with pytest.raises(ValueError, match="no rows"):
            collate([], pad=3)

    def test_pad_of(self, plain: PreTrainedTokenizerBase) -> None:
        assert pad_of(plain) == EOS  # it has no padding token
        assert pad_of(ByT5Tokenizer()) == 0
        bare = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
        assert pad_of(bare) == 0
        bare.pad_token = "<|end|>"
        assert pad_of(bare) == END


def test_fingerprint(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", TWO_TURNS)
    first = fingerprint(name)
    assert fingerprint(name) == first == fingerprint(write(tmp_path / "moved.jsonl", TWO_TURNS))
    assert fingerprint(name, field="story") != first
    assert fingerprint(write(tmp_path / "a.jsonl", TWO_TURNS, TWO_TURNS)) != first
    with pytest.raises(ValueError, match="no such file"):
        fingerprint(str(tmp_path / "none.jsonl"))
