"""What fastrnn runs with: docs/compatibility.md is made here, and checked.

FASTRNN_WRITE_COMPATIBILITY=1 python -m pytest tests/docs/test_docs_compatibility.py
"""

import copy
import io
import os
import platform
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import _C, kernel_flags, nvcc

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "compatibility.md"
T, B, I, H = 4, 2, 3, 5


def first(pattern: str, path: str) -> str:
    """What a file of the project says."""
    return re.search(pattern, (ROOT / path).read_text())[1]


def versions() -> list[tuple[str, str, str]]:
    """What is needed, what the tests have run with, and where that is from."""
    gpu = (ROOT / "benchmarks" / "results" / "gpu-checks-nvidia-h200.txt").read_text()
    tested, with_cuda = first(r'TESTED_TORCH = "(.+)"', ".ci/venv.py"), first(r"torch==([\d.]+)", "Makefile")
    python = first(r'requires-python = ">=(.+)"', "pyproject.toml")
    capabilities = ", ".join(name.removesuffix("a") for name in nvcc.CUDA_ARCHITECTURES)
    return [
        ("Python", f"{python} or newer", "`pyproject.toml`; on a GPU " + re.search(r"Python [\d.]+\d", gpu)[0]),
        (
            "torch",
            first(r'OLDEST_TORCH = "(.+?)"', "setup.py")
            + " or newer; a build serves the minor version it was made with",
            f"CPU: {tested} (`.ci/venv.py`); CUDA: {with_cuda} (`make cuda-build`)",
        ),
        ("operating system", "Linux", "the tests have run on no other"),
        ("compiler", "a C++17 one; for GPUs nvcc of the major version of torch's CUDA", "`setup.py`; gcc"),
        (
            "CPU, x86-64",
            "any; chosen when it is loaded: " + ", ".join([*ISAS]),
            "`FASTRNN_CPU_ISA` forces one; `tests/kernels/test_isa.py`",
        ),
        ("CPU, others", "base: what the compiler makes of it", "not tested"),
        (
            "GPU",
            f"NVIDIA, compute capability {capabilities}, and newer by PTX",
            f"run on an {gpu.split(',')[0]} alone; all kernels in an emulator on the CPU",
        ),
        *(
            (f'`pip install "fastrnn[{name}]"`', packages, "`pyproject.toml`")
            for name, packages in (
                ("onnx", "onnx, onnxscript: ONNX files"),
                ("keras", "h5py: Keras files"),
                ("reservoir", "scikit-learn: `fastrnn.reservoir`"),
            )
        ),
    ]


ISAS = [*kernel_flags.ISA_FLAGS, "amx"] if platform.machine() in ("x86_64", "AMD64") else []

LAYERS = {
    "LSTM": lambda **options: fastrnn.LSTM(I, H, **options),
    "GRU": lambda **options: fastrnn.GRU(I, H, **options),
    "RNN": lambda **options: fastrnn.RNN(I, H, **options),
}


def train(layer, x, *args, **options):
    layer(x, *args, **options)[0].sum().backward()


def through_a_file(layer, x):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(layer)]):
        twin = torch.load(file, weights_only=True)
    assert torch.equal(twin(x)[0], layer(x)[0])


def state_dict(layer, x):
    theirs = getattr(torch.nn, type(layer).__name__)(I, H)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(theirs(x)[0], layer(x)[0])


def exported(layer, x):
    dims = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,))
        y = torch.randn(7, 3, I)
        assert torch.equal(program.module()(y)[0], layer(y)[0])


def compiled(layer, x):
    torch._dynamo.reset()
    train(torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True), x)


def per_sample(layer, x):
    def loss(parameters, row):
        return functional_call(layer, parameters, (row[:, None],))[0].sum()

    vmap(grad(loss), in_dims=(None, 1))(dict(layer.named_parameters()), x)


def second(layer, x):
    (g,) = torch.autograd.grad(layer(x.requires_grad_())[0].sum(), x, create_graph=True)
    g.square().sum().backward()


def checkpointed(layer, x):
    for kind in (False, True):
        checkpoint(layer, x.requires_grad_(), use_reentrant=kind)[0].sum().backward()


def traced(layer, x):
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(layer, x)(x)[0], layer(x)[0])


def counted(layer, x):
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() > 0


def distributed(layer, x):
    options = {"rank": 0, "world_size": 1, "store": torch.distributed.HashStore()}
    torch.distributed.init_process_group("gloo", **options)
    try:
        train(torch.nn.parallel.DistributedDataParallel(layer), x)
    finally:
        torch.distributed.destroy_process_group()


def onnx_program(layer, x):
    program = torch.onnx.export(layer.eval(), (x,), dynamo=True, verbose=False)
    assert type(layer).__name__ in [node.op_type for node in program.model_proto.graph.node]


def quantized(layer, x):
    layer.qconfig = torch.ao.quantization.default_qconfig


def weights(layer, x):
    layer.weights = "int8"
    with torch.no_grad():
        layer(x)


FEATURES = {
    "training, `loss.backward()`": train,
    "`state_dict` to and from torch.nn": state_dict,
    "`copy.deepcopy`": lambda m, x: copy.deepcopy(m)(x),
    "`torch.save`, `weights_only=True`": through_a_file,
    "`PackedSequence`": lambda m, x: train(lambda p: (m(p)[0].data,), pack_padded_sequence(x, torch.tensor([4, 2]))),
    "`lengths=`, `resets=`": lambda m, x: train(
        m, x, lengths=torch.tensor([4, 1]), resets=torch.zeros(T, B, dtype=torch.bool)
    ),
    "`torch.autocast`": lambda m, x: train(torch.autocast("cpu", torch.bfloat16)(m), x),
    "bfloat16, float16, float64": lambda m, x: [
        train(m.to(dtype), x.to(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ],
    "`torch.compile(fullgraph=True, dynamic=True)`": compiled,
    "`torch.export`, dynamic time and batch": exported,
    "`torch.onnx.export(dynamo=True)`": onnx_program,
    "`torch.jit.trace`": traced,
    "`torch.jit.script`": lambda m, x: torch.jit.script(m),
    "`torch.fx.symbolic_trace`": lambda m, x: torch.fx.symbolic_trace(torch.nn.Sequential(m))(x),
    "second derivatives": second,
    "`torch.func.vmap` of `grad`": per_sample,
    "`torch.func.jvp`": lambda m, x: jvp(lambda x: m(x)[0], (x,), (x,)),
    "`torch.utils.checkpoint`, both kinds": checkpointed,
    "`torch.utils.flop_counter`": counted,
    "`DistributedDataParallel`": distributed,
    "nested tensors": lambda m, x: m(torch.nested.nested_tensor([x[:, 0], x[:2, 1]], layout=torch.jagged)),
    "`torch.ao.quantization`, a qconfig": quantized,
    '`weights="int8"`, inference': weights,
    "forward on the device meta": lambda m, x: m.to("meta")(x.to("meta")),
}


def found_for(feature: str, layer: str) -> str:
    """yes, warning or error."""
    module, x = LAYERS[layer](), torch.randn(T, B, I)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            FEATURES[feature](module, x)
        except (NotImplementedError, TypeError, ValueError):
            return "error"
    return "warning" if any("fastrnn" in str(warning.message) for warning in caught) else "yes"


def table(head: list[str], rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXT = """\
# What it runs with

`tests/docs/test_docs_compatibility.py` makes this page from the files and calls that it speaks of, and
fails where it is wrong.

## Versions and machines

{versions}

## Features of torch

Each was tried with each layer, on a CPU: *yes*, a *warning*, or an *error* that says what to do instead.

{features}

## What to know of them

<!-- README: The rest of torch -->
"""


def test_document_says_what_is():
    text = TEXT.format(
        versions=table(["", "needed", "from, and tested with"], versions()),
        features=table(["", *LAYERS], [[name, *(found_for(name, layer) for layer in LAYERS)] for name in FEATURES]),
    )
    if not ISAS:
        pytest.skip("the page names the instruction sets of x86-64")
    if os.environ.get("FASTRNN_WRITE_COMPATIBILITY"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text


def test_instruction_sets_are_those_of_the_build():
    """The build tells those that this processor has, each of which has all before it."""
    found = _C.build_info()["isas"]
    assert found
    assert not ISAS or found == ISAS[: len(found)]


def test_extras_are_there():
    text = (ROOT / "pyproject.toml").read_text()
    for name, needed, _ in versions():
        if "fastrnn[" in name:
            extra = re.search(r"fastrnn\[(\w+)\]", name)[1]
            line = re.search(rf"^{extra} = \[(.+)\]", text, re.MULTILINE)[1]
            assert all(package.strip() in line for package in needed.split(":")[0].split(","))
