"""Training files to rows: what is refused, and what is cut or dropped to fit into a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from spectrim.data import instructions
from spectrim.data.instructions import rows
from tests.data.rows import (
    BOS,
    TEMPLATE,
    TWO_TURNS,
    WIDE,
    make,
    said,
    trained,
    whole,
    write,
)


class TestBadInput:
    def test_settings(self, tmp_path: Path) -> None:
        for given, message in [
            ((1, "auto", "error"), "window is 1"),
            ((8, "chats", "error"), "kind is 'chats': .*'instructions'"),
            ((8, "auto", "trim"), "long is 'trim': .*'cut'"),
        ]:
            with pytest.raises(ValueError, match=message):
                instructions._check(*given)

    def test_file(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        with pytest.raises(ValueError, match="no such file"):
            rows(str(tmp_path / "none.jsonl"), plain, WIDE)
        for kind in ("auto", "chat"):
            with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not valid JSON"):
                rows(write(tmp_path / "a.jsonl", '{"messages": '), plain, WIDE, kind)
        (tmp_path / "b.json").write_text('{"a": []}')
        with pytest.raises(ValueError, match=r"b\.json: holds dict, not a list of rows"):
            rows(str(tmp_path / "b.json"), plain, WIDE)

    @pytest.mark.parametrize(
        "row, message",
        [
            ("[1]", "no 'instruction' in a row of type list"),
            ('"text"', "no 'instruction' in a row of type str"),
            ({"instruction": "a"}, r"no 'output' in its keys \['instruction'\]"),
            ({"output": "a"}, "no 'instruction' in"),
            ({"instruction": "a", "output": ""}, "the output is empty"),
            ({"instruction": " \n", "output": "a"}, "the instruction is empty"),
            ({"instruction": "a", "output": 3}, "the output must be a string, got int"),
            ({"instruction": None, "output": "a"}, "the instruction must be a string, got NoneType"),
            ({"instruction": "a", "output": "a", "input": ["b"]}, "the input must be a string, got list"),
        ],
    )
    def test_instructions(self, tmp_path: Path, plain: PreTrainedTokenizerBase, row: Any, message: str) -> None:
        name = write(tmp_path / "bad.jsonl", {"instruction": "a", "output": "b"}, "", row)
        with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: {message}"):
            rows(name, plain, WIDE)

    @pytest.mark.parametrize(
        "given, message",
        [
            ([], r": messages must be a list of at least one message, got \[\]"),
            ("hello", ": messages must be a list .*got 'hello'"),
            (["hello"], ", message 1: must be an object .*got str"),
            ([{"role": "user"}], r", message 1: has \['role'\]: it needs"),
            ([{"role": "bot", "content": "a"}], ", message 1: the role is 'bot': it must be one of .*'user'"),
            ([{"from": ["gpt"], "value": "a"}], r", message 1: the from is \['gpt'\]"),
            ([{"role": "user", "content": None}], ", message 1: the content must be a string, got NoneType"),
            (
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
                ", message 2: the content is empty",
            ),
            ([{"role": "user", "content": "a"}], ": the last message is of 'user': it must be of the assistant"),
        ],
    )
    def test_chat(self, tmp_path: Path, plain: PreTrainedTokenizerBase, given: Any, message: str) -> None:
        name = write(tmp_path / "bad.jsonl", TWO_TURNS, {"messages": given})
        with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2{message}"):
            rows(name, plain, WIDE)

    def test_a_tokenizer_that_cannot_be_used(self) -> None:
        def odd(probe: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1, 2] if add_special_tokens else [3]}

        with pytest.raises(ValueError, match=r"gives \[1, 2\] for .* without special tokens \[3\]"):
            instructions._start(Mock(PreTrainedTokenizerBase, side_effect=odd))


class TestLong:
    """One token a letter: the plain prompt has 31 beside <s> and what it asks."""

    @pytest.fixture
    def name(self, tmp_path: Path) -> str:
        outputs = ["b" * 10, "0123456789" * 10, "c" * 120]
        given = [{"instruction": "a" * 7, "output": output} for output in outputs]
        return write(tmp_path / "a.jsonl", given[0], "", *given[1:])

    def test_error(self, name: str, plain: PreTrainedTokenizerBase) -> None:
        # <s>, 100 digits and </s>
        expected = r"2 of 3 rows .* window of 60 .*a\.jsonl, line 3, with 102: .*--window.*long=cut.*long=drop"
        with pytest.raises(ValueError, match=expected):
            rows(name, plain, 60)
        assert len(rows(name, plain, 122)) == 3
        with pytest.raises(ValueError, match=r"1 of 3 .*line 4, with 122"):
            rows(name, plain, 121)

    def test_drop(self, name: str, plain: PreTrainedTokenizerBase, log: pytest.LogCaptureFixture) -> None:
        (row,) = rows(name, plain, 60, long="drop")
        assert trained(row, plain) == "b" * 10 + "</s>"
        assert "a.jsonl: 2 of 3 rows dropped" in log.text
        with pytest.raises(ValueError, match=r"a\.jsonl: no row is left"):
            rows(name, plain, 6, long="drop")

    def test_cut(self, name: str, plain: PreTrainedTokenizerBase, log: pytest.LogCaptureFixture) -> None:
        told = rows(name, plain, 90, long="cut")
        assert "a.jsonl: 2 of 3 rows cut at their end" in log.text and "lost their start" not in log.text
        assert whole(told[1], plain).startswith("<s>### Instruction:\naaaaaaa\n\n### Response:\n0123")
        assert [len(row.ids) for row in told[1:]] == [90, 90]
        digits = trained(told[1], plain)
        assert digits == ("0123456789" * 10)[: len(digits)] and whole(told[1], plain).endswith(digits)
        # a prompt longer than half of what is left beside the start token keeps its end
        row = rows(name, plain, 21, long="cut")[1]
        assert whole(row, plain) == "<s>Response:\n0123456789"
        assert trained(row, plain) == "0123456789"

    def test_a_long_prompt_loses_its_start(
        self, tmp_path: Path, plain: PreTrainedTokenizerBase, log: pytest.LogCaptureFixture
    ) -> None:
        given = [{"instruction": "a" * 99, "output": "bcd"}, {"instruction": "a", "output": "b"}]
        name = write(tmp_path / "a.jsonl", *given)
        first, second = rows(name, plain, 40)
        assert whole(first, plain) == "<s>" + "a" * 19 + "\n\n### Response:\nbcd</s>" and len(first.ids) == 40
        assert trained(first, plain) == "bcd</s>" and len(second.ids) < 40
        assert "the prompts of 1 of 2 rows lost their start, to fit into 40 tokens" in log.text
        first, _ = rows(name, plain, 5)  # nothing of the prompt is left
        assert whole(first, plain) == "<s>bcd</s>"

    def test_with_a_template(self, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
        tokenizer = make(TEMPLATE)
        name = write(tmp_path / "a.jsonl", said(("user", "a" * 99), ("assistant", "bcd")))
        full = rows(name, tokenizer, WIDE)[0]
        (row,) = rows(name, tokenizer, len(full.ids) - 1)  # the line break after the end token goes first
        assert torch.equal(row.ids, full.ids[:-1]) and torch.equal(row.labels, full.labels[:-1])
        assert "lost" not in log.text
        (row,) = rows(name, tokenizer, 20)
        assert whole(row, tokenizer) == "<s>aa<|end|>\n<|start|>assistant\nbcd<|end|>"
        assert trained(row, tokenizer) == "bcd<|end|>"
        assert "lost their start" in log.text

    def test_of_a_chat_all_turns_must_fit(self, tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
        name = write(tmp_path / "a.jsonl", said(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
        needed = 1 + len("b") + 1 + len("\n\n### User:\nc\n\n### Assistant:\nd") + 1
        (row,) = rows(name, plain, needed)
        assert whole(row, plain).startswith("<s>b</s>\n\n### User:") and trained(row, plain) == "b</s>d</s>"
        with pytest.raises(ValueError, match=rf"with {needed}:"):
            rows(name, plain, needed - 1)
        (row,) = rows(name, plain, needed - 1, long="cut")
        assert trained(row, plain).startswith("b</s>") and len(row.ids) == needed - 1

    def test_a_window_of_start_tokens(self, tmp_path: Path) -> None:
        tokenizer = make()
        two = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.backend_tokenizer.post_processor = two
        name = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
        with pytest.raises(ValueError, match=r"window is 2: .*2 start tokens"):
            rows(name, tokenizer, 2, long="cut")
        assert rows(name, tokenizer, 4)[0].ids[:2].tolist() == [BOS, BOS]
