"""What must work in an environment that has nothing but the wheel: run by `make dist`."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import lightning_stosign
from lightning_stosign import StoSignSGD

assert "site-packages" in lightning_stosign.__file__, lightning_stosign.__file__
model = torch.nn.Linear(128, 64)
optimizer = StoSignSGD(model.named_parameters(), lr=1e-3, state_precision="fp8")
before = model.weight.detach().clone()
model(torch.ones(4, 128)).square().mean().backward()
optimizer.step()
assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float8_e4m3fn
assert not torch.equal(before, model.weight)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "last.ckpt")
    state = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 1}
    torch.save({**state, "epoch": 0, "pytorch-lightning_version": "2.6.0"}, path)
    shown = subprocess.run(
        [sys.executable, "-m", "lightning_stosign", "inspect", str(path)], capture_output=True, text=True, check=True
    )
    assert "exp_avg" in shown.stdout, shown.stdout

    subprocess.run([sys.executable, "-m", "lightning_stosign", "demo", "--steps=2", f"--out={folder}/demo"], check=True)
    assert Path(folder, "demo", "results.json").exists()

assert lightning_stosign.SignDDPStrategy.__name__ == "SignDDPStrategy"  # Lightning's side imports, too
print(f"lightning-stosign {lightning_stosign.__version__} works")
