"""Triton's kernels compiled for GPUs that are not here, and what their code must and must not contain."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_stosign import StatePrecision
from lightning_stosign.optim.kernels import triton_kernels, triton_step
from lightning_stosign.optim.kernels.job import Kind

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "table": "*i64",
    "blocks": "*i32",
    "found_inf": "*fp32",
    "scales": "*fp32",
    "numbers": "*fp32",
    "found": "*i32",
}
NVIDIA = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 89, 90, 100, 120)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}

STATES = [
    "float32",
    "bfloat16",
    "float16",
    "fp8",
    "fp8:dtype=float8_e5m2",
    "fp8-raw",
    "fp8-raw:static_scale=1024",
    "fp8-block",
    "fp8-block:block_size=32",
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# momentum, envelope, stochastic, decays
RULES = {
    "StoSignSGD": (True, True, True, False),
    "StoSignSGDv2": (True, True, True, True),
    "in expectation": (True, True, False, False),
    "SignSGD": (True, False, False, False),
    "SignSGD, no momentum": (False, False, False, False),
}


def kind_of(rule, states, *, round_param, stochastic_rounding=False, maximize=False):
    momentum, envelope, stochastic, decays = RULES[rule]
    if stochastic_rounding:
        states += f"{',' if ':' in states else ':'}stochastic_rounding=true"
    return Kind(momentum, envelope, stochastic, maximize, decays, StatePrecision.parse(states), round_param)


def variants():
    """Every kind that the dispatch may hand over, once per kernel: name -> (kernel, constants)."""
    found = {}
    for rule, states, param, stochastic in itertools.product(RULES, STATES, DTYPES, (False, True)):
        if (stochastic and states == "float32") or (rule.endswith("no momentum") and states != "float32"):
            continue
        kind = kind_of(rule, states, round_param=param != "float32", stochastic_rounding=stochastic)
        name = f"{rule}, {param}, {states}{', rounded stochastically' if stochastic else ''}"
        found[f"update {name}"] = "update", triton_step.updating_constants(kind, DTYPES[param], aligned=True)
        kernel = "largest" if kind.has_tensor_scale else "nonfinite"
        found[f"{kernel} {name}"] = kernel, triton_step.looking_constants(kind, DTYPES[param], aligned=True)
    unique = {}
    for name, what in found.items():
        unique.setdefault((what[0], tuple(sorted(what[1].items()))), name)
    return {name: found[name] for name in unique.values()}


# One of each rule, parameter's dtype, states and rounding: few compilations, all branches.
COVERING = [
    "update StoSignSGD, float32, float32",
    "update StoSignSGD, bfloat16, fp8",
    "update StoSignSGDv2, float32, fp8-block:block_size=32, rounded stochastically",
    "update StoSignSGDv2, float16, bfloat16",
    "update in expectation, float32, fp8:dtype=float8_e5m2",
    "update SignSGD, bfloat16, float16, rounded stochastically",
    "update SignSGD, no momentum, float32, float32",
    "update StoSignSGD, float32, fp8-raw:static_scale=1024",
    "largest StoSignSGD, float32, fp8",
    "nonfinite StoSignSGD, float32, float32",
]


def compile_for(target, kernel, constants):
    """Return the compiled kernel, as the launcher would have it compiled for aligned tensors."""
    function = getattr(triton_kernels, kernel)
    signature = {name: POINTERS.get(name, "constexpr") for name in function.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in POINTERS}
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=triton_step.OPTIONS)


def resources(compiled):
    """Return a cubin's registers, bytes of stack and of local memory, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
        assembly = run("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack, local, re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", assembly)


def run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def faults(name, target, kernel, constants):
    """Return what is wrong with a variant's code, in words; an empty list if nothing is."""
    compiled = compile_for(target, kernel, constants)
    wrong = []
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        if re.search(r"_spill_count:?\s+[1-9]", assembly):
            wrong.append("spills")
        # The double-precision way to an exact quotient has its own fused steps.
        if constants.get("STOCHASTIC_SIGN") and re.search(r"\bv_(pk_)?fmac?_f32", assembly):
            wrong.append("fused multiply-add")
        if not re.search(r"(global|buffer)_load_dwordx4", assembly):
            wrong.append("no 128-bit load")
        return wrong
    ptx = compiled.asm["ptx"]
    _, stack, local, _ = resources(compiled)
    if stack or local:
        wrong.append(f"{stack} bytes of stack, {local} of local memory")
    for pattern in (r"\bfma\.", r"\bdiv\.(?!rn)", r"\.ftz\b", r"\bdiv\.rn\.ftz"):
        wrong += sorted(set(re.findall(pattern + r"[\w.]*", ptx)))
    wide = re.findall(r"\bld\.global(?:\.\w+)*\.v4\.b32", ptx)
    if not wide:
        wrong.append("no 128-bit load")
    return wrong
