"""A device that is not there: tensors that say they lie on `lazy:0` while a processor computes with them. What mixes them with
tensors of this machine, or looks at their memory, fails as it does with a real accelerator."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PLACE = torch.device("lazy", 0)


class There(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "There":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=PLACE
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(function, args, kwargs or {})


def _carried_out(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    copies = function.overloadpacket.__name__ == "copy_"
    there = any(isinstance(x, There) for x in given)
    if there and not copies and any(not isinstance(x, There) and x.dim() for x in given):
        raise RuntimeError(f"{function}: tensors of two devices")
    asked = kwargs.get("device")
    if copies:
        there = isinstance(args[0], There)
    elif asked is not None:
        there, kwargs = torch.device(asked).type == "lazy", {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, kwargs))
    made = function(*args, **kwargs)
    return tree_map(lambda x: There(x) if there and isinstance(x, torch.Tensor) else x, made)


class Here(TorchDispatchMode):
    """While it is active, the device exists."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(function, args, kwargs or {})


def with_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, in any thread, with the device there."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with Here():
            return method(*args, **kwargs)

    return call
