"""The extension with its CUDA kernels, as far as no GPU is needed. `make cuda-build` builds it and runs this."""

import re
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case

import fastrnn
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


def cuobjdump(*arguments):
    """Lines of what it says of the library, one by one: there are millions."""
    tool = Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    with subprocess.Popen([tool, *arguments, LIBRARY], stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    assert process.returncode == 0


@pytest.fixture(scope="module")
def instructions():
    """Architecture -> kernel -> which of the watched instructions it has."""
    found = defaultdict(lambda: defaultdict(set))
    for line in cuobjdump("-sass"):
        if "/*" not in line:
            if place := re.search(r"^arch = (\w+)", line):
                kernels = found[place[1]]
            elif place := re.search(r"Function : (\w+)", line):
                kernel = kernels[place[1]]
        elif instruction := re.search(r"\*/ +(?:@!?\w+ )?(\w+)", line):
            kernel |= {instruction[1]} & WATCHED
    return found


def test_library_has_all_architectures(instructions):
    assert set(instructions) == set(TARGETS)
    assert any("sm_100" in line for line in cuobjdump("-lptx"))


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
