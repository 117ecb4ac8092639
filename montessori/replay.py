"""Per-example gradients of small parameters in whatever calls of torch they are used.

While a model runs forward, every call that takes a *form* (a parameter, or what was computed from parameters alone:
−exp(A_log), a squeezed kernel) together with an activation is noted. When the gradient of its output arrives, the call
alone is run again under `torch.vmap`, each example on its own rows with a copy of the parameters of its own, and
differentiated. A matrix of which some rows are a parameter (trained tokens of PEFT) is no form: its gradient is that of
these rows alone. The forward pass itself is not touched. Dimensions: B examples.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from montessori.errors import ModelError
from montessori.rowmap import RowMap, UnmappableRowsError
from montessori.uses import DenseUse, LinearUse, Use

# A parameter with more values than this has no gradient [B, *shape] that is held at once.
MOST_VALUES = 1 << 20
# A form of more values than this, and of GROWTH times those of its parameters, is no cheaper to have for each example
# than a pass for each: whole matrices made of a few vectors, of 256 columns, take the same time in batches of 16 (LoKr,
# HiRA) or three times as long (HRA), and all their memory; of 64 columns half the time.
SMALL_FORM, GROWTH = 1 << 15, 4
# Bytes of the forms of a batch.
MOST_HELD = 1 << 31
# Autograd cuts the graph at these too: what they return is followed no further.
_APART = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
# What these make of a parameter may have a row for each example.
_PER_EXAMPLE = (Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, torch.tile)
_CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double)
_ROW_WRITES = (Tensor.index_copy, torch.index_copy)
# Options of a look-up under which its gradient is another one.
_UNLIKE = ("max_norm", "scale_grad_by_freq", "sparse")


@dataclass(frozen=True)
class _Table:
    """A matrix of which the rows `ids`, int64 [n], are the parameter `name`, or a cast of it."""

    tensor: Tensor
    ids: Tensor
    name: str

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class _Form:
    """A tensor computed from the parameters `names` alone, and the same [B, *shape] from a copy for each example.

    `expanded`, of the shape of `tensor`, is there where that may be one view for each example, as of attention sinks.
    """

    tensor: Tensor
    copies: Tensor
    names: frozenset[str]
    expanded: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """A call of torch that takes forms: its tensors in order, for each of them the form that it is, if any, and
    whether it is the same for all examples."""

    func: Any
    arguments: tuple[Any, Any]
    forms: list[_Form | None]
    tensors: list[Tensor]
    shared: list[bool]
    size: int

    @property
    def names(self) -> frozenset[str]:
        return frozenset[str]().union(*(form.names for form in self.forms if form is not None))

    def again(self, expanded: bool = False) -> Any:
        """The call's output [B, …], example by example; raises UnmappableRowsError where that does not go.

        With `expanded`, forms that may be one view for each example are taken as that.
        """
        given = zip(self.forms, self.tensors, self.shared, strict=True)
        own = [self._own(form, tensor, shared, expanded) for form, tensor, shared in given]

        def one(*tensors: Tensor) -> Any:
            args, kwargs = _with_tensors(self.arguments, iter(tensors))
            return self.func(*args, **kwargs)

        try:
            return torch.vmap(one, tuple(None if shared else 0 for shared in self.shared))(*own)
        except torch.OutOfMemoryError:
            raise
        # Whatever a call raises that is not made for one example or not known to vmap.
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise self.unmappable() from error

    def like(self, output: Tensor) -> Tensor:
        """`again()` where it has the rows of `output`, one example after the other."""
        may_be_views = any(form is not None and form.expanded is not None for form in self.forms)
        for expanded in (False, True) if may_be_views else (False,):
            try:
                found = self.again(expanded)
            except UnmappableRowsError:
                continue
            if found.dim() > 1 and found.flatten(0, 1).shape == output.shape:
                return found
        raise self.unmappable()

    def _own(self, form: _Form | None, tensor: Tensor, shared: bool, expanded: bool) -> Tensor:
        if form is not None:
            return form.expanded.unsqueeze(1) if expanded and form.expanded is not None else form.copies
        if shared:
            return tensor
        if tensor.shape[0] % self.size:
            raise self.unmappable()
        return tensor.unflatten(0, (self.size, -1))

    def unmappable(self) -> UnmappableRowsError:
        others = [tensor for tensor, form in zip(self.tensors, self.forms, strict=True) if form is None]
        shape = tuple(others[0].shape) if others else ()
        return UnmappableRowsError(min(self.names).rpartition(".")[0], shape, self.size)


class ReplayedCalls(TorchFunctionMode):
    """Active during a forward pass of the batch of `rows`.

    `grown`: parameters with a form that is better not held for each example. `held`: bytes of all forms.
    `watch(names, output, on_gradient)` has `on_gradient` called with the gradient of `output` and gives the output to
    go on with; `deliver(name, use)` receives a gradient, once for every call of `watch` that named it.
    Raises UnmappableRowsError, with the module of a parameter, where rows cannot be told apart by example.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: RowMap,
        watch: Callable[[Iterable[str], Tensor, Callable[[Tensor], None]], Tensor],
        deliver: Callable[[str, Use], None],
    ) -> None:
        super().__init__()
        self._rows, self._size, self._watch, self._deliver = rows, rows.size, watch, deliver
        self._leaves = {
            name: parameter.detach().expand(rows.size, *parameter.shape).requires_grad_()
            for name, parameter in parameters.items()
        }
        # By identity; a form holds its tensor, so that no other takes its place.
        self._forms = {
            id(parameter): _Form(parameter, self._leaves[name], frozenset([name]))
            for name, parameter in parameters.items()
        }
        self._values = {name: parameter.numel() for name, parameter in parameters.items()}
        self._storages = {_storage(leaf) for leaf in self._leaves.values()}
        self.grown: set[str] = set()
        self.held = 0
        # What is computed from parameters alone and no form, by identity: the norm of DoRA's weight, frozen decays.
        self._common: dict[int, weakref.ref[Tensor]] = {}
        # Parameters and casts of them, and matrices with one in their rows, by identity.
        self._alike: dict[int, tuple[Tensor, str]] = {id(own): (own, name) for name, own in parameters.items()}
        self._tables: dict[int, _Table] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        forms = [self._forms.get(id(tensor)) for tensor in given]
        table = next((found for tensor in given if (found := self._tables.get(id(tensor)))), None)
        if not any(forms) or func in _APART or not torch.is_grad_enabled():
            common = self._is_common(func, given, forms)
            output = func(*args, **kwargs)
            self._note(output, common)
            return output if table is None else self._used(table, func, args, kwargs, output)
        if self._is_row_write(func, args, kwargs):
            return self._written(func, args, kwargs)
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        outputs = list(_tensors(output))
        if not any(tensor.is_floating_point() for tensor in outputs):
            return output
        shared = [
            form is None and (not tensor.dim() or self._of_parameters(tensor))
            for form, tensor in zip(forms, given, strict=True)
        ]
        call = _Call(func, (args, kwargs), forms, [tensor.detach() for tensor in given], shared, self._size)
        if versions != [tensor._version for tensor in given]:
            raise call.unmappable()
        if all(form or same for form, same in zip(forms, shared, strict=True)):
            for tensor, copies in zip(outputs, _tensors(call.again()), strict=True):
                self._forms[id(tensor)] = _Form(tensor, copies, call.names, self._expanded(func, forms[0], tensor))
                self._count(call.names, copies)
                if func in _CASTS and id(args[0]) in self._alike:
                    self._alike[id(tensor)] = (tensor, self._alike[id(args[0])][1])
            return output
        if not isinstance(output, Tensor):
            raise call.unmappable()
        return self._watch(call.names, output, partial(self._met, call, versions))

    def _is_row_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether rows of a matrix that is the same for all examples become a parameter, or a cast of one."""
        if func not in _ROW_WRITES:
            return False
        matrix, dim, source = _named(("matrix", "dim", "index", "source"), args, kwargs, ("matrix", "dim", "source"))
        return id(source) in self._alike and dim == 0 and source.dim() == 2 and self._of_parameters(matrix)

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        ids, source = _named(("matrix", "dim", "index", "source"), args, kwargs, ("index", "source"))
        output = func(*args, **kwargs)
        self._tables[id(output)] = _Table(output, ids, self._alike[id(source)][1])
        return output

    def _used(self, table: _Table, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        x, weight = _named(("input", "weight"), args, kwargs, ("input", "weight"))
        if weight is table.tensor and func is F.linear:
            return self._watch([table.name], output, partial(self._multiplied, table, x.detach(), x._version))
        if weight is table.tensor and func is F.embedding and not any(kwargs.get(option) for option in _UNLIKE):
            padding_idx = args[2] if len(args) > 2 else kwargs.get("padding_idx")
            return self._watch([table.name], output, partial(self._looked_up, table, x, padding_idx))
        raise UnmappableRowsError(table.module, tuple(table.tensor.shape), self._size)

    def _looked_up(self, table: _Table, ids: Tensor, padding_idx: int | None, dy: Tensor) -> None:
        rows = self._rows.gradient_rows(dy, table.module)
        tokens = self._rows.rows(ids.unsqueeze(-1), table.module).values
        taken = (tokens == table.ids) & (tokens != (-1 if padding_idx is None else padding_idx))
        self._deliver(table.name, LinearUse(rows.values, taken.to(dy.dtype), rows.offsets, starts=rows.starts))

    def _multiplied(self, table: _Table, x: Tensor, version: int, dy: Tensor) -> None:
        if x._version != version:
            raise ModelError(f"{table.module}: its input was changed in place after use, cannot be captured")
        rows = self._rows.gradient_rows(dy, table.module)
        taken = rows.values.index_select(1, table.ids)
        x_rows = self._rows.rows(x, table.module).values
        self._deliver(table.name, LinearUse(x_rows, taken, rows.offsets, starts=rows.starts))

    def _count(self, names: frozenset[str], copies: Tensor) -> None:
        # A view of a parameter or of another form takes no memory of its own.
        if _storage(copies) in self._storages:
            return
        self._storages.add(_storage(copies))
        self.held += copies.untyped_storage().nbytes()
        if copies[0].numel() > max(SMALL_FORM, GROWTH * sum(self._values[name] for name in names)):
            self.grown |= names

    def _of_parameters(self, tensor: Tensor) -> bool:
        found = self._common.get(id(tensor))
        return isinstance(tensor, nn.Parameter) or (found is not None and found() is tensor)

    def _is_common(self, func: Any, given: Sequence[Tensor], forms: Sequence[_Form | None]) -> bool:
        """Whether what `func` returns is the same for all examples."""
        if func is torch.eye:
            return True
        alike = (form or self._of_parameters(tensor) for form, tensor in zip(forms, given, strict=True))
        return bool(given) and func not in _PER_EXAMPLE and all(alike)

    def _note(self, output: Any, common: bool) -> None:
        for tensor in _tensors(output):
            if common:
                self._common[id(tensor)] = weakref.ref(tensor)
            else:
                # Another tensor in the place of one that is gone, or one that was written to.
                self._common.pop(id(tensor), None)

    def _expanded(self, func: Any, form: _Form | None, output: Tensor) -> Tensor | None:
        if func is not Tensor.expand or form is None or form.tensor.dim() != output.dim():
            return None
        if form.tensor.shape[0] != 1 or output.shape[0] != self._size:
            return None
        return form.copies.squeeze(1).expand(output.shape)

    def _met(self, call: _Call, versions: list[int], dy: Tensor) -> None:
        if versions != [tensor._version for tensor in call.tensors]:
            raise call.unmappable()
        with torch.enable_grad():
            output = call.like(dy)
        self._send(call.names, output, dy.reshape(output.shape))

    def _send(self, names: Iterable[str], output: Tensor, grad: Tensor) -> None:
        leaves = {name: self._leaves[name] for name in sorted(names)}
        if not output.requires_grad:
            # The call takes no more than a dtype from its form.
            for name, leaf in leaves.items():
                self._deliver(name, DenseUse(torch.zeros_like(leaf)))
            return
        # Forms are used by several calls, so what leads to them is kept.
        grads = torch.autograd.grad(
            output, list(leaves.values()), grad, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, own in zip(leaves, grads, strict=True):
            self._deliver(name, DenseUse(own if own.dtype is torch.float64 else own.float()))


def _named(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Sequence[str]
) -> tuple[Any, ...]:
    """The arguments `wanted` of a call whose first ones are called `names`."""
    given = dict(zip(names, args, strict=False)) | kwargs
    return tuple(given.get(name) for name in wanted)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _with_tensors(values: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nesting with `tensors` in the place of its own."""
    if isinstance(values, Tensor):
        return next(tensors)
    if isinstance(values, tuple | list):
        return type(values)([_with_tensors(value, tensors) for value in values])
    if isinstance(values, dict):
        return {key: _with_tensors(value, tensors) for key, value in values.items()}
    return values
