"""Registers the module formats with transformers: at once if it is loaded, else at the moment it loads its quantizers.

Nothing heavy is imported here, so importing the package stays light.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRIGGER = "transformers.quantizers.auto"  # the module that holds transformers' table of quantizers


def install() -> None:
    """Make `AutoModelForCausalLM.from_pretrained` know compressed checkpoints; calling it again does nothing."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # It registers itself at its end, which is still to come where its own import is what wakes transformers.
    import_module("spectrim.model.quantizer")


class _Finder(MetaPathFinder):
    """Finds the trigger module where the other finders do, and registers after it has run."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            # On this one loader object: a loader class of our own would hide what the real one can do beside.
            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
