"""What transformers needs to load, save and unfold compressed models: the config entry and the quantizer behind it.

transformers calls a quantizer before it reads the weights (here empty modules are put in place), after (here they are
checked) and when it saves. This file imports torch and transformers only: a copy of it is in every checkpoint.
"""

import copy
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .modules import checked, empty, is_transposed, spec_of, swap

FORMAT_VERSION = 1
METHOD = "spectrim"
CODE_MODULE = "spectrim_model"  # the code file beside a checkpoint, without its .py

logger = logging.getLogger(__name__)


class SpectrimConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a compressed checkpoint's config.json: its layout and its format version."""

    def __init__(
        self,
        layout: Any = None,  # {module name: spec}; what a file holds may be anything
        format_version: Any = FORMAT_VERSION,
        quant_method: Any = METHOD,
        **unknown: Any,
    ) -> None:
        if type(format_version) is not int or format_version < 1:
            raise ValueError(f"the spectrim format_version is a number from 1 on, not {format_version!r:.200}")
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has the spectrim format_version {format_version!r}, this code reads up to version "
                f"{FORMAT_VERSION}: install a newer release of spectrim, one that reads version {format_version!r}"
            )
        if unknown or quant_method != METHOD:
            raise ValueError(f"not a spectrim quantization_config: {quant_method=}, unknown keys {sorted(unknown)}")
        if layout is not None and not isinstance(layout, Mapping):
            raise ValueError(f"the layout is an object of module names and specs, not {layout!r:.200}")
        self.quant_method: Any = quant_method
        self.format_version = format_version
        self.layout: dict[str, dict[str, Any]] = {}
        for name, spec in (layout or {}).items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"the layout names a module {name!r:.200}, which is no name")
            try:
                self.layout[name] = checked(spec)
            except ValueError as error:
                raise ValueError(f"the layout's entry for module {name!r}: {error}") from error


def guard_name(layout: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the module under whose `.weight` a tensor without entries is saved; None if all formats are `dense`.

    Code that knows nothing of the layout expects the dense weight there and stops at the wrong size, where it would
    otherwise only warn and fill the weights it misses with random numbers.
    """
    return next((name for name in sorted(layout) if layout[name]["format"] != "dense"), None)


class SpectrimQuantizer(HfQuantizer):
    """Puts the layout's modules into a model as transformers loads it. The weights are neither quantized nor frozen."""

    format_version = FORMAT_VERSION
    requires_calibration = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def layout(self) -> dict[str, dict[str, Any]]:
        layout: dict[str, dict[str, Any]] = self.quantization_config.layout  # type: ignore[attr-defined]
        return layout

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Say yes for the layout's tensors: transformers then leaves their shapes to us to check."""
        parts = param_name.split(".")
        return any(".".join(parts[:end]) in self.layout for end in range(1, len(parts)))

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        prefix = model.base_model_prefix
        guard = guard_name(self.layout)
        self.quantization_config.layout = _local(model, self.layout, prefix)  # type: ignore[attr-defined]
        swap(model, self.layout)
        files = kwargs.get("checkpoint_files")
        if files:
            refuse_unfilled(model, sum(os.path.getsize(file) for file in files))
        for name, spec in self.layout.items():
            _stand_in(spec, model.get_submodule(name))
        if guard is not None:
            pattern = rf"(^|\.){re.escape(guard.removeprefix(prefix + '.'))}\.weight$"
            known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
            model._keys_to_ignore_on_load_unexpected = {*known, pattern}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, spec in self.layout.items():
            _settle(name, spec, model.get_submodule(name))
        mark(model, self)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the model's tensors and the guard; transformers saves what this returns."""
        tensors = model.state_dict()
        guard = guard_name(self.layout)
        if guard is not None:
            tensors[f"{guard}.weight"] = torch.zeros(0)
        return tensors, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Put plain dense layers in the place of the compressed modules; a `dense` one keeps its smaller size."""
        with torch.device("meta"):
            original = type(model)(copy.deepcopy(model.config))
        for name in self.layout:
            module = model.get_submodule(name)
            assert isinstance(module, nn.Module) and spec_of(module) is not None
            model.set_submodule(name, _plain(name, module, original.get_submodule(name), model))
        # transformers passes the config's dtype if the caller named none; the model may have been cast since.
        if dtype is not None and str(dtype).removeprefix("torch.") != str(model.config.dtype).removeprefix("torch."):
            model.to(dtype)
        return model


def refuse_unfilled(model: nn.Module, stored: int) -> None:
    """Raise ValueError for a skeleton whose parameters or buffers cannot come from files of `stored` bytes.

    A stored number takes a byte or more, and the head may be tied to the embedding: so at most 2 numbers a byte. Of
    the buffers most are indices as stored, in wider integers, or small tables: so at most 4 times the bytes, and 1 GiB.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() > stored:
            shape = f"{tuple(parameter.shape)} by its config.json"
            raise ValueError(f"the weight {name} is {shape}, more than its files of {stored:,} bytes can hold")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if numbers > 2 * stored or buffers > 4 * stored + 2**30:
        wanted = f"{numbers:,} numbers and {buffers:,} bytes of tables"
        raise ValueError(f"the model of its config.json has {wanted}, more than its files of {stored:,} bytes can fill")


def mark(model: Any, quantizer: SpectrimQuantizer) -> None:
    """Make the model save its layout, but not refuse what a quantized model refuses (`float`, `half`, training)."""
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = False
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_is_quantized", False):
            module.config._is_quantized = False
    # Saved by `save_pretrained`, an auto_map would name a code file that is not there, unless the class is from it.
    auto_map = getattr(model.config, "auto_map", None)
    if auto_map and not type(model).__module__.endswith(CODE_MODULE):
        ours = f"{CODE_MODULE}."
        model.config.auto_map = {key: value for key, value in auto_map.items() if ours not in str(value)}
        if not model.config.auto_map:
            del model.config.auto_map


def register() -> None:
    """Make transformers know the format; keeps a registration of this or a newer format version."""
    known = AUTO_QUANTIZER_MAPPING.get(METHOD)
    if known is not None and getattr(known, "format_version", 0) >= FORMAT_VERSION:
        return
    for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
        table.pop(METHOD, None)
    register_quantization_config(METHOD)(SpectrimConfig)
    register_quantizer(METHOD)(SpectrimQuantizer)


def _local(model: nn.Module, layout: dict[str, dict[str, Any]], prefix: str) -> dict[str, dict[str, Any]]:
    """Return the layout under this model's names: the base model's have no prefix, those of its head models do."""
    known = {name for name, _ in model.named_modules()}

    def local(name: str) -> str:
        return next((n for n in (name, f"{prefix}.{name}", name.removeprefix(prefix + ".")) if n in known), name)

    owners: dict[str, str] = {}
    for name in layout:
        if owners.setdefault(local(name), name) != name:
            raise ValueError(f"the layout names one module twice: {owners[local(name)]!r} and {name!r}")
    return {local: layout[name] for local, name in owners.items()}


def _stand_in(spec: dict[str, Any], module: nn.Module) -> None:
    """Give a module a `weight` until it is loaded: some families' initialisation wants to see that it needs none."""
    if spec["format"] != "dense":
        weight: Any = torch.empty(spec["out"], spec["in"], device="meta")
        weight._is_hf_initialized = True
        module.weight = weight


def _settle(name: str, spec: dict[str, Any], module: nn.Module) -> None:
    """Check that a module got all its tensors, then let it derive its buffers. ValueError names the module."""
    if spec["format"] != "dense":
        del module.weight  # the stand-in
    missing = []
    wanted = empty(spec, device="meta").state_dict()
    for key, tensor in module.state_dict(keep_vars=True).items():
        if tensor.shape != wanted[key].shape:
            shapes = f"{tuple(tensor.shape)}, its layout needs {tuple(wanted[key].shape)}"
            raise ValueError(f"module {name!r}: the checkpoint's tensor {key!r} has the shape {shapes} ({spec})")
        if tensor.is_floating_point() != wanted[key].is_floating_point() or tensor.is_complex():
            kinds = f"{tensor.dtype}, its layout needs {wanted[key].dtype}"
            raise ValueError(f"module {name!r}: the checkpoint's tensor {key!r} is {kinds} ({spec})")
        if tensor.is_meta and not tensor.is_floating_point():
            raise ValueError(f"module {name!r}: its indices cannot be offloaded; load without offload_buffers=True")
        # transformers marks what it read; what it did not read it filled at random. On meta: offloaded to disk.
        if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
            missing.append(key)
    if missing:
        raise ValueError(f"module {name!r}: the checkpoint lacks {missing}, which its layout needs ({spec})")
    try:
        module.derive()  # type: ignore[operator]
    except ValueError as error:
        raise ValueError(f"module {name!r}: {error}") from error


def _plain(name: str, module: Any, original: nn.Module, model: Any) -> nn.Module:
    like = next(module.parameters(), model.get_input_embeddings().weight)
    weight = module.dense().detach().to(like)
    rows, width = weight.shape
    bias: Tensor | None = module.bias
    with torch.device("meta"):
        if is_transposed(original):
            new: nn.Module = Conv1D(rows, width)
            weight, bias = weight.t().contiguous(), weight.new_zeros(rows) if bias is None else bias
        else:
            new = nn.Linear(width, rows, bias=bias is not None)
    if bias is not None and getattr(original, "bias", None) is None:
        logger.warning("module %r has a bias that its dense layer lacked: a saved copy will not load as it is", name)
    new.register_parameter("weight", nn.Parameter(weight))
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(like)))
    return new.train(module.training)


# At the end, when all of it is there: whatever imports this file first, transformers knows the format afterwards.
register()
