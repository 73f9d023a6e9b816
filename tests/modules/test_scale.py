"""Training on several processes, and with activations computed again: the gradients and parameters of one process."""

import os
import time
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import fastrnn

TIMEOUT = 90  # seconds; both processes take less than 30, most of it for imports
RANKS, T, B, I, H = 2, 6, 4, 3, 5

# Sums of a few hundred products of size 1, added for each half of the rows and then together: float64 rounds them at
# 1e-16. A gradient that is not averaged, or averaged twice, is off by half of itself.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}


class Twice(nn.Module):
    """One layer used twice, and a second one that has its recurrent weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = fastrnn.GRU(I, I), fastrnn.GRU(I, I)
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x, **rows):
        y, _ = self.first(x, **rows)
        y, h = self.first(y, **rows)
        return self.second(y, h, **rows)


class Cells(nn.Module):
    """A loop over cells."""

    def __init__(self):
        super().__init__()
        self.lstm, self.own = fastrnn.LSTMCell(I, H), fastrnn.RecurrentCell("mgu", H, H)

    def forward(self, x, lengths=None):
        state, h, outputs = None, None, []
        for step in x:
            state = self.lstm(step, state)
            h = self.own(state[0], h)
            outputs.append(h)
        return torch.stack(outputs), h


LAYERS = {
    "LSTM": lambda: fastrnn.LSTM(I, H, 2, bidirectional=True),
    "LSTM-peephole": lambda: fastrnn.LSTM(I, H, peephole=True),
    "LSTM-recompute": lambda: fastrnn.LSTM(I, H, proj_size=2, recompute=True),
    "GRU": lambda: fastrnn.GRU(I, H, 2),
    "RNN-leak": lambda: fastrnn.RNN(I, H, leak=nn.Parameter(torch.linspace(0.1, 0.9, H))),
    "Recurrent": lambda: fastrnn.Recurrent("slstm", I, H, bidirectional=True),
    "LMU": lambda: fastrnn.LMU(I, H, 4, 6.0),
    "Stack": lambda: fastrnn.Stack(fastrnn.LSTM(I, H), fastrnn.GRU(H, H), residual=True),
    "weight-norm": lambda: weight_norm(fastrnn.GRU(I, H), "weight_hh_l0"),
    "shared": Twice,
    "cells": Cells,
}


class Model(nn.Module):
    def __init__(self, name: str, is_checkpointed: bool = False):
        super().__init__()
        torch.manual_seed(3)
        self.recurrent, self.is_checkpointed = LAYERS[name](), is_checkpointed
        self.output = nn.LazyLinear(2)
        self.double()(*data())

    def forward(self, x, lengths):
        if self.is_checkpointed:
            y, state = checkpoint(self.recurrent, x, lengths=lengths, use_reentrant=False)
        else:
            y, state = self.recurrent(x, lengths=lengths)
        return self.output(y), state


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(T, B, I, dtype=torch.float64, generator=generator), torch.tensor([6, 3, 0, 5])


def rows_of(rank: int, x, lengths):
    """The rows of one process."""
    return x[:, rank::RANKS], lengths[rank::RANKS]


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(model, args, share: float = 1.0):
    """Gradients and parameters of two steps, on the loss times `share`, and an evaluation after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        y, state = model(*args)
        states = [s for part in (state if isinstance(state, tuple) else (state,)) for s in part]
        (share * (y.square().sum() + sum(s.square().sum() for s in states))).backward()
        gradients = [whole(p.grad) for p in model.parameters()]
        optimizer.step()
        found += gradients + [whole(p) for p in model.parameters()]
    with torch.no_grad():
        return found, model(*args)[0].clone()


def ddp(name, mesh):
    return nn.parallel.DistributedDataParallel(Model(name))


def fsdp(name, mesh, is_checkpointed=False):
    """Each layer is gathered for its own call, and once more for its backward pass; shared parameters are one group."""
    from torch.distributed.fsdp import fully_shard

    model = Model(name, is_checkpointed)
    if name != "cells":  # whose steps would each gather
        fully_shard(model.recurrent, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


WAYS = {"ddp": ddp, "fsdp": fsdp, "fsdp-checkpoint": partial(fsdp, is_checkpointed=True)}


def trained(way, name, mesh, rank):
    """Of a process's own rows. Processes average, so that each one's loss counts twice."""
    return train(way(name, mesh), rows_of(rank, *data()), share=RANKS)


SAVED = [(way, name) for way in ("ddp", "fsdp") for name in ("LSTM", "RNN-leak", "Recurrent")]


def saved_and_loaded(way, name, mesh, rank):
    """A whole state dict, and that of another model which has loaded it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    options = StateDictOptions(full_state_dict=True)
    model, other = WAYS[way](name, mesh), WAYS[way](name, mesh)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = get_model_state_dict(model, options=options)
    set_model_state_dict(other, dict(state), options=options)  # which puts this process's parts into what it is given
    return state, get_model_state_dict(other, options=options), other(*rows_of(rank, *data()))[0].detach()


def streamed(mesh):
    """Errors of what is called while the weights are distributed, and a stream made while they are whole."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.manual_seed(3)
    layer, errors = fastrnn.GRU(I, H).double(), []
    fully_shard(layer, mesh=mesh)
    for call in (lambda: layer.stream(B), lambda: fastrnn.GRU.forward(layer, data()[0])):
        with pytest.raises(TypeError) as caught:
            call()
        errors.append(str(caught.value))
    register_fsdp_forward_method(layer, "stream")
    step = layer.stream(B)
    return errors, torch.stack([step(x).clone() for x in data()[0]])


def without_hook(mesh):
    """The error, in a list, of a backward pass that FSDP has gathered no weights for."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(fastrnn.GRU(I, H).double())
    fully_shard(model[0], mesh=mesh, reshard_after_forward=True)
    _, h = fully_shard(model, mesh=mesh)(data()[0][:, 0])
    h += 1
    with pytest.raises(RuntimeError) as caught:
        h.sum().backward()
    return [str(caught.value)]


def truncated():
    """Outputs of chunks through DistributedDataParallel, in the layout of the layer inside."""
    torch.manual_seed(3)
    model = nn.parallel.DistributedDataParallel(fastrnn.GRU(I, H, batch_first=True).double())
    return [y.detach() for y, *_ in fastrnn.truncated(model, data()[0].transpose(0, 1), 4)]


def job(rank: int, folder: str) -> None:
    """What one process does: everything, in the same order as the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT / 2))
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    calls = {(way, name): partial(trained, WAYS[way], name, mesh, rank) for way in WAYS for name in LAYERS}
    calls |= {("saved", way, name): partial(saved_and_loaded, way, name, mesh, rank) for way, name in SAVED}
    calls |= {"streamed": partial(streamed, mesh), "hook": partial(without_hook, mesh), "truncated": truncated}
    found = {}
    for key, call in calls.items():
        try:
            found[key] = call()
        except Exception:
            found[key] = traceback.format_exc()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process has found, by key."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder = str(tmp_path_factory.mktemp("ranks"))
    processes = torch.multiprocessing.spawn(job, (folder,), nprocs=RANKS, join=False)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not processes.join(1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(RANKS)]


def of_each(ranks, key):
    found = [rank[key] for rank in ranks]
    assert not isinstance(found[0], str), found[0]
    assert not isinstance(found[1], str), found[1]
    return found


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, **TOLERANCE)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(ranks, way, name):
    """Gradients and parameters of each step, and an evaluation after them."""
    expected, output = train(Model(name), data())
    for rank, (found, own) in enumerate(of_each(ranks, (way, name))):
        assert_close(found, expected)
        assert_close(own, output[:, rank::RANKS])


@pytest.mark.parametrize(("way", "name"), SAVED)
def test_state_dict(ranks, way, name):
    """It has the names and bits of one process, and comes back."""
    model = Model(name)
    for rank, (state, loaded, output) in enumerate(of_each(ranks, ("saved", way, name))):
        assert_equal(dict(state), dict(model.state_dict()))
        assert_equal(dict(loaded), dict(model.state_dict()))
        assert_close(output, model(*rows_of(rank, *data()))[0])


def test_distributed_weights_outside_of_a_call(ranks):
    torch.manual_seed(3)
    expected, _ = fastrnn.GRU(I, H).double()(data()[0])
    for errors, outputs in of_each(ranks, "streamed"):
        for error in errors:
            assert error.startswith("weights: expected local tensors, got a DTensor (Shard(dim=0),). FSDP gathers them")
        assert_close(outputs, expected)


def test_weights_that_are_gone_in_backward(ranks):
    """A view of an unbatched state has lost its hook."""
    for (error,) in of_each(ranks, "hook"):
        assert error.startswith("weights: their memory was freed. FSDP")


@pytest.mark.parametrize("module", [fastrnn.LSTM(I, H, 2), fastrnn.Recurrent("mgu", I, H), fastrnn.LSTMCell(I, H)])
def test_weights_whose_memory_is_freed(module):
    x = data()[0].float()
    for parameter in module.parameters():
        parameter.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weights: their memory was freed"):
        module(x[0] if isinstance(module, nn.LSTMCell) else x)


@pytest.mark.parametrize("layer", [fastrnn.LSTM(I, H), fastrnn.GRU(I, H), fastrnn.LSTM(I, H, 2, bidirectional=True)])
def test_results_are_no_views(layer):
    """FSDP warns of views: in-place operations take its hooks off them."""
    y, state = layer(data()[0].float())
    assert not any(t._is_view() for t in (y, *(state if isinstance(state, tuple) else (state,))))


def test_truncated_through_ddp(ranks):
    torch.manual_seed(3)
    expected, _ = fastrnn.GRU(I, H, batch_first=True).double()(data()[0].transpose(0, 1))
    for outputs in of_each(ranks, "truncated"):
        assert_close(torch.cat(outputs, dim=1), expected)


def test_data_parallel_without_gpus_is_the_module():
    model = Model("LSTM")
    assert_equal(train(nn.DataParallel(model), data()), train(Model("LSTM"), data()))


# ---- activation checkpointing

DROPPED = {
    "LSTM": lambda **o: fastrnn.LSTM(I, H, 3, dropout=0.5, bidirectional=True, **o),
    "GRU": lambda **o: fastrnn.GRU(I, H, 2, dropout=0.5, **o),
    "RNN": lambda **o: fastrnn.RNN(I, H, 2, dropout=0.5, leak=0.3, **o),
    "Recurrent": lambda **o: fastrnn.Recurrent("slstm", I, H, 2, dropout=0.5, **o),
    "Stack": lambda **o: fastrnn.Stack(fastrnn.LSTM(I, H, **o), fastrnn.GRU(H, H, **o), dropout=0.5),
}


def gradients_of(module, call):
    """Of x and the parameters; two calls, each with dropout of its own."""
    torch.manual_seed(7)
    module.zero_grad()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    lengths, resets = data()[1], torch.rand(T, B) < 0.2
    sum(call(x, None, lengths, resets)[0].square().sum() for _ in range(2)).backward()
    return [x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", DROPPED)
def test_checkpoint(name, recompute, use_reentrant):
    """To the bit, dropout between layers included: the state of the generator comes back."""
    module = DROPPED[name](recompute=recompute).double()
    expected = gradients_of(module, module)
    assert_equal(gradients_of(module, partial(checkpoint, module, use_reentrant=use_reentrant)), expected)


@pytest.mark.parametrize("name", ["LSTM", "Recurrent"])
def test_compiled_checkpoint(name):
    """Without dropout, whose numbers a compiler draws otherwise."""
    module = DROPPED[name]().double()
    for part in module.modules():
        part.dropout = 0.0
    compiled = torch.compile(partial(checkpoint, module, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_close(gradients_of(module, compiled), gradients_of(module, module))
