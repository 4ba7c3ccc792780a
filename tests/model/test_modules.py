"""The module formats: each against its definition written out, and everything a spec can get wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from spectrim.model import modules
from spectrim.model.modules import FORMATS, checked, empty, spec_of, swap

torch.set_num_threads(1)

OUT, IN = 12, 20


def spec(kind: str, bias: bool = False, **sizes: Any) -> dict[str, Any]:
    return {"format": kind, "in": IN, "out": OUT, "bias": bias, **sizes}


SPECS = [
    spec("dense"),
    spec("dense", bias=True),
    spec("low_rank", rank=0),
    spec("low_rank", rank=0, bias=True),
    spec("low_rank", rank=3),
    spec("low_rank", rank=12, bias=True),
    spec("pivot", rank=0, side="rows"),
    spec("pivot", rank=0, side="columns", bias=True),
    spec("pivot", rank=5, side="rows", bias=True),
    spec("pivot", rank=12, side="rows"),
    spec("pivot", rank=5, side="columns"),
    spec("pivot", rank=12, side="columns", bias=True),
    spec("pivot", rank=4, side="columns", kept=3, bias=True),
    spec("pivot", rank=0, side="columns", kept=3),
    spec("pivot", rank=8, side="columns", kept=12),
    spec("pivot", rank=0, side="columns", kept=20),
    spec("low_rank_columns", rank=3, kept=4, bias=True),
    spec("low_rank_columns", rank=0, kept=4),
    spec("low_rank_columns", rank=3, kept=0),
    spec("low_rank_columns", rank=0, kept=0),
    spec("low_rank_columns", rank=0, kept=20),
    spec("low_rank_sparse", rank=3, nnz=25, index="csr", bias=True),
    spec("low_rank_sparse", rank=0, nnz=25, index="mask"),
    spec("low_rank_sparse", rank=3, nnz=0, index="csr"),
    spec("low_rank_sparse", rank=0, nnz=0, index="mask", bias=True),
    spec("low_rank_sparse", rank=2, nnz=200, index="mask"),
    spec("low_rank_sparse", rank=0, nnz=240, index="csr"),
    spec("pivot_sparse", rank=3, nnz=25, index="mask", bias=True),
    spec("pivot_sparse", rank=0, nnz=25, index="csr"),
    spec("pivot_sparse", rank=12, nnz=200, index="csr"),
    spec("pivot_sparse", rank=5, nnz=0, index="mask"),
]
each_spec = pytest.mark.parametrize("wanted", SPECS, ids=lambda s: "-".join(map(str, s.values())))


def tensors(wanted: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for a spec, by state-dict name, the bias among them."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in empty(wanted, device="meta").state_dict().items():
        if tensor.is_floating_point():
            made[name] = torch.randn(tensor.shape, generator=draw) / 4
        elif name == "order":
            made[name] = torch.randperm(tensor.numel(), generator=draw)
        elif wanted["format"] == "low_rank_columns":
            made[name] = torch.randperm(wanted["in"], generator=draw)[: tensor.numel()]
    if "nnz" in wanted:
        flat = torch.randperm(wanted["out"] * wanted["in"], generator=draw)[: wanted["nnz"]].sort().values
        made |= index(wanted, flat.tolist())
    return made


def index(wanted: dict[str, Any], entries: list[int]) -> dict[str, Tensor]:
    """The stored index of entries at row · in + column, by its definition, an entry at a time."""
    if wanted["index"] == "csr":
        starts = [sum(entry < row * wanted["in"] for entry in entries) for row in range(wanted["out"] + 1)]
        return {"row_starts": torch.tensor(starts), "columns": torch.tensor(entries).long() % wanted["in"]}
    mask = torch.zeros(wanted["out"], (wanted["in"] + 7) // 8, dtype=torch.uint8)
    for entry in entries:
        row, column = divmod(entry, wanted["in"])
        mask[row, column // 8] += 2 ** (column % 8)
    return {"mask": mask}


def places(wanted: dict[str, Any], given: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Row and column of each entry, read from a stored index by its definition."""
    if wanted["index"] == "csr":
        ends = given["row_starts"].tolist()
        return [
            (row, int(given["columns"][i])) for row in range(wanted["out"]) for i in range(ends[row], ends[row + 1])
        ]
    bits = [(row, column) for row in range(wanted["out"]) for column in range(wanted["in"])]
    return [(row, column) for row, column in bits if int(given["mask"][row, column // 8]) >> column % 8 & 1]


def built(wanted: dict[str, Any], seed: int = 0) -> modules.Format:
    given = tensors(wanted, seed)
    return modules.build(wanted, given, given.pop("bias", None))


def defined(wanted: dict[str, Any], given: dict[str, Tensor]) -> Tensor:
    """The weight by its definition, an index at a time."""
    zero = torch.zeros(wanted["out"], wanted["in"])
    pair = given["left.weight"] @ given["right.weight"] if "left.weight" in given else None
    weight = zero if pair is None else pair
    if wanted["format"] == "dense":
        weight = given["weight"]
    if wanted["format"] == "low_rank_columns":
        kept = given["columns"].tolist()
        others = [i for i in range(wanted["in"]) if i not in kept]
        weight = zero.clone()
        for place, column in enumerate(others if pair is not None else []):
            weight[:, column] = pair[:, place]
        for place, column in enumerate(kept):
            weight[:, column] = given["kept.weight"][:, place]
    if "base.weight" in given:
        weight = _pivot(wanted, given)
    if "nnz" in wanted:
        weight = weight.clone()
        for (row, column), value in zip(places(wanted, given), given["values"], strict=True):
            weight[row, column] += value
    return weight


def _pivot(wanted: dict[str, Any], given: dict[str, Tensor]) -> Tensor:
    weight = torch.zeros(wanted["out"], wanted["in"])
    base, order, rank = given["base.weight"], given["order"].tolist(), wanted["rank"]
    mix = given.get("mix.weight")
    if wanted.get("side", "rows") == "rows":
        rows = base if mix is None else torch.cat([base, mix @ base])
        for place, row in enumerate(order):
            weight[row] = rows[place]
        return weight
    c = wanted.get("kept", 0)
    for place, column in enumerate(order):
        if place < c + rank:
            weight[:, column] = base[:, place]
        elif mix is not None:
            weight[:, column] = base[:, c:] @ mix[:, place - c - rank]
    return weight


@each_spec
def test_forward_and_dense_are_the_definition(wanted: dict[str, Any]) -> None:
    given = tensors(wanted)
    module = built(wanted)
    weight = defined(wanted, given)
    torch.testing.assert_close(module.dense(), weight)
    for shape in [(IN,), (1, IN), (5, IN), (2, 30, IN), (1, 2, 1, IN)]:
        x = torch.randn(shape)
        y = module(x)
        assert y.shape == (*shape[:-1], OUT)
        torch.testing.assert_close(y, functional.linear(x, weight, given.get("bias")))


@each_spec
def test_gradients_are_those_of_the_dense_weight(wanted: dict[str, Any]) -> None:
    module = built(wanted).double()
    x = torch.randn(2, 30, IN, dtype=torch.float64, requires_grad=True)
    few = x[:1, :7]  # the sparse formats take another way for few tokens
    for sample in (x, few):
        inputs = [x, *module.parameters()]
        found = module(sample).square().sum()
        wanted_sum = functional.linear(sample, module.dense().double(), module.bias).square().sum()
        if found.requires_grad:
            pairs = [torch.autograd.grad(y, inputs, allow_unused=True) for y in (found, wanted_sum)]
            for ours, theirs in zip(*pairs, strict=True):
                torch.testing.assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs)


@each_spec
def test_parameters_are_the_table_of_formats(wanted: dict[str, Any]) -> None:
    module = built(wanted)
    r, c, bias = wanted.get("rank", 0), wanted.get("kept", 0), OUT * wanted["bias"]
    count = {
        "dense": OUT * IN,
        "low_rank": r * (OUT + IN),
        "pivot": r * (OUT + IN - c) - r * r + OUT * c,
        "low_rank_columns": r * (OUT + IN - c) + OUT * c,
        "low_rank_sparse": r * (OUT + IN) + wanted.get("nnz", 0),
        "pivot_sparse": r * (OUT + IN) - r * r + wanted.get("nnz", 0),
    }[wanted["format"]]
    assert sum(p.numel() for p in module.parameters()) == count + bias
    kinds = {name: t.dtype for name, t in module.state_dict().items() if not t.is_floating_point()}
    narrow = {"columns": torch.int16, "mask": torch.uint8} if "nnz" in wanted else {}
    assert all(kind == narrow.get(name, torch.int32) for name, kind in kinds.items())
    assert all(p.numel() for name, p in module.named_parameters() if name != "values")


@each_spec
def test_spec_and_tensors_make_the_module_again(wanted: dict[str, Any]) -> None:
    module, x = built(wanted), torch.randn(3, IN)
    assert checked(json.loads(json.dumps(module.spec()))) == module.spec() == spec_of(module)
    for device in ("meta", "cpu"):
        other = empty(module.spec(), device=device)
        assert {n: t.shape for n, t in other.state_dict().items()} == {
            n: t.shape for n, t in module.state_dict().items()
        }
        other.load_state_dict(module.state_dict(), assign=True)
        torch.testing.assert_close(other(x), module(x))
        other.derive()  # the memory layout too, on which the last digit depends
        assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert {n: t.dtype for n, t in copy.deepcopy(module).double().named_buffers()} == {
        n: t.dtype for n, t in module.named_buffers()
    }
    children = {name for name, child in module.named_children() if isinstance(child, nn.Linear) and child.bias is None}
    assert children == {name for name, _ in module.named_children()} <= {"left", "right", "base", "mix", "kept"}


@each_spec
def test_other_dtypes(wanted: dict[str, Any]) -> None:
    module, x = built(wanted), torch.randn(40, IN)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(module).to(dtype)
        assert all(t.dtype == dtype for t in half.parameters())
        assert all(t.dtype != dtype for t in half.buffers())
        for tokens in (40, 1):
            y = half(x[:tokens].to(dtype))
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), module(x[:tokens]), atol=0.05, rtol=0.05)
        assert half.dense().dtype == (dtype if list(half.parameters()) else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(x).float(), module.float()(x).float(), atol=0.1, rtol=0.1)


COMPILED = [wanted for wanted in SPECS if wanted.get("rank") != 0 and wanted["bias"] is False]


@pytest.mark.parametrize("wanted", COMPILED, ids=lambda s: s["format"])
def test_compiles_to_one_graph(wanted: dict[str, Any]) -> None:
    module, x = built(wanted), torch.randn(40, IN)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:1]), module(x[:1]))


def test_a_pickled_module_is_the_same(tmp_path: Any) -> None:
    module, x = built(spec("pivot", rank=4, side="columns", kept=3)), torch.randn(3, IN)
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), module(x))


def test_build_copies_and_accepts_tensors_without_entries() -> None:
    whole = torch.randn(OUT, 8)
    wanted = spec("low_rank", rank=3)
    module = modules.build(wanted, {"left.weight": whole[:, :3], "right.weight": torch.randn(3, IN)}, None)
    assert module.left is not None
    assert module.left.weight.untyped_storage().nbytes() == OUT * 3 * 4
    none = {"left.weight": torch.zeros(OUT, 0), "right.weight": torch.zeros(0, IN)}
    assert modules.build(spec("low_rank", rank=0), none, None).state_dict() == {}


BAD_TENSORS = [
    (spec("low_rank", rank=3), {"left.weight": torch.zeros(OUT, 3)}, None, "missing .'right.weight'."),
    (spec("dense"), {"weight": torch.zeros(OUT, IN)}, torch.zeros(OUT), "not wanted .'bias'."),
    (spec("dense", bias=True), {"weight": torch.zeros(OUT, IN)}, None, "missing .'bias'."),
    (spec("dense"), {"weight": torch.zeros(IN, OUT)}, None, r"'weight' has the shape \(20, 12\)"),
    (spec("low_rank_columns", rank=0, kept=2), {"columns": torch.tensor([3, 3])}, None, "distinct"),
    (spec("low_rank_columns", rank=0, kept=2), {"columns": torch.tensor([3, 20])}, None, r"within \[0, 20\)"),
    (spec("pivot", rank=2, side="rows"), {"order": torch.zeros(OUT)}, None, "'order' must be distinct"),
]


@pytest.mark.parametrize(("wanted", "changed", "bias", "message"), BAD_TENSORS)
def test_tensors_that_do_not_fit(
    wanted: dict[str, Any], changed: dict[str, Tensor], bias: Tensor | None, message: str
) -> None:
    good = {} if "weight" in str(changed) or "bias" in message else tensors(wanted)
    with pytest.raises(ValueError, match=message):
        modules.build(wanted, {**good, **changed}, bias)


BAD_SPECS = [
    ({"format": "svd"}, "unknown module format 'svd'; known"),
    ({}, "unknown module format None"),
    ({"format": "low_rank", "in": 4, "out": 4}, r"missing \['bias', 'rank'\]"),
    (spec("low_rank", rank=2, kept=1), r"unknown \['kept'\]"),
    (spec("low_rank", rank=-1), "'rank' .* cannot be -1"),
    (spec("low_rank", rank=True), "'rank' .* cannot be True"),
    (spec("pivot", rank=2, side="left"), "'side' .* cannot be 'left'"),
    (spec("pivot", rank=13, side="rows"), "do not fit together"),
    (spec("pivot", rank=2, side="rows", kept=1), "do not fit together"),
    (spec("pivot", rank=9, side="columns", kept=12), "do not fit together"),
    (spec("low_rank_columns", rank=1, kept=20), "do not fit together"),
    (spec("low_rank_columns", rank=0, kept=21), "do not fit together"),
    (spec("low_rank_sparse", rank=1, nnz=241, index="csr"), "do not fit together"),
    (spec("low_rank_sparse", rank=1, nnz=20), r"missing \['index'\]"),
    (spec("low_rank_sparse", rank=1, nnz=20, index="coo"), "'index' .* cannot be 'coo'"),
    (spec("low_rank_sparse", rank=1, nnz=20, index=1), "'index' .* cannot be 1"),
    (spec("pivot_sparse", rank=1, nnz=20), r"missing \['index'\]"),
    (spec("pivot_sparse", rank=1, nnz=20, index="csr", side="rows"), r"unknown \['side'\]"),
    (spec("pivot_sparse", rank=13, nnz=20, index="csr"), "do not fit together"),
    (spec("pivot", rank=2, side="rows", index="csr"), r"unknown \['index'\]"),
]


@pytest.mark.parametrize(("wanted", "message"), BAD_SPECS)
def test_bad_specs(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empty(wanted)


def test_a_spec_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'dense' was given to Pivot"):
        FORMATS["pivot"].empty(spec("dense"))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), Conv1D(8, OUT), nn.ModuleList([nn.Linear(8, 4, bias=False)]))


def test_swap_puts_empty_modules_in_place() -> None:
    net = _net().to(torch.bfloat16).eval()
    layout = {
        "0": spec("low_rank", rank=2, bias=True),
        "2": {"format": "pivot", "in": OUT, "out": 8, "bias": True, "rank": 3, "side": "rows"},
        "3.0": {"format": "dense", "in": 8, "out": 3, "bias": False},
    }
    swap(net, layout)
    assert {name: spec_of(net.get_submodule(name)) for name in layout} == {n: checked(s) for n, s in layout.items()}
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not net[0].training
    before = dict(net.named_modules())
    swap(net, {**layout, "2": {**layout["2"], "kept": 0}})
    assert dict(net.named_modules()) == before
    on_meta = _net().to("meta")
    swap(on_meta, layout, dtype=torch.float16)
    assert {(p.dtype, p.device.type) for p in on_meta.parameters()} == {(torch.float16, "meta")}


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("9", spec("low_rank", rank=2), "names the module '9'"),
        ("1", spec("low_rank", rank=2), "'1' is a ReLU"),
        ("0", {**spec("low_rank", rank=2), "in": 8}, r"'0' is \(12, 20\)"),
        ("2", spec("low_rank", rank=2), r"'2' is \(8, 12\)"),
        ("0", {**spec("dense"), "out": 13}, r"'0' is \(12, 20\)"),
        ("0", {"format": "low_rank"}, "'0': .*missing"),
    ],
)
def test_swap_names_what_does_not_fit_and_changes_nothing(name: str, wanted: dict[str, Any], message: str) -> None:
    net = _net()
    before = dict(net.named_modules())
    good = {"3.0": {"format": "low_rank", "in": 8, "out": 4, "bias": False, "rank": 1}}
    with pytest.raises(ValueError, match=message):
        swap(net, {**good, name: wanted})
    assert dict(net.named_modules()) == before


def test_swap_refuses_another_spec() -> None:
    net = _net()
    swap(net, {"0": spec("low_rank", rank=2)})
    with pytest.raises(ValueError, match="'0' already has the spec"):
        swap(net, {"0": spec("low_rank", rank=3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tall_float32_weights_lie_column_by_column(dtype: torch.dtype) -> None:
    given = {"left.weight": torch.randn(12, 3).to(dtype), "right.weight": torch.randn(3, 20).to(dtype)}
    module = modules.build(spec("low_rank", rank=3), given, None)
    assert module.left.weight.stride() == ((1, 12) if dtype is torch.float32 else (3, 1))
    assert module.right.weight.stride() == (20, 1)
    assert torch.equal(module.left.weight, given["left.weight"])
    assert copy.deepcopy(module).left.weight.stride() == module.left.weight.stride()
