"""spectrim: make language models smaller by low-rank decomposition.

Importing it is light: neither torch nor transformers is imported, but once transformers is, checkpoints written by
spectrim load through plain `AutoModelForCausalLM.from_pretrained`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrim.model.hook import install as _install

if TYPE_CHECKING:
    from spectrim.measure.compare import compare
    from spectrim.measure.curve import curve
    from spectrim.measure.evaluate import evaluate
    from spectrim.model.export import export_dense
    from spectrim.model.loading import load, save
    from spectrim.pipeline import Result, compress
    from spectrim.tuning import tune

__all__ = ["Result", "compare", "compress", "curve", "evaluate", "export_dense", "load", "save", "tune"]
__version__ = "0.1.0"

_PLACES = {
    "Result": "spectrim.pipeline",
    "compare": "spectrim.measure.compare",
    "compress": "spectrim.pipeline",
    "curve": "spectrim.measure.curve",
    "evaluate": "spectrim.measure.evaluate",
    "export_dense": "spectrim.model.export",
    "load": "spectrim.model.loading",
    "save": "spectrim.model.loading",
    "tune": "spectrim.tuning",
}

_install()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'spectrim' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
