"""The files of a model: find them, read the configuration, see that the weights are whole."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def resolve(model: str) -> Path:
    """The local directory of MODEL: a directory, `reference` (the bundled model), or a hub name, then downloaded.

    Of the hub only safetensors, JSON, tokenizer files and code are fetched. Raises ValueError when there is neither.
    """
    if model == "reference":
        return Path(str(importlib.resources.files("spectrim") / "assets" / "reference"))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{path} is no model directory: it holds no config.json")
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"no such model directory: {model}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{model} is no directory here and could not be had from the hub: {error}") from error


def read_config(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration. Raises ValueError if it cannot be read or belongs to no causal language model."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory}: the configuration cannot be used: {error}") from error
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and not _is_causal(config):
        made_for = ", ".join(config.architectures or ()) or config.model_type
        raise ValueError(
            f"{directory} is a {config.model_type} model ({made_for}), which is not a causal language model of "
            "transformers; spectrim compresses decoder models (AutoModelForCausalLM)"
        )
    return config


def _is_causal(config: PretrainedConfig) -> bool:
    """Whether transformers has a causal model of this configuration, and the checkpoint was saved as one."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return False
    known: Any = AutoModelForCausalLM._model_mapping[type(config)]
    endings = (known.__name__, "ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return not config.architectures or any(name.endswith(endings) for name in config.architectures)


def refuse_quantized(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError for a model whose weights are compressed or quantized already."""
    entry = getattr(config, "quantization_config", None)
    if entry is not None:
        method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", entry)
        raise ValueError(
            f"{name} is compressed already (quant_method {method}): give the model it was made from, or a dense one "
            "(of spectrim's own: spectrim export --format dense)"
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each opened once to see that it is whole.

    An index names its shards; other safetensors may lie beside them. Raises ValueError when there are none, one is
    missing, or one is truncated or damaged.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [directory / name for name in names]
    for file in files:
        if not file.exists():
            raise ValueError(
                f"{directory}: {file.name} is missing; spectrim reads safetensors only "
                "(convert pickled .bin weights with save_pretrained first)"
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); fetch it again") from error
    return files


def file_hash(files: list[Path]) -> str:
    """sha256 over the contents of files."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def keys(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def config_json(directory: Path) -> dict[str, Any]:
    """The raw config.json."""
    data: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return data
