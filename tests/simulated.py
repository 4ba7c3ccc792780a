"""A GPU that is none: tensors said to be on `cuda:0` that compute on the CPU, and refuse to meet tensors of the CPU.

So a run with `--device cuda` can be had where there is no GPU, and what would fail on one, two tensors of an operation
in two places, fails here too. What a real one adds, its rounding, its streams and its memory, is not to be seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# operations that answer where their first tensor is, wherever the others are: copies into it, and indices of it
OF_FIRST = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_", "set_")

GUARDED = (
    Tensor.__getitem__, Tensor.__setitem__, Tensor.contiguous, Tensor.nonzero, torch.nonzero, Tensor.tolist,
    Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__,
)  # fmt: skip


class OnGPU(Tensor):
    """Said to be on the GPU; `held` is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        """Without numbers of its own: what C++ looks at is a tensor of that shape on the meta device."""
        outline = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        made: OnGPU = Tensor._make_subclass(cls, outline, False, dispatch_device=True, device_for_backend_keys=CUDA)
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As on a GPU."""
        return simulate(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As on a GPU; some methods ask the device itself before they get to `__torch_dispatch__`."""
        if func not in GUARDED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if not isinstance(args[0], OnGPU):
            raise RuntimeError("indices on cuda:0 of a tensor on the CPU")
        found = func(*_inner(args), **(kwargs or {}))
        return tree_map(lambda value: OnGPU(value) if isinstance(value, Tensor) else value, found)

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.held!r})"


class Simulation(TorchDispatchMode):
    """Makes tensors that are asked for on `cuda`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As on a GPU."""
        return simulate(func, args, kwargs or {})


def simulate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU, and say that what comes of it is where it would be."""
    if func is torch.ops.prim.device.default:
        return CUDA
    name = func.overloadpacket.__name__
    leaves, _ = tree_flatten((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, OnGPU)]
    here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnGPU) and leaf.ndim]
    if there and here and name not in (*OF_FIRST, "_to_copy"):
        raise RuntimeError(f"{func}: tensors on cuda:0 and of shape {tuple(here[0].shape)} on the CPU")
    if name == "_fused_sdp_choice":
        return 0  # written out, as on any device without a kernel of its own
    asked = kwargs.get("device")
    on_gpu = bool(there) if asked is None else asked.type == "cuda"
    if name in OF_FIRST:
        on_gpu = isinstance(args[0], OnGPU)
        if there and not on_gpu and name != "copy_":
            raise RuntimeError(f"{func}: a tensor on the CPU, with others on cuda:0")
    known = {id(leaf.held): leaf for leaf in there}
    found = func(*_inner(args), **_inner(kwargs))

    def said(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else OnGPU(value) if on_gpu else value

    return tree_map(said, found)


def _inner(values: Any) -> Any:
    """Tensors and places as they really are."""

    def real(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return CPU if leaf.type == "cuda" else leaf
        return leaf.held if isinstance(leaf, OnGPU) else leaf

    return tree_map(real, values)


def _is_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


@contextmanager
def gpu(patch: pytest.MonkeyPatch, pinned: Callable[[Tensor], Tensor] = torch.clone) -> Iterator[None]:
    """While inside, `cuda` is there; fast in float64."""
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "simulated")
    patch.setattr("spectrim.model.prefetch.pinned", pinned)
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # a plain one cannot become `OnGPU`
    made = torch.tensor

    def tensor(data: Any, *, device: torch.device | str | None = None, **more: Any) -> Tensor:
        """`torch.tensor` copies to a device without a word to `__torch_dispatch__`."""
        return OnGPU(made(data, **more)) if device is not None and _is_cuda(device) else made(data, **more)

    patch.setattr(torch, "tensor", tensor)
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # its threads would not know of the simulation
    with Simulation(), torch.no_grad():  # the ways back of what wants gradients would ask the device itself
        yield
