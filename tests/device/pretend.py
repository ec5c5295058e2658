"""A pretend GPU: importing this adds the device "gpu", which computes on the CPU and counts waits.

Its numbers are real. It refuses to mix devices, as a GPU does, and it counts whatever would make
the host wait for a GPU, with the line that did so. It knows no autocast, no streams and no times.
"""

import collections
import traceback

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CPU = torch.device("cpu")
# Each of these ends with a copy to the host, or has a result whose shape depends on the values.
READS = frozenset({
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "_unique2", "unique_dim", "repeat_interleave", "_linalg_check_errors",
})  # fmt: skip
OURS = ("ununennium/", "torch/optim/", "torch/nn/utils/", "tests/")


class Watch:
    """What happened on the device since `start`."""

    def __init__(self):
        self.is_on = False
        self.start()
        self.stop()

    def start(self):
        """Count from zero."""
        self.is_on, self.operations = True, 0
        self.waits = collections.Counter()  # by kind and line

    def stop(self):
        """Count no more."""
        self.is_on = False

    @property
    def count(self):
        """How often the host had to wait."""
        return sum(self.waits.values())

    def note(self, kind):
        """Count a wait, for the innermost line that is not PyTorch's."""
        if self.is_on:
            frames = [f for f in traceback.extract_stack() if any(o in f.filename for o in OURS)]
            frames = [f for f in frames if f.filename != __file__]
            line = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}"
            self.waits[f"{kind} at {line}"] += 1


WATCH = Watch()


class OnGpu(torch.Tensor):
    """A tensor on the device; `host` has its numbers."""

    @staticmethod
    def __new__(cls, host, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, device=torch.device("gpu", 0), requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, host, requires_grad=False):
        self.host = host

    def __repr__(self):
        return f"OnGpu({self.host})"

    def tolist(self):
        WATCH.note("tolist")
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def is_on_gpu(value):
    return isinstance(value, OnGpu)


def reads(name, args):
    """Return whether an operation reads tensors of the device on the host."""
    by_mask = name in ("index", "index_put_", "index_put") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    return by_mask or name in READS


def note_copy(name, args, kwargs):
    """Count a copy between host and device, unless it goes to the device without a wait."""
    if name == "_to_copy":
        source, device = args[0], torch.device(kwargs.get("device") or args[0].device)
        blocks, target = not kwargs.get("non_blocking"), device.type == "gpu"
    else:
        target, source, *non_blocking = (*args[:2], *args[2:], kwargs.get("non_blocking"))
        blocks, target = not any(non_blocking), is_on_gpu(target)
    if is_on_gpu(source) and not target:
        WATCH.note("copy to the host")
    if target and not is_on_gpu(source) and blocks:
        WATCH.note("blocking copy to the device")


def refuse_mixed(name, tensors):
    """Raise as a GPU does if an operation mixes devices; numbers of the host may be scalars."""
    on_host = [t for t in tensors if not is_on_gpu(t)]
    if name.startswith("_fused") and on_host:
        raise RuntimeError(f"{name}: illegal memory access, some of its tensors are on the host")
    if any(t.ndim for t in on_host):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device: gpu and cpu")


def to_host(value):
    """Return an argument as the CPU's operation takes it."""
    if isinstance(value, torch.device) and value.type == "gpu":
        return CPU
    return value.host if is_on_gpu(value) else value


def compute(operation, args, kwargs):
    """Run an operation on the CPU, for tensors of which some are on the device."""
    name = operation._schema.name.split("::")[1]
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    on_gpu = [t for t in tensors if is_on_gpu(t)]
    WATCH.operations += WATCH.is_on
    if on_gpu and reads(name, args):
        WATCH.note(name)
    if name in ("_to_copy", "copy_"):
        note_copy(name, args, kwargs)
    elif on_gpu and name != "_foreach_copy_":
        refuse_mixed(name, tensors)
    asked = kwargs.get("device")
    goes_to_gpu = bool(on_gpu) if asked is None else torch.device(asked).type == "gpu"
    if asked is not None:
        kwargs = kwargs | {"device": CPU}
    host_args, host_kwargs = pytree.tree_map(to_host, (args, kwargs))
    result = operation(*host_args, **host_kwargs)
    if name in ("copy_", "set_"):
        return args[0]
    known = {id(t.host): t for t in on_gpu}  # an operation in place returns its argument

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        if goes_to_gpu:
            return known.get(id(value)) if id(value) in known else OnGpu(value)
        return value.clone() if on_gpu else value

    return pytree.tree_map(wrap, result)


def without_tensors(operation, *args, **kwargs):
    """Run an operation that makes a tensor on the device."""
    on_gpu = any(is_on_gpu(v) for v in pytree.tree_leaves((args, kwargs)))
    if kwargs.get("device") is None and not on_gpu:
        kwargs = kwargs | {"device": torch.device("gpu", 0)}
    return compute(operation, args, kwargs)


def with_device(make):
    """Let `torch.tensor` and `torch.as_tensor`, which do not dispatch, know the device."""

    def made(data, *args, device=None, **kwargs):
        if device is None or torch.device(device).type != "gpu":
            return make(data, *args, device=device, **kwargs)
        return data if is_on_gpu(data) else make(data, *args, **kwargs).to("gpu")

    return made


_setup_privateuseone_for_python_backend("gpu")
torch.__future__.set_swap_module_params_on_conversion(True)
LIBRARY = torch.library.Library("_", "IMPL")
LIBRARY.fallback(without_tensors, "PrivateUse1")
torch.tensor, torch.as_tensor = with_device(torch.tensor), with_device(torch.as_tensor)
