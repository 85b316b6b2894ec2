"""Which class an optimizer's state is of: its state dict does not say, the names of what it holds do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Keys of a group that every class may have: the ids and names, and what schedulers leave behind.
_COMMON = frozenset({
    "params", "param_names", "name", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr",
    "base_momentum", "max_momentum", "lr_scale",
})  # fmt: skip


@dataclass(frozen=True)
class OptimizerSignature:
    """A class of optimizers, by its keys.

    Attributes:
        name: As ``"AdamW"``.
        required_keys: Hyperparameters that its groups always have.
        absent_keys: Hyperparameters that they never have.
        similar: Hyperparameters that they may have, by torch's version.
        buffers: What it keeps per parameter, counters too.
    """

    name: str
    required_keys: frozenset[str]
    absent_keys: frozenset[str]
    similar: frozenset[str]
    buffers: frozenset[str]


def _kind(name: str, needs: str, lacks: str, others: str, buffers: str) -> OptimizerSignature:
    return OptimizerSignature(name, *(frozenset(words.split()) for words in (needs, lacks, others, buffers)))


_SWITCHES = "weight_decay maximize foreach capturable differentiable fused"
_MOMENTS = "step exp_avg exp_avg_sq"
#: The first that fits is taken.
_KINDS = (
    _kind("Muon", "ns_coefficients ns_steps", "",
          "weight_decay momentum nesterov eps adjust_lr_fn", "momentum_buffer"),
    _kind("LBFGS", "history_size tolerance_grad", "", "max_iter max_eval tolerance_change line_search_fn",
          "func_evals n_iter d t old_dirs old_stps ro H_diag prev_flat_grad prev_loss al"),
    _kind("Adafactor", "beta2_decay d", "", f"{_SWITCHES} eps", "step row_var col_var variance"),
    _kind("Adafactor (of transformers)", "clip_threshold scale_parameter relative_step", "",
          "eps decay_rate beta1 weight_decay warmup_init",
          "step exp_avg exp_avg_sq exp_avg_sq_row exp_avg_sq_col RMS"),
    _kind("NAdam", "betas momentum_decay", "", f"{_SWITCHES} eps decoupled_weight_decay", f"{_MOMENTS} mu_product"),
    _kind("RAdam", "betas decoupled_weight_decay", "amsgrad", f"{_SWITCHES} eps", _MOMENTS),
    _kind("FusedAdam (of apex)", "betas bias_correction", "amsgrad grad_averaging", "eps weight_decay step", _MOMENTS),
    _kind("LAMB", "betas bias_correction grad_averaging", "amsgrad", "eps weight_decay max_grad_norm step", _MOMENTS),
    _kind("Adam", "betas amsgrad", "", f"{_SWITCHES} eps decoupled_weight_decay bias_correction step",
          f"{_MOMENTS} max_exp_avg_sq"),
    _kind("SparseAdam", "betas eps", "weight_decay", "maximize", _MOMENTS),
    _kind("Adamax", "betas eps foreach maximize", "amsgrad", _SWITCHES, "step exp_avg exp_inf"),
    _kind("ASGD", "lambd alpha t0", "", _SWITCHES, "step eta mu ax"),
    _kind("Adadelta", "rho eps", "", _SWITCHES, "step square_avg acc_delta"),
    _kind("Adagrad", "lr_decay", "", f"{_SWITCHES} eps initial_accumulator_value", "step sum"),
    _kind("RMSprop", "alpha centered", "", f"{_SWITCHES} eps momentum",
          "step square_avg momentum_buffer grad_avg"),
    _kind("Rprop", "etas step_sizes", "", _SWITCHES, "step prev step_size"),
    _kind("SGD", "momentum dampening nesterov", "", _SWITCHES, "momentum_buffer"),
)  # fmt: skip
#: Classes whose groups have nothing of their own, by their buffers. The first that fits is taken.
_BY_BUFFERS = (
    ("Adamax", {"exp_inf"}, {"betas"}),
    ("RAdam", {"exp_avg", "exp_avg_sq"}, {"betas", "eps", "weight_decay", "foreach"}),
    ("Adam or AdamW", {"exp_avg", "exp_avg_sq"}, {"betas"}),
    ("Lion", {"exp_avg"}, {"betas"}),
)


@dataclass(frozen=True)
class InferredClass:
    """What was inferred.

    Attributes:
        cls: The class; empty where it cannot be told, ``"A or B"`` where two save the same keys.
        evidence: What it rests on, in words.
        unknown: Hyperparameters and buffers that the class does not have.
    """

    cls: str
    evidence: str
    unknown: tuple[str, ...] = ()


def infer(groups: Any, state: dict[Any, Any]) -> InferredClass:
    """Tell an optimizer's class from the names in its state dict.

    Args:
        groups: Its ``param_groups``.
        state: Its ``state``.

    Example:
        >>> infer([{"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "params": [0]}], {}).cls
        'SGD'
    """
    group = groups[0] if groups else {}
    keys = {str(key) for key in group}
    buffers = {str(key) for entry in state.values() if isinstance(entry, dict) for key in entry}
    kind = next((one for one in _KINDS if one.required_keys <= keys and not one.absent_keys & keys), None)
    if kind is not None and not (kind.name == "SparseAdam" and "exp_inf" in buffers):
        unknown = sorted(keys - kind.required_keys - kind.similar - _COMMON) + sorted(buffers - kind.buffers)
        cls, evidence = _refined(kind, group)
        return InferredClass(cls, evidence, tuple(unknown))
    for name, marks, needs in _BY_BUFFERS:
        if marks <= buffers and needs <= keys:
            return InferredClass(name, f"its buffers: {', '.join(sorted(marks))}; keys: {', '.join(sorted(needs))}")
    told = f"unknown keys: {', '.join(sorted(keys - _COMMON))}; buffers: {', '.join(sorted(buffers))}"
    return InferredClass("", told, tuple(sorted(keys - _COMMON) + sorted(buffers)))


def _refined(kind: OptimizerSignature, group: dict[Any, Any]) -> tuple[str, str]:
    evidence = f"its keys: {', '.join(sorted(kind.required_keys))}"
    if kind.name != "Adam":
        return kind.name, evidence
    if "decoupled_weight_decay" in group:
        decoupled = group["decoupled_weight_decay"]
        return "AdamW" if decoupled else "Adam", f"{evidence}, decoupled_weight_decay={decoupled}"
    return "Adam or AdamW", f"{evidence}; before torch 2.7 Adam and AdamW save the same keys"
