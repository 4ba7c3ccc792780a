"""Numbers about one model: loss and perplexity on a text, divergence from another model, parameters, a sample.

The protocol, which every `Evaluation` carries in words: each document of the text is tokenised with its special
tokens, all are joined to one stream, the stream is cut into windows that do not overlap (tail dropped, no window
skipped), and the loss is the mean over all next-token predictions inside the windows, window − 1 of each.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spectrim.data.text import fixed_windows, read_documents, token_stream
from spectrim.model.files import weight_files

logger = logging.getLogger(__name__)

DEFAULT_WINDOW = 2048
_CHUNK = 2**24  # logits turned into float32 log-probabilities at a time: 64 MiB, whatever the vocabulary


@dataclass(frozen=True)
class Evaluation:
    """One model on one text. nll and kl are in nats a token; tokens = predictions made; see `parameters` for the dict.

    text is the name given; protocol says in words how nll was measured; kl and sample are None unless asked for.
    """

    nll: float
    perplexity: float
    tokens: int
    windows: int
    window: int
    text: str
    protocol: str
    kl: float | None
    parameters: dict[str, int]
    sample: str | None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON data."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    reference: PreTrainedModel | None = None,
    progress: Callable[[int, int], None] | None = None,
    sample_prompt: str | None = None,
) -> Evaluation:
    """Token loss and perplexity of a model on a text (a file or name, as `read_documents` takes it).

    window: tokens, by default 2048 or what the model has positions for. limit: only the first windows. batch: windows
    in one forward pass. reference: also the token-mean KL(reference ‖ model) on the same windows. progress is called
    with windows done and windows in all. sample_prompt: also a greedy continuation of it. Raises ValueError for a
    window no model here can take, a text shorter than one window, and a loss that is not finite (naming the window).
    """
    window = _checked_window(window, [model] if reference is None else [model, reference])
    if batch < 1:
        raise ValueError(f"batch must be at least 1 window, got {batch}")
    stream = token_stream(read_documents(text), tokenizer)
    windows = fixed_windows(stream, window, limit)
    nll, kl = mean_losses(model, windows, batch, reference, progress)
    return Evaluation(
        nll=nll,
        perplexity=_perplexity(nll, text),
        tokens=windows.numel() - len(windows),
        windows=len(windows),
        window=window,
        text=text,
        protocol=_protocol(window, len(windows), stream.numel() // window, model.dtype),
        kl=kl,
        parameters=parameters(model),
        sample=None if sample_prompt is None else generate_sample(model, tokenizer, sample_prompt),
    )


def mean_losses(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows window"],
    batch: int = 8,
    reference: PreTrainedModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float | None]:
    """Token loss on windows and, with a reference, KL(reference ‖ model), nats a token. Raises ValueError as above."""
    losses, divergences = [], []
    with inference(model), inference(model if reference is None else reference):
        for start in range(0, len(windows), batch):
            loss, divergence = _batch_losses(model, reference, windows[start : start + batch], start)
            losses.append(loss)
            divergences.append(divergence)
            if progress is not None:
                progress(min(start + batch, len(windows)), len(windows))
    # every window makes the same number of predictions, so the mean of windows is the mean of tokens
    return float(torch.cat(losses).mean()), None if reference is None else float(torch.cat(divergences).mean())


def parameters(model_or_directory: nn.Module | str | Path) -> dict[str, int]:
    """What a model stores: {"total", "bytes", "index_bytes"}.

    total: entries of its floating-point tensors (persistent buffers too), tied ones once; bytes: the room these take;
    index_bytes: the room its integer and boolean tensors take. Of a directory only the headers of its safetensors files
    are read, and a tensor counts as often as it is stored. Raises ValueError if there are none.
    """
    if isinstance(model_or_directory, nn.Module):
        # state_dict gives a tied parameter under each of its names; keep_vars: as the same object
        tensors = {id(tensor): tensor for tensor in model_or_directory.state_dict(keep_vars=True).values()}
        sizes = [(t.is_floating_point(), t.numel(), 8 * t.element_size()) for t in tensors.values()]
    else:
        sizes = [size for file in weight_files(Path(model_or_directory)) for size in _header_sizes(file)]
    return {
        "total": sum(numel for floating, numel, _ in sizes if floating),
        "bytes": sum(numel * bits // 8 for floating, numel, bits in sizes if floating),
        "index_bytes": sum(numel * bits // 8 for floating, numel, bits in sizes if not floating),
    }


def generate_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 40
) -> str:
    """The prompt with its greedy continuation: deterministic, without penalties, up to the end-of-text token.

    Raises ValueError if the prompt has no token, or with the new tokens more than the model has positions for.
    """
    encoded = tokenizer([prompt], verbose=False, return_attention_mask=True, return_tensors="pt").to(model.device)
    length = encoded["input_ids"].shape[1]
    maximum = max_positions(model)
    if length == 0:
        raise ValueError(f"the prompt {prompt!r} gives no token: write a longer one")
    if maximum is not None and length + max_new_tokens > maximum:
        raise ValueError(
            f"{length} tokens of prompt and {max_new_tokens} new ones exceed the model's {maximum} positions: "
            "give a shorter prompt or ask for fewer"
        )
    with inference(model):
        output = model.generate(  # type: ignore[operator]  # the causal models have it, their base class does not
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            # what the model's own generation settings may hold and greedy decoding must not use
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model is made for, in tokens; None where its config states no limit."""
    return positions(model.config)


def positions(config: PretrainedConfig) -> int | None:
    """The same of a config."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; afterwards every module is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _checked_window(window: int | None, models: list[PreTrainedModel]) -> int:
    limits = [limit for limit in map(max_positions, models) if limit is not None]
    if window is None:
        return min([DEFAULT_WINDOW, *limits])
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens for one prediction, got {window}")
    if limits and window > min(limits):
        raise ValueError(
            f"window {window} is longer than the {min(limits)} positions of the model: choose a shorter one"
        )
    return window


def _batch_losses(
    model: PreTrainedModel, reference: PreTrainedModel | None, ids: Int[Tensor, "b w"], start: int
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Loss and divergence of each window of a batch whose first is number `start`; ValueError if one is not finite."""
    logits = _logits(model, ids)
    expected = None if reference is None else _logits(reference, ids)
    if expected is not None and expected.shape != logits.shape:
        raise ValueError(
            f"the reference has a vocabulary of {expected.shape[-1]}, the model of {logits.shape[-1]}: "
            "a divergence needs the same one"
        )
    loss = torch.zeros(len(ids), dtype=torch.float64)
    divergence = torch.zeros_like(loss)
    for i in range(len(ids)):
        other = None if expected is None else expected[i]
        loss[i], divergence[i] = _window_losses(logits[i], ids[i, 1:].to(logits.device), other)
        for name, value in (("loss", loss[i]), ("divergence from the reference", divergence[i])):
            if not math.isfinite(value):
                raise ValueError(
                    f"window {start + i} (counted from 0): the {name} is {float(value)}: look for weights that are not "
                    "finite, or for activations that overflow in the model's dtype"
                )
    return loss, divergence


def _logits(model: PreTrainedModel, ids: Int[Tensor, "b w"]) -> Float[Tensor, "b predictions vocabulary"]:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits[:, :-1]


def _window_losses(
    logits: Float[Tensor, "n vocabulary"],
    following: Int[Tensor, "n"],
    expected: Float[Tensor, "n vocabulary"] | None,
) -> tuple[float, float]:
    """Mean −log p(following) and mean KL(expected ‖ logits) of one window; float32 terms, summed in float64."""
    chunk = max(1, _CHUNK // logits.shape[-1])
    loss = divergence = 0.0
    for start in range(0, len(logits), chunk):
        part = slice(start, start + chunk)
        log_q = F.log_softmax(logits[part].float(), dim=-1)
        loss -= float(log_q.gather(1, following[part, None]).double().sum())
        if expected is not None:
            log_p = F.log_softmax(expected[part].to(log_q), dim=-1)
            divergence += float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum())
    return loss / len(logits), divergence / len(logits)


def _perplexity(nll: float, text: str) -> float:
    try:
        return math.exp(nll)
    except OverflowError as error:
        raise ValueError(
            f"{text}: a loss of {nll:.1f} a token has no finite perplexity: the model is broken"
        ) from error


def _protocol(window: int, windows: int, available: int, dtype: torch.dtype) -> str:
    used = f"all {windows}" if windows == available else f"first {windows} of {available}"
    return (
        "documents tokenised with their special tokens and joined to one stream; fixed windows of "
        f"{window} tokens without overlap, tail dropped ({used}); mean over the {window - 1} next-token predictions "
        f"of every window; {str(dtype).removeprefix('torch.')} model, float32 loss"
    )


def _header_sizes(file: Path) -> Iterator[tuple[bool, int, int]]:
    """(is floating-point, entries, bits an entry) of every tensor of a file; dtypes are named F32, BF16, I64, BOOL…"""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
            entry = tensors.get_slice(name)
            dtype = entry.get_dtype()
            bits = re.search(r"\d+", dtype)
            yield dtype.startswith(("F", "BF")), math.prod(entry.get_shape()), int(bits.group()) if bits else 8
