"""Compressed models in the tools around transformers: generation, adapters, training, compilation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from spectrim.model import loading, modules
from tests.families import FAMILIES
from tests.model.test_loading import SIZES, compressed, logits

# transformers 5.23 renames gradient_checkpointing; 5.16 and adapter libraries know the old name only
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TOKENS = torch.arange(1, 21).view(2, 10)
FACTORS = [["left", "right"], ["base", "mix"], ["left", "right", "base", "mix", "kept"]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings and grouped-query attention, every format in it."""
    path = tmp_path_factory.mktemp("ecosystem")
    loading.save(compressed(FAMILIES["llama_tied"].make(), SIZES), path)
    return path


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    return loading.load(directory)


def dense(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).dequantize()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(model: PreTrainedModel, cache: str) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    found = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    wanted = dense(model).generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    assert found.shape == (2, 18)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("targets", FACTORS, ids="-".join)
def test_lora_on_the_factors(model: PreTrainedModel, targets: list[str], tmp_path: Path) -> None:
    """Adapters are found, train, merge into the factors, and the merged model is a compressed one of the same ranks."""
    from peft import LoraConfig, get_peft_model

    before, factors = logits(model), dict(model.named_modules())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    count = sum(name.rpartition(".")[2] in targets for name in factors)
    assert len([n for n, _ in adapted.named_parameters() if n.endswith("lora_A.default.weight")]) == count > 0
    trained = logits(adapted)
    assert (trained - before).abs().max() > 1e-3
    loss = adapted(TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_" in n)
    layout = model.hf_quantizer.layout
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
    loading.save(merged, tmp_path / "merged")
    assert loading.read_layout(tmp_path / "merged") == layout
    assert torch.equal(logits(loading.load(tmp_path / "merged")), logits(merged))


def test_a_saved_adapter_loads_on_the_compressed_model(directory: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=2, target_modules=FACTORS[0], init_lora_weights=False)
    adapted = get_peft_model(loading.load(directory), config)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loading.load(directory), tmp_path)
    assert torch.equal(logits(again), logits(adapted))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(model: PreTrainedModel, checkpointing: bool) -> None:
    """Every parameter that is used gets one, the same with gradient checkpointing."""
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_trainer(model: PreTrainedModel, tmp_path: Path) -> None:
    """A step of full fine-tuning moves every factor; the checkpoint it saves is a compressed one."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, save_steps=1,
        disable_tqdm=True, dataloader_pin_memory=False, gradient_checkpointing=True, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    torch.testing.assert_close(logits(again), logits(model))


def test_deep_copies_and_casts(model: PreTrainedModel) -> None:
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    torch.testing.assert_close(logits(model.bfloat16()).float(), before, atol=0.3, rtol=0.1)


@torch.no_grad()
def test_compiles_to_one_graph(model: PreTrainedModel) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own parts
def test_compiles_with_inductor(model: PreTrainedModel) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS).logits, model(TOKENS).logits, atol=1e-4, rtol=1e-4)
    compiled(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_format_is_in_it(model: PreTrainedModel) -> None:
    found = {spec["format"] for module in model.modules() if (spec := modules.spec_of(module))}
    assert found == modules.FORMATS.keys() - {"dense"}


def test_offloaded_to_disk(model: PreTrainedModel, directory: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    loaded = loading.load(directory, device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.get_submodule("model.layers.0.self_attn.q_proj.left").weight.is_meta
    torch.testing.assert_close(logits(loaded), logits(model))


def test_the_base_model_and_back(model: PreTrainedModel, directory: Path, tmp_path: Path) -> None:
    """Names lose the base model's prefix, and get it again."""
    base = AutoModel.from_pretrained(directory)
    hidden = base(TOKENS).last_hidden_state
    torch.testing.assert_close(hidden, model.model(TOKENS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert min(loading.read_layout(tmp_path / "base")) == min(loading.read_layout(directory)).removeprefix("model.")
    torch.testing.assert_close(logits(loading.load(tmp_path / "base")), logits(model))


def test_a_loaded_model_is_not_refused_what_a_quantized_one_is(directory: Path) -> None:
    loaded = loading.load(directory)
    assert not loaded.is_quantized
    assert {p.dtype for p in loaded.half().parameters()} == {torch.float16}
    assert {p.dtype for p in loaded.float().parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_dequantize(family: str, tmp_path: Path) -> None:
    model = compressed(FAMILIES[family].make())
    before, kinds = logits(model), {type(m) for m in FAMILIES[family].make().modules()}
    plain = model.dequantize()
    assert {type(m) for m in plain.modules()} == kinds
    torch.testing.assert_close(logits(plain), before, atol=1e-2, rtol=1e-2)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    plain.save_pretrained(tmp_path)
    assert not loading.is_compressed(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))
    assert {p.dtype for p in compressed(FAMILIES[family].make()).dequantize(torch.bfloat16).parameters()} == {
        torch.bfloat16
    }
