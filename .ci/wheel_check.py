"""What .ci/wheels.py runs in an environment that has torch, NumPy and the wheel alone, and no compiler."""

import shutil
from importlib.metadata import distribution, version

import torch

import fastrnn

assert not shutil.which("c++")
assert not shutil.which("nvcc")
assert fastrnn.__version__ == version("fastrnn")
files = {str(file) for file in distribution("fastrnn").files or []}
assert {"fastrnn/py.typed", "fastrnn/_C.pyi", "fastrnn/built_with.json", "fastrnn/csrc/cells/cell.h"} <= files

x = torch.randn(20, 4, 8)
for name in ("LSTM", "GRU", "RNN"):
    theirs, ours = getattr(torch.nn, name)(8, 16), getattr(fastrnn, name)(8, 16)
    ours.load_state_dict(theirs.state_dict())
    wanted, found = theirs(x)[0], ours(x)[0]
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)


@fastrnn.cell(gates="f n", states="h")
def own(x, u, h):
    f = torch.sigmoid(x.f + u.f(h))
    return (1 - f) * h + f * torch.tanh(x.n + u.n(f * h))


fastrnn.Recurrent(own, 8, 16)(x)[0].sum().backward()  # in torch's operations, after a warning
print(f"fastrnn {fastrnn.__version__} with torch {torch.__version__}: {fastrnn._C.build_info()}")
