"""Methods by name: what is found, and what an error says."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from spectrim.core import registry

NAMES = ("svd", "asvd", "fwsvd", "input_weighted_svd", "whitened_svd")


def test_shipped_methods_are_registered() -> None:
    assert set(NAMES) <= registry.decomposers().keys()
    assert "uniform" in registry.allocators()


def test_the_tables_are_copies() -> None:
    registry.decomposers().clear()
    registry.allocators().clear()
    assert registry.decomposers() and registry.allocators()


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"'svd' is registered twice.*PlainSVD"):
        registry.decomposer("svd")(registry.decomposers()["asvd"])
    with pytest.raises(ValueError, match="'uniform' is registered twice"):
        registry.allocator("uniform")(registry.allocators()["uniform"])


def test_methods_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_decomposers", dict(registry.decomposers()))

    @dataclasses.dataclass(frozen=True)
    class Other:
        strength: float = 1.0

    def entry_points(group: str) -> list[SimpleNamespace]:
        assert group == "spectrim.methods"
        return [SimpleNamespace(load=lambda: registry.decomposer("other_svd")(Other))]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert registry.decomposers()["other_svd"] is Other


def test_an_import_error_of_another_package_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("no module named missing")

    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(load=broken)])
    with pytest.raises(ImportError, match="missing"):
        registry.allocators()


def test_settings_are_the_fields() -> None:
    method = registry.build("decomposer", registry.decomposers(), "asvd", {"alpha": 0.25})
    assert method == registry.decomposers()["asvd"](alpha=0.25)
    # as YAML gives it
    assert registry.build("decomposer", registry.decomposers(), "asvd", {"alpha": 1}).alpha == 1.0
    assert registry.build("allocator", registry.allocators(), "uniform", {}) == registry.allocators()["uniform"]()


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown decomposer 'whitend_svd': did you mean 'whitened_svd'") as error:
        registry.build("decomposer", registry.decomposers(), "whitend_svd", {})
    assert all(name in str(error.value) for name in NAMES)
    with pytest.raises(ValueError, match="unknown allocator 'unifrom': did you mean 'uniform'"):
        registry.build("allocator", registry.allocators(), "unifrom", {})


def test_a_name_like_no_other_lists_those_known() -> None:
    with pytest.raises(ValueError, match="unknown decomposer 'qqqq': Known: asvd"):
        registry.build("decomposer", registry.decomposers(), "qqqq", {})


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'asvd' has no setting 'alpa': did you mean 'alpha'"):
        registry.build("decomposer", registry.decomposers(), "asvd", {"alpa": 0.5})
    with pytest.raises(ValueError, match="'svd' has no setting 'alpha'"):
        registry.build("decomposer", registry.decomposers(), "svd", {"alpha": 0.5})


@pytest.mark.parametrize("name", ["needs", "sees", "grain"])
def test_what_a_method_says_of_itself_is_no_setting(name: str) -> None:
    for kind, table in (("allocator", registry.allocators()), ("decomposer", registry.decomposers())):
        for method in table:
            with pytest.raises(ValueError, match=f"has no setting {name!r}"):
                registry.build(kind, table, method, {name: "units"})


@pytest.mark.parametrize(("value", "reason"), [("much", "number"), ([1], "number"), (None, "number")])
def test_a_setting_of_a_wrong_type(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"decomposer 'asvd', setting alpha: .*{reason}.*given") as error:
        registry.build("decomposer", registry.decomposers(), "asvd", {"alpha": value})
    assert repr(value) in str(error.value)


def test_a_setting_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^allocator 'uniform': multiple is 0: .*given {'multiple': 0}$"):
        registry.build("allocator", registry.allocators(), "uniform", {"multiple": 0})
    with pytest.raises(ValueError, match=r"setting multiple: .*integer.*given 1\.5"):
        registry.build("allocator", registry.allocators(), "uniform", {"multiple": 1.5})
