"""Statistics shrunk on their way to decomposers: which ones, what keys say of it, and whole runs of any Gram user."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
from spectrim.calibrate.shrinking import Shrinking
from spectrim.calibrate.statistics import Gram, Norm, Tokens
from spectrim.core.linalg import directions
from spectrim.methods.svd import WhitenedSVD
from spectrim.recipe import RecipeError
from tests.families import VOCABULARY

IDS = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))


def test_grams_are_pulled_and_all_else_stays() -> None:
    gram, norm = torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([4.0, 5.0])
    measured = {"q": {Gram(): gram, Norm(): norm}, "k": {Gram(): gram}}
    found = Shrinking(0.5, "identity").of(measured)
    assert found["q"][Gram()].tolist() == [[2.5, 0.5], [0.5, 1.5]] and found["q"][Norm()] is norm
    assert found["k"][Gram()] is found["q"][Gram()], "of an input that is shared, one is made"
    assert gram.tolist() == [[3, 1], [1, 1]] and float(found["q"][Gram()].trace()) == float(gram.trace())
    assert Shrinking(0.0).of(measured)["q"][Gram()] is gram


def test_keys_tell_strengths_apart_but_only_where_something_shrinks() -> None:
    keys = [
        Shrinking(share, to).key([Gram(), Tokens()]) for share in (0.0, 0.1, 0.2) for to in ("diagonal", "identity")
    ]
    assert keys[0] == keys[1] == {} and len({str(key) for key in keys}) == 5
    assert Shrinking(0.1).key([Norm()]) == {} and Shrinking(0.1).key([]) == {}


def factors(made: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(made.directory / "model.safetensors")


@pytest.mark.parametrize("recipe", ["whitened", "duo-svd-columns", "spectrim-input"])
def test_shrunk_to_the_mean_alone_is_the_weight_s_own_decomposition(
    recipe: str, llama_dir: Path, tmp_path: Path
) -> None:
    """Predicted: at 1 towards the identity G is a multiple of I, whatever the text."""
    trial = ["groups.0.allocate.trial=2"] if recipe == "spectrim-input" else []
    given: dict[str, Any] = {"ratio": 0.3, "work": tmp_path / "work"}
    texts = [IDS, IDS.flip(0)[:3]] if recipe != "spectrim-input" else [IDS]
    made = [
        spectrim.compress(
            llama_dir, recipe, text=text, out=tmp_path / f"{i}", **given,
            settings=["calibrate.shrink=1", "calibrate.shrink_to=identity", *trial],
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    plain = spectrim.compress(llama_dir, recipe, text=IDS, out=tmp_path / "plain", settings=trial, **given)
    assert made[0].run is not None and plain.plan.choices.keys()
    same = factors(made[0])
    assert any(not torch.equal(same[name], tensor) for name, tensor in factors(plain).items())
    for other in made[1:]:
        for name, tensor in factors(other).items():
            torch.testing.assert_close(tensor, same[name], rtol=1e-3, atol=1e-4)


def test_whitened_svd_is_given_the_shrunk_gram(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    original = WhitenedSVD.metric

    def noting(self: WhitenedSVD, stats: Any) -> Any:
        seen.append(stats[Gram()])
        return original(self, stats)

    monkeypatch.setattr(WhitenedSVD, "metric", noting)
    for share in (0.0, 0.25):
        settings = [f"calibrate.shrink={share}", "calibrate.shrink_to=diagonal"]
        spectrim.compress(llama_dir, "whitened", 0.3, IDS, tmp_path / f"{share}", settings=settings)
    half = len(seen) // 2
    for gram, shrunk in zip(seen[:half], seen[half:], strict=True):
        off = ~torch.eye(len(gram), dtype=torch.bool)
        torch.testing.assert_close(shrunk[off], 0.75 * gram[off])
        torch.testing.assert_close(shrunk.diagonal(), gram.diagonal())


def test_strengths_are_not_confused_in_one_work_directory(llama_dir: Path, tmp_path: Path, calls: Counter[str]) -> None:
    """Another strength measures and decomposes anew, the same one nothing; and it matters what it is."""
    work, made = tmp_path / "work", {}
    for i, share in enumerate((0.0, 0.1, 0.3, 0.1)):
        made[i] = spectrim.compress(
            llama_dir, "whitened", 0.3, IDS, tmp_path / f"{i}", work=work, settings=[f"calibrate.shrink={share}"]
        )
    assert calls["streamed"] == 3
    alone = spectrim.compress(llama_dir, "whitened", 0.3, IDS, tmp_path / "alone", settings=["calibrate.shrink=0.1"])
    for other in (made[1], made[3]):
        assert all(torch.equal(factors(other)[name], tensor) for name, tensor in factors(alone).items())
    assert any(not torch.equal(factors(made[2])[name], tensor) for name, tensor in factors(alone).items())


def test_a_second_pass_is_given_shrunk_grams_too(llama_dir: Path, tmp_path: Path) -> None:
    found = []
    for share in (0.0, 0.3):
        settings = ["calibrate.sequential=true", "calibrate.target=mix", f"calibrate.shrink={share}"]
        out = tmp_path / f"{share}"
        made = spectrim.compress(llama_dir, "whitened", 0.3, IDS, out, work=tmp_path / "work", settings=settings)
        found.append(factors(made))
    assert any(not torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize("setting", ["shrink=1.5", "shrink=-0.1", "shrink=often", "shrink_to=mean", "shrink=.nan"])
def test_settings_out_of_range(setting: str, llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"calibrate\.{setting.partition('=')[0]}"):
        spectrim.compress(llama_dir, "whitened", 0.3, IDS, tmp_path / "out", settings=[f"calibrate.{setting}"])


def test_directions_of_a_shrunk_gram_hold_more_of_what_the_text_lacked() -> None:
    """Predicted: inputs of a plane that no token of the text used are cut whole without shrinking, not with it."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.9, 1.0], dtype=torch.float64))
    gram = torch.diag(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    kept = []
    for share in (0.0, 0.5):
        left, _ = directions(weight, Shrinking(share, "identity").of({"w": {Gram(): gram}})["w"][Gram()])
        kept.append(float((left[:, :2].T @ weight)[:, 1:3].norm()))
    assert kept[0] == 0 and kept[1] > 1.9
