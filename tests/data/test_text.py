"""Files to documents, documents to a stream, the stream to windows."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

from spectrim.data import text
from spectrim.data.text import (
    Source,
    fingerprint,
    fixed_windows,
    parse_source,
    read_documents,
    sample_windows,
    token_stream,
    windows_beside,
)

BOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: one token a byte (id by its rank), after one <s>; and a tiny limit, which must not matter."""
    vocabulary = {"<s>": BOS} | {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=8)


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


class TestParseSource:
    def test_plain_and_weighted(self) -> None:
        assert parse_source("a.txt") == Source("a.txt", 1.0)
        assert parse_source("a.txt=0.25") == Source("a.txt", 0.25)
        assert parse_source("a=b.txt=2") == Source("a=b.txt", 2.0)

    def test_an_existing_file_is_taken_whole(self, tmp_path: Path) -> None:
        name = write(tmp_path / "run=0.5", "x")
        assert parse_source(name) == Source(name, 1.0)
        assert parse_source(f"{name}=3") == Source(name, 3.0)

    @pytest.mark.parametrize("bad", ["a.txt=0", "a.txt=-1", "a.txt=nan", "a.txt=inf", "a.txt=", "a.txt=x", "=0.5", ""])
    def test_bad_weight_or_name(self, bad: str) -> None:
        with pytest.raises(ValueError, match="weight"):
            parse_source(bad)


class TestReadDocuments:
    def test_txt_is_one_document(self, tmp_path: Path) -> None:
        content = "first line\n\n second, ü \n"
        assert read_documents(write(tmp_path / "a.txt", content)) == [content]

    def test_jsonl_rows(self, tmp_path: Path) -> None:
        # U+2028 is a line end for str.splitlines, and legal inside a JSON string
        rows = ['{"text": "one\\ntwo", "n": 1}', '"plain"', "", '{"text": "a\u2028b"}', '{"text": ""}']
        assert read_documents(write(tmp_path / "a.jsonl", "\n".join(rows) + "\n")) == [
            "one\ntwo",
            "plain",
            "a\u2028b",
            "",
        ]

    def test_field(self, tmp_path: Path) -> None:
        name = write(tmp_path / "a.jsonl", '{"text": "no", "story": "yes"}\n')
        assert read_documents(name, field="story") == ["yes"]

    @pytest.mark.parametrize(
        "row, message", [('{"text": ', "not valid JSON"), ('{"txt": "a"}', "has no 'text'"), ('{"text": 3}', "got int")]
    )
    def test_bad_jsonl_row_names_file_and_line(self, tmp_path: Path, row: str, message: str) -> None:
        name = write(tmp_path / "bad.jsonl", f'{{"text": "fine"}}\n\n{row}\n')
        with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{message}"):
            read_documents(name)

    def test_json_list(self, tmp_path: Path) -> None:
        assert read_documents(write(tmp_path / "a.json", '["a", {"text": "b"}]')) == ["a", "b"]
        with pytest.raises(ValueError, match=r"b\.json, item 2: .*got list"):
            read_documents(write(tmp_path / "b.json", '["a", []]'))
        with pytest.raises(ValueError, match="holds dict, not a list"):
            read_documents(write(tmp_path / "c.json", '{"text": "b"}'))
        with pytest.raises(ValueError, match=r"d\.json: not valid JSON"):
            read_documents(write(tmp_path / "d.json", "["))

    def test_parquet_column(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, 2], "holes": ["x", None]}), path)
        assert read_documents(str(path)) == ["a", "b"]
        with pytest.raises(ValueError, match=r"no column 'story', only .*'text'"):
            read_documents(str(path), field="story")
        with pytest.raises(ValueError, match=r"row 2: .*NoneType"):
            read_documents(str(path), field="holes")
        with pytest.raises(ValueError, match="not a parquet file"):
            read_documents(write(tmp_path / "b.parquet", "no"))

    def test_parquet_without_its_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ValueError, match=r"spectrim\[data\]"):
            read_documents(write(tmp_path / "a.parquet", "any"))

    @pytest.mark.parametrize("content", ["", " \n\n"])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_empty_file(self, tmp_path: Path, name: str, content: str) -> None:
        with pytest.raises(ValueError, match="holds no text"):
            read_documents(write(tmp_path / name, content))

    def test_only_empty_documents(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no text: 2 documents"):
            read_documents(write(tmp_path / "a.json", '["", " "]'))

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
            read_documents(str(tmp_path / "a.txt"))

    def test_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        write(tmp_path / "training.jsonl", "{}")
        write(tmp_path / "notes.md", "x")
        with pytest.raises(ValueError, match=r"no such file: .*trainin\.jsonl; nearest in .*: training\.jsonl$"):
            read_documents(str(tmp_path / "trainin.jsonl"))
        with pytest.raises(ValueError, match="there is no folder"):
            read_documents(str(tmp_path / "none" / "a.txt"))

    def test_folder_and_unknown_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is a folder"):
            read_documents(str(tmp_path))
        with pytest.raises(ValueError, match=r"must end in one of .*'\.jsonl'"):
            read_documents(write(tmp_path / "a.md", "x"))


class TestBundled:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(text, "resources", SimpleNamespace(files={"spectrim": tmp_path}.__getitem__))
        (tmp_path / "assets").mkdir()
        return tmp_path / "assets"

    def test_read_from_the_package(self, package: Path) -> None:
        write(package / "reference_calibration.jsonl", '{"text": "c"}\n')
        write(package / "reference_evaluation.jsonl", '{"text": "e"}\n')
        assert read_documents("reference") == ["c"]
        assert read_documents("reference-evaluation") == ["e"]
        assert fingerprint([Source("reference")]) == fingerprint(
            [Source(str(package / "reference_calibration.jsonl"))]
        )  # the bytes count, not the name

    def test_missing(self, package: Path) -> None:
        with pytest.raises(ValueError, match="install spectrim again"):
            read_documents("reference")


class TestDatasets:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        class Rows(dict[str, list[Any]]):
            column_names = ("text", "n")

        def load_dataset(name: str, config: str | None, split: str) -> Rows:
            calls.append((name, config, split))
            if name == "unknown":
                raise FileNotFoundError("not on the hub")
            return Rows(text=["a", "b"], n=[1, 2])

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    @pytest.mark.parametrize(
        "name, expected",
        [
            ("org/set", ("org/set", None, "train")),
            ("org/set:en", ("org/set", "en", "train")),
            ("org/set:test", ("org/set", None, "test")),
            ("org/set:en:test", ("org/set", "en", "test")),
            ("org/set:train[:10]", ("org/set", None, "train[:10]")),
            ("org/set:en:train[5:10]", ("org/set", "en", "train[5:10]")),
        ],
    )
    def test_name_config_split(self, calls: list[Any], name: str, expected: tuple[Any, ...]) -> None:
        assert read_documents(name) == ["a", "b"]
        assert calls == [expected]

    def test_errors(self, calls: list[Any]) -> None:
        with pytest.raises(ValueError, match="no such file, and no dataset that can be loaded: not on the hub"):
            read_documents("unknown")
        with pytest.raises(ValueError, match="no column 'story'"):
            read_documents("org/set", field="story")
        with pytest.raises(ValueError, match=r"row 1: .*got int"):
            read_documents("org/set", field="n")
        with pytest.raises(ValueError, match="not the name of a dataset"):
            read_documents("a:b:c:d")

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"no such file.*spectrim\[data\]"):
            read_documents("org/set")


class TestTokenStream:
    def test_each_document_with_its_special_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        documents = ["abc", "", "ü - long enough for a warning"] * 700  # more than one call's worth
        expected = [token for document in documents for token in tokenizer(document, verbose=False).input_ids]
        assert expected.count(BOS) == len(documents)
        stream = token_stream(documents, tokenizer)
        assert stream.dtype == torch.int64
        assert stream.tolist() == expected

    def test_no_warning_about_length(self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
        warnings: list[str] = []
        monkeypatch.setattr(tokenization_utils_base.logger, "warning", warnings.append)
        tokenizer.deprecation_warnings.clear()  # it warns once
        assert len(token_stream(["x" * 50], tokenizer)) == 51
        assert warnings == []
        tokenizer("x" * 50)
        assert len(warnings) == 1  # it does warn by itself

    def test_no_documents(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="no documents"):
            token_stream([], tokenizer)


class TestFixedWindows:
    def test_tail_dropped_and_limit(self) -> None:
        stream = torch.arange(11)
        assert fixed_windows(stream, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert fixed_windows(stream, 4, limit=1).tolist() == [[0, 1, 2, 3]]
        assert fixed_windows(stream, 4, limit=9).shape == (2, 4)
        assert fixed_windows(stream, 11).shape == (1, 11)

    def test_text_too_short(self) -> None:
        with pytest.raises(ValueError, match="has 11 tokens, one window needs 12"):
            fixed_windows(torch.arange(11), 12)

    @pytest.mark.parametrize("window, limit", [(0, None), (4, 0), (-1, 2)])
    def test_bad_numbers(self, window: int, limit: int | None) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            fixed_windows(torch.arange(11), window, limit)


class TestSampleWindows:
    @pytest.fixture
    def sources(self, tmp_path: Path) -> list[Source]:
        """Two texts without a common letter, in which no two windows of 5 tokens are alike."""
        names = []
        for name, letters in (("digits.jsonl", "0123456789"), ("letters.jsonl", "abcdefghij")):
            counters = [f"{i:04d}".translate(str.maketrans("0123456789", letters)) for i in range(40)]
            names.append(write(tmp_path / name, "\n".join(json.dumps({"text": counter}) for counter in counters)))
        return [Source(names[0], 0.3), Source(names[1], 0.7)]

    def test_windows_of_the_stream_without_repeats(
        self, sources: list[Source], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        there = {tuple(tokenizer(document).input_ids) for document in read_documents(sources[0].name)}
        windows = sample_windows(sources[:1], tokenizer, 40, 5, seed=0)
        assert windows.shape == (40, 5)
        assert {tuple(row) for row in windows.tolist()} == there  # so each of the 40 exactly once

    def test_seed(self, sources: list[Source], tokenizer: PreTrainedTokenizerFast) -> None:
        state = torch.random.get_rng_state()
        first = sample_windows(sources, tokenizer, 20, 5, seed=1)
        torch.manual_seed(5)  # no global state: neither read …
        assert torch.equal(first, sample_windows(sources, tokenizer, 20, 5, seed=1))
        other = sample_windows(sources, tokenizer, 20, 5, seed=2)
        assert {tuple(row) for row in first.tolist()} != {tuple(row) for row in other.tolist()}
        torch.manual_seed(5)
        after = torch.random.get_rng_state()
        sample_windows(sources, tokenizer, 20, 5, seed=3)
        assert torch.equal(after, torch.random.get_rng_state())  # … nor moved
        torch.random.set_rng_state(state)

    @pytest.mark.parametrize("sequences, expected", [(20, (6, 14)), (1, (0, 1)), (2, (1, 1)), (5, (2, 3))])
    def test_weights(
        self, sources: list[Source], tokenizer: PreTrainedTokenizerFast, sequences: int, expected: tuple[int, int]
    ) -> None:
        windows = sample_windows(sources, tokenizer, sequences, 5, seed=0)
        zero = tokenizer("0").input_ids[1]
        of_digits = [bool((row == zero).any()) for row in windows]
        assert (sum(of_digits), sequences - sum(of_digits)) == expected
        if sequences == 20:  # mixed, not one source after the other
            assert of_digits != sorted(of_digits) and of_digits != sorted(of_digits, reverse=True)

    def test_a_source_left_out_is_logged(
        self, sources: list[Source], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="spectrim.data.text"):
            sample_windows(sources, tokenizer, 1, 5, seed=0)
        assert "digits.jsonl gets none of the 1 sequences" in caplog.text

    def test_too_few_tokens(self, sources: list[Source], tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match=r"digits\.jsonl: 41 sequences of 5 tokens need 205 tokens, it has 200"):
            sample_windows(sources[:1], tokenizer, 41, 5, seed=0)

    def test_bad_arguments(self, sources: list[Source], tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="named twice"):
            sample_windows([sources[0], sources[0]], tokenizer, 2, 5, seed=0)
        with pytest.raises(ValueError, match="no text source"):
            sample_windows([], tokenizer, 2, 5, seed=0)
        with pytest.raises(ValueError, match="at least 1"):
            sample_windows(sources, tokenizer, 0, 5, seed=0)

    def test_shares_add_up(self) -> None:
        for sequences in range(1, 30):
            shares = text.shares([Source("a"), Source("b"), Source("c", 0.5)], sequences)
            assert sum(shares) == sequences
            exact = [sequences * weight / 2.5 for weight in (1, 1, 0.5)]
            assert all(abs(share - wanted) < 1 for share, wanted in zip(shares, exact, strict=True))


class Numbering:
    """A tokenizer that gives every letter of all texts a number of its own."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        ids = []
        for each in texts:
            ids.append(list(range(self.seen, self.seen + len(each))))
            self.seen += len(each)
        return {"input_ids": ids}


class TestWindowsBeside:
    @pytest.fixture
    def sources(self, tmp_path: Path) -> list[Source]:
        names = [write(tmp_path / f"{name}.txt", name * size) for name, size in (("a", 203), ("b", 410))]
        return [Source(names[0], 0.3), Source(names[1], 0.7)]

    @pytest.mark.parametrize("window", [10, 7, 25])
    @pytest.mark.parametrize("held", [[], [0], [3, 4, 5, 19], list(range(20))])
    def test_no_token_of_those_that_are_held(self, sources: list[Source], held: list[int], window: int) -> None:
        drawn = sample_windows(sources, Numbering(), 20, 10, seed=1)
        pools = windows_beside(sources, Numbering(), 20, 10, 1, held, window)
        judged = set(drawn[held].flatten().tolist())
        ranges = (range(203), range(203, 613))
        for pool, tokens in zip(pools, ranges, strict=True):
            found = pool.flatten().tolist()
            assert pool.shape[1] == window and len(set(found)) == len(found)
            assert (pool.diff(dim=1) == 1).all(), "windows are passages of the text"
            assert set(found) <= set(tokens) - judged
            # what is left out is less than a window at the end of each stretch
            stretches = 1 + len({each // 10 for each in judged if each in tokens})
            assert len(set(tokens) - judged - set(found)) <= stretches * (window - 1)

    def test_of_the_same_length_they_are_all_the_others(self, sources: list[Source]) -> None:
        held = [2, 7]
        drawn = sample_windows(sources[:1], Numbering(), 12, 10, seed=0)
        (pool,) = windows_beside(sources[:1], Numbering(), 12, 10, 0, held, 10)
        firsts = {*range(0, 200, 10)} - {int(drawn[each, 0]) for each in held}
        assert set(pool[:, 0].tolist()) == firsts

    def test_a_source_may_have_none(self, sources: list[Source]) -> None:
        pools = windows_beside(sources, Numbering(), 1, 10, 0, [0], 300)
        assert [len(pool) for pool in pools] == [0, 0] or len(pools[1]) == 1
        assert all(pool.shape[1] == 300 for pool in pools)


class TestFingerprint:
    def test_contents_and_weights_count(self, tmp_path: Path) -> None:
        a, b = write(tmp_path / "a.txt", "one"), write(tmp_path / "b.txt", "two")
        rows = write(tmp_path / "a.jsonl", "one")
        several = [[Source(a), Source(b)], [Source(b), Source(a)]]
        alone = [[Source(a, 2.0)], *([Source(name)] for name in (a, b, rows, "org/set", "org/set:test"))]
        prints = [fingerprint(sources) for sources in [*several, *alone]]
        assert max(Counter(prints).values()) == 1
        assert all(len(each) == 64 for each in prints)

    def test_a_changed_file_changes_it_and_a_moved_one_does_not(self, tmp_path: Path) -> None:
        name = write(tmp_path / "a.txt", "one")
        before = fingerprint([Source(name)])
        assert fingerprint([Source(write(tmp_path / "moved.txt", "one"))]) == before
        write(tmp_path / "a.txt", "One")
        assert fingerprint([Source(name)]) != before

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such file"):
            fingerprint([Source(str(tmp_path / "a.txt"))])
