"""replace_mha and restore_mha: put this library's attention into an existing model, and take it out again.

A module is replaced by changing its class. It stays the same object, so parameters, optimizers, hooks, sharing,
training flags and references held elsewhere need no care.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrize

from .hard_modules import HardMultiheadAttention
from .modules import MultiheadAttention

# The modules of this library that a stock encoder layer must call in evaluation too.
_OURS = (MultiheadAttention, HardMultiheadAttention)

# Where a replaced encoder layer keeps its own activation_relu_or_gelu; see _close_fast_path.
_SAVED_ACTIVATION = "_activation_relu_or_gelu_before_replace_mha"


def replace_mha(model: nn.Module) -> nn.Module:
    """Turn every :class:`torch.nn.MultiheadAttention` in ``model`` into a :class:`torch_attn.MultiheadAttention`.

    Works in place and returns ``model``; doing it twice changes nothing. Parameters, buffers, hooks, parametrizations
    and state_dict stay as they are. In evaluation without gradients, nn.TransformerEncoderLayer calls a fused operator
    instead of its attention module; for layers that hold a replaced module that path is closed, in eager mode and in
    TorchScript. The nested tensors of nn.TransformerEncoder still work: outputs at padded positions are 0, as before.
    A :class:`torch_attn.HardMultiheadAttention` in such a layer stays, and the path is closed for it too.

    Subclasses of nn.MultiheadAttention, modules whose ``forward`` was replaced on the instance, and modules already
    compiled by TorchScript are left alone, with a warning that names them. torch.fx takes PyTorch's module for a leaf,
    but not this one: trace a model before replacing, or with a Tracer whose ``is_leaf_module`` says so.
    """
    for name, module in model.named_modules():
        reason = _why_not_replaced(module)
        if reason is None:
            _change_class(module, nn.MultiheadAttention, MultiheadAttention)
        elif reason:
            warnings.warn(f"replace_mha left {name or 'the model itself'} as it is: {reason}.", stacklevel=2)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.self_attn, _OURS):
            _close_fast_path(module)
    return model


def restore_mha(model: nn.Module) -> nn.Module:
    """The inverse of :func:`replace_mha`: every :class:`torch_attn.MultiheadAttention` becomes PyTorch's again."""
    for module in model.modules():
        if _exact_class(module) is MultiheadAttention:
            _change_class(module, MultiheadAttention, nn.MultiheadAttention)
    for module in model.modules():
        if hasattr(module, _SAVED_ACTIVATION) and not isinstance(module.self_attn, _OURS):
            _open_fast_path(module)
    return model


def _exact_class(module: nn.Module) -> type:
    """The module's class, seen through the subclass that torch.nn.utils.parametrize gives to a single module."""
    return parametrize.type_before_parametrizations(module)


def _why_not_replaced(module: nn.Module) -> str | None:
    """None: to be replaced. Empty: not ours to replace. Otherwise the reason why it cannot be."""
    if isinstance(module, torch.jit.ScriptModule):
        is_attention = getattr(module, "original_name", "") == nn.MultiheadAttention.__name__
        return "it was compiled by torch.jit.script; call replace_mha before compiling" if is_attention else ""
    if not isinstance(module, nn.MultiheadAttention) or isinstance(module, _OURS):
        return ""
    if _exact_class(module) is not nn.MultiheadAttention:
        return f"{type(module).__qualname__} is a subclass of nn.MultiheadAttention, which may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _change_class(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    if type(module) is old:
        module.__class__ = new
    else:  # parametrized: its own subclass holds the properties that compute the parameters
        properties = dict(vars(type(module)))
        module.__class__ = type(f"Parametrized{new.__name__}", (new,), properties)


def _close_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Make the layer call its attention module in evaluation too.

    ``activation_relu_or_gelu`` is 1 or 2 when the layer's fused operator knows the activation and 0 otherwise, and has
    no other use. As a plain integer it survives deepcopy, pickle and TorchScript, where hooks would not be seen.
    """
    if layer.activation_relu_or_gelu != 0:
        setattr(layer, _SAVED_ACTIVATION, layer.activation_relu_or_gelu)
        layer.activation_relu_or_gelu = 0


def _open_fast_path(layer: nn.Module) -> None:
    layer.activation_relu_or_gelu = getattr(layer, _SAVED_ACTIVATION)
    delattr(layer, _SAVED_ACTIVATION)
