"""Sparse parts: their stored indices and what these take, every way the product is computed, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from spectrim.model import loading, modules
from spectrim.model.modules import index_bytes, smaller_index, stored_index
from tests.families import FAMILIES, linears
from tests.model.test_modules import IN, OUT, built, defined, index, places, spec, tensors

torch.set_num_threads(1)

FORMATS = ("low_rank_sparse", "pivot_sparse")
INDICES = ("csr", "mask")
each_format = pytest.mark.parametrize("kind", FORMATS)
each_index = pytest.mark.parametrize("stored", INDICES)


def sized(kind: str, out: int, size: int, nnz: int, stored: str, rank: int = 0) -> dict[str, Any]:
    return {"format": kind, "in": size, "out": out, "bias": False, "rank": rank, "nnz": nnz, "index": stored}


def module_of(wanted: dict[str, Any], dtype: torch.dtype = torch.float32) -> modules.Format:
    """A module with random values at random places, its index made by `stored_index`."""
    draw = torch.Generator().manual_seed(1)
    entries = torch.randperm(wanted["out"] * wanted["in"], generator=draw)[: wanted["nnz"]].sort().values
    given = {"values": torch.randn(wanted["nnz"], generator=draw).to(dtype), **stored_index(wanted, entries)}
    return modules.build(wanted, given, None)


# stored indices


@pytest.mark.parametrize("nnz", [0, 1, 25, 240])
@each_index
def test_stored_index_is_the_definition(stored: str, nnz: int) -> None:
    wanted = spec("low_rank_sparse", rank=0, nnz=nnz, index=stored)
    entries = torch.randperm(OUT * IN)[:nnz].sort().values
    found, expected = stored_index(wanted, entries), index(wanted, entries.tolist())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].long(), tensor.long()) for name, tensor in expected.items())
    assert [row * IN + column for row, column in places(wanted, found)] == entries.tolist()
    assert sum(t.numel() * t.element_size() for t in found.values()) == index_bytes(wanted)
    empty = modules.empty(wanted, device="meta").state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (empty[n].shape, empty[n].dtype) for n in found}


@each_index
def test_a_bit_is_where_the_format_says(stored: str) -> None:
    found = stored_index(sized("pivot_sparse", 2, 11, 3, stored), torch.tensor([1, 8, 21]))
    if stored == "mask":
        assert found["mask"].tolist() == [[0b10, 0b1], [0, 0b100]]
    else:
        assert (found["row_starts"].tolist(), found["columns"].tolist()) == ([0, 2, 3], [1, 8, 10])


@pytest.mark.parametrize(
    ("entries", "given"),
    [
        ([1, 2], r"given are \(2,\)"),
        ([1, 2, 3, 4], r"\(4,\)"),
        ([1, 3, 3], "first and last"),
        ([4, 3, 5], "first and last"),
        ([-1, 3, 5], r"\[-1, 5\]"),
        ([1, 3, 240], r"\[1, 240\]"),
        ([[1, 3, 5]], r"\(1, 3\)"),
    ],
)
@each_index
def test_entries_that_make_no_index(stored: str, entries: list[Any], given: str) -> None:
    wanted = spec("pivot_sparse", rank=0, nnz=3, index=stored)
    with pytest.raises(ValueError, match=rf"3 rising numbers within \[0, 240\).*{given}"):
        stored_index(wanted, torch.tensor(entries))


def test_a_format_without_a_sparse_part_has_no_index() -> None:
    with pytest.raises(ValueError, match="'low_rank' has no sparse part"):
        stored_index(spec("low_rank", rank=2), torch.tensor([1]))


def test_bytes_and_which_index_is_smaller() -> None:
    for out, size, nnz in ((2048, 2048, 83886), (5632, 2048, 2883584), (7, 3, 0), (3, 40000, 9)):
        csr, mask = 4 * (out + 1) + nnz * (2 if size <= 32768 else 4), out * ((size + 7) // 8)
        assert index_bytes(sized("low_rank_sparse", out, size, nnz, "csr")) == csr
        assert index_bytes(sized("low_rank_sparse", out, size, nnz, "mask")) == mask
        assert smaller_index(out, size, nnz) == ("csr" if csr <= mask else "mask")
    # one row of 128 inputs: 16 bytes of mask, 8 of row starts
    assert [smaller_index(1, 128, nnz) for nnz in (3, 4, 5)] == ["csr", "csr", "mask"]
    assert [smaller_index(1, 2**20, nnz) for nnz in (32766, 32767)] == ["csr", "mask"]


@pytest.mark.parametrize(("size", "kind"), [(32768, torch.int16), (32769, torch.int32)])
def test_columns_are_as_wide_as_the_inputs_ask(size: int, kind: torch.dtype) -> None:
    wanted = sized("low_rank_sparse", 2, size, 3, "csr")
    assert modules.empty(wanted, device="meta").state_dict()["columns"].dtype == kind
    found = stored_index(wanted, torch.tensor([0, size - 1, 2 * size - 1]))
    assert found["columns"].dtype == kind
    module = modules.build(wanted, {"values": torch.tensor([1.0, 2.0, 3.0]), **found}, None)
    expected = torch.zeros(2, size)
    expected[0, 0], expected[0, -1], expected[1, -1] = 1, 2, 3
    assert torch.equal(module.dense(), expected)
    x = torch.randn(3, size)
    torch.testing.assert_close(module(x), functional.linear(x, expected))


def _bits(*columns: int) -> Tensor:
    """A mask of OUT rows with these bits of row 1 set."""
    mask = torch.zeros(OUT, 3, dtype=torch.uint8)
    for column in columns:
        mask[1, column // 8] += 2 ** (column % 8)
    return mask


STARTS = torch.tensor([0, 0, *[2] * (OUT - 1)])
BAD_INDICES = [
    ("mask", {"mask": _bits(3)}, "has 1 bits set, its spec says nnz = 2"),
    ("mask", {"mask": _bits(3, 4, 5)}, "has 3 bits set, its spec says nnz = 2"),
    ("mask", {"mask": _bits(3, 20)}, "bits set beyond its 20 inputs"),
    ("mask", {"mask": torch.zeros(OUT, 2)}, r"'mask' has the shape \(12, 2\)"),
    ("mask", {"mask": torch.full((OUT, 3), 256)}, "'mask' holds numbers that torch.uint8 does not"),
    ("csr", {"columns": torch.tensor([1, 20])}, r"'columns' must rise in each row and be within \[0, 20\)"),
    ("csr", {"columns": torch.tensor([-1, 2])}, "'columns' must rise"),
    ("csr", {"columns": torch.tensor([2, 1])}, "'columns' must rise"),
    ("csr", {"columns": torch.tensor([2, 2])}, "'columns' must rise"),
    ("csr", {"columns": torch.tensor([2, 2**16 + 3])}, "'columns' holds numbers that torch.int16 does not"),
    ("csr", {"row_starts": torch.full((OUT + 1,), 2)}, "row_starts must rise from 0 to nnz = 2"),
    ("csr", {"row_starts": STARTS.clamp(max=1)}, "row_starts must rise from 0"),
    ("csr", {"row_starts": torch.tensor([0, 2, 1, *[2] * (OUT - 2)])}, "row_starts must rise from 0"),
    ("csr", {"mask": _bits(1, 2)}, "not wanted .'mask'."),
]


@pytest.mark.parametrize(("stored", "changed", "message"), BAD_INDICES)
@each_format
def test_indices_that_are_refused(kind: str, stored: str, changed: dict[str, Tensor], message: str) -> None:
    good = {"csr": {"row_starts": STARTS, "columns": torch.tensor([3, 5])}, "mask": {"mask": _bits(3, 5)}}[stored]
    wanted = spec(kind, rank=0, nnz=2, index=stored)
    module = modules.build(wanted, {"values": torch.ones(2), **good}, None)
    assert module.dense()[1].nonzero().flatten().tolist() == [3, 5]
    with pytest.raises(ValueError, match=message):
        modules.build(wanted, {"values": torch.ones(2), **good, **changed}, None)


# the product

WAYS = [
    (1, 0.1, "one token"),
    (8, 0.1, "as CSR"),
    (9, 0.1, "weighted sums"),
    (200, 0.1, "weighted sums, in parts"),
    (260, 0.6, "some rows made full"),
]


@pytest.mark.parametrize(("tokens", "share", "way"), WAYS, ids=[way for *_, way in WAYS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_way_of_the_product(dtype: torch.dtype, tokens: int, share: float, way: str) -> None:
    """To the rounding of each dtype: sums are in float32 or better, so bfloat16 rounds the result alone."""
    rows, size = 70, 8192  # a part of rows has 64 of this size
    module = module_of(sized("low_rank_sparse", rows, size, int(share * rows * size), "mask"), dtype)
    x = torch.randn(tokens, size).to(dtype)
    expected = functional.linear(x.double(), module.dense().double())
    error = (module(x).double() - expected).norm() / expected.norm()
    with torch.no_grad():
        same = module(x)
    assert torch.equal(same, module(x))
    assert error < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)])
@each_format
def test_no_tokens(kind: str, shape: tuple[int, ...]) -> None:
    assert built(spec(kind, rank=2, nnz=25, index="mask"))(torch.zeros(shape)).shape == (*shape[:-1], OUT)


@pytest.mark.parametrize(("rank", "nnz"), [(0, 0), (0, 30), (5, 0), (5, 30), (12, 240)])
@each_index
@each_format
def test_definition_in_float64(kind: str, stored: str, rank: int, nnz: int) -> None:
    wanted = spec(kind, rank=rank, nnz=nnz, index=stored, bias=True)
    given = tensors(wanted)
    module = built(wanted).double()
    given = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    torch.set_default_dtype(torch.float64)
    try:
        weight = defined(wanted, given)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(module.dense(), weight, rtol=0, atol=1e-14)
    for tokens in (1, 6, 40):
        x = torch.randn(tokens, IN, dtype=torch.float64)
        torch.testing.assert_close(module(x), functional.linear(x, weight, given["bias"]), rtol=0, atol=1e-13)
    names = {name.partition(".")[0] for name, _ in module.named_parameters()}
    pair = {"low_rank_sparse": {"left", "right"}, "pivot_sparse": {"base"} | ({"mix"} if rank < OUT else set())}[kind]
    assert names == {"bias", "values"} | (pair if rank else set())


@pytest.mark.parametrize("tokens", [1, 5, 12, 40, 130])
def test_gradients_in_float64(tokens: int) -> None:
    module = module_of(sized("low_rank_sparse", 6, 10, 25, "csr"), torch.float64)
    x = torch.randn(tokens, 10, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, values: Tensor) -> Tensor:
        y: Tensor = torch.ops.spectrim.sparse_product(x, values, module.starts, module.inputs, 6)
        return y

    assert torch.autograd.gradcheck(product, (x, module.get_parameter("values")), fast_mode=True)


def test_gradients_where_rows_are_made_full() -> None:
    module = module_of(sized("low_rank_sparse", 8, 16, 100, "mask"), torch.float64)
    module.bfloat16()
    x = torch.randn(300, 16, dtype=torch.bfloat16, requires_grad=True)
    values = module.get_parameter("values")
    found = torch.autograd.grad(module(x).sum(), (x, values))
    expected = torch.autograd.grad(functional.linear(x, module.dense()).sum(), (x, values))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("frozen", ["values", "x"])
@each_format
def test_frozen_tensors_get_no_gradient(kind: str, frozen: str) -> None:
    module = built(spec(kind, rank=3, nnz=25, index="csr"))
    module.get_parameter("values").requires_grad_(frozen != "values")
    x = torch.randn(20, IN, requires_grad=frozen != "x")
    module(x).square().sum().backward()
    assert (module.get_parameter("values").grad is None) == (frozen == "values")
    assert (x.grad is None) == (frozen == "x")
    assert all(p.grad is not None for name, p in module.named_parameters() if name != "values")


def test_the_operator_is_sound() -> None:
    module = built(spec("low_rank_sparse", rank=0, nnz=25, index="mask"))
    for tokens in (1, 5, 20):
        x = torch.randn(tokens, IN, requires_grad=True)
        arguments = (x, module.get_parameter("values"), module.starts, module.inputs, OUT)
        torch.library.opcheck(
            torch.ops.spectrim.sparse_product.default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize(("kind", "stored"), list(zip(FORMATS, INDICES, strict=True)))
def test_compiled_forward_and_gradients(kind: str, stored: str) -> None:
    module = built(spec(kind, rank=3, nnz=60, index=stored, bias=True))
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (1, 40):
        x = torch.randn(tokens, IN, requires_grad=True)
        inputs = [x, *module.parameters()]
        pairs = [torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, module)]
        for ours, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs)


# storing


@each_index
@each_format
def test_state_dict_round_trip(kind: str, stored: str) -> None:
    wanted = spec(kind, rank=3, nnz=25, index=stored, bias=True)
    module, x = built(wanted), torch.randn(3, IN)
    names = {"csr": {"row_starts", "columns"}, "mask": {"mask"}}[stored]
    state = module.state_dict()
    assert {name for name, tensor in state.items() if not tensor.is_floating_point()} - {"order"} == names
    assert sum(state[name].numel() * state[name].element_size() for name in names) == index_bytes(wanted)
    again = modules.empty(wanted, device="meta")
    again.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    for other in (again, copy.deepcopy(again), copy.deepcopy(module).half().float().to("cpu")):
        assert {name: t.dtype for name, t in other.named_buffers()} == {n: t.dtype for n, t in module.named_buffers()}
        torch.testing.assert_close(other(x), module(x), atol=1e-2, rtol=1e-2)
    again.derive()  # the memory layout too, on which the last digit depends
    assert torch.equal(again(x), module(x))


def test_both_indices_mean_the_same_matrix() -> None:
    entries = torch.randperm(OUT * IN)[:50].sort().values
    values = torch.randn(50)
    csr, mask = (
        modules.build(wanted, {"values": values, **stored_index(wanted, entries)}, None)
        for wanted in (spec("low_rank_sparse", rank=0, nnz=50, index=stored) for stored in INDICES)
    )
    assert torch.equal(csr.dense(), mask.dense())
    assert csr.dense().flatten().nonzero().flatten().tolist() == entries.tolist()
    assert torch.equal(csr.inputs, mask.inputs) and torch.equal(csr.starts, mask.starts)


def test_the_sparse_pivot_form_is_the_pivot_form_and_a_sparse_one() -> None:
    wanted = spec("pivot_sparse", rank=4, nnz=30, index="csr")
    given = tensors(wanted)
    part = {name: tensor for name, tensor in given.items() if name in ("base.weight", "mix.weight", "order")}
    pivot = modules.build(spec("pivot", rank=4, side="rows"), part, None)
    rest = {name: tensor for name, tensor in given.items() if name not in part}
    sparse = modules.build(spec("low_rank_sparse", rank=0, nnz=30, index="csr"), rest, None)
    torch.testing.assert_close(built(wanted).dense(), pivot.dense() + sparse.dense())


def test_transformers_loads_and_saves_the_same_bytes(tmp_path: Path) -> None:
    """Every linear of a small Llama, both formats with both indices; no buffer stays on the meta device."""
    model = FAMILIES["llama_tied"].make()
    layout, kinds = {}, [(kind, stored) for kind in FORMATS for stored in INDICES]
    for place, (name, old) in enumerate(linears(model, "model.layers").items()):
        rows, size = old.weight.shape
        kind, stored = kinds[place % 4]
        layout[name] = sized(kind, rows, size, 60, stored, rank=3 * (place < 8))
        model.set_submodule(name, built(layout[name], seed=place))
    loading.attach(model, layout)
    loading.save(model, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()
    tokens = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as opened:
        kinds_stored = {key.rpartition(".")[2]: opened.get_slice(key).get_dtype() for key in list(opened.keys())}
    assert {"mask": "U8", "columns": "I16", "row_starts": "I32", "order": "I32"}.items() <= kinds_stored.items()
    assert not {"starts", "inputs", "gather"} & kinds_stored.keys()
