"""Private training with Opacus: gradients by row of our layers, in a model that its `GradSampleModule` wraps.

A grad sampler as Opacus registers them sees a layer's positional tensors and the gradient of its first output: no
lengths, no states, no packed sequence. So its hooks leave our layers out, and these have their own: a call takes down
what each layer has read, and when the backward pass has come to the layer's gate gradients of every step, the gradients
of its parameters by row are one product each (per_sample.py). No other pass is made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from fastrnn import autograd, modules, papers, per_sample
from fastrnn.composed import Composed
from fastrnn.layers import Layers
from fastrnn.learned_state import LearnedState
from fastrnn.recurrent import Recurrent
from fastrnn.regularized import Regularized

Recording: TypeAlias = AbstractContextManager[list[autograd.Recorded]]
ByParameter: TypeAlias = tuple[Any, per_sample.Makers]  # a parameter, to which Opacus adds attributes, and its own

_LAYERS = (modules.RNN, modules.LSTM, modules.GRU, Recurrent, *(getattr(papers, name) for name in papers.__all__))
_UNKNOWN = Regularized, LearnedState, Composed  # what computes with parameters otherwise than a layer does


def register() -> None:
    """Tells Opacus' `ModuleValidator` which of our layers it cannot take. It asks by the very class of a module."""
    from opacus.validators import ModuleValidator
    from opacus.validators.errors import UnsupportedModuleError

    def validate(module: torch.nn.Module) -> list[Any]:
        try:
            per_sample.check_kind(module)
        except (ValueError, NotImplementedError) as error:
            return [UnsupportedModuleError(f"fastrnn.{module._get_name()}: {error}")]
        return []

    ModuleValidator.VALIDATORS.update(dict.fromkeys(_LAYERS, validate))


def prepare() -> None:
    """Called when Opacus' hooks have been imported."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    iterate_submodules, add_hooks = GradSampleHooks.iterate_submodules, GradSampleHooks.add_hooks

    @functools.wraps(iterate_submodules)
    def iterate_others(self: Any, module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        return (found for found in iterate_submodules(self, module) if not isinstance(found, Layers))

    @functools.wraps(add_hooks)
    def add_all_hooks(self: Any, *args: Any, loss_reduction: str = "mean", **options: Any) -> None:
        ours = _ours(self, self._module)
        add_hooks(self, *args, loss_reduction=loss_reduction, **options)
        for layer in ours:
            self._module.autograd_grad_sample_hooks += _Watch(self, layer, loss_reduction == "mean").hooks()

    GradSampleHooks.iterate_submodules, GradSampleHooks.add_hooks = iterate_others, add_all_hooks


def _ours(hooks: Any, model: torch.nn.Module) -> list[Layers]:
    """The layers of a model that are to have gradients by row.

    Raises:
        NotImplementedError: there are none of a module, or none for the kind of `hooks`.
        ValueError: a layer has rounded or computed weights.
    """
    found: list[Layers] = []
    for name, module in model.named_modules():
        if not isinstance(module, (Layers, LearnedState)) or not any(p.requires_grad for p in module.parameters()):
            continue
        if isinstance(module, _UNKNOWN):
            raise NotImplementedError(
                f"{name or 'module'}: fastrnn.{type(module).__name__} has no gradients by row for Opacus; expected an "
                "LSTM, GRU, RNN, Recurrent or layer of a paper"
            )
        if type(hooks).__name__.endswith(("FSDP", "TP")):
            raise NotImplementedError(f"{type(hooks).__name__}: expected no layers of fastrnn, got {name or 'one'}")
        per_sample.check_kind(module)
        found.append(module)
    return found


class _Watch:
    """Gives the parameters of one layer their `grad_sample`, or with ghost clipping `_norm_sample`."""

    def __init__(self, hooks: Any, layer: Layers, is_mean: bool) -> None:
        self.of_opacus, self.layer, self.is_mean = hooks, layer, is_mean
        self.begun: list[tuple[Recording, list[autograd.Recorded]]] = []  # of a call that is under way
        self.rows: list[int] = []  # of calls that backward has not come to
        self.most: int | None = None  # of these, while it does

    def hooks(self) -> list[RemovableHandle]:
        return [
            self.layer.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
            self.layer.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        ]

    def begin(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_on = self.of_opacus.hooks_enabled and layer.training and torch.is_grad_enabled()
        if is_on and any(p.requires_grad for p in layer.parameters()):
            recording = autograd.recorded()
            self.begun.append((recording, recording.__enter__()))

    def end(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.begun:
            return
        recording, calls = self.begun.pop()
        recording.__exit__(None, None, None)
        if output is None:  # an error is on its way
            return
        input = args[0] if args else kwargs["input"]
        order = input.unsorted_indices if isinstance(input, PackedSequence) else None
        for index, call in enumerate(calls):
            self._expect(index, call, order)

    def _expect(self, index: int, call: autograd.Recorded, order: torch.Tensor | None) -> None:
        """Has the gradients made when backward has come to this call."""
        members, by_name = per_sample.of_call(self.layer, index, call)
        by_parameter: list[ByParameter] = [(self.layer.get_parameter(name), made) for name, made in by_name.items()]
        by_parameter = [(p, made) for p, made in by_parameter if p.requires_grad]
        self.rows.append(members.members)
        for p, _ in by_parameter:
            p._forward_counter += 1
            if self._makes_norms() and p._forward_counter > 1:
                raise NotImplementedError("Parameter tying is not supported with Ghost Clipping")

        def arrive(steps: Any) -> None:
            members.steps, steps.grad = steps.grad, None
            if self.of_opacus.hooks_enabled:
                self._make(members.members, by_parameter, order)
            members.release()

        steps: Any = call.read.steps  # which recording has made
        steps.register_post_accumulate_grad_hook(arrive)

    def _makes_norms(self) -> bool:
        return getattr(self.of_opacus, "use_ghost_clipping", False)

    def _make(self, rows: int, by_parameter: list[ByParameter], order: torch.Tensor | None) -> None:
        if not self.rows:
            raise RuntimeError("gradients by row: expected one backward pass through each call of the layer")
        self.most = max(self.rows) if self.most is None else self.most
        for p, (gradient, norm) in by_parameter:
            found = (norm() if self._makes_norms() else gradient()).to(p.dtype)
            found = found if order is None else found.index_select(0, order)
            self._give(p, found * self.most if self.is_mean else found)
        self.rows.remove(rows)
        if not self.rows:
            self.most = None

    def _give(self, p: Any, found: torch.Tensor) -> None:
        """As Opacus' own hooks do."""
        from opacus.grad_sample import grad_sample_module as theirs

        p._forward_counter -= 1
        if self._makes_norms():
            p._norm_sample = found
            return
        shaped = found.reshape(found.shape[0], *p.shape)
        theirs.create_or_accumulate_grad_sample(param=p, grad_sample=shaped, max_batch_len=self.most)
        if p._forward_counter:
            return
        theirs.promote_current_grad_sample(p)
        if hasattr(self.of_opacus, "use_ghost_clipping"):  # which wants norms of gradients then
            p._norm_sample, p.grad_sample = p.grad_sample.flatten(1).norm(dim=1), None
        elif not self.of_opacus.grad_accumulation_allowed and isinstance(p.grad_sample, list):
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. You need to call optimizer.step() after "
                "every forward/backward pass or consider using BatchMemoryManager"
            )
