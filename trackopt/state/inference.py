"""Infer an optimizer's class, which its state dict does not name, from its hyperparameters and buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Keys of a group that every class may have: the ids and names, those that schedulers add, and torch's switches,
#: which new versions of torch add to its classes.
_COMMON = frozenset({
    "params", "param_names", "name", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr",
    "base_momentum", "max_momentum", "lr_scale",
    "maximize", "foreach", "capturable", "differentiable", "fused",
})  # fmt: skip


@dataclass(frozen=True)
class OptimizerSignature:
    """The keys of an optimizer class.

    Attributes:
        name: As ``"AdamW"``.
        required_keys: Hyperparameters that its groups always have.
        absent_keys: Hyperparameters that they never have.
        optional_keys: Hyperparameters that they have in some versions of torch.
        buffers: Entries of a parameter's state, counters too.
    """

    name: str
    required_keys: frozenset[str]
    absent_keys: frozenset[str]
    optional_keys: frozenset[str]
    buffers: frozenset[str]


def _signature(name: str, required: str, absent: str, optional: str, buffers: str) -> OptimizerSignature:
    return OptimizerSignature(name, *(frozenset(words.split()) for words in (required, absent, optional, buffers)))


_MOMENTS = "step exp_avg exp_avg_sq"
#: The first match counts.
_SIGNATURES = (
    _signature("Muon", "ns_coefficients ns_steps", "", "weight_decay momentum nesterov eps adjust_lr_fn",
               "momentum_buffer"),
    _signature("LBFGS", "history_size tolerance_grad", "", "max_iter max_eval tolerance_change line_search_fn",
               "func_evals n_iter d t old_dirs old_stps ro H_diag prev_flat_grad prev_loss al"),
    _signature("Adafactor", "beta2_decay d", "", "weight_decay eps", "step row_var col_var variance"),
    _signature("Adafactor (of transformers)", "clip_threshold scale_parameter relative_step", "",
               "eps decay_rate beta1 weight_decay warmup_init",
               "step exp_avg exp_avg_sq exp_avg_sq_row exp_avg_sq_col RMS"),
    _signature("NAdam", "betas momentum_decay", "", "weight_decay eps decoupled_weight_decay",
               f"{_MOMENTS} mu_product"),
    _signature("RAdam", "betas decoupled_weight_decay", "amsgrad", "weight_decay eps", _MOMENTS),
    _signature("FusedAdam (of apex)", "betas bias_correction", "amsgrad grad_averaging", "eps weight_decay step",
               _MOMENTS),
    _signature("LAMB", "betas bias_correction grad_averaging", "amsgrad", "eps weight_decay max_grad_norm step",
               _MOMENTS),
    _signature("Adam", "betas amsgrad", "", "weight_decay eps decoupled_weight_decay bias_correction step",
               f"{_MOMENTS} max_exp_avg_sq"),
    _signature("SparseAdam", "betas eps", "weight_decay", "maximize", _MOMENTS),
    _signature("Adamax", "betas eps foreach maximize", "amsgrad", "weight_decay", "step exp_avg exp_inf"),
    _signature("ASGD", "lambd alpha t0", "", "weight_decay", "step eta mu ax"),
    _signature("Adadelta", "rho eps", "", "weight_decay", "step square_avg acc_delta"),
    _signature("Adagrad", "lr_decay", "", "weight_decay eps initial_accumulator_value", "step sum"),
    _signature("RMSprop", "alpha centered", "", "weight_decay eps momentum",
               "step square_avg momentum_buffer grad_avg"),
    _signature("Rprop", "etas step_sizes", "", "weight_decay", "step prev step_size"),
    _signature("SGD", "momentum dampening nesterov", "", "weight_decay", "momentum_buffer"),
)  # fmt: skip
#: Classes without hyperparameters of their own: name, buffers, hyperparameters. The first match counts.
_BY_BUFFERS = (
    ("Adamax", {"exp_inf"}, {"betas"}),
    ("RAdam", {"exp_avg", "exp_avg_sq"}, {"betas", "eps", "weight_decay", "foreach"}),
    ("Adam or AdamW", {"exp_avg", "exp_avg_sq"}, {"betas"}),
    ("Lion", {"exp_avg"}, {"betas"}),
)


@dataclass(frozen=True)
class InferredClass:
    """The result of an inference.

    Attributes:
        cls: The class; empty if it is unknown, ``"A or B"`` if two save the same keys.
        evidence: The keys that it is inferred from, as text.
        unknown: Hyperparameters and buffers that the class does not have.
    """

    cls: str
    evidence: str
    unknown: tuple[str, ...] = ()


def infer_class(groups: Any, state: dict[Any, Any]) -> InferredClass:
    """Infer an optimizer's class from the names in its state dict.

    Args:
        groups: Its ``param_groups``.
        state: Its ``state``.

    Example:
        >>> infer_class([{"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "params": [0]}], {}).cls
        'SGD'
    """
    group = groups[0] if groups else {}
    keys = {str(key) for key in group}
    buffers = {str(key) for entry in state.values() if isinstance(entry, dict) for key in entry}
    for signature in _SIGNATURES:
        if signature.required_keys <= keys and not signature.absent_keys & keys:
            if signature.name == "SparseAdam" and "exp_inf" in buffers:
                break  # an Adamax, which is recognized by its buffers
            unknown_keys = keys - signature.required_keys - signature.optional_keys - _COMMON
            unknown = (*sorted(unknown_keys), *sorted(buffers - signature.buffers))
            return InferredClass(*_refine_adam(signature, group), unknown)
    for name, required_buffers, required_keys in _BY_BUFFERS:
        if required_buffers <= buffers and required_keys <= keys:
            evidence = f"its buffers: {', '.join(sorted(required_buffers))}; keys: {', '.join(sorted(required_keys))}"
            return InferredClass(name, evidence)
    evidence = f"unknown keys: {', '.join(sorted(keys - _COMMON))}; buffers: {', '.join(sorted(buffers))}"
    return InferredClass("", evidence, (*sorted(keys - _COMMON), *sorted(buffers)))


def _refine_adam(signature: OptimizerSignature, group: dict[Any, Any]) -> tuple[str, str]:
    """Return the class and the evidence, distinguishing Adam and AdamW if possible."""
    evidence = f"its keys: {', '.join(sorted(signature.required_keys))}"
    if signature.name != "Adam":
        return signature.name, evidence
    if "decoupled_weight_decay" in group:
        decoupled = group["decoupled_weight_decay"]
        return "AdamW" if decoupled else "Adam", f"{evidence}, decoupled_weight_decay={decoupled}"
    return "Adam or AdamW", f"{evidence}; before torch 2.7 Adam and AdamW save the same keys"
