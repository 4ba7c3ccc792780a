"""The files of a model: find them, read the configuration, see that the weights are whole."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

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
JSON_BYTES = 2**28  # an index of 100 000 tensors takes some 10 MB
MOST_LAYERS = 2**14  # some configurations make lists of that length as soon as they are read
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?")


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
    config = configuration(directory, trust_remote_code)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and not _is_causal(config):
        made_for = ", ".join(config.architectures or ()) or config.model_type
        raise ValueError(
            f"{directory} is a {config.model_type} model ({made_for}), which is not a causal language model of "
            "transformers; spectrim compresses decoder models (AutoModelForCausalLM)"
        )
    return config


def configuration(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model of any kind. Raises ValueError if it cannot be read."""
    _refuse_odd(directory, config_json(directory))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # the classes raise whatever their own arithmetic and checks raise for a wrong value
        raise ValueError(f"{directory}: the configuration cannot be used: {_said(error)}") from error
    return config


def _refuse_odd(directory: Path, data: dict[str, Any]) -> None:
    """Raise ValueError for what the configuration classes take without a look, or only after a long time."""
    right = {"auto_map": dict, "quantization_config": dict, "architectures": list, "model_type": str}
    for key, kind in right.items():
        if data.get(key) is not None and not isinstance(data[key], kind):
            raise ValueError(f"{directory}: the configuration cannot be used: {key} cannot be {data[key]!r:.200}")
    if not all(isinstance(name, str) for name in data.get("architectures") or ()):
        raise ValueError(f"{directory}: the configuration cannot be used: architectures must be a list of names")
    for part in (data, *(value for value in data.values() if isinstance(value, dict))):
        for key, value in part.items():
            if _LAYERS.fullmatch(key) and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"{directory}: its config.json says {key} = {value}; at most {MOST_LAYERS:,} are read")


def _said(error: Exception) -> str:
    """An error of other code in words: one without a message of its own says at least its kind."""
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def read_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises ValueError naming the directory if there is none, or it is damaged."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files give anything, even a bare Exception
        raise ValueError(
            f"{directory}: the tokenizer cannot be read: {_said(error)}; fetch its tokenizer files again"
        ) from error


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

    An index names its shards; other safetensors may lie beside them. A shard may be a link, as in the hub's cache.
    Raises ValueError when there are none, one is missing, or one is truncated or damaged; for an index that is no such
    object or names anything but .safetensors files of this directory.
    """
    index = directory / "model.safetensors.index.json"
    files = [directory / name for name in (_shards(index) if index.exists() else ["model.safetensors"])]
    for file in files:
        try:
            if not file.is_file():
                raise ValueError(
                    f"{directory}: {file.name} is missing; spectrim reads safetensors only "
                    "(convert pickled .bin weights with save_pretrained first)"
                )
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); fetch it again") from error
    return files


def has_weights(directory: Path) -> bool:
    """Whether a model directory holds weights of any kind, or what would name them."""
    return any(path.name.endswith(_WEIGHTS) for path in directory.iterdir())


def _shards(index: Path) -> list[str]:
    """The files an index names. Raises ValueError for a name that could lead out of its directory, or to a pickle."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, an object of tensor names and the files they are in")
    for key, name in weight_map.items():
        plain = isinstance(name, str) and not set(name) & set("/\\:\0") and name.isprintable()
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: the file of {key!r:.200} is {name!r:.200}; it must be the plain name of a .safetensors file "
                "beside the index"
            )
    return sorted(set(weight_map.values()))


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


def stored_dtype(file: Path, key: str, name: str) -> torch.dtype:
    """The dtype of a safetensors name such as BF16. Raises ValueError, naming file and tensor, for any other one."""
    if name not in DTYPES:
        raise ValueError(f"{file}: the tensor {key} is stored as {name}; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def config_json(directory: Path) -> dict[str, Any]:
    """The raw config.json. Raises ValueError as `read_json`."""
    return read_json(directory / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file: not there, no JSON, no object, above 256 MiB."""
    try:
        if not path.is_file():
            raise ValueError("no such file")
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"it is larger than {JSON_BYTES:,} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} cannot be read: it holds a {type(data).__name__}, not an object of JSON")
    return data
