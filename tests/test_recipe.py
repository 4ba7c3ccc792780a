"""Recipes: those shipped, what the command line changes in them, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from spectrim import recipe as recipes
from spectrim.core import registry
from spectrim.core.plan import Part, Target
from spectrim.methods.spectrim import TwoSidedSVD
from spectrim.methods.svd import ActivationSVD, PlainSVD, Uniform
from spectrim.recipe import Calibrate, Recipe, RecipeError, build, grouped, matches, read, shipped, validated

SIMPLE: dict[str, Any] = {
    "calibrate": {"sequences": 16, "length": 64, "seed": 3},
    "groups": [{"match": ["q", "k"], "ratio": 0.3, "decompose": {"method": "asvd", "alpha": 0.25}}],
}


def target(name: str, role: str) -> Target:
    return Target(name, role, (0,), (Part(name, 8, 8, name),))


TARGETS = [target(f"model.layers.{i}.{role}_proj", role) for i in range(2) for role in ("q", "k", "up", "down")]
FFNS = [
    Target(f"model.layers.{i}.mlp", "ffn", (i,), tuple(t.parts[0] for t in TARGETS[4 * i + 2 : 4 * i + 4]))
    for i in range(2)
]


def changed(**keys: Any) -> dict[str, Any]:
    """SIMPLE with other keys in its group."""
    return {**SIMPLE, "groups": [{**SIMPLE["groups"][0], **keys}]}


def decomposer(recipe: Recipe, each: Target) -> Any:
    """The decomposer of a target, where there is one group."""
    (group,) = recipe.groups
    return recipe.decomposers(group, [each])[each.name]


def written(folder: Path, data: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return str(path)


# --- those shipped ---


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_builds(name: str) -> None:
    recipe = build(name)
    assert recipe.about and shipped()[name] == recipe.about
    for group, members in zip(recipe.groups, grouped(recipe, TARGETS, FFNS), strict=True):
        assert members
        assert type(recipe.allocator(group)) in registry.allocators().values()
        found = recipe.decomposers(group, members)
        assert found.keys() == {each.name for each in members}
        assert {type(method) for method in found.values()} <= set(registry.decomposers().values())


def test_there_is_a_recipe_for_every_baseline() -> None:
    assert shipped().keys() >= {"default", "svd", "asvd", "fwsvd", "input-weighted", "whitened"}


def test_the_default_is_our_own() -> None:
    default, own = build("default"), build("spectrim")
    assert default.model_copy(update={"about": own.about}) == own
    assert default.groups[0].format == "pivot" and decomposer(default, TARGETS[0]) == TwoSidedSVD()
    assert default.calibrate.paired and default.calibrate.select and default.calibrate.accept


def test_a_recipe_is_read_from_a_file_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(written(tmp_path, SIMPLE)).calibrate == Calibrate(sequences=16, length=64, seed=3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "svd").mkdir()  # a folder of that name is no recipe
    assert read("svd")["groups"][0]["decompose"] == {"method": "svd"}


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'whitend': did you mean 'whitened'"):
        build("whitend")
    with pytest.raises(RecipeError, match=r"no such recipe file: .*missing\.yaml"):
        build(str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "just words"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        build(written(tmp_path, text))


# --- what a recipe says ---


def test_what_is_left_out_has_defaults() -> None:
    recipe = validated({"groups": [{"decompose": {"method": "svd"}}]}, "mine")
    assert recipe.calibrate == Calibrate()
    (group,) = recipe.groups
    assert (group.match, group.ratio, group.format) == ("*", 0.2, "plain")
    assert recipe.allocator(group) == Uniform()
    assert grouped(recipe, TARGETS) == [TARGETS]


def test_a_recipe_survives_being_written_down() -> None:
    recipe = validated(SIMPLE, "mine")
    again = Recipe.model_validate(recipe.model_dump())
    assert again == recipe
    assert decomposer(again, TARGETS[0]) == ActivationSVD(alpha=0.25)


def test_match_is_a_role_roles_or_a_glob_over_names() -> None:
    assert [matches("up", each) for each in TARGETS[:4]] == [False, False, True, False]
    assert [matches(["q", "down"], each) for each in TARGETS[:4]] == [True, False, False, True]
    assert [matches("*.1.*", each) for each in TARGETS] == [False] * 4 + [True] * 4
    assert [matches("*.layers.0.[qk]_proj", each) for each in TARGETS] == [True, True] + [False] * 6
    assert all(matches("*", each) for each in TARGETS)
    assert not any(matches("UP", each) for each in TARGETS)


def test_groups_part_the_targets_and_may_leave_some_dense() -> None:
    data = {"groups": [{"match": role, "decompose": {"method": "svd"}} for role in ("up", "q")]}
    up, q = grouped(validated(data, "mine"), TARGETS)
    assert [each.role for each in up] == ["up", "up"] and [each.role for each in q] == ["q", "q"]


def test_an_ffn_is_a_target_only_where_it_is_named() -> None:
    data = {"groups": [{"match": ["q", "k"], "decompose": {"method": "svd"}}]}
    data["groups"].append({"match": "ffn", "decompose": {"method": "channel_prune"}})
    assert grouped(validated(data, "mine"), TARGETS, FFNS)[1] == FFNS
    data["groups"] = [{"match": "*", "decompose": {"method": "svd"}}]
    assert grouped(validated(data, "mine"), TARGETS, FFNS) == [TARGETS]


@pytest.mark.parametrize("match", ["up", "*.0.*"])
def test_an_ffn_and_a_part_of_it_are_refused(match: str) -> None:
    data = {"groups": [{"match": each, "decompose": {"method": "svd"}} for each in ("ffn", match)]}
    with pytest.raises(
        RecipeError, match=r"model\.layers\.0\.(up|down)_proj is in two groups: groups\.0 and groups\.1"
    ):
        grouped(validated(data, "mine"), TARGETS, FFNS)
    data = {"groups": [{"match": ["ffn", match], "decompose": {"method": "svd"}}]}
    with pytest.raises(
        RecipeError, match=r"(up|down)_proj is in it by itself and as part of the FFN model\.layers\.0\.mlp"
    ):
        grouped(validated(data, "mine"), TARGETS, FFNS)


def test_a_target_in_two_groups_is_named() -> None:
    data = {"groups": [{"match": match, "decompose": {"method": "svd"}} for match in ("up", "*.1.*")]}
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.up_proj is in two groups: groups\.0 and groups\.1"):
        grouped(validated(data, "mine"), TARGETS)


def test_a_match_without_targets_names_the_roles_present() -> None:
    with pytest.raises(RecipeError, match=r"groups\.0: match 'gate' has no target.*down, k, q, up"):
        grouped(validated(changed(match="gate"), "mine"), TARGETS)


def test_several_decomposers_each_with_its_own_match() -> None:
    methods = [{"method": "asvd", "match": ["q", "k"], "alpha": 1}, {"method": "svd", "match": "*.0.*"}]
    recipe = validated({"groups": [{"decompose": methods}]}, "mine")
    found = [decomposer(recipe, each) for each in TARGETS[:4]]
    assert found == [ActivationSVD(1.0), ActivationSVD(1.0), PlainSVD(), PlainSVD()]
    with pytest.raises(RecipeError, match=r"no decomposer .* matches model\.layers\.1\.up_proj \(role up\)"):
        decomposer(recipe, TARGETS[6])


# --- what is refused ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**SIMPLE, "group": []}, "unknown key group: did you mean 'groups'"),
        ({**SIMPLE, "calibrate": {"sequence": 3}}, r"unknown key calibrate\.sequence: did you mean 'sequences'"),
        (changed(ration=0.3), r"unknown key groups\.0\.ration: did you mean 'ratio'"),
        (changed(ratio=1.0), r"groups\.0\.ratio: .*less than 1.*given 1\.0"),
        (changed(ratio=-0.1), r"groups\.0\.ratio: .*greater than or equal to 0.*given -0\.1"),
        (changed(ratio=float("nan")), r"groups\.0\.ratio: .*given nan"),
        (changed(ratio="much"), r"groups\.0\.ratio: .*number.*given 'much'"),
        (changed(format="pivots"), r"groups\.0\.format: .*'plain' or 'pivot'.*given 'pivots'"),
        (changed(match=3), r"groups\.0\.match"),
        (changed(decompose={"alpha": 1}), r"groups\.0\.decompose\.0\.method: .*required"),
        (changed(decompose="svd"), r"groups\.0\.decompose\.0: .*given 'svd'"),
        (changed(decompose=[]), r"groups\.0\.decompose"),
        (changed(decompose={"method": "svdd"}), "unknown decomposer 'svdd': did you mean 'svd'"),
        (changed(decompose={"method": "asvd", "alhpa": 1}), "'asvd' has no setting 'alhpa': did you mean 'alpha'"),
        (changed(decompose={"method": "asvd", "alpha": "a"}), "'asvd', setting alpha: .*number.*given 'a'"),
        (changed(decompose={"method": "asvd", "alpha": -1}), "'asvd': alpha is -1"),
        (changed(allocate={"method": "unifrom"}), "unknown allocator 'unifrom': did you mean 'uniform'"),
        (changed(allocate={"method": "uniform", "multiple": 0}), "'uniform': multiple is 0"),
        (changed(allocate={"method": "uniform", "match": "q"}), r"groups\.0\.allocate.*match"),
        ({**SIMPLE, "calibrate": {"sequences": 0}}, r"calibrate\.sequences: .*greater than 0.*given 0"),
        ({**SIMPLE, "calibrate": {"length": 1}}, r"calibrate\.length: .*greater than 1"),
        ({**SIMPLE, "groups": []}, "groups: .*at least 1"),
        ({"calibrate": {}}, "groups: .*required"),
        ({**SIMPLE, "groups": None}, "groups: .*list"),
    ],
)
def test_an_error_names_the_key_and_what_was_given(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validated(data, "mine")


def test_an_error_in_a_recipe_is_a_value_error_that_names_the_recipe(tmp_path: Path) -> None:
    name = written(tmp_path, changed(ratio=2))
    with pytest.raises(ValueError, match=r"mine\.yaml: groups\.0\.ratio"):
        build(name)


# --- what the command line changes ---


def test_settings_are_assigned_by_path(tmp_path: Path) -> None:
    settings = [
        "calibrate.sequences=4",
        "groups.0.ratio=0.5",
        "groups.0.match=[up, down]",
        "groups.0.decompose.alpha=1",
    ]
    recipe = build(written(tmp_path, SIMPLE), settings=[*settings, "groups.0.allocate.method=uniform", "about=a=b"])
    (group,) = recipe.groups
    assert recipe.calibrate == Calibrate(sequences=4, length=64, seed=3)
    assert (group.ratio, group.match) == (0.5, ["up", "down"])
    assert decomposer(recipe, TARGETS[2]) == ActivationSVD(alpha=1.0)
    assert recipe.about == "a=b"


def test_settings_make_the_mappings_they_need() -> None:
    recipe = validated({"groups": [{"decompose": {"method": "svd"}}]}, "mine")
    data: dict[str, Any] = {"groups": [{"decompose": {"method": "svd"}}]}
    recipes.assign(data, "calibrate.seed", 5)
    assert validated(data, "mine") == recipe.model_copy(update={"calibrate": Calibrate(seed=5)})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("calibrate.sequences", "write it as key.key=value"),
        ("calibrate.sequnces=3", r"unknown key calibrate\.sequnces: did you mean 'sequences'"),
        ("calibrat.sequences=3", "unknown key calibrat: did you mean 'calibrate'"),
        ("groups.1.ratio=0.3", "'1' is no index of a list of 1"),
        ("groups.1=0", "'1' is no index of a list of 1"),
        ("groups.first.ratio=0.3", "'first' is no index"),
        ("groups.0.ratio.x=0.3", r"cannot set 'groups\.0\.ratio\.x'"),
        ("groups.0.match.x.y=q", r"cannot set 'groups\.0\.match\.x\.y'"),
        ("groups.0.ratio=1.5", r"groups\.0\.ratio: .*given 1\.5"),
        ("groups.0.ratio=", r"groups\.0\.ratio: .*given None"),
        ("groups.0.match=[q", r"--set 'groups\.0\.match=\[q'"),
        ("=3", "unknown key"),
    ],
)
def test_a_setting_that_does_not_fit(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(written(tmp_path, SIMPLE), settings=[setting])


def test_shortcuts_reach_every_group_and_the_calibration(tmp_path: Path) -> None:
    both = [{"match": role, "ratio": 0.1, "decompose": {"method": "svd"}} for role in ("q", "up")]
    name = written(tmp_path, {**SIMPLE, "groups": both})
    shortcuts = {"ratio": 0.4, "format": "pivot", "sequences": 5, "length": None, "seed": 0}
    recipe = build(name, shortcuts)
    assert [(group.ratio, group.format) for group in recipe.groups] == [(0.4, "pivot")] * 2
    assert recipe.calibrate == Calibrate(sequences=5, length=64, seed=0)
    assert build(name, {"ratio": 0.4}, ["groups.1.ratio=0.6"]).groups[1].ratio == 0.6
    with pytest.raises(RecipeError, match=r"groups\.0\.ratio"):
        build(name, {"ratio": 1.0})


@pytest.mark.parametrize("groups", [None, 3, "q", ["q"]])
def test_shortcuts_on_a_recipe_without_groups(tmp_path: Path, groups: Any) -> None:
    with pytest.raises(RecipeError, match="groups"):
        build(written(tmp_path, {"groups": groups}), {"ratio": 0.3})


def test_a_recipe_made_already_takes_the_shortcuts_too() -> None:
    made = build("asvd", settings=["groups.0.decompose.alpha=0.25"])
    again = build(made, {"ratio": 0.35, "format": "pivot", "seed": 3})
    assert (again.groups[0].ratio, again.groups[0].format, again.calibrate.seed) == (0.35, "pivot", 3)
    assert again.groups[0].decompose == made.groups[0].decompose
    assert build(made) == made
