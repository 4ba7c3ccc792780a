"""The cut of a module and back, for every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.finetune import parts
from spectrim.finetune.parts import decomposed, factored_svd, parts_of, put, with_rank
from spectrim.model.modules import Format
from tests.families import FAMILIES
from tests.model.test_loading import compressed, narrow
from tests.model.test_modules import IN, OUT, SPECS, built, spec

MORE = [
    spec("low_rank", rank=1),
    spec("low_rank_columns", rank=1, kept=3),
    spec("low_rank_columns", rank=12, kept=3),
    spec("low_rank_sparse", rank=1, nnz=9, index="mask"),
    spec("low_rank_sparse", rank=12, nnz=9, index="csr"),
    spec("pivot", rank=1, side="rows"),
    spec("pivot", rank=1, side="columns"),
    spec("pivot", rank=1, side="columns", kept=2, bias=True),
    spec("pivot_sparse", rank=1, nnz=9, index="csr"),
]
each_spec = pytest.mark.parametrize("wanted", SPECS + MORE, ids=lambda s: "-".join(map(str, s.values())))


def dense_of(module: Format, cut: dict[str, Tensor]) -> Tensor:
    """The weight from a cut, by the definition of a cut."""
    if "weight" in cut:
        return cut["weight"]
    weight = torch.zeros(module.out_features, module.in_features)
    columns = cut.get("columns", torch.empty(0, dtype=torch.int64)).tolist()
    others = [i for i in range(module.in_features) if i not in columns]
    weight[:, others] = cut["left"] @ cut["right"]
    if columns:
        weight[:, columns] = cut["kept"]
    for entry, value in zip(cut.get("entries", torch.empty(0)).tolist(), cut.get("values", []), strict=True):
        weight[entry // module.in_features, entry % module.in_features] += value
    return weight


@each_spec
def test_the_cut_is_the_module(wanted: dict[str, Any]) -> None:
    module = built(wanted)
    cut = parts_of(module)
    torch.testing.assert_close(dense_of(module, cut), module.dense().detach(), atol=1e-6, rtol=1e-6)
    held = {t.data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel()}
    assert not held & {t.data_ptr() for t in cut.values() if t.numel()}


@each_spec
def test_put_back_it_is_the_same_module(wanted: dict[str, Any]) -> None:
    module, x = built(wanted), torch.randn(5, IN)
    before, held, y = module.dense().detach(), dict(module.named_parameters()), module(x).detach()
    strides = {name: p.stride() for name, p in held.items()}
    put(module, parts_of(module))
    torch.testing.assert_close(module.dense(), before, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(module(x), y, atol=1e-5, rtol=1e-5)
    assert all(p is held[name] and p.stride() == strides[name] for name, p in module.named_parameters())


@each_spec
def test_other_parts_become_the_module(wanted: dict[str, Any]) -> None:
    """New numbers, new kept columns and new places; the derived buffers follow."""
    module, x = built(wanted), torch.randn(5, IN)
    cut = parts_of(built(wanted, seed=1))
    draw = torch.Generator().manual_seed(2)
    cut |= {name: torch.randn(t.shape, generator=draw) / 4 for name, t in cut.items() if t.is_floating_point()}
    put(module, cut)
    torch.testing.assert_close(module.dense(), dense_of(module, cut), atol=2e-5, rtol=1e-5)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(x), x @ module.dense().T + bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays_and_what_is_kept_is_exact(dtype: torch.dtype) -> None:
    for sizes in ({"kind": "pivot", "side": "columns"}, {"kind": "low_rank_columns"}):
        module = built(spec(sizes.pop("kind"), rank=4, kept=3, **sizes)).to(dtype)
        cut = parts_of(module)
        put(module, cut)
        again = parts_of(module)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert {t.dtype for t in cut.values()} == {torch.promote_types(dtype, torch.float32), torch.int64}
        assert torch.equal(again["kept"], cut["kept"])
        assert torch.equal(again["columns"], cut["columns"])


def test_parts_of_another_shape_are_refused() -> None:
    module = built(spec("low_rank", rank=3))
    cut = parts_of(built(spec("low_rank", rank=4)))
    with pytest.raises(ValueError, match=r"do not fit the module .*'rank': 3.*they are .*it needs"):
        put(module, cut)
    with pytest.raises(ValueError, match="do not fit"):
        put(module, {"left": torch.zeros(OUT, 3)})


@pytest.mark.parametrize("rank", [1, 4, 5, 9])
def test_the_svd_of_factors_is_that_of_their_product(rank: int) -> None:
    left, right = torch.randn(7, 5).double(), torch.randn(5, 9).double()
    u, sigma, vh = factored_svd(left, right, rank)
    wanted = torch.linalg.svd(left @ right, full_matrices=False)
    count = min(rank, 5)
    torch.testing.assert_close(sigma[:count], wanted.S[:count])
    assert not sigma[count:].any() and u.shape == (7, rank) and vh.shape == (rank, 9)
    torch.testing.assert_close((u * sigma) @ vh, (wanted.U[:, :count] * wanted.S[:count]) @ wanted.Vh[:count])


def test_a_model_without_factors_is_named() -> None:
    with pytest.raises(ValueError, match="run `spectrim compress` first"):
        decomposed(FAMILIES["llama"].make())
    with pytest.raises(ValueError, match="run `spectrim compress` first"):
        decomposed(narrow(FAMILIES["llama"].make(), {0: 24, 1: 40}))
    empty = compressed(FAMILIES["llama"].make(), [{"format": "low_rank", "rank": 0}])
    assert len(decomposed(empty)) == 14
    with pytest.raises(ValueError, match=r"rank 0.*run `spectrim compress`"):
        with_rank(empty)


def test_the_pivots_are_those_of_the_formats() -> None:
    assert {wanted["format"] for wanted in SPECS if "pivot" in wanted["format"]} == set(parts.PIVOTS)
