"""`torch.export` files and AOTInductor packages: made here, loaded in a process that knows the ops, but no module."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_package.cpp"
LENGTHS, RESETS = torch.tensor([5, 0, 3]), torch.zeros(6, 3, dtype=torch.bool)
RESETS[2, 0] = True

RUN = """
import sys, torch, fastrnn
file = sys.argv[1]
loaded = torch.export.load(file).module() if file.endswith("ep") else torch._inductor.aoti_load_package(file)
for inputs, expected in torch.load(sys.argv[2]):
    with torch.no_grad():
        found = loaded(*inputs)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert torch.equal(a, b), (a - b).abs().max()
print("the same bits")
"""


class Everything(nn.Module):
    """Every layer and cell, every option, so that one compilation is enough."""

    def __init__(self):
        super().__init__()
        make = {
            "lstm": lambda: fastrnn.LSTM(3, 4),
            "no_bias": lambda: fastrnn.LSTM(3, 4, bias=False),
            "projected": lambda: fastrnn.LSTM(3, 4, 2, proj_size=2, bidirectional=True),
            "projected_no_bias": lambda: fastrnn.LSTM(3, 4, bias=False, proj_size=2),
            "gru": lambda: fastrnn.GRU(3, 4, 2, dropout=0.5),
            "reset_before": lambda: fastrnn.GRU(3, 4, reset_after=False, bidirectional=True),
            "tanh": lambda: fastrnn.RNN(3, 4, recompute=True),
            "relu": lambda: fastrnn.RNN(3, 4, nonlinearity="relu", bias=False),
            "rounded": lambda: fastrnn.GRU(3, 4, weights="bf16"),
            "converted": lambda: fastrnn.convert(nn.LSTM(3, 4)),
        }
        self.layers = nn.ModuleDict({name: build() for name, build in make.items()})
        self.first = fastrnn.LSTM(3, 4, batch_first=True)
        self.cells = nn.ModuleList([fastrnn.RNNCell(3, 4), fastrnn.LSTMCell(3, 4), fastrnn.GRUCell(3, 4, bias=False)])

    def forward(self, x, lengths, resets):
        outputs = []
        for layer in self.layers.values():
            y, state = layer(x)
            outputs += [y, *(state if isinstance(state, tuple) else [state])]
        y, (h, c) = self.layers["lstm"](x, (outputs[1], outputs[2]), lengths=lengths, resets=resets)
        outputs += [
            y,
            h,
            c,
            self.layers["gru"](x, lengths=lengths)[0],
            self.layers["reset_before"](x, resets=resets)[0],
        ]
        outputs += [self.first(x.transpose(0, 1))[0], self.layers["tanh"](x[:, 0])[0]]
        outputs += [self.cells[0](x[0]), *self.cells[1](x[0]), self.cells[2](x[0], h[0])]
        return tuple(outputs)


def inputs(T, B):
    return torch.randn(T, B, 3), LENGTHS.clamp(max=T).repeat(B)[:B].clone(), RESETS.repeat(T, B)[:T, :B].contiguous()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the exported program, its package, and calls with what they return."""
    folder = tmp_path_factory.mktemp("packages")
    module = Everything().eval()
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    shapes = ({0: T, 1: B}, {0: B}, {0: T, 1: B})
    with torch.no_grad():
        exported = torch.export.export(module, inputs(6, 3), dynamic_shapes=shapes)
        calls = [(given, module(*given)) for given in (inputs(6, 3), inputs(9, 5))]
    torch.save(calls, folder / "calls.pt")
    torch.export.save(exported, folder / "model.pt2ep")
    torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
    return folder


@pytest.mark.parametrize("name", ["model.pt2ep", "model.pt2"])
def test_in_a_fresh_process(name, packages):
    """Any number of steps and rows, from one file; weights, biases and projections there or not."""
    command = [sys.executable, "-c", RUN, str(packages / name), str(packages / "calls.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "the same bits" in run.stdout, run.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_from_cpp(packages):
    """examples/run_package.cpp, compiled as it says, without Python anywhere: the same bits."""
    text = EXAMPLE.read_text()
    command = re.search(r"g\+\+ .*?\n\n", text, re.DOTALL)[0].replace("\\\n", " ")
    ours, theirs = (Path(module.__file__).parent for module in (fastrnn, torch))
    program = packages / "run_package"
    command = command.replace("-o run_package ", f"-o {program} ").replace("run_package.cpp", str(EXAMPLE))
    environment = {"PATH": os.environ["PATH"], "TORCH": str(theirs), "FASTRNN": str(ours)}
    subprocess.run(command, shell=True, env=environment, check=True)
    used = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libfastrnn.so" in used
    assert "python" not in re.sub(r"=> .*", "", used)
    for given, expected in torch.load(packages / "calls.pt"):
        torch.save(list(given), packages / "inputs.pt")
        arguments = [program, packages / "model.pt2", packages / "inputs.pt", packages / "outputs.pt"]
        run = subprocess.run(arguments, env={}, capture_output=True, text=True, check=False)
        assert run.stdout == f"{len(expected)} outputs\n", run.stderr
        found = torch.load(packages / "outputs.pt")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
