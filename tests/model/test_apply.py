"""A plan put into a live model and streamed to disk: the same modules, and nothing else touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.core import budget
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.methods.svd import PlainSVD
from spectrim.model import apply, targets
from spectrim.model.checkpoint import Checkpoint, LiveModel, Weights
from spectrim.model.modules import LowRank, Pivot
from spectrim.model.targets import Structure
from tests.conftest import save_model
from tests.families import FAMILIES, VOCABULARY

FORMATS = ["low_rank", "pivot"]


def candidates_of(source: Weights, structure: Structure) -> dict[str, Candidate]:
    """Plain SVD of each target; the weights are read when asked, as in a run."""

    def reader(target: Target) -> Callable[[], dict[str, Tensor]]:
        module = source.model.get_submodule(target.name)
        return lambda: {target.name: targets.oriented(module, source.read(f"{target.name}.weight"))}

    made = {}
    for target in structure.targets:
        weights = reader(target)
        found = PlainSVD().decompose(target, weights(), {target.name: {}})
        made[target.name] = Candidate(target, found.units, found.tensors, weights)
    return made


def plan_of(structure: Structure, format: str, ranks: dict[str, int]) -> Plan:
    """Ranks by role; other targets stay dense."""
    ranked = {target.name: ranks.get(target.role) for target in structure.targets}
    return budget.rank_plan(structure.targets, ranked, format, 10**9)


def write(directory: Path, out: Path, plan: Plan, **options: object) -> Path:
    source = Checkpoint(directory)
    structure = targets.find(source.model)
    out.mkdir()
    apply.streamed(source, structure, plan, candidates_of(source, structure), out, **options)  # type: ignore[arg-type]
    return out


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_live_and_streamed_give_the_same_model(name: str, format: str, tmp_path: Path) -> None:
    live = FAMILIES[name].make()
    save_model(live, tmp_path / "dense")
    structure = targets.find(live)
    plan = plan_of(structure, format, {"up": 5, "down": 0, "o": 7, "v": 1, "qkv": 9})
    untouched = {n: p for n, p in live.named_parameters() if n.removesuffix(".weight") not in plan.choices}
    apply.live(live, structure, plan, candidates_of(LiveModel(live), structure))
    written = write(tmp_path / "dense", tmp_path / "out", plan)
    loaded = AutoModelForCausalLM.from_pretrained(written)
    assert logits(loaded).abs().max() > 1
    torch.testing.assert_close(logits(loaded), logits(live), rtol=0, atol=0)
    expected, found = live.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, msg=key)
    after = dict(live.named_parameters())
    assert all(after[key] is parameter for key, parameter in untouched.items() if not key.endswith("bias"))


def test_modules_are_what_the_plan_says() -> None:
    model = FAMILIES["llama"].make()
    structure = targets.find(model)
    biases = {target.name: model.get_submodule(target.name).bias.clone() for target in structure.targets}
    dense = {target.name: model.get_submodule(target.name).weight for target in structure.targets}
    plan = plan_of(structure, "low_rank", {"up": 5, "o": 0})
    cuts = candidates_of(LiveModel(model), structure)
    apply.live(model, structure, plan, cuts)
    for target in structure.targets:
        module = model.get_submodule(target.name)
        if target.role == "up":
            assert isinstance(module, LowRank)
            u, s, vh = torch.linalg.svd(dense[target.name].double())
            torch.testing.assert_close(module.dense().double(), (u[:, :5] * s[:5]) @ vh[:5], rtol=1e-5, atol=1e-6)
        elif target.role == "o":
            assert isinstance(module, LowRank) and module.left is None
            assert bool((module.dense() == 0).all())
        else:
            assert module.weight is dense[target.name]
        assert torch.equal(module.bias, biases[target.name])
    assert model.config.quantization_config.layout.keys() == {
        t.name for t in structure.targets if t.role in ("up", "o")
    }


def test_replaced_modules_keep_mode_and_dtype() -> None:
    model = FAMILIES["llama"].make().to(torch.bfloat16).train()
    structure = targets.find(model)
    apply.live(model, structure, plan_of(structure, "pivot", {"up": 5}), candidates_of(LiveModel(model), structure))
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(module, Pivot) and module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_untouched_tensors_are_copied_bit_for_bit(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make().to(torch.bfloat16)
    save_model(model, tmp_path / "dense", max_shard_size="20KB")
    structure = targets.find(model)
    plan = plan_of(structure, "pivot", {"up": 5})
    out = write(tmp_path / "dense", tmp_path / "out", plan)
    before = {k: t for file in (tmp_path / "dense").glob("*.safetensors") for k, t in load_file(file).items()}
    after = load_file(out / "model.safetensors")
    replaced = {f"{name}.weight" for name in plan.choices}
    kept = before.keys() - replaced
    assert kept <= after.keys() and len(replaced) == 2
    for key in kept:
        assert after[key].dtype == torch.bfloat16 and torch.equal(after[key], before[key])
    new = {key.rpartition("up_proj.")[2] for key in after.keys() - before.keys()}
    assert new == {"base.weight", "mix.weight", "order"}


def test_the_guard_stands_under_one_replaced_weight(tmp_path: Path) -> None:
    save_model(FAMILIES["llama"].make(), tmp_path / "dense")
    plan = plan_of(targets.find(FAMILIES["llama"].make()), "low_rank", {"up": 5, "o": 3})
    tensors = load_file(write(tmp_path / "dense", tmp_path / "out", plan) / "model.safetensors")
    replaced = sorted(f"{name}.weight" for name in plan.choices)
    assert [key for key in replaced if key in tensors] == replaced[:1]
    assert tensors[replaced[0]].numel() == 0


def test_output_in_shards_loads(tmp_path: Path) -> None:
    save_model(FAMILIES["llama"].make(), tmp_path / "dense")
    plan = plan_of(targets.find(FAMILIES["llama"].make()), "low_rank", {"up": 5})
    seen: list[tuple[str, int, int]] = []
    small = write(tmp_path / "dense", tmp_path / "a", plan, shard_bytes=20_000, progress=lambda *d: seen.append(d))
    whole = write(tmp_path / "dense", tmp_path / "b", plan)
    assert len(list(small.glob("*.safetensors"))) > 2
    assert seen[-1][1] == seen[-1][2] and {stage for stage, _, _ in seen} == {"write"}
    one, other = AutoModelForCausalLM.from_pretrained(small), AutoModelForCausalLM.from_pretrained(whole)
    torch.testing.assert_close(logits(one), logits(other), rtol=0, atol=0)


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    dense = save_model(FAMILIES["llama"].make(), tmp_path / "dense", max_shard_size="20KB")
    (dense / "LICENSE").write_text("free")
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    (dense / "pytorch_model.bin").write_text("pickled")
    plan = plan_of(targets.find(FAMILIES["llama"].make()), "low_rank", {"up": 5})
    out = write(dense, tmp_path / "out", plan)
    names = {path.name for path in out.iterdir()}
    assert {
        "LICENSE",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    } <= names
    assert not {"pytorch_model.bin", "model.safetensors.index.json"} & names
    assert (out / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_casting_to_another_dtype(tmp_path: Path) -> None:
    save_model(FAMILIES["llama"].make(), tmp_path / "dense")
    plan = plan_of(targets.find(FAMILIES["llama"].make()), "pivot", {"up": 5})
    out = write(tmp_path / "dense", tmp_path / "out", plan, dtype=torch.bfloat16)
    kinds = {key.rpartition(".")[2]: tensor.dtype for key, tensor in load_file(out / "model.safetensors").items()}
    assert kinds == {"weight": torch.bfloat16, "bias": torch.bfloat16, "order": torch.int32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_checkpoints_without_the_base_models_prefix(tmp_path: Path) -> None:
    """Factors are stored under names of the same style as the rest, and load."""
    model = FAMILIES["gpt2"].make()
    save_model(model, tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file(tensors, file, metadata={"format": "pt"})
    structure = targets.find(model)
    plan = plan_of(structure, "low_rank", {"up": 5, "qkv": 9})
    out = write(tmp_path / "dense", tmp_path / "out", plan)
    stored = load_file(out / "model.safetensors")
    assert "h.0.mlp.c_fc.left.weight" in stored and "h.0.attn.bias" in stored
    assert not any(key.startswith("transformer.") for key in stored)
    apply.live(model, structure, plan, candidates_of(LiveModel(model), structure))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model), rtol=0, atol=0)


def test_a_plan_without_choices_changes_nothing(tmp_path: Path) -> None:
    dense = save_model(FAMILIES["llama"].make(), tmp_path / "dense")
    structure = targets.find(FAMILIES["llama"].make())
    out = write(dense, tmp_path / "out", Plan({}, 10**9, 0))
    before, after = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((dense / "config.json").read_text())
    model = FAMILIES["llama"].make()
    apply.live(model, structure, Plan({}, 10**9, 0), {})
    assert not hasattr(model.config, "quantization_config")


def test_progress_of_a_live_model_counts_to_its_total() -> None:
    model = FAMILIES["llama"].make()
    structure = targets.find(model)
    plan = plan_of(structure, "low_rank", {"up": 5, "o": 3})
    seen: list[tuple[str, int, int]] = []
    apply.live(model, structure, plan, candidates_of(LiveModel(model), structure), lambda *done: seen.append(done))
    assert seen == [("write", i, 4) for i in range(1, 5)]


def whole(out: int, width: int) -> tuple[Target, Part]:
    part = Part("m", out, width, "x")
    return Target("m", "up", (0,), (part,)), part


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rank", [0, 1, 7, 15])
def test_formed_tensors_fit_the_spec_and_give_the_product(format: str, rank: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(16, rank), torch.randn(rank, 24)
    spec = apply.spec_of(Choice({"m": format}, {"rank": rank}), *whole(16, 24))
    tensors = apply.form(spec, {"left": left, "right": right}, torch.float32)
    module = {"low_rank": LowRank, "pivot": Pivot}[format].build(spec, tensors, None)
    torch.testing.assert_close(module.dense(), left @ right, rtol=1e-4, atol=1e-5)
    assert module.spec() == spec


def test_the_saved_live_model_loads_as_it_is(tmp_path: Path) -> None:
    model = FAMILIES["falcon"].make()
    structure = targets.find(model)
    plan = plan_of(structure, "pivot", {"qkv": 9, "up": 4})
    apply.live(model, structure, plan, candidates_of(LiveModel(model), structure))
    spectrim.save(model, tmp_path / "saved")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model), rtol=0, atol=0
    )
