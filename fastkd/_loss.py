"""The decorator that turns a formula into a loss: checks, engine, masks and ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from fastkd import _backend, _checks, _option_checks
from fastkd._op import Number
from fastkd._precision import as_under_autocast, compute_dtype, without_autocast
from fastkd._ranks import Ranks
from fastkd._reduction import Reduction, Term, reduce, selected, sum_of_terms, weight_of_rows

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

_REDUCTION = ("weights", "normalizer", "reduction")  # parameters that a formula does not read
_ROW_LABELS = ("labels", "ignore_index")  # these too, where labels are an option
_PARTS = "return_parts"
_DIM = "dim"  # a parameter too that a formula does not read
_TEACHER_GRADIENT = "teacher_gradient"
_TEACHER_FORM = "teacher_form"
_THIS_PROCESS = Ranks()


class Call(NamedTuple):
    """A call of a loss: all that a statement must know besides its tensors and options."""

    name: str  # of the loss
    engine: str  # "portable" or "triton"
    row_mask: Tensor | None  # bool, in the shape of the losses: examples of weight 0 are False
    ranks: Ranks
    # what the losses of all rows that count are multiplied by in the reduction, 0 if not known
    row_weight: Number = 0.0
    reduction: Reduction | None = None  # for a statement that reduces the losses itself


class Reduced(NamedTuple):
    """The result of a statement that has reduced the losses."""

    result: Any


class Detailed(NamedTuple):
    """The terms of a per-example loss, whose parts are detached, and numbers of each example."""

    terms: Sequence[Term]
    details: Mapping[str, Tensor] | None  # by their names and detached, None where none are asked


class Loss(Protocol[P, R]):
    """A public loss: callable as its formula, with the same types."""

    __name__: str
    formula: Callable[..., Any]
    has_engines: bool  # whether it is more than its formula
    has_kernels: bool
    engine_for: Callable[[Sequence[Tensor]], str]  # "triton", "portable" or "formula"
    check: Callable[..., None]  # (batch by name, options): raises the errors of a call

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the loss."""


def loss(
    check: Callable[..., None],
    statement: Callable[..., Any] | None = None,
    *,
    per_example: bool | int = False,
    has_kernels: bool = True,
    on_cpu_alone: bool = False,
    same_on_ranks: Sequence[str] = (),
    is_mean: bool = False,
    n_deciding: int = 2,
    multiplies: bool = False,
    of_examples: Sequence[str] = (),
) -> Callable[[Callable[P, R]], Loss[P, R]]:
    """Decorate a formula, which keeps its signature and becomes a public loss.

    The parameters before `*` are the batch, tensors and learnt numbers; those after it are options.
    The decorator reads `weights`, `normalizer`, `reduction`, `return_parts` and `group` itself, and
    `labels` and `ignore_index` where both are options: rows with that label have weight 0.

    Args:
        check: ``check(*batch, **options)`` raises an error if they do not fit together.
        statement: ``statement(call, *batch, **options)`` states the loss as a problem, solves it
            and returns what the formula returns, or NotImplemented for options that no engine
            takes. Without it the loss is its formula everywhere.
        per_example: True if the formula returns one loss for each row of the first tensor
            (..., V), a number if for each entry of so many leading dimensions, or below 0 of all
            but so many last ones. It may return a list of `Term` instead, of which the loss is the
            sum, or `Detailed`; a statement may return `Reduced`.
        has_kernels: Whether the kernels solve the problem; otherwise the portable engine does.
        on_cpu_alone: Whether other devices compute the formula, which has fewer launches.
        same_on_ranks: Parameters of the batch that are no part of it, matrices: all ranks hold the
            same. With a dimension more they belong to the examples.
        is_mean: Whether a loss of the batch is a mean over examples that do not interact, so that
            ranks exchange nothing but their means.
        n_deciding: How many of the first parameters of the batch decide the compute dtype.
        multiplies: Whether the loss begins with matrix products, for which autocast casts the batch
            as it does for those of PyTorch. Its matrices decide the compute dtype, as the rows do.
        of_examples: Options that may hold a row or a number for each example, in a tensor or in a
            list of them, and then take part in the choice of the engine and of the compute dtype.
    """

    def decorate(formula: Callable[P, R]) -> Loss[P, R]:
        signature = inspect.signature(formula)
        parameters = signature.parameters.values()
        batch = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        absent = {p.name: p.default for p in parameters if p.kind is not p.KEYWORD_ONLY}
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        constant = [name.startswith("teacher") for name in batch]
        spread = [name not in same_on_ranks for name in batch]
        name, takes_labels = formula.__name__, "labels" in defaults

        def engine_for(tensors: Sequence[Tensor]) -> str:
            if statement is None or (on_cpu_alone and not tensors[0].is_cpu):
                return "formula"
            return _backend.choose(tensors, has_kernels)

        def from_formula(
            arguments: Sequence[Any], options: dict[str, Any], mask: Tensor | None, ranks: Ranks
        ) -> Any:
            given = [options[option] for option in of_examples]
            dtype = compute_dtype(
                *_tensors([*arguments[: None if multiplies else n_deciding], *given])
            )
            options = options | {
                option: _prepared_rows(x, dtype, mask)
                for option, x in zip(of_examples, given, strict=True)
            }
            is_trained = options.get(_TEACHER_GRADIENT, False)
            # probabilities of 0 alone have no logarithm, so that masked rows would give a NaN
            of_teacher = 1 if options.get(_TEACHER_FORM) == "probabilities" else 0
            tensors = [
                _prepared(
                    x,
                    dtype,
                    mask if is_spread else None,
                    is_constant and not is_trained,
                    of_teacher if is_constant else 0,
                )
                for x, is_constant, is_spread in zip(arguments, constant, spread, strict=True)
            ]
            if mask is not None and _ROW_LABELS[0] in batch and _ROW_LABELS[1] in options:
                place, ignored = batch.index(_ROW_LABELS[0]), options[_ROW_LABELS[1]]
                labels = tensors[place]
                # there may be none, or soft ones
                if isinstance(labels, Tensor) and not labels.is_floating_point():
                    tensors[place] = torch.where(mask, labels.long(), ignored)
            if not ranks or is_mean:
                return formula(*tensors, **options)  # type: ignore[arg-type]
            tensors = [
                ranks.share(x)[0]
                if isinstance(x, Tensor) and x.ndim > (0 if is_spread else 2)
                else x
                for x, is_spread in zip(tensors, spread, strict=True)
            ]
            options = {
                option: ranks.gather(x)[0][0] if isinstance(x, Tensor) and x.ndim else x
                for option, x in options.items()
            }
            found: Any = formula(*tensors, **options)  # type: ignore[arg-type]
            # the losses of all examples; this rank gets those of its own
            return found[ranks.own(arguments[0])] if found.ndim else found

        def losses_of(
            arguments: Sequence[Any],
            options: Any,
            mask: Any,
            ranks: Ranks,
            row_weight: float = 0.0,
            reduction: Reduction | None = None,
        ) -> Any:
            if multiplies:
                arguments = [as_under_autocast(x) for x in arguments]
            tensors = _tensors([*arguments, *(options[option] for option in of_examples)])
            engine, options = engine_for(tensors), _with_numbers(options, compute_dtype(*tensors))
            with without_autocast(tensors[0].device):
                found = NotImplemented
                if engine != "formula" and statement is not None:
                    if mask is not None and engine != "portable":
                        row_weight = 0.0  # on a GPU nobody counts the rows of a mask
                    call = Call(name, engine, mask, ranks, row_weight, reduction)
                    found = statement(call, *arguments, **options)
                if found is NotImplemented:
                    return from_formula(arguments, options, mask, ranks)
                return found

        @functools.wraps(formula)
        def compute(*arguments: Any, **options: Any) -> Any:
            if len(arguments) != len(batch):
                arguments = _bound(signature, absent, arguments, options, name)
            if options:
                _option_checks.options(options, defaults, name)
            options = defaults | options
            if not per_example:
                group = options.pop("group", None)
                check(*arguments, **options)
                ranks = Ranks.of(group)
                found = losses_of(arguments, options, None, ranks)
                return ranks.mean(found, len(arguments[0][0])) if is_mean else found
            weights, normalizer, reduction = map(options.pop, _REDUCTION)
            labels, ignore_index = map(options.pop, _ROW_LABELS) if takes_labels else (None, 0)
            return_parts = options.pop(_PARTS, False)
            dim = options.pop(_DIM, -1)
            if dim != -1:
                arguments = _with_classes_last(arguments, dim)
            if reduction != "mean" or normalizer is not None:
                _option_checks.reduction(reduction, normalizer)
                if isinstance(normalizer, Tensor):
                    normalizer = normalizer.reshape(())
            check(*arguments, **options)
            if weights is not None:
                (first, *_), of_rows = _tensors(arguments[:1]), per_example is True
                n_dims = first.ndim - 1 if of_rows else per_example
                logits = first if of_rows and not multiplies else None
                _checks.weights(weights, first.shape[:n_dims], first.device, logits)
            if labels is not None:
                _checks.labels(labels, _tensors(arguments[:1])[0], ignore_index)
                labelled = labels.long() != ignore_index  # −100 is 156 in uint8
                weights = labelled if weights is None else torch.where(labelled, weights, 0)
            mask, row_weight = None, 0.0
            if weights is not None:
                mask = weights if weights.dtype == torch.bool else weights.detach() != 0
            if per_example is True and (weights is None or weights is mask):
                row_weight = weight_of_rows(arguments[0], mask, normalizer, reduction)
            asked = Reduction(weights, normalizer, reduction, return_parts)
            found = losses_of(arguments, options, mask, _THIS_PROCESS, row_weight, asked)
            if isinstance(found, Tensor):
                return reduce(found, weights, mask, normalizer, reduction)
            if isinstance(found, Reduced):
                return found.result
            if not isinstance(found, Detailed):
                return sum_of_terms(found, weights, mask, normalizer, reduction, return_parts)
            terms, details = found
            total = sum_of_terms(terms, weights, mask, normalizer, reduction, return_parts)
            if return_parts:
                total = (total[0], *(part.detach() for part in total[1:]))
            if details is None:
                return total
            details = {name: selected(x, mask) for name, x in details.items()}
            return (*total, details) if return_parts else (total, details)

        def check_only(of_batch: Mapping[str, Any], options: dict[str, Any]) -> None:
            arguments = _bound(signature, absent, (), dict(of_batch), name)
            options = defaults | options
            if per_example:
                *_, reduction = map(options.pop, _REDUCTION)
                _option_checks.reduction(reduction, None)
                for name_of_rows in (_PARTS, _DIM, *_ROW_LABELS[: 2 * takes_labels]):
                    options.pop(name_of_rows, None)
            else:
                group = options.pop("group", None)
                if not isinstance(group, str):  # a name is looked up at the call
                    _option_checks.process_group(group)
            check(*arguments, **options)

        public: Any = compute
        public.formula, public.engine_for, public.check = formula, engine_for, check_only
        public.has_engines = statement is not None
        public.has_kernels = has_kernels and public.has_engines
        return public

    return decorate


def _bound(
    signature: inspect.Signature,
    defaults: Mapping[str, Any],
    arguments: Any,
    options: dict[str, Any],
    loss: str,
) -> tuple[Any, ...]:
    """Return the whole batch, of which some were given by name or left at their default.

    Those that were given by name are taken out of the options.
    """
    given = {name: options.pop(name) for name in defaults if name in options}
    names = [*defaults][len(arguments) :]
    rest = [given.get(name, defaults[name]) for name in names]
    is_whole = all(x is not inspect.Parameter.empty for x in rest)
    if is_whole and len(arguments) <= len(defaults) and all(name in names for name in given):
        return *arguments, *rest
    try:
        bound = signature.bind(*arguments, **given)
    except TypeError as error:
        raise TypeError(
            f"{loss} takes {', '.join(defaults)} and then its options by name, as option=value, "
            f"got {len(arguments) + len(given)} of them: {error}"
        ) from None
    bound.apply_defaults()
    return bound.args


def _with_classes_last(arguments: Sequence[Any], dim: Any) -> tuple[Any, ...]:
    """Return views of the logits, which all have as many dimensions, with this dimension last."""
    first = arguments[0]
    if not isinstance(first, Tensor):  # which the checks refuse
        return tuple(arguments)
    if not isinstance(dim, int) or not -first.ndim <= dim < first.ndim:
        raise ValueError(
            f"dim must be the number of the classes' dimension, in [{-first.ndim}, {first.ndim}) "
            f"for logits of shape {_checks.shape(first)}, got {dim!r}"
        )
    return tuple(
        x.movedim(dim, -1) if isinstance(x, Tensor) and x.ndim == first.ndim else x
        for x in arguments
    )


def _with_numbers(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the options with numbers that are tensors in this dtype.

    The square of a temperature in half precision would be rounded, and a loss of one row, a 0-dim
    tensor too, would be promoted to the dtype of a wider one.
    """
    if not any(isinstance(x, Tensor) for x in options.values()):
        return options
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and not x.ndim and x.is_floating_point() else x
        for name, x in options.items()
    }


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    """Return the floating-point tensors of the batch, those inside lists too, but no numbers."""
    found: list[Tensor] = []
    for x in arguments:
        if isinstance(x, Tensor):
            if x.ndim and x.is_floating_point():
                found.append(x)
        elif isinstance(x, (list, tuple)):
            found += _tensors(x)
    return found


def _prepared(
    x: Any, dtype: torch.dtype, mask: Tensor | None, is_constant: bool, masked: int = 0
) -> Any:
    """Return an argument of a formula: in the compute dtype, constant if it is a teacher's."""
    if isinstance(x, (list, tuple)):
        return [_prepared(each, dtype, mask, is_constant, masked) for each in x]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    x = x.to(dtype)
    if is_constant:
        x = x.detach()
    if mask is not None and x.shape[: mask.ndim] == mask.shape:
        x = selected(x, mask, masked)
    # autograd cannot save what torch.inference_mode made
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def _prepared_rows(x: Any, dtype: torch.dtype, mask: Tensor | None) -> Any:
    """Return rows of a teacher in the compute dtype, with 1 where the mask is False.

    Of that one can take a logarithm or a softmax, so that masked rows give no NaN.
    """
    if isinstance(x, (list, tuple)):
        return [_prepared_rows(each, dtype, mask) for each in x]
    x = _prepared(x, dtype, None, False)
    if mask is None or not isinstance(x, Tensor) or x.ndim <= mask.ndim:
        return x
    return torch.where(mask.unsqueeze(-1), x, 1)
