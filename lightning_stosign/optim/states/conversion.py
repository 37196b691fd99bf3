"""Moving the states of one parameter from one storage format to another."""

from typing import Any, Literal

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_stosign.optim.sharding import local, shard_of
from lightning_stosign.optim.states.state_precision import FLOAT32, StatePrecision
from lightning_stosign.optim.states.storage import companions, init_state, read_state, write_state


def store_anew(state: dict[str, Any], name: str, param: Tensor, old: StatePrecision, new: StatePrecision) -> None:
    """Replace ``state[name]`` and what belongs to it by the same values in another format.

    Args:
        state: the parameter's entry in ``optimizer.state``.
        name: the state's name.
        param: the parameter. Every rank has to call this of a sharded one.
        old: the format it is in.
        new: the format it is to be in; float32 is float64 for a float64 parameter.
    """
    old_entries = [name, *companions(state, name)]
    value = read_state({key: local(state[key]) for key in old_entries}, name, old)
    # Exact, but for fp4-block and for scales beyond bfloat16's range; the envelope must not fall below the momentum.
    rounding: Literal["nearest", "up"] = "up" if name == "exp_inf" else "nearest"
    for key in old_entries:
        del state[key]
    init_state(state, name, param, None if new.dtype is FLOAT32.dtype else new)
    shard = shard_of(param)
    if shard is None or not isinstance(param, DTensor):
        write_state(state, name, value, new, rounding=rounding)
        return
    # A scale is that of the unsharded parameter's state, so that is put together for the moment.
    whole: dict[str, Any] = {}
    gathered = shard.wrap(value, param).full_tensor()
    init_state(whole, name, gathered, new)
    write_state(whole, name, gathered, new, rounding=rounding)
    parts = distribute_tensor(whole[name].float(), param.device_mesh, param.placements, src_data_rank=None)
    local(state[name]).copy_(parts.to_local())
    for key in companions(whole, name):
        state[key].copy_(whole[key])
