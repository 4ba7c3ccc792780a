"""Saves compressed models so that they load in three ways, and loads them.

The three: with this package imported, by plain `from_pretrained`; without it, by `trust_remote_code=True`, from the one
code file written beside the weights; after `export_dense`, by anything. Without both package and trust the load fails.
"""

import ast
import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from spectrim.model import files, modules, quantizer
from spectrim.model.checkpoint import refuse_absurd
from spectrim.model.quantizer import CODE_MODULE, METHOD, SpectrimConfig, SpectrimQuantizer, mark, register

CODE_FILE = f"{CODE_MODULE}.py"
Layout = Mapping[str, Mapping[str, Any]]

logger = logging.getLogger(__name__)

_CODE = '''# SPDX-License-Identifier: Apache-2.0
"""Written by spectrim: loads this checkpoint with trust_remote_code=True; needs torch and transformers only."""

{imports}

{modules}


{quantizer}


class {config}(_Config):
    """The config of the model before it was compressed."""


class {model}(_Model):
    """The model before it was compressed; transformers puts the compressed modules in while it loads."""

    config_class = {config}
'''


def attach(model: PreTrainedModel, layout: Layout) -> None:
    """Bring a model that was compressed in memory into the state of a loaded one, so that it saves its layout.

    ValueError if a module the layout names is not in the model with that spec.
    """
    config = SpectrimConfig(layout=layout)
    present = {name: modules.spec_of(module) for name, module in model.named_modules()}
    for name, spec in config.layout.items():
        if name not in present or present[name] != spec:
            found = present.get(name, "not in the model")
            raise ValueError(f"module {name!r}: the layout says {spec}, the model's is {found}")
    mark(model, SpectrimQuantizer(config, pre_quantized=True))


def save(model: PreTrainedModel, directory: str | Path, **kwargs: Any) -> None:
    """Save a compressed model with its code file; keywords go to `save_pretrained` (max_shard_size, …).

    ValueError if the model has no layout, or for push_to_hub: the files are complete only after the upload would be.
    """
    layout = getattr(getattr(model.config, "quantization_config", None), "layout", None)
    if layout is None:
        raise ValueError("the model has no layout: compress it, or call attach(model, layout) first")
    if kwargs.get("push_to_hub"):
        raise ValueError("push_to_hub=True would upload an incomplete checkpoint: save, then upload the directory")
    # Old tensor names, which transformers would restore for some families, may stand for several modules fused.
    model.save_pretrained(directory, **{"save_original_format": False, **kwargs})
    if kwargs.get("is_main_process", True):
        write_config(directory, read_config(directory), layout, type(model.config), type(model))


def load(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a causal model, compressed or not; keywords go to `AutoModelForCausalLM.from_pretrained`.

    Of safetensors only: pickled weights are refused. ValueError for a directory whose files are damaged or do not
    belong together, for a layout that does not fit the model or its tensors, or of a newer format version.
    """
    register()
    if not kwargs.get("gguf_file"):
        kwargs.setdefault("use_safetensors", True)
    elsewhere = any(kwargs.get(key) for key in ("gguf_file", "subfolder", "variant", "state_dict", "config"))
    if (Path(directory) / "config.json").is_file() and not elsewhere:
        _refuse_damaged(Path(directory), bool(kwargs.get("trust_remote_code")))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    return model


def _refuse_damaged(directory: Path, trust_remote_code: bool) -> None:
    """Raise ValueError, naming the file, for what transformers would find late, in other words or not at all."""
    config = files.configuration(directory, trust_remote_code)
    weights = files.weight_files(directory)
    if is_compressed(directory):
        read_layout(directory)  # whether the files can fill it is the quantizer's to say
    elif getattr(config, "quantization_config", None) is None:
        refuse_absurd(directory, config, weights, trust_remote_code)


def is_compressed(directory: str | Path) -> bool:
    """Return whether a directory holds a model compressed by spectrim. ValueError without a config.json."""
    entry = read_config(directory).get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


def read_layout(directory: str | Path) -> dict[str, dict[str, Any]]:
    """Return {module name: spec} of a compressed model. ValueError if it is not one, or of a newer format version."""
    if not is_compressed(directory):
        raise ValueError(f"{directory} holds no model compressed by spectrim: its config.json has no such layout")
    try:
        return SpectrimConfig(**read_config(directory)["quantization_config"]).layout
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return what config.json of a model directory holds. ValueError if there is none, or it holds no such object."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    return files.read_json(path)


def write_config(
    directory: str | Path, config: Mapping[str, Any], layout: Layout, config_class: type, model_class: type
) -> None:
    """Write config.json with the layout, and beside it the code file that loads the model without this package.

    The code file subclasses the two classes as transformers exports them. A model whose classes come from its own
    remote code keeps its own auto_map instead, and needs this package to load.
    """
    entry = SpectrimConfig(layout=layout).to_dict()
    complete = {**config, "quantization_config": entry}
    native = [_native(config_class), _native(model_class)]
    if native[0] is None or native[1] is None:
        logger.warning("%s is not part of transformers: loading needs spectrim installed", model_class.__name__)
    else:
        names = [kind.__name__ for kind in native if kind is not None]
        others = {key: value for key, value in (config.get("auto_map") or {}).items() if not _for_models(key)}
        complete["architectures"] = names[1:]
        complete["auto_map"] = {
            **others,
            "AutoConfig": f"{CODE_MODULE}.{names[0]}",
            "AutoModelForCausalLM": f"{CODE_MODULE}.{names[1]}",
        }
        (Path(directory) / CODE_FILE).write_text(code(*names), encoding="utf-8")
    text = json.dumps(complete, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (Path(directory) / "config.json").write_text(text, encoding="utf-8")


def code(config_name: str, model_name: str) -> str:
    """Return the source of the code file: `modules.py` and `quantizer.py` in one, and the two classes to load by.

    The classes bear the names of those they subclass: these are what `architectures` names after saving again.
    """
    first, second = _parts(modules), _parts(quantizer)
    imports = sorted({*first[0], *second[0], f"from transformers import {config_name} as _Config"})
    imports.append(f"from transformers import {model_name} as _Model")
    return _CODE.format(
        imports="\n".join(imports), modules=first[1], quantizer=second[1], config=config_name, model=model_name
    )


def _parts(module: ModuleType) -> tuple[list[str], str]:
    """Return a module's imports, without those of its siblings, and the rest of its source without the docstring."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    imports = []
    for position, node in enumerate(ast.parse(source).body):
        imported = isinstance(node, ast.Import | ast.ImportFrom)
        if imported and not (isinstance(node, ast.ImportFrom) and node.level):
            imports.append(ast.unparse(node))
        if imported or position == 0:
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return imports, "\n".join(lines).strip()


def _native(kind: type) -> type | None:
    """Return the class as transformers exports it, also for one from a code file of ours; None for any other."""
    origin = kind.__bases__[0] if kind.__module__.endswith(CODE_MODULE) else kind
    return origin if getattr(transformers, origin.__name__, None) is origin else None


def _for_models(key: str) -> bool:
    return key == "AutoConfig" or key.startswith("AutoModel")
