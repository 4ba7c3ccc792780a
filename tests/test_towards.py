"""calibrate.target: the second pass towards the dense model, for every method, and whatever happens to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim import towards
from spectrim.core import registry
from spectrim.core.linalg import pulled
from spectrim.recipe import RecipeError
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(2))
PROMPT = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
MIX = ["calibrate.sequential=true", "calibrate.target=mix"]
# decomposers that are given FFNs as wholes, and what the others need to go through quickly
WHOLE = {name for name, each in registry.decomposers().items() if each().whole}
QUICK = {"robust_pca": ", iterations: 3"}


def recipe_of(tmp_path: Path, decompose: str, allocate: str = "uniform", match: str = "'*'") -> str:
    path = tmp_path / f"{decompose}-{allocate}.yaml"
    method = f"{{method: {decompose}{QUICK.get(decompose, '')}}}"
    path.write_text(f"groups: [{{match: {match}, ratio: 0.3, decompose: {method}, allocate: {{method: {allocate}}}}}]")
    return str(path)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(PROMPT).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("decompose", sorted(registry.decomposers()))
def test_every_decomposer_can(decompose: str, tmp_path: Path) -> None:
    match = "ffn" if decompose in WHOLE else "'*'"
    model = FAMILIES["llama"].make()
    dense = logits(model)
    result = spectrim.compress(model, recipe_of(tmp_path, decompose, match=match), text=CALIBRATION, settings=MIX)
    assert result.plan.choices and result.plan.spent <= result.plan.budget
    found = logits(model)
    assert found.isfinite().all() and not torch.equal(found, dense)
    other = FAMILIES["llama"].make()
    once = spectrim.compress(other, recipe_of(tmp_path, decompose, match=match), text=CALIBRATION)
    assert once.plan.choices.keys() == result.plan.choices.keys()
    assert (logits(other) - found).abs().max() > 1e-3, "towards other outputs, from other inputs"


@pytest.mark.parametrize("recipe", ["unirank", "spectrim-onepass", "lorap"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_whole_recipes_on_kinds_of_families(name: str, recipe: str) -> None:
    model = FAMILIES[name].make()
    result = spectrim.compress(model, recipe, 0.3, CALIBRATION, settings=MIX)
    assert result.plan.choices and logits(model).isfinite().all()


def test_the_closest_to_the_dense_model_is_what_is_aimed_at(tmp_path: Path) -> None:
    """The states that leave the blocks, on the calibration tokens, are nearer to those of the dense model."""
    asked = recipe_of(tmp_path, "whitened_svd")
    final: dict[str, Tensor] = {}
    for name, settings in {"dense": None, "once": [], "own": MIX[:1], "mix": [*MIX, "calibrate.mix=1.0"]}.items():
        model = FAMILIES["llama"].make()
        if settings is not None:
            spectrim.compress(model, asked, text=CALIBRATION, settings=settings)
        with torch.no_grad():
            final[name] = model.model(CALIBRATION).last_hidden_state
    away = {name: float((state - final["dense"]).norm()) for name, state in final.items()}
    assert away["mix"] < 0.95 * min(away["once"], away["own"]), away


def test_aimed_at_its_own_outputs_every_matrix_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def watched(weight: Tensor, gram: Tensor, missed: Tensor, share: float, ridge: float) -> Tensor:
        shares.append(share)
        found = pulled(weight, gram, missed, share, ridge)
        assert torch.equal(found, weight.double()) == (share == 0 or not missed.any())
        return found

    monkeypatch.setattr(towards, "pulled", watched)
    for mix, share in ((["calibrate.mix=0.0"], 0.0), (["calibrate.mix=0.25"], 0.25), (["calibrate.target=dense"], 1.0)):
        shares.clear()
        spectrim.compress(
            FAMILIES["llama"].make(), recipe_of(tmp_path, "whitened_svd"), text=CALIBRATION, settings=[*MIX, *mix]
        )
        assert shares == [share] * 14


def test_from_memory_from_disk_and_with_little_memory_are_the_same(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"].make(), tmp_path / "dense")
    asked = recipe_of(tmp_path, "whitened_svd")
    settings = [*MIX, "calibrate.batch=2"]
    spectrim.compress(directory, asked, text=CALIBRATION, out=tmp_path / "out", settings=settings)
    live = FAMILIES["llama"].make()
    spectrim.compress(live, asked, text=CALIBRATION, settings=settings)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(live), logits(found), rtol=0, atol=1e-5)
    spectrim.compress(directory, asked, text=CALIBRATION, out=tmp_path / "spilled", settings=settings, memory="100MB")
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "spilled", "run.json")
    assert not list((tmp_path / "spilled.work" / "states").glob("*")), "states are gone"


@pytest.mark.parametrize(("recipe", "memory"), [("whitened", None), ("spectrim-onepass", "100MB")])
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 8, pytest.param(13, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    at: int, recipe: str, memory: str | None, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str) -> None:
        spectrim.compress(llama_dir, recipe, 0.3, CALIBRATION, tmp_path / out, settings=MIX, memory=memory)

    run("whole")
    count = 0

    def interrupting(*args: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return pulled(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(towards, "pulled", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    assert count == at and not (tmp_path / "out").exists()
    made = []
    monkeypatch.setattr(towards, "pulled", lambda *args: made.append(1) or pulled(*args))
    run("out")
    assert len(made) <= 14 - at + 3, "what was made before is not made again, but for the others of its step"
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "whole", "run.json")


def test_another_share_makes_only_the_second_pass_again(llama_dir: Path, tmp_path: Path) -> None:
    for out, mix, made in (("a", 0.5, 14 + 12), ("b", 0.5, 14 + 12), ("c", 0.75, 14 + 12 + 12)):
        settings = [*MIX, f"calibrate.mix={mix}"]
        spectrim.compress(
            llama_dir, "unirank", 0.3, CALIBRATION, tmp_path / out, work=tmp_path / "work", settings=settings
        )
        assert len(list((tmp_path / "work" / "candidate").glob("*"))) == made
    assert tree_hash(tmp_path / "a", "run.json") == tree_hash(tmp_path / "b", "run.json")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibrate\.mix.* less than or equal to 1"):
        spectrim.compress(FAMILIES["llama"].make(), "whitened", text=CALIBRATION, settings=[*MIX, "calibrate.mix=1.5"])
    with pytest.raises(RecipeError, match=r"calibrate\.target: .*'own', 'dense' or 'mix', given 'dens'"):
        spectrim.compress(FAMILIES["llama"].make(), "whitened", text=CALIBRATION, settings=["calibrate.target=dens"])
    with pytest.raises(ValueError, match=r"do not add up .* set calibrate\.residual_aware to false or auto"):
        spectrim.compress(
            FAMILIES["gemma2"].make(), "whitened", text=CALIBRATION, settings=[*MIX, "calibrate.residual_aware=true"]
        )


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_the_residual_stream_is_aimed_at_where_it_can_be(name: str) -> None:
    found = {}
    for aware in ("auto", "false"):
        model = FAMILIES[name].make()
        settings = [*MIX, f"calibrate.residual_aware={aware}"]
        spectrim.compress(model, "whitened", text=CALIBRATION, settings=settings)
        found[aware] = logits(model)
    assert torch.equal(found["auto"], found["false"]) == (name == "gemma2")


def kl(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    with torch.no_grad():
        known, found = (each(ids).logits.double().log_softmax(-1) for each in (model, other))
    return float((known.exp() * (known - found)).sum(-1).mean())


SPLIT = ["calibrate.select=0.5", "calibrate.accept=0.25"]


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2", "gemma2"])
def test_the_share_is_chosen_on_text_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(1, VOCABULARY, (128, 24), generator=torch.Generator().manual_seed(4))
    asked, settings = recipe_of(tmp_path, "whitened_svd"), [*MIX, *SPLIT, "calibrate.mix=auto"]
    settings += ["calibrate.residual_aware=false"]
    directory = save_model(FAMILIES[name].make(), tmp_path / "dense")
    measured: dict[str, list[float]] = {}
    original = towards.divergence

    def watched(run: Any, plan: Any, candidates: Any, windows: Tensor, *dense: Any) -> float:
        found = original(run, plan, candidates, windows, *dense)
        measured.setdefault(str(windows.tolist()), []).append(found)
        return found

    monkeypatch.setattr(towards, "divergence", watched)
    result = spectrim.compress(directory, asked, text=ids, out=tmp_path / "out", settings=settings)
    (note,) = (note for note in result.plan.notes if note.startswith("calibrate.mix"))
    share = float(note.split(":")[1].split(",")[0])
    select, accept = ids[32:96], ids[96:]
    assert set(measured) == {str(select.tolist()), str(accept.tolist())}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # of those tried the best, by what the models themselves say
    lost = measured[str(select.tolist())]
    assert len(lost) >= 3 and min(lost) == pytest.approx(kl(FAMILIES[name].make(), made, select), rel=1e-3)
    assert measured[str(accept.tolist())][1] == pytest.approx(kl(FAMILIES[name].make(), made, accept), rel=1e-3)
    alone = [each for each in settings if "auto" not in each and "accept" not in each]
    again = spectrim.compress(
        FAMILIES[name].make(),
        asked,
        text=ids[:96],
        settings=[*alone, "calibrate.select=0.66667", f"calibrate.mix={share}"],
    )
    assert again.model is not None
    torch.testing.assert_close(logits(again.model), logits(made), rtol=1e-4, atol=1e-4)


def test_a_second_pass_that_is_worse_on_other_text_is_not_kept(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out, values in (("worse", [0.1, 0.2]), ("broken", [0.1, float("nan")]), ("better", [0.2, 0.1])):
        left = list(values)
        monkeypatch.setattr(towards, "divergence", lambda *args, left=left: left.pop(0))
        result = spectrim.compress(
            llama_dir, "whitened", 0.3, CALIBRATION, tmp_path / out, work=tmp_path / "work",
            settings=[*MIX, "calibrate.accept=0.25"],
        )  # fmt: skip
        (note,) = (note for note in result.plan.notes if note.startswith("KL on the windows of accept"))
        assert note.endswith("the first one stays") == (out != "better")
    monkeypatch.undo()
    spectrim.compress(llama_dir, "whitened", 0.3, CALIBRATION[:9], tmp_path / "once")
    spectrim.compress(llama_dir, "whitened", 0.3, CALIBRATION[:9], tmp_path / "again", settings=MIX)
    for out, same in (("worse", "once"), ("broken", "once"), ("better", "again")):
        found, right = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in (out, same))
        torch.testing.assert_close(logits(found), logits(right), rtol=0, atol=1e-5)


def test_too_little_text_to_choose_on_is_said(tmp_path: Path) -> None:
    settings = [*MIX, "calibrate.mix=auto", "calibrate.select=0.2"]
    result = spectrim.compress(FAMILIES["llama"].make(), "whitened", text=CALIBRATION, settings=settings)
    assert any("48 tokens of calibrate.select to choose on, not 1024: it is 0.5" in note for note in result.plan.notes)
    with pytest.raises(RecipeError, match=r"select 0\.5 and calibrate\.accept 0\.5 leave none of 12 windows"):
        spectrim.compress(
            FAMILIES["llama"].make(), "whitened", text=CALIBRATION,
            settings=["calibrate.select=0.5", "calibrate.accept=0.5"],
        )  # fmt: skip


def test_allocators_measure_on_text_that_nothing_was_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectrim.model.live import Installed

    seen: list[Tensor] = []
    original = Installed.batches

    def watched(self: Installed, *args: Any) -> list[Tensor]:
        seen.extend(found := original(self, *args))
        return found

    monkeypatch.setattr(Installed, "batches", watched)
    spectrim.compress(
        FAMILIES["llama"].make(), "spectrim-onepass", 0.3, CALIBRATION, settings=["calibrate.select=0.25"]
    )
    assert seen and all(any(torch.equal(row, right) for right in CALIBRATION[9:]) for ids in seen for row in ids)
