"""Whether a call needs torch's dispatcher at all: the cost of a small layer is the way to its kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _never() -> int:
    return 1


_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", _never)
_function_modes = getattr(torch._C, "_len_torch_function_stack", _never)
_jit_trace = getattr(torch._C, "_get_tracing_state", _never)
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", _never)
any_autocast = getattr(torch._C, "_is_any_autocast_enabled", _never)
"""Whether autocast is on for some device; a torch without it makes every call take the dispatcher."""


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor and nothing looks on: no tracing, compiling, mode, functorch or forward AD.

    What is left for the dispatcher to do is then to choose by the device and to record a gradient.
    """
    return (
        not is_compiling()
        and type(x) in _PLAIN_TYPES
        and not _dispatch_modes()
        and not _function_modes()
        and _transform() is None
        and _jit_trace() is None
        and forward_ad._current_level < 0
    )
