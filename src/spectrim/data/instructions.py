r"""Training files to rows of token ids and labels, for fine-tuning a causal LM: text, instructions, or chats.

Text is trained on whole. Of instructions and chats only what the assistant says carries loss, with the token that ends
it. A row is written as one text, tokenised once, and a token carries loss if it holds a character of a response; so
one that spans the end of a prompt and the start of a response counts as response. A slow tokenizer knows no offsets:
there the pieces are tokenised apart and joined.

With a chat template the text is what the template writes, and nothing is put before it: the template writes the start
token itself. Its `{% generation %}` passages say what carries loss, the end token only if they hold it. Without such
passages an assistant message is what the rendering gains over the messages before it with the generation prompt, less
white space after the end token.

Without a chat template the text is in our own plain form, after the start tokens that `tokenizer(text)` gives:

    ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}{eos}
    ### System:\n{content}\n\n### User:\n{content}\n\n### Assistant:\n{content}{eos}

without the Input part where it is empty, the parts of a chat as its messages come, and {eos} the tokenizer's end
token, nothing if it has none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from spectrim.data import text as texts

logger = logging.getLogger(__name__)

IGNORED = -100  # label where no loss is taken
Kind = Literal["auto", "text", "instructions", "chat"]
Long = Literal["error", "cut", "drop"]
Message = dict[str, str]
Span = tuple[int, int]  # from a character to before another

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Row:
    """One row to train on. ids: int64; labels: the same, IGNORED where no loss is taken, not shifted."""

    ids: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]


@dataclass(frozen=True)
class _Encoded:
    """A row before it is made to fit. where: its place in the file; start: how many start tokens it begins with."""

    where: str
    ids: list[int]
    loss: list[bool]
    start: int

    @property
    def first(self) -> int:
        return self.loss.index(True)

    @property
    def stop(self) -> int:  # after the last token with loss
        return len(self.loss) - self.loss[::-1].index(True)

    @property
    def needed(self) -> int:
        """Tokens of the start and of the response; of several turns from the first response to the last."""
        return self.start + self.stop - self.first


def rows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    kind: Kind = "auto",
    long: Long = "error",
    field: str = "text",
) -> list[Row]:
    """The rows of a training file or dataset, none longer than `window` tokens.

    name: as for `text.read_documents`. kind: "text" joins the documents (under `field`) to one stream and cuts it into
    windows, tail dropped; "instructions" reads `instruction`, `output` and, if there, `input`; "chat" reads `messages`
    of `role` and `content`, or `conversations` of `from` and `value`; other keys are not read. "auto" takes the kind
    from the keys of the first row: a chat if it could be one, else instructions, else text.
    A prompt too long for its response loses its start, never the start token. long: what becomes of a row whose
    response does not fit, with its start token (of a chat: from its first response to its last): an error, its end is
    cut away (and of a prompt longer than half the window the start), or it is dropped. Rows cut or dropped are counted
    in the log. Raises ValueError for a file or row that is not as described, by line, and where no row is left.
    """
    _check(window, kind, long)
    if kind == "auto":
        kind = _kind_of(name, field)
        logger.info("%s: read as %s", name, kind)
    if kind == "text":
        stream = texts.token_stream(texts.read_documents(name, field), tokenizer)
        return [Row(ids.clone(), ids.clone()) for ids in texts.fixed_windows(stream, window)]
    encoder = _Encoder(tokenizer)
    if window <= len(encoder.start):
        raise ValueError(f"the window is {window}: the tokenizer's {len(encoder.start)} start tokens alone fill it")
    encode = encoder.instruction if kind == "instructions" else encoder.chat
    encoded = [encode(row, where) for where, row in texts.read_rows(name)]
    if not encoded:
        raise ValueError(f"{name}: it holds no rows: give at least one")
    return [_shortened(each, window) for each in _fitting(name, encoded, window, long)]


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each rows × longest, int64: filled up on the right with `pad`.

    The mask is 0 and the label IGNORED where a row was filled up. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError("no rows to collate: give at least one")
    shape = len(rows), max(len(row.ids) for row in rows)
    ids = torch.full(shape, pad, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], mask[i, : len(row.ids)], labels[i, : len(row.ids)] = row.ids, 1, row.labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill rows up with: of the padding token, else of the end token, else 0; the mask hides it anyway."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def fingerprint(name: str, field: str = "text") -> str:
    """A sha256 over the content of a training file and the field read: see `text.fingerprint`."""
    content = [texts.fingerprint([texts.Source(name)]), field]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check(window: int, kind: str, long: str) -> None:
    if window < 2:
        raise ValueError(f"the window is {window}: it must be at least 2 tokens, for the first predicts the second")
    for what, given, known in (("kind", kind, get_args(Kind)), ("long", long, get_args(Long))):
        if given not in known:
            raise ValueError(f"{what} is {given!r}: it must be one of {known}")


def _kind_of(name: str, field: str) -> Kind:
    """What the first row can be read as. ValueError naming its keys if it is nothing known."""
    where, row = next(texts.read_rows(name), (name, None))
    if row is None:
        raise ValueError(f"{where}: it holds no rows, or an empty first one: give at least one")
    if isinstance(row, str):
        return "text"
    keys = sorted(row) if isinstance(row, Mapping) else []
    if "messages" in keys or "conversations" in keys:
        return "chat"
    if "instruction" in keys and "output" in keys:
        return "instructions"
    if field in keys:
        return "text"
    raise ValueError(
        f"{where}: cannot tell what to train on from {_found(row)}: it must have {field!r} (text), 'instruction' and "
        "'output' (instructions), or 'messages' or 'conversations' (chat)"
    )


class _Encoder:
    """Rows to ids and loss, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self.start = _start(tokenizer) if self.template is None else []
        self.eos = str(tokenizer.eos_token or "")

    def instruction(self, row: Any, where: str) -> _Encoded:
        """A row of instruction, input and output."""
        instruction, given, output = _instruction(row, where)
        if self.template is not None:
            question = f"{instruction}\n\n{given}" if given else instruction
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
            return self._encoded(*self._templated(messages, where), where)
        prompt = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
        pieces = [(f"{prompt}### Response:\n", False), (output + self.eos, True)]
        return self._encoded(*_joined(pieces), where)

    def chat(self, row: Any, where: str) -> _Encoded:
        """A row of messages."""
        messages = _messages(row, where)
        if self.template is not None:
            return self._encoded(*self._templated(messages, where), where)
        pieces = []
        for i, message in enumerate(messages):
            said = message["role"] == "assistant"
            pieces.append(("\n\n" * (i > 0) + f"### {message['role'].capitalize()}:\n", False))
            pieces.append((message["content"] + self.eos * said, said))
        return self._encoded(*_joined(pieces), where)

    def _encoded(self, text: str, spans: Sequence[Span], where: str) -> _Encoded:
        if self.tokenizer.is_fast:
            told = self._tokenised(text, return_offsets_mapping=True)
            ids, loss = told["input_ids"], _inside(told["offset_mapping"], spans)
        else:
            ids, loss = [], []
            edges = [0, *(edge for span in spans for edge in span), len(text)]
            for i, (begin, end) in enumerate(pairwise(edges)):  # every second piece is a response
                piece = self._tokenised(text[begin:end])["input_ids"] if end > begin else []
                ids, loss = ids + piece, loss + [i % 2 == 1] * len(piece)
        if not any(loss):
            raise ValueError(f"{where}: no token of it carries loss: the response is empty once tokenised")
        start = len(self.start) if self.template is None else int(ids[0] == self.tokenizer.bos_token_id)
        return _Encoded(where, self.start + ids, [False] * len(self.start) + loss, start)

    def _tokenised(self, text: str, **options: Any) -> Mapping[str, Any]:
        # verbose=False: a row longer than the model's positions is no mistake here, it is made to fit the window
        return self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, padding=False, verbose=False, **options
        )

    def _templated(self, messages: list[Message], where: str) -> tuple[str, list[Span]]:
        """The template's text, and where in it the assistant speaks."""
        from jinja2.exceptions import TemplateError

        assert self.template is not None
        try:
            if not _GENERATION.search(self.template):
                return self._by_prefixes(messages, where)
            # The tokenizer's own mask is made of these same spans, but goes wrong where one begins or ends with a
            # character that no token's offsets hold, as with the spaces that some byte-level tokenizers trim.
            render: Callable[..., Any] = render_jinja_template  # it returns texts and spans, its annotation says str
            rendered, spans = render(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the tokenizer's chat template refuses its messages: {error}") from error
        return rendered[0], [(int(begin), int(end)) for begin, end in spans[0]]

    def _by_prefixes(self, messages: list[Message], where: str) -> tuple[str, list[Span]]:
        text, spans = self._rendered(messages, False), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise ValueError(f"{where}: its first message is of the assistant: a chat template needs one before")
            before = self._rendered(messages[:i], True)
            after = self._rendered(messages[: i + 1], False)
            if not (text.startswith(after) and after.startswith(before) and len(before) < len(after)):
                raise ValueError(
                    f"{where}: cannot tell where message {i + 1} stands: the tokenizer's chat template renders the "
                    "messages up to it differently than within the whole. Mark what the assistant says by "
                    "{% generation %} in the template, or give chats of one question and one answer"
                )
            spans.append((len(before), _end(after, len(before), message["content"])))
        return text, spans

    def _rendered(self, messages: list[Message], prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text


def _end(text: str, begin: int, content: str) -> int:
    """Where the message ends that the text closes with: white space after an end token is not of it."""
    found = text.find(content.strip(), begin)
    rest = text[found + len(content.strip()) :] if found >= 0 else ""
    return len(text.rstrip()) if rest.strip() else len(text)


def _joined(pieces: Sequence[tuple[str, bool]]) -> tuple[str, list[Span]]:
    """The pieces as one text, and the spans of those marked."""
    text, spans = "", []
    for piece, marked in pieces:
        if marked:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens hold a character of a span.

    Some byte-level tokenizers trim spaces off their offsets: a token of nothing else is then empty, at its end.
    """
    told, covered = [], 0
    for begin, end in offsets:
        told.append(any(a < end and (begin < b if begin < end else covered < end <= b) for a, b in spans))
        covered = max(covered, end)
    return told


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that `tokenizer(text)` puts before a text. ValueError if the text is not found among them."""
    probe = "Instruction"
    whole = list(tokenizer(probe)["input_ids"])
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise ValueError(f"the tokenizer gives {whole} for {probe!r}, and without special tokens {bare}: not a part of it")


def _instruction(row: Any, where: str) -> tuple[str, str, str]:
    """Instruction, input (empty if there is none) and output of a row."""
    values = []
    for key in ("instruction", "output"):
        if not isinstance(row, Mapping) or key not in row:
            raise ValueError(f"{where}: no {key!r} in {_found(row)}: a row needs 'instruction' and 'output'")
        values.append(_said(row[key], f"{where}: the {key}"))
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{where}: the input must be a string, got {type(given).__name__}")
    return values[0], given if given and given.strip() else "", values[1]


def _messages(row: Any, where: str) -> list[Message]:
    """The messages of a row, by `role` and `content`, the last of the assistant."""
    keys = [key for key in ("messages", "conversations") if isinstance(row, Mapping) and key in row]
    if not keys:
        raise ValueError(f"{where}: no 'messages' in {_found(row)}: a row needs 'messages' or 'conversations'")
    given = row[keys[0]]
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: {keys[0]} must be a list of at least one message, got {given!r:.40}")
    messages = [_message(each, f"{where}, message {number}") for number, each in enumerate(given, start=1)]
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last message is of {messages[-1]['role']!r}: it must be of the assistant")
    return messages


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: must be an object with 'role' and 'content', got {type(given).__name__}")
    for role, content in (("role", "content"), ("from", "value")):
        if role in given and content in given:
            break
    else:
        raise ValueError(f"{where}: has {sorted(given)}: it needs 'role' and 'content', or 'from' and 'value'")
    known = [name for name in ROLES if name == given[role]]
    if not known:
        raise ValueError(f"{where}: the {role} is {given[role]!r}: it must be one of {sorted(ROLES)}")
    return {"role": ROLES[known[0]], "content": _said(given[content], f"{where}: the {content}")}


def _found(row: Any) -> str:
    return f"its keys {sorted(row)}" if isinstance(row, Mapping) else f"a row of type {type(row).__name__}"


def _said(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{what} is empty: it must hold more than white space")
    return value


def _fitting(name: str, encoded: list[_Encoded], window: int, long: Long) -> list[_Encoded]:
    """The rows that fit, or shall be made to; what is lost is logged. ValueError: see `rows`."""
    over = [each for each in encoded if each.needed > window]
    if over and long == "error":
        raise ValueError(
            f"{name}: {len(over)} of {len(encoded)} rows have a response longer than the window of {window} tokens, "
            f"the first {over[0].where}, with {over[0].needed}: take a larger window (--window), cut such rows at "
            "their end (data.long=cut) or leave them out (data.long=drop)"
        )
    if over:
        done = "dropped" if long == "drop" else "cut at their end"
        message = "%s: %d of %d rows %s: their response is longer than the window of %d tokens"
        logger.warning(message, name, len(over), len(encoded), done, window)
    kept = [each for each in encoded if long == "cut" or each.needed <= window]
    if not kept:
        raise ValueError(f"{name}: no row is left: every response is longer than the window of {window} tokens")
    prompts = sum(each.needed <= window < each.stop for each in kept)
    if prompts:
        message = "%s: the prompts of %d of %d rows lost their start, to fit into %d tokens"
        logger.warning(message, name, prompts, len(encoded), window)
    return kept


def _shortened(row: _Encoded, window: int) -> Row:
    """A row of at most `window` tokens: what follows the last response goes, then the prompt's start, then the end."""
    ids, loss, room = row.ids, row.loss, window - row.start
    if len(ids) > window:
        begin = max(row.start, row.stop - room if row.needed <= window else row.first - room // 2)
        end = min(begin + room, row.stop)
        ids, loss = ids[: row.start] + ids[begin:end], loss[: row.start] + loss[begin:end]
    tensor = torch.tensor(ids, dtype=torch.int64)
    return Row(tensor, torch.where(torch.tensor(loss), tensor, IGNORED))
