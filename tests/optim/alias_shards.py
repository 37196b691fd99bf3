"""ALIAS on a model sharded over two processes by fully_shard, beside the whole model in each of them.

python -m torch.distributed.run --nproc_per_node 2 alias_shards.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from lightning_stosign import ALIAS
from lightning_stosign.optim.alias import totals

DATA = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VARIANTS = [{}, {"momentum": 0.9, "beta2": 0.99, "weight_decay": 0.1}, {"loss_lower_bound": 0.0}]


class CountingDist:
    """torch.distributed, counting its gathers."""

    gathers = 0

    def __getattr__(self, name):
        return getattr(dist, name)

    def all_gather(self, *args, **kwargs):
        self.gathers += 1
        dist.all_gather(*args, **kwargs)


def model(sharded):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()  # 7 and 3 rows: uneven shards
    return fully_shard(net) if sharded else net


def train(net, optimizer, x, steps):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = (net(x) - x[:, :3]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    totals.dist = counting = CountingDist()
    mine = DATA[dist.get_rank() * 4 :][:4]
    for options in VARIANTS:
        net, whole = model(sharded=True), model(sharded=False)
        optimizer = ALIAS(net.parameters(), **options)
        before = counting.gathers
        train(net, optimizer, mine, 25)
        assert counting.gathers - before == 26, "one a step, and one for the first loss"
        train(whole, ALIAS(whole.parameters(), **options), DATA, 25)
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=1e-10)

        other = model(sharded=True)
        for p, q in zip(other.parameters(), net.parameters(), strict=True):
            p.to_local().detach().copy_(q.to_local())
        loaded = ALIAS(other.parameters(), **options)
        set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(net, optimizer))
        train(net, optimizer, mine, 5)
        train(other, loaded, mine, 5)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
