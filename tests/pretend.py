"""A pretended GPU: tensors in the CPU's memory that say they live on "cuda", and refuse to be mixed with others as real ones do.

What a machine without a GPU can find out about code for one: tensors made on the wrong device, numpy given a tensor that it can't
read, generators of the wrong device. It says nothing about speed, precision or memory.
"""
from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_REAL_GENERATOR = torch.Generator
_ON_CPU_TOO = {Tensor.__getitem__, Tensor.__setitem__}  # an index may lie on the CPU
_READS = {Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__}


def _is_cuda(device) -> bool:
    return device is not None and not isinstance(device, (int, bool)) and torch.device(device).type == "cuda"


class Pretended(Tensor):
    """A tensor on the pretended GPU."""

    def __array__(self, *arguments, **keywords):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __deepcopy__(self, memo):
        made = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made._is_param = True
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


_ours: list = []  # pretended generators: their type takes no marks


class _Maker(type):
    def __call__(cls, device="cpu"):
        made = _REAL_GENERATOR("cpu")
        if _is_cuda(device):
            _ours.append(made)
        return made

    def __instancecheck__(cls, thing):
        return isinstance(thing, _REAL_GENERATOR)


class _Generator(metaclass=_Maker):
    """Stands in for `torch.Generator`, which takes no marks."""


def _plain(value):
    return value.as_subclass(Tensor) if isinstance(value, Pretended) else value


def _mark(value):
    if isinstance(value, Tensor) and not isinstance(value, Pretended):
        return value.as_subclass(Pretended)
    return value


def _call(func, args, kwargs):
    """What torch would do if the pretended tensors were on a GPU: the same, or a refusal."""
    with torch._C.DisableTorchFunctionSubclass():
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        pretended = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        name = getattr(func, "__name__", str(func))
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is not None:
            what = getattr(owner, "__name__", "")
            if what == "device":
                return CUDA if pretended else func(*args, **kwargs)
            if what in ("is_cuda", "is_cpu"):
                return (what == "is_cuda") == bool(pretended) if pretended else func(*args, **kwargs)
            found = func(*args, **kwargs)
            return _mark(found) if pretended else found
        if name == "__set__":
            return func(*args, **kwargs)
        if name in ("numpy", "__array__") and pretended:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if name == "from_numpy" or name == "frombuffer":
            return func(*args, **kwargs)
        if name == "cpu":
            return func(*args, **kwargs).as_subclass(Tensor) if not pretended else args[0].clone().as_subclass(Tensor)
        if name == "cuda":
            return _mark(args[0].clone())
        if name in ("get_device", ):
            return 0 if pretended else -1
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.split(":")[0] in ("cuda", "cpu"))]
        if devices:
            to_cuda = _is_cuda(devices[-1])
            cpu = lambda leaf: torch.device("cpu") if any(leaf is device for device in devices) else leaf  # noqa: E731
            args, kwargs = tree_map(cpu, args), tree_map(cpu, kwargs)
            _same_generator(name, kwargs, to_cuda)
            found = func(*args, **kwargs)
            if name in ("to", "as_tensor", "tensor") and to_cuda != bool(pretended):
                found = found.clone()
            return tree_map(_mark if to_cuda else _plain, found)
        if name in ("to", "type_as", "copy_"):
            other = [tensor for tensor in tensors[1:]]
            found = func(*args, **kwargs)
            there = isinstance((other or tensors)[0], Pretended) if name in ("to", "type_as") and other else isinstance(tensors[0], Pretended)
            return _mark(found) if there else _plain(found)
        if pretended and name not in ("__getitem__", "__setitem__", "index_put_", "index_put"):
            strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim() > 0]
            if strangers:
                raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name}: {[tuple(t.shape) for t in strangers]} on the CPU)")
        if name in ("__getitem__", "__setitem__") and tensors:
            subject, others = tensors[0], tensors[1:]
            if not isinstance(subject, Pretended) and any(isinstance(t, Pretended) and t.dim() > 0 for t in others):
                raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu): {name}")
            if name == "__setitem__" and isinstance(subject, Pretended) and isinstance(args[2], Tensor) and not isinstance(args[2], Pretended) and args[2].dim() > 0:
                pass  # a copy from the host: allowed with slices
            there = isinstance(subject, Pretended)
        else:
            there = bool(pretended)
        _same_generator(name, kwargs, there)
        found = func(*args, **kwargs)
        if name in ("tolist", "item", "backward", "__len__"):
            return found
        return tree_map(_mark, found) if there else found


def _same_generator(name: str, kwargs: dict, there: bool) -> None:
    generator = kwargs.get("generator")
    if generator is not None and any(generator is one for one in _ours) != there:
        raise RuntimeError(f"Expected a '{'cuda' if there else 'cpu'}' device type for generator but found the other ({name})")


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type):  # where a device is only named, or compared
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _call(func, args, kwargs or {})


@contextlib.contextmanager
def pretended_gpu():
    """Inside, the device "cuda" exists."""
    torch.Generator = _Generator
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Mode():
            yield CUDA
    finally:
        torch.Generator = _REAL_GENERATOR
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        _ours.clear()
