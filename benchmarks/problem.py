"""What every contender is given, what it returns, and how a recurrent module is called in each mode."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import CLASSES, Case

STREAMED = 3  # frames that contenders are compared over


@dataclass(frozen=True)
class Problem:
    """The weights and inputs of a case, the same for every contender.

    `x` is [T, B, I] and `grad` [T, B, D*H], or without T in the modes of a single step, where `states` holds one [B, H]
    per state; a whole sequence starts from the zero state that a module makes by itself. `weights` has torch.nn's
    names. `lengths` is int64 [B], on the CPU, or None where every row has T steps.
    """

    case: Case
    weights: dict[str, Tensor]
    x: Tensor
    states: tuple[Tensor, ...]
    grad: Tensor
    lengths: Tensor | None

    @classmethod
    def of(cls, case: Case) -> Problem:
        torch.manual_seed(0)
        T, B, _, H = case.shape
        weights = make_module(nn, case).state_dict()
        with torch.device(case.device):
            x = torch.randn(T, B, case.shape.I).to(case.torch_dtype)
            states = torch.randn(2 if case.cell == "lstm" else 1, B, H).to(case.torch_dtype)
            grad = torch.randn(T, B, case.directions * H).to(case.torch_dtype)
        lengths = None if case.lengths is None else torch.tensor(case.lengths)
        if case.is_single_step:
            return cls(case, weights, x[0], states.unbind(), grad[0], None)
        return cls(case, weights, x, (), grad, lengths)

    @property
    def hx(self) -> Tensor | tuple[Tensor, ...] | None:
        """The states as a cell module takes them; None for a whole sequence."""
        return self.states[0] if len(self.states) == 1 else self.states or None


@dataclass(frozen=True)
class Call:
    """What a contender does, as a function without arguments that is timed; the rest is not.

    `outputs` returns what is compared between contenders, by default what `run` does: y, then the last states, or in
    training the gradients of the input and of each parameter; while streaming the first frames of y. Nested tuples are
    fine. `threads` are torch's while it runs, by default the case's.
    """

    run: Callable[[], object]
    compared: Callable[[], object] | None = None
    threads: int | None = None

    @property
    def outputs(self) -> Callable[[], object]:
        return self.compared or self.run


class Peer:
    """Something that can run a case. `package` is the distribution it comes from."""

    name: str
    package: str
    tolerance: float | None = None  # how far it may be from fastrnn; None: as the type allows
    limit_applies = True  # whether the limit of the case is one for this peer, too

    @property
    def version(self) -> str | None:
        """The installed version; None if the package is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def obstacle(self, case: Case) -> str | None:
        """Why this peer cannot run the case; None if it can."""
        return None

    def prepare(self, problem: Problem) -> Call:
        """What is called in this case. Gradient mode and threads are the caller's to set."""
        raise NotImplementedError


def make_module(library, case: Case, **options) -> nn.Module:
    """The recurrent module, or in the modes of single steps the cell module, that `library` has under torch.nn's
    name."""
    name = case.spec.module + ("Cell" if case.is_of_cell_modules else "")
    with torch.device(case.device):  # where random numbers are drawn fastest
        module = getattr(library, name)(case.shape.I, case.shape.H, **case.stack_options, **options)
    return module.to(case.torch_dtype)


def module_call(module: nn.Module, problem: Problem, **keywords) -> Call:
    """A call of `module` in the problem's mode, with `keywords` beside the input and the state."""
    module.load_state_dict(problem.weights)
    use, x, hx = problem.case.use, problem.x, problem.hx
    if use == "update":
        return update_call(module, problem, **keywords)
    if use == "loop":
        return training_call(module, lambda x: loop(module, x), problem.x, problem.grad)
    if use == "training":
        return training_call(module, lambda x: module(x, **keywords)[0], problem.x, problem.grad)
    module.eval()
    if use == "stream":
        return stream_call(module, problem)
    if use == "forward":
        x = x.clone().requires_grad_()
    return Call(lambda: module(x, hx, **keywords))


def packed_call(module: nn.Module, problem: Problem) -> Call:
    """A packed sequence, which each call packs anew; the results stay packed."""
    module.load_state_dict(problem.weights)
    training = problem.case.use == "training"

    def packed(x):
        return pack_padded_sequence(x, problem.lengths, enforce_sorted=False)

    if training:
        call = training_call(module, lambda x: module(packed(x))[0].data, problem.x, packed(problem.grad).data)
    else:
        module.eval()
        call = Call(lambda: module(packed(problem.x)))

    def compared():
        y, others = call.run()
        y = packed(problem.x)._replace(data=y) if training else y
        return pad_packed_sequence(y)[0], others

    return Call(call.run, compared)


def training_call(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Call:
    """Forward and backward.

    Each call first marks the parameters as changed, as an optimiser would, by a write of no elements: nothing derived
    from them can be carried over from the call before.
    """
    x = x.clone().requires_grad_()
    parameters = list(module.parameters())
    with torch.no_grad():
        nothing = [parameter[:0] for parameter in parameters]

    def run():
        with torch.no_grad():
            torch._foreach_zero_(nothing)
        y = forward(x)
        return y.detach(), torch.autograd.grad(y, [x, *parameters], grad)

    return Call(run)


def loop(cell: nn.Module, x: Tensor) -> Tensor:
    """The outputs of a cell module, step by step from the zero state."""
    outputs, state = [], None
    for now in x.unbind():
        state = cell(now, state)
        outputs.append(state if isinstance(state, Tensor) else state[0])
    return torch.stack(outputs)


def update_call(module: nn.Module, problem: Problem, **keywords) -> Call:
    """A step of training as people write it, with torch's own operations before and after the layer.

    The learning rate is 0, which is as much work as any other, and leaves all contenders with the same weights. What is
    compared is the loss and every gradient.
    """
    case, x = problem.case, problem.x
    T, B, I, H = case.shape
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(), torch.device(case.device):
        torch.manual_seed(1)  # for all contenders the same linear layers
        first, last = nn.Linear(I, I), nn.Linear(case.directions * H, CLASSES)
    targets = torch.randint(CLASSES, (T * B,), generator=generator).to(case.device)
    model = nn.ModuleList([first, module, last]).to(case.torch_dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)

    def gradients():
        optimizer.zero_grad()
        logits = last(module(first(x), **keywords)[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters()]

    def run():
        gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Call(run, gradients)


def stream_call(cell: nn.Module, problem: Problem) -> Call:
    """A cell module that is given its own state of the step before."""
    x, zero = problem.x, torch.zeros_like(problem.states[0])
    state = zero if len(problem.states) == 1 else (zero, zero)

    def run():
        nonlocal state
        state = cell(x, state)
        return state

    def compared():
        nonlocal state
        state = zero if len(problem.states) == 1 else (zero, zero)
        frames = [run() for _ in range(STREAMED)]
        return [frame if isinstance(frame, Tensor) else frame[0] for frame in frames]

    return Call(run, compared)
