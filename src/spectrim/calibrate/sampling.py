"""Text that a model writes itself: every token drawn from the whole of its prediction, nothing cut off, seeded.

Such text holds what the model has learned of everything it was trained on, not of one corpus alone, and needs no file.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from spectrim.calibrate.collect import without_dropout
from spectrim.core.progress import Progress, silent

# Bytes of keys and values for which more windows are drawn at once than a batch has.
CACHE = 2**26


def ends(config: PretrainedConfig) -> tuple[int, frozenset[int]]:
    """The token that begins a text, and those that end one. Raises ValueError where the model names none at all.

    A model that names no beginning begins after an end, as its training texts did.
    """
    config = config.get_text_config(decoder=True)
    begin, end = getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)
    stops = frozenset([] if end is None else [end] if isinstance(end, int) else end)
    if begin is None and not stops:
        raise ValueError(
            "the model cannot write a text by itself: its config.json names neither a token that begins one "
            "(bos_token_id) nor one that ends it (eos_token_id); give a text file instead"
        )
    return (min(stops) if begin is None else int(begin)), stops


def together(config: PretrainedConfig, batch: int, length: int, size: int) -> int:
    """How many windows are drawn at once: a batch, and of small models as many as `CACHE` has room for.

    size: bytes of a number. Keys and values are taken to be as wide as the model, which is the most they are mostly.
    """
    config = config.get_text_config(decoder=True)
    row = 2 * size * length * config.hidden_size * config.num_hidden_layers
    return max(batch, CACHE // row)


@torch.no_grad()
def sample(
    model: PreTrainedModel, sequences: int, length: int, seed: int, batch: int, progress: Progress = silent
) -> Int[Tensor, "sequences length"]:
    """Windows of the model's own text, at temperature 1, each from the token that begins one; int64, in main memory.

    Where a text ends inside a window the next one begins, as in windows of a stream of documents. batch: windows drawn
    at once, with a cache of keys and values for so many. One generator draws, seeded with `seed`; the same windows come
    of the same seed, batch, device and number of threads. Raises ValueError for a model that names no such token, keeps
    no cache, or predicts what is not finite.
    """
    begin, stops = ends(model.config)
    draws = torch.rand(sequences, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows: list[Tensor] = []
    with without_dropout(model):
        for draw in draws.split(batch):
            rows.append(_together(model, draw.to(model.device), begin, stops - {begin}))
            progress("sample", sum(map(len, rows)), sequences)
    return torch.cat(rows)


def _together(
    model: PreTrainedModel, draws: Float[Tensor, "batch length"], begin: int, stops: Collection[int]
) -> Int[Tensor, "batch length"]:
    """One window for each row of draws, from 0 to 1; the first draw of a row is not used."""
    token = torch.full((len(draws), 1), begin, device=draws.device)
    ended = torch.tensor(sorted(stops), dtype=token.dtype, device=draws.device)
    found, cache = [token], None
    for draw in draws.T[1:]:
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        if cache is None:
            raise ValueError(f"{type(model).__name__} keeps no cache: it cannot write a text by itself; give a file")
        drawn, finite = picked(output.logits[:, -1], draw)
        if not bool(finite.all()):
            raise ValueError("the model's predictions on its own text are not finite: sampling stopped")
        token = torch.where(torch.isin(token, ended), begin, drawn[:, None])
        found.append(token)
    return torch.cat(found, dim=1).cpu()


def picked(
    logits: Float[Tensor, "tokens vocabulary"], draws: Float[Tensor, "tokens"]
) -> tuple[Int[Tensor, "tokens"], Tensor]:
    """The token of each prediction that a draw from 0 to 1 falls on, and whether it is finite; 0 where it is not."""
    tokens, finite = [], []
    for rows, draw in zip(logits.split(64), draws.split(64), strict=True):  # a float64 vocabulary a token is large
        shares = rows.double().softmax(-1).cumsum(-1)
        whole = shares[:, -1]
        found = torch.searchsorted(shares, (draw * whole)[:, None], right=True)[:, 0]
        finite.append(whole.isfinite())
        tokens.append(torch.where(finite[-1], found.clamp_max(logits.shape[-1] - 1), 0))
    return torch.cat(tokens), torch.cat(finite)
