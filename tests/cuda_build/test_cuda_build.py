"""The extension with its CUDA kernels, as far as no GPU is needed. `make cuda-build` builds it and runs this."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case

import fastrnn
from benchmarks import machine_code
from fastrnn import compiler, nvcc, ops, reference
from fastrnn.nvcc import CUDA_ARCHITECTURES

ROOT = Path(__file__).parents[2]
LIBRARY = Path(fastrnn._C.__file__).with_name("libfastrnn.so")
TARGETS = [nvcc.target(architecture) for architecture in CUDA_ARCHITECTURES]
WATCHED = {"HMMA", "HGMMA", "LDL", "STL"}  # tensor cores; local memory


def test_library_is_the_one_just_built():
    assert LIBRARY.parent == ROOT / "build/cuda/lib/fastrnn"
    assert fastrnn._C.build_info()["cuda"]


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
@pytest.mark.parametrize("op", ["layer_forward", "layer_backward"])
def test_ops_have_kernels(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrnn::{op}", key)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_cpu_matches_reference(cell, P, rows):
    case = make_case(cell, 5, 7, 9, 37, P=P, D=2, **rows).to(torch.float64, requires_grad=True)
    found, expected = case.outputs_and_grads(ops.layer), case.outputs_and_grads(reference.layer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_compiled_step_of_training():
    """With the oldest torch that is supported, where Dynamo knows less than with those of the other tests."""
    module, x = fastrnn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    results = []
    for run in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        module.zero_grad()
        run(x)[0].square().sum().backward()
        results.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def code_for(target):
    """Kernel -> which of the watched instructions it has, and what it does in a pass."""
    found = {}
    for architecture, name, lines in machine_code.functions(machine_code.output("-sass", "-arch", target, LIBRARY)):
        assert architecture == target
        watched = WATCHED & set(re.findall(r"\*/ +(?:@!?\w+ )?(\w+)", "".join(lines)))
        found[name] = watched, machine_code.describe(name, lines)
    return found


@pytest.fixture(scope="module")
def code():
    """Architecture -> kernel -> as above; a process for each, since there are millions of lines."""
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        return dict(zip(TARGETS, pool.map(code_for, TARGETS), strict=True))


@pytest.fixture
def instructions(code):
    return {target: {name: found for name, (found, _) in kernels.items()} for target, kernels in code.items()}


def test_library_has_all_architectures(instructions):
    listed = "".join(machine_code.output("-lelf", LIBRARY))
    assert set(re.findall(r"\.(sm_\d+)\.cubin", listed)) == {target.removesuffix("a") for target in TARGETS}
    assert all(instructions.values())
    assert any("sm_100" in line for line in machine_code.output("-lptx", LIBRARY))


@pytest.mark.parametrize("architecture", TARGETS)
def test_nothing_is_waited_for_before_the_polls(code, architecture):
    """A load of inputs that is under way at the head of a pass would hold up its polls: see csrc/README.md."""
    passes = {name: found for name, (_, found) in code[architecture].items() if found}
    no_polls = "Lb1ELi1EE|Lb0ELi4EE|Wgmma" if architecture == "sm_80" else "Lb1ELi1EE"  # clusters; as below
    if architecture == "sm_100":
        no_polls += "|Wgmma"
    polling = {name for name in code[architecture] if "run_steps" in name and not machine_code.STEPWISE.search(name)}
    assert polling
    assert passes.keys() == {name for name in polling if not re.search(no_polls, name)}
    assert {name: found.passes for name, found in passes.items()} == {
        name: int(re.search(r"TileILi\d+ELi\d+ELi(\d)E", name)[1]) for name in passes
    }
    assert {name: found.early_waits for name, found in passes.items() if found.early_waits} == {}


@pytest.mark.parametrize("architecture", TARGETS)
def test_steps_use_tensor_cores_and_no_local_memory(instructions, architecture):
    steps = {name: found for name, found in instructions[architecture].items() if "run_steps" in name}
    products = {name: found for name, found in steps.items() if "MmaProduct" in name}
    if architecture == "sm_80":  # has no clusters: MmaProduct<..., true, 1> and <..., false, 4> are empty there
        products = {name: found for name, found in products.items() if not re.search("Lb1ELi1EE|Lb0ELi4EE", name)}
    assert products
    assert [name for name, found in products.items() if "HMMA" not in found] == []
    of_warpgroups = [found for name, found in steps.items() if "WgmmaProduct" in name]
    assert of_warpgroups
    assert all(("HGMMA" in found) == (architecture == "sm_90a") for found in of_warpgroups)
    steps |= {name: found for name, found in instructions[architecture].items() if "finish_step" in name}
    assert [name for name, found in steps.items() if found & {"LDL", "STL"}] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_compiled_at_first_use(tmp_path, monkeypatch, dtype):
    """As on a machine with one H100."""
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    compiler.for_gpu.cache_clear()
    number = ops.DTYPES[dtype]
    variant = fastrnn._C.cuda_variant(number)
    assert variant == (4 if dtype == torch.float32 else number)  # TF32 is allowed unless it is turned off
    assert not fastrnn._C.has_cuda_kernels("indrnn", variant)
    assert ops.prepare("indrnn", dtype, "cuda")
    assert fastrnn._C.has_cuda_kernels("indrnn", variant)
    assert [file.name.split("-")[0] for file in tmp_path.glob("*.so")] == ["indrnn"]


def test_other_nvcc_is_no_nvcc(monkeypatch):
    """Of another CUDA than torch's: its library would load another runtime."""
    monkeypatch.setattr(nvcc, "major_version", lambda: "11")
    compiler.for_gpu.cache_clear()
    with pytest.warns(UserWarning, match=rf"without an nvcc of CUDA {torch.version.cuda} there are no kernels"):
        assert not ops.prepare("qrnn", torch.float32, "cuda")
    compiler.for_gpu.cache_clear()
