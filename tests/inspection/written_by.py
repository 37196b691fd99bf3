"""Checkpoints written by those who write them: each trainer's own code where it runs here, else its layout."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytorch_optimizer
import torch
from lightning.fabric import Fabric
from safetensors.torch import save_file
from torch import nn
from torchao.optim import AdamW8bit
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from lightning_stosign import MuonSign, SignSGD, StoSignSGD
from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}


class Net(nn.Module):
    """Two layers and a norm; the last input is always 0, so its weights get no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x=None):
        if x is None:
            x = torch.randn(16, 4)
            x[:, 3] = 0
        return self.head(self.norm(self.first(x).tanh())).square().sum()


class Module(pl.LightningModule):
    def __init__(self, net, optimizer):
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch, batch_idx):
        return self.net()

    def configure_optimizers(self):
        return self.optimizer

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(8, 1))


# ---- optimizers ----


def _bitsandbytes(blockwise):
    """Adam's states as bitsandbytes has them: codes, a code book, and the largest magnitudes."""

    def make(net):
        optimizer_class = type("Optimizer8bit", (torch.optim.Optimizer,), {"__module__": "bitsandbytes.optim"})
        options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "alpha": 0.0, "t_alpha": None}
        optimizer = optimizer_class(net.parameters(), options)
        optimizer.optimizer_name = "adam"
        book = torch.linspace(-1, 1, 256)
        for number, param in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(number)
            state = {"step": 3}
            for n in (1, 2):
                codes = torch.randint(128, 256, param.shape, generator=generator, dtype=torch.uint8)
                state |= {f"state{n}": codes, f"qmap{n}": book.clone()}
                if blockwise:
                    state[f"absmax{n}"] = torch.rand(-(-param.numel() // 256), generator=generator)
                else:
                    state |= {f"max{n}": torch.tensor([0.5 * n]), f"new_max{n}": torch.tensor([0.1])}
            optimizer.state[param] = state
        return optimizer

    return make


def _torchao(kind):
    """AdamW8bit and its kin with the states that their step, which needs a compiler, would have left."""

    def make(net):
        optimizer = AdamW8bit(net.parameters())
        for param in net.parameters():
            state = {"step": torch.tensor(3.0)}
            for name in ("exp_avg", "exp_avg_sq"):
                value = torch.randn(param.shape).square()
                if param.numel() == 32:
                    sign = () if kind is OptimStateFp8 else (True,)
                    value = kind.zeros(param.shape, *sign, 16).copy_(value)
                state[name] = value
            optimizer.state[param] = state
        return optimizer

    return make


# name of the table's row -> (how to make it, what inspect calls it, the states it shows, whether steps are its own)
OPTIMIZERS = {
    "AdamW": (lambda net: torch.optim.AdamW(net.parameters()), "AdamW", True),
    "SGD with momentum": (lambda net: torch.optim.SGD(net.parameters(), momentum=0.9), "SGD", True),
    "RMSprop": (lambda net: torch.optim.RMSprop(net.parameters()), "RMSprop", True),
    "Adafactor": (lambda net: torch.optim.Adafactor(net.parameters()), "Adafactor", True),
    "StoSignSGD, fp8": (
        lambda net: StoSignSGD(net.parameters(), state_precision="fp8:min_numel=0"),
        "StoSignSGD",
        True,
    ),
    "StoSignSGD, fp4-block": (
        lambda net: StoSignSGD(net.parameters(), state_precision="fp4-block:min_numel=0"),
        "StoSignSGD",
        True,
    ),
    "SignSGD": (lambda net: SignSGD(net.parameters()), "SignSGD", True),
    "MuonSign, fp8": (
        lambda net: MuonSign(
            [{"params": [p], "use_muon": p.dim() == 2} for p in net.parameters()], state_precision="fp8:min_numel=0"
        ),
        "MuonSign",
        True,
    ),
    "Muon and AdamW": (
        lambda net: MuonAdamW(
            [
                {"params": [p for p in net.parameters() if p.dim() == 2], "use_muon": True},
                {"params": [p for p in net.parameters() if p.dim() != 2], "use_muon": False},
            ]
        ),
        "Muon and AdamW",
        True,
    ),
    "Lion (pytorch_optimizer)": (lambda net: pytorch_optimizer.Lion(net.parameters()), "Lion", True),
    "ScheduleFreeAdamW (pytorch_optimizer)": (
        lambda net: pytorch_optimizer.ScheduleFreeAdamW(net.parameters()),
        "ScheduleFree AdamW",
        True,
    ),
    "Lookahead of AdamW (pytorch_optimizer)": (
        lambda net: pytorch_optimizer.Lookahead(torch.optim.AdamW(net.parameters())),
        "Lookahead of AdamW",
        True,
    ),
    "an unknown one": (lambda net: pytorch_optimizer.AdaBelief(net.parameters()), "unknown optimizer", True),
    "bitsandbytes Adam8bit, block-wise (layout)": (_bitsandbytes(True), "Adam of bitsandbytes", False),
    "bitsandbytes Adam8bit, one scale per tensor (layout)": (_bitsandbytes(False), "Adam of bitsandbytes", False),
    "torchao AdamW8bit": (_torchao(OptimState8bit), "Adam or AdamW", False),
    "torchao AdamW4bit": (_torchao(OptimState4bit), "Adam or AdamW", False),
    "torchao AdamWFp8": (_torchao(OptimStateFp8), "Adam or AdamW", False),
}


def trained(name, steps=3):
    """Return a net and its optimizer after some steps."""
    net = Net()
    make, _, has_step = OPTIMIZERS[name]
    torch.manual_seed(1)
    optimizer = make(net)
    for _ in range(steps if has_step else 0):
        optimizer.zero_grad()
        net().backward()
        optimizer.step()
    return net, optimizer


# ---- formats: each writes (net, optimizer) under a folder and returns what to inspect ----


def lightning(folder, net, optimizer):
    module = Module(net, optimizer)
    module.save_hyperparameters({"width": 8, "scale": np.float64(2.0), "folder": Path("data")})
    trainer = pl.Trainer(accelerator="cpu", max_steps=0, **QUIET)
    trainer.fit(module)
    trainer.strategy.optimizers = [optimizer]
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def fabric(folder, net, optimizer):
    run = Fabric(accelerator="cpu", devices=1)
    model, wrapped = run.setup(net, optimizer)
    run.save(folder / "state.ckpt", {"model": model, "optimizer": wrapped, "iteration": 3})
    return folder / "state.ckpt"


def nanogpt(folder, net, optimizer):
    content = {
        "model": {f"_orig_mod.{name}": value for name, value in net.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 2},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.0),
        "config": {"device": "cpu"},
    }
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def two_state_dicts(folder, net, optimizer):
    wrapped = nn.DataParallel(net).state_dict() if torch.cuda.is_available() else net.state_dict()
    wrapped = {f"module.{name.removeprefix('module.')}": value for name, value in wrapped.items()}
    content = {"epoch": 1, "model_state_dict": wrapped, "optimizer_state_dict": optimizer.state_dict(), "loss": 0.5}
    torch.save(content, folder / "model.tar")
    return folder / "model.tar"


def bare(folder, net, optimizer):
    torch.save(optimizer.state_dict(), folder / "opt.pt")
    return folder / "opt.pt"


def before_zip(folder, net, optimizer):
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def litgpt(folder, net, optimizer):
    run = Fabric(accelerator="cpu", devices=1)
    model, wrapped = run.setup(net, optimizer)
    loader = torch.utils.data.DataLoader(torch.zeros(4, 1))
    state = {"model": model, "optimizer": wrapped, "train_dataloader": loader, "iter_num": 3, "step_count": 3}
    run.save(folder / "lit_model.pth", state)
    return folder / "lit_model.pth"


def ultralytics(folder, net, optimizer):
    content = {
        "epoch": 1,
        "best_fitness": 0.5,
        "model": None,
        "ema": net,
        "updates": 3,
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "train_args": {"epochs": 1},
        "train_metrics": {},
        "version": "8.4.0",
    }
    torch.save(content, folder / "last.pt")
    return folder / "last.pt"


def accelerate(folder, net, optimizer):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.save_state(_prepared(accelerator, folder, net, optimizer))
    return folder / "state"


def _prepared(accelerator, folder, net, optimizer):
    state = optimizer.state_dict()
    _, prepared = accelerator.prepare(net, optimizer)
    assert prepared.state_dict()["state"].keys() == state["state"].keys()
    return str(folder / "state")


def dcp(flatten):
    def write(folder, net, optimizer):
        import torch.distributed.checkpoint as checkpoint
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        states = get_optimizer_state_dict(net, optimizer, options=options)
        content = {"model": get_model_state_dict(net), "optimizer": states, "step": 3}
        checkpoint.save(content, checkpoint_id=folder / "step-3")
        return folder / "step-3"

    return write


def fsdp1(way):
    """FSDP of one process: a state_dict by names, or what the optimizer itself has: one parameter of all values."""

    def write(folder, net, optimizer):
        import torch.distributed as dist
        import torch.distributed.checkpoint as checkpoint
        from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

        names = {number: name for number, (name, _) in enumerate(net.named_parameters())}
        saved = optimizer.state_dict()
        full = {
            "state": {names[number]: state for number, state in saved["state"].items()},
            "param_groups": [{**saved["param_groups"][0], "params": list(names.values())}],
        }
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            sharded = FullyShardedDataParallel(copy.deepcopy(net), device_id=torch.device("cpu"))
            flat = type(optimizer)(sharded.parameters())
            flat.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(sharded, flat, full))
            if way == "sharded":
                FullyShardedDataParallel.set_state_dict_type(sharded, StateDictType.SHARDED_STATE_DICT)
                states = FullyShardedDataParallel.optim_state_dict(sharded, flat)
                content = {"model": sharded.state_dict(), "optimizer": states}
                checkpoint.save(content, checkpoint_id=folder / "step-3")
                return folder / "step-3"
            states = flat.state_dict() if way == "flat" else FullyShardedDataParallel.optim_state_dict(sharded, flat)
            torch.save({"model": sharded.state_dict(), "optimizer": states}, folder / "fsdp.pt")
            return folder / "fsdp.pt"
        finally:
            dist.destroy_process_group()

    return write


def safetensors(folder, net, optimizer):
    names = {param: name for name, param in net.named_parameters()}
    tensors = {
        f"{names[param]}.{key}": value.contiguous()
        for param, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    save_file(tensors, folder / "optimizer_state.safetensors")
    return folder / "optimizer_state.safetensors"


def hugging_face(folder, net, optimizer):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder / "run"), use_cpu=True, report_to=[], disable_tqdm=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(net.parameters(), lr=1.0))
    trainer = Trainer(net, arguments, optimizers=(optimizer, scheduler))
    inner = folder / "checkpoint-3"
    trainer.save_model(str(inner))
    trainer._save_optimizer_and_scheduler(str(inner))
    trainer.state.global_step = 3
    trainer.state.save_to_json(str(inner / "trainer_state.json"))
    return inner


def deepspeed(stage=2, ranks=2):
    """ZeRO's layout: one flat float32 parameter per group, of which each rank has a run."""

    def write(folder, net, optimizer):
        inner = folder / "checkpoint"
        inner.mkdir()
        state = optimizer.state_dict()
        flat = {}
        for name in ("exp_avg", "exp_avg_sq"):
            values = torch.cat([s[name].float().reshape(-1) for s in state["state"].values()])
            flat[name] = torch.cat([values, torch.zeros(-values.numel() % (2 * ranks))])
        options = {key: state["param_groups"][0][key] for key in ("lr", "betas", "eps", "weight_decay")}
        for rank in range(ranks):
            mine = {name: values.chunk(ranks)[rank].clone() for name, values in flat.items()}
            base = {"state": {0: {"step": torch.tensor(3.0), **mine}}, "param_groups": [{**options, "params": [0]}]}
            content = {
                "loss_scaler": None,
                "base_optimizer_state": base,
                "single_partition_of_fp32_groups": [mine["exp_avg"]],
                "zero_stage": stage,
                "group_paddings": [0],
                "partition_count": [ranks],
                "ds_version": "0.14.0",
            }
            file = inner / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": content, "ds_config": {}, "ds_version": "0.14.0"}, file)
        shapes = {f"_forward_module.{name}": param.shape for name, param in net.named_parameters()}
        model = {"module": net.state_dict(), "param_shapes": [shapes], "global_steps": 3, "ds_version": "0.14.0"}
        torch.save(model, inner / "mp_rank_00_model_states.pt")
        (folder / "latest").write_text("checkpoint")
        return folder

    return write


# column of the table -> (writer, what inspect calls it, whether names can be known)
FORMATS = {
    "Lightning `.ckpt`": (lightning, "Lightning checkpoint", True),
    "Fabric": (fabric, "checkpoint of model and optimizer", True),
    "nanoGPT": (nanogpt, "nanoGPT checkpoint", True),
    "`model_state_dict` and `optimizer_state_dict`": (
        two_state_dicts,
        "checkpoint of model_state_dict and optimizer_state_dict",
        True,
    ),
    "optimizer's `state_dict()`": (bare, "optimizer state_dict", False),
    "torch before 1.6": (before_zip, "checkpoint of model and optimizer", True),
    "LitGPT (layout)": (litgpt, "LitGPT checkpoint", True),
    "Ultralytics (layout)": (ultralytics, "Ultralytics checkpoint", True),
    "Hugging Face Trainer": (hugging_face, "Hugging Face Trainer checkpoint", True),
    "accelerate": (accelerate, "checkpoint folder (accelerate)", True),
    "DCP": (dcp(False), "distributed checkpoint (DCP)", True),
    "DCP, flattened (torchtitan)": (dcp(True), "distributed checkpoint (DCP)", True),
    "FSDP1, by names": (fsdp1("full"), "checkpoint of model and optimizer", True),
    "FSDP1, sharded (DCP)": (fsdp1("sharded"), "distributed checkpoint (DCP)", True),
    "safetensors of states": (safetensors, "safetensors of states", True),
    "DeepSpeed ZeRO-1/2 (layout)": (deepspeed(), "DeepSpeed ZeRO checkpoint, stage 2", True),
}

_OUTER = {name for name in OPTIMIZERS if name.startswith("Lookahead")}
_QUANTISED = {name for name in OPTIMIZERS if name.startswith(("torchao", "bitsandbytes"))}
# What the writers cannot write, and what needs the options that a format lacks.
_ELEMENTWISE = {"AdamW", "SGD with momentum", "RMSprop"}  # FSDP1 flattens what each value has of its own
WITHOUT = {
    "FSDP1, by names": set(OPTIMIZERS) - _ELEMENTWISE,
    "FSDP1, sharded (DCP)": set(OPTIMIZERS) - _ELEMENTWISE,
    "Hugging Face Trainer": set(),
    "accelerate": _OUTER,
    "safetensors of states": _OUTER
    | {name for name in OPTIMIZERS if name.startswith(("torchao", "StoSignSGD", "MuonSign", "an unknown"))},
    "DCP": _OUTER | _QUANTISED,
    "DCP, flattened (torchtitan)": _OUTER | _QUANTISED,
    "torch before 1.6": {name for name in OPTIMIZERS if name.startswith("torchao")},
    "DeepSpeed ZeRO-1/2 (layout)": set(OPTIMIZERS) - {"AdamW"},
}

CELLS = [
    (format, optimizer) for format in FORMATS for optimizer in OPTIMIZERS if optimizer not in WITHOUT.get(format, set())
]


def table():
    """Return the table of the documentation."""
    lines = ["| | " + " | ".join(FORMATS) + " |", "| --- |" + " --- |" * len(FORMATS)]
    for optimizer in OPTIMIZERS:
        cells = ["yes" if (format, optimizer) in CELLS else "" for format in FORMATS]
        lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
