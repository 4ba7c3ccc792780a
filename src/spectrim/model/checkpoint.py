"""Where weights come from, a block at a time: a checkpoint on disk, or a model in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as hf_logging

from spectrim.core import heap
from spectrim.model import modules
from spectrim.model.files import file_hash, keys, read_config, refuse_quantized, stored_dtype, weight_files
from spectrim.model.prefetch import Ahead
from spectrim.model.quantizer import refuse_unfilled

logger = logging.getLogger(__name__)

_PIECE = 2**20  # numbers that are looked at together


@runtime_checkable
class Weights(Protocol):
    """A model whose weights can be had a part at a time; `model` is its skeleton."""

    model: PreTrainedModel

    def load(self, prefix: str, device: torch.device) -> None:
        """Give the parameters under the module `prefix` their values, on `device`."""
        ...

    def prefetch(self, prefix: str, device: torch.device) -> None:
        """Begin to read what `load` will be asked for next, where that is done beside the work on `device`."""
        ...

    def release(self, prefix: str) -> None:
        """Free the parameters under `prefix` again, if they can be had again."""
        ...

    def load_outside(self, blocks: str, device: torch.device) -> list[str]:
        """Load what lies outside the blocks, but for an output head that is not tied; the names loaded."""
        ...

    def release_names(self, names: list[str]) -> None:
        """Free these parameters again, if they can be had again."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor stored under the model's parameter name, in its stored dtype."""
        ...

    def whole(self, device: torch.device) -> PreTrainedModel:
        """The model with all its weights, on `device`."""
        ...

    def fingerprint(self) -> str:
        """A hash of every weight: part of a store key."""
        ...


# each weight is allocated for a moment, and in the heap would leave a hole that tensors of a run then fill
@heap.small(heap.TIGHT)
def skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers real (rotary tables and the like)."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def refuse_absurd(
    directory: Path,
    config: PretrainedConfig,
    files: Sequence[Path],
    trust_remote_code: bool = False,
    layout: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Raise ValueError for a configuration (and layout) that the files cannot fill, before memory of its size is taken.

    All of the model is on the meta device here, tables too, which `skeleton` makes for real.
    """
    stored, tensors = sum(file.stat().st_size for file in files), sum(len(keys(file)) for file in files)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"{directory}: {layers:,} layers by its config.json, but {tensors:,} tensors in its files")
    model = _on_meta(directory, config, trust_remote_code)
    try:
        modules.swap(model, layout or {})
        refuse_unfilled(model, stored)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _on_meta(directory: Path, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """All of the model on the meta device. Raises ValueError where there is no such model."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model class raises for sizes that do not go together
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{directory}: no model can be made by its config.json: {said}") from error
    return model


def described(
    directory: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, torch.dtype]:
    """The skeleton of a model of which only the configuration is there, and the dtype its weights would be stored in.

    dtype: the one to compute in (None: as stored). Raises ValueError as `Checkpoint` does for a bad configuration.
    """
    config = read_config(directory, trust_remote_code)
    refuse_quantized(config, str(directory))
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    outline = _on_meta(directory, config, trust_remote_code)
    try:
        refuse_unfilled(outline, stored.itemsize * sum(p.numel() for p in outline.parameters()))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return skeleton(config, dtype or stored, trust_remote_code), stored


class Checkpoint:
    """A checkpoint on disk, read a module at a time; `dtype` is the one to compute in (None: as stored)."""

    def __init__(self, directory: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False):
        self.directory, self.trust_remote_code = directory, trust_remote_code
        self.config = read_config(directory, trust_remote_code)
        refuse_quantized(self.config, str(directory))
        self.files = weight_files(directory)
        self.where = {key: file for file in self.files for key in keys(file)}
        self.stored_dtype = self._main_dtype()
        refuse_absurd(directory, self.config, self.files, trust_remote_code)
        self.model = skeleton(self.config, dtype or self.stored_dtype, trust_remote_code)
        self.mapping = get_model_conversion_mapping(self.model)
        # what transformers would load each stored tensor into; a converted one goes with others into one parameter
        self.names: dict[str, str] = {}
        self.converted: set[str] = set()
        self._map_names()
        self._ahead = Ahead(self._tensor)

    def _main_dtype(self) -> torch.dtype:
        sizes: dict[torch.dtype, int] = {}
        for key, file in self.where.items():
            with safe_open(file, framework="pt") as opened:
                piece = opened.get_slice(key)
                dtype = stored_dtype(file, key, piece.get_dtype())
                sizes[dtype] = sizes.get(dtype, 0) + torch.Size(piece.get_shape()).numel()
        floating = {dtype: size for dtype, size in sizes.items() if dtype.is_floating_point}
        if not floating:
            raise ValueError(f"{self.directory}: the checkpoint holds no floating-point tensor")
        return max(floating, key=lambda dtype: floating[dtype])

    def _map_names(self) -> None:
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        for key in self.where:
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
            if name in state:
                self.names[key] = name
                if pattern is not None:
                    self.converted.add(key)
                elif self._shape(key) != state[name].shape:
                    raise ValueError(self._misfit(name, self._shape(key), state[name].shape))

    def _shape(self, key: str) -> torch.Size:
        with safe_open(self.where[key], framework="pt") as file:
            return torch.Size(file.get_slice(key).get_shape())

    def _misfit(self, name: str, stored: torch.Size, expected: torch.Size) -> str:
        shapes = f"is {tuple(stored)} in the checkpoint, {tuple(expected)} by its config.json"
        return f"{self.directory}: the weight {name} {shapes}; they do not belong together"

    def stored_key(self, name: str) -> str:
        """The checkpoint's key of a parameter that is stored by itself. Raises ValueError if it is not."""
        for key, known in self.names.items():
            if known == name and key not in self.converted:
                return key
        raise ValueError(f"{self.directory}: no tensor for {name}")

    def load(self, prefix: str, device: torch.device) -> None:
        """As in `Weights`. Raises ValueError naming a parameter that is missing or not finite."""
        self._load(self._inside(prefix), device)
        _move_buffers(self.model.get_submodule(prefix), device)
        for name, parameter in self.model.get_submodule(prefix).named_parameters(prefix):
            if parameter.is_meta:
                raise ValueError(f"{self.directory}: the checkpoint has no tensor for {name}")

    def _inside(self, prefix: str) -> list[str]:
        """The keys of what lies under a module."""
        return [key for key, name in self.names.items() if _under(name, prefix)]

    def prefetch(self, prefix: str, device: torch.device) -> None:
        """As in `Weights`: for a GPU, into main memory; on a CPU it would be held beside the block that is run there.

        Errors of reading are raised by `load`.
        """
        if device.type == "cuda":
            self._ahead.begin(self._inside(prefix))

    def load_outside(self, blocks: str, device: torch.device) -> list[str]:
        """As in `Weights`."""
        head = self.model.get_output_embeddings()
        inside = {id(p) for p in head.parameters()} if head is not None else set()
        tied = {id(p) for p in self.model.get_input_embeddings().parameters()}
        skipped = {name for name, p in self.model.named_parameters() if id(p) in inside - tied}
        wanted = {k: n for k, n in self.names.items() if not _under(n, blocks) and n not in skipped}
        self._load(list(wanted), device)
        for name, module in self.model.named_modules():
            if not _under(name, blocks):
                _move_buffers(module, device, recurse=False)
        self.model.tie_weights()
        return list(wanted.values())

    def _load(self, keys: list[str], device: torch.device) -> None:
        ahead = self._ahead.take(keys)
        if ahead is None:
            pieces = {key: self._tensor(key) for key in keys}
        else:  # what follows on the device waits for the copies, and so does the memory that they come from
            pieces = {key: tensor.to(device, non_blocking=True) for key, tensor in ahead.items()}
        mapping: Any = self.mapping
        settings = LoadStateDictConfig(weight_mapping=mapping, dtype=self.model.dtype, device_map={"": device})
        with quiet():
            found, _ = convert_and_load_state_dict_in_model(self.model, pieces, settings)
        for name, stored, expected in sorted(found.mismatched_keys):
            raise ValueError(self._misfit(name, stored, expected))
        for name in {self.names[key] for key in keys}:
            _check_finite(name, self._parameter(name))

    def _parameter(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(module), leaf)
        assert isinstance(tensor, Tensor)
        return tensor

    def release(self, prefix: str) -> None:
        """As in `Weights`: back to the meta device; buffers back to main memory."""
        module = self.model.get_submodule(prefix)
        self.release_names([name for name, _ in module.named_parameters(prefix)])
        _move_buffers(module, torch.device("cpu"))

    def release_names(self, names: list[str]) -> None:
        """As in `Weights`: back to the meta device; buffers stay."""
        for name in names:
            tensor = self._parameter(name)
            if isinstance(tensor, nn.Parameter):
                module, _, leaf = name.rpartition(".")
                empty = nn.Parameter(tensor.to("meta"), requires_grad=False)
                setattr(self.model.get_submodule(module), leaf, empty)
        self.model.tie_weights()

    def _tensor(self, key: str) -> Tensor:
        with safe_open(self.where[key], framework="pt") as file:
            return file.get_tensor(key)

    def read(self, name: str) -> Tensor:
        """As in `Weights`."""
        return self.read_key(self.stored_key(name))

    def read_key(self, key: str) -> Tensor:
        """The tensor stored under a key of the checkpoint. Raises ValueError if it is not finite."""
        tensor = self._tensor(key)
        _check_finite(self.names.get(key, key), tensor)
        return tensor

    def dtype_of(self, key: str) -> torch.dtype:
        """Its stored dtype."""
        with safe_open(self.where[key], framework="pt") as file:
            return stored_dtype(self.where[key], key, file.get_slice(key).get_dtype())

    def whole(self, device: torch.device) -> PreTrainedModel:
        """As in `Weights`."""
        with quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self.directory, dtype=self.model.dtype, trust_remote_code=self.trust_remote_code
            )
        check_finite(model)
        return moved(model, device).eval()

    def fingerprint(self) -> str:
        """As in `Weights`: sha256 over the files and the configuration."""
        return file_hash([*self.files, self.directory / "config.json"])


class LiveModel:
    """A model in memory: `load` and `release` have nothing to do."""

    def __init__(self, model: PreTrainedModel):
        refuse_quantized(model.config, "the model")
        check_finite(model)
        self.model = model

    def load(self, prefix: str, device: torch.device) -> None:
        """Nothing to load."""

    def prefetch(self, prefix: str, device: torch.device) -> None:
        """Nothing to load."""

    def load_outside(self, blocks: str, device: torch.device) -> list[str]:
        """Nothing to load."""
        return []

    def release(self, prefix: str) -> None:
        """Nothing to free."""

    def release_names(self, names: list[str]) -> None:
        """Nothing to free."""

    def read(self, name: str) -> Tensor:
        """As in `Weights`."""
        return self.model.get_parameter(name).detach()

    def whole(self, device: torch.device) -> PreTrainedModel:
        """As in `Weights`; a live model stays where it is."""
        return self.model

    def fingerprint(self) -> str:
        """As in `Weights`: sha256 over the state dict."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _move_buffers(module: nn.Module, device: torch.device, recurse: bool = True) -> None:
    """Tables and the like, which a skeleton has in main memory, to where the weights beside them are."""
    for owner in module.modules() if recurse else (module,):
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device))


def check_finite(model: nn.Module) -> None:
    """Raise ValueError naming a parameter that holds NaN or infinity, or no values at all (offloaded)."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"the weight {name} is not in memory (offloaded): load it whole, or give its directory")
        _check_finite(name, parameter)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    pieces = tensor.reshape(-1).split(_PIECE)  # `isfinite` makes a copy of what it is given
    if not all(_finite(piece) for piece in pieces):
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
        raise ValueError(f"the weight {name} holds {bad:,} values that are not finite (NaN or infinity)")


def _finite(piece: Tensor) -> bool:
    """Whether all its numbers are: where their sum is, which is a tenth of the work; else, it may have overflowed."""
    total = piece.sum(dtype=torch.float32 if piece.dtype.itemsize < 4 else piece.dtype)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(piece).all())


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bar for every block."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on a device."""
    on_device: PreTrainedModel = nn.Module.to(model, device)
    return on_device
