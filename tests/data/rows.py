"""Tokenizers of one token a byte, training files written in the test, and what of their rows carries loss."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spectrim.data.instructions import IGNORED, Row

BOS, EOS, START, END = range(4)
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>"]
WIDE = 10_000

HEAD = "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
TEMPLATE = HEAD + "{{ m.content + '<|end|>\n' }}{% endfor %}" + PROMPT
# marked, the line break after the end token carries loss too
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
# thoughts of earlier turns are left out, as in some templates of models that reason
FORGETTING = HEAD + "{{ ('' if loop.last or m.role == 'user' else 'old ') + m.content }}<|end|>{% endfor %}" + PROMPT
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE


def make(template: str | None = None, *, trim: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte after <s>, and </s> behind if `ends`; offsets without white space if `trim`."""
    letters = enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=len(SPECIAL))
    vocabulary = {special: i for i, special in enumerate(SPECIAL)} | {letter: i for i, letter in letters}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    single = "<s> $A </s>" if ends else "<s> $A"
    around = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), around])
    core.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template, model_max_length=8
    )


def write(path: Path, *given: Any) -> str:
    """A .jsonl or .json file of these rows; strings in .jsonl and others as they stand."""
    if path.suffix == ".json":
        path.write_text(json.dumps(given), encoding="utf-8")
    else:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in given]
        path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def said(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def whole(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(row.ids, clean_up_tokenization_spaces=False))


def trained(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """What carries loss, decoded; and that a label is its id or IGNORED."""
    told = row.labels != IGNORED
    assert row.ids.dtype == row.labels.dtype == torch.int64
    assert torch.equal(row.ids[told], row.labels[told])
    return str(tokenizer.decode(row.ids[told], clean_up_tokenization_spaces=False))


def random_text(source: random.Random, letters: str = "ab Z\n\t.#:é→😀 \u2028\"\\'") -> str:
    return "x" + "".join(source.choices(letters, k=source.randrange(30)))


TWO_TURNS = said(("system", "be kind"), ("user", "hi"), ("assistant", "yes"), ("user", "more"), ("assistant", "no é"))
