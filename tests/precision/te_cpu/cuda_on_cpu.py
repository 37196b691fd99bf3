"""Torch on a machine without a GPU, answering Transformer Engine (TE) as if it had one."""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

answers = SimpleNamespace(capability=(9, 0), installed=False)

# Who is told that there is a GPU. Lightning and torch itself are not: the Trainer runs on the CPU.
_ASKERS = ("transformer_engine.", "lightning_stosign.precision.", "te_cpu.")

_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "eye", "rand", "randn", "randint", "empty_strided"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)
_METHODS = ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


def install(capability: tuple[int, int]) -> None:
    """Change torch for the rest of this process."""
    answers.capability = capability
    if answers.installed:
        return
    answers.installed = True
    _device_constructors()  # `torch.device("meta")` as a context knows torch's own functions
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    wrapper = _on_cpu(torch.Tensor._make_wrapper_subclass)
    torch.Tensor._make_wrapper_subclass = staticmethod(wrapper)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    is_cuda = torch.Tensor.is_cuda
    torch.Tensor.is_cuda = property(  # type: ignore[assignment]
        lambda self: self.device.type == "cpu" if _asked_by_te() else is_cuda.__get__(self)
    )
    _answer_for_cuda()
    _answer_for_autocast()
    torch.version.cuda = "13.0"


def _answer_for_cuda() -> None:
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None, wait_event=lambda event: None)
    available, version = torch.cuda.is_available, torch.cuda.get_device_capability
    torch.cuda.is_available = lambda: _asked_by_te() or available()
    torch.cuda.get_device_capability = lambda *device: answers.capability if _asked_by_te() else version(*device)
    torch.cuda.get_device_properties = lambda *device: SimpleNamespace(  # type: ignore[assignment]
        major=answers.capability[0],
        minor=answers.capability[1],
        name="CPU",
        multi_processor_count=128,
        total_memory=1 << 36,
    )
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_stream = lambda *device: stream  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *device: None
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]


def _answer_for_autocast() -> None:
    """TE asks for CUDA's autocast, as torchao does; the one around it is the CPU's."""
    enabled, dtype, gpu_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.get_autocast_gpu_dtype
    torch.is_autocast_enabled = lambda *device: enabled("cpu") if _asked_by_te() else enabled(*device)
    torch.get_autocast_dtype = lambda device: dtype("cpu") if _asked_by_te() else dtype(device)
    torch.get_autocast_gpu_dtype = lambda: dtype("cpu") if _asked_by_te() else gpu_dtype()


def _asked_by_te() -> bool:
    """Whether the caller of whoever calls this is TE or the package's precision plugin."""
    frame = sys._getframe(2)
    for _ in range(2):  # torch may lie between
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__")).startswith(_ASKERS):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str | torch.device):
        return torch.device(device).type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the CPU where its caller names a CUDA device."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if function.__name__ == "to" and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        if function.__name__ == "to" and _stays(*args, **kwargs):
            return args[0]  # a tensor of TE's would be copied
        return function(*args, **kwargs)

    return called


def _stays(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether ``tensor.to`` is asked for the device alone, and the tensor is there."""
    return [*args, *kwargs.values()] == [torch.device("cpu")] and tensor.device.type == "cpu"


class _Absent:
    """What TE's files take at import from a package that nothing here calls: anything at all."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self  # or a decorator


@contextlib.contextmanager
def optional_modules() -> Iterator[None]:
    """While TE is imported, modules stand in for the packages that it imports for GPUs and for export only."""
    importlib.import_module("torch._dynamo")  # looks whether triton is there: before it seems to be
    wanted = ("triton", "triton.language", "triton.language.core", "triton.language.standard", "einops", "onnx")
    missing = [name for name in (*wanted, "onnxscript") if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in missing:
        module = ModuleType(name)
        module.__dict__.update(__path__=[], __version__="3.0.0", __getattr__=_Absent().__getattr__)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
