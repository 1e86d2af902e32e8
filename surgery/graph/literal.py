"""Tensors given by the user in Python, as expressions."""

from __future__ import annotations

import hashlib
from typing import Any

from surgery.checkpoint.dtypes import BY_TORCH
from surgery.errors import Refused
from surgery.graph.expr import Derived, Expr, Literal, Read, walk


def literal(tensor: Any, origin: Any = None) -> Literal:
    """A torch tensor, or anything `torch.as_tensor` takes, as an expression. Raises Refused for types files cannot hold."""
    import torch

    made = torch.as_tensor(tensor).detach().cpu().contiguous()
    dtype = BY_TORCH.get(str(made.dtype).removeprefix("torch."))
    if dtype is None:
        raise Refused(f"a tensor of {made.dtype} cannot be stored in safetensors")
    return Literal(made, dtype, origin)


def token(expr: Expr) -> str:
    """Content hash of an expression that stands outside the node graph."""
    digest = hashlib.sha256()
    for e in walk([expr]):
        if isinstance(e, Literal):
            import torch

            digest.update(e.tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(e, Read):
            digest.update(f"{e.source.fingerprint}/{e.stored.name}".encode())
        elif isinstance(e, Derived):
            digest.update(f"{e.identity}/{e.shape}".encode())
        else:
            digest.update(f"{type(e).__name__}/{getattr(e.origin, 'token', '')}/{e.shape}".encode())
    return digest.hexdigest()
