"""Optimizers: torch's own where it has them, Muon here because torch's runs in bf16 even on CPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmkit.config.optimization import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    AdamwConfig,
    Decay,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RmspropConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lmkit.sharding import pieced, whole

Kind = TypeVar("Kind", bound=Optimizer)

HOST_SLOTS = ("step", "mu_product")
"""Numbers that torch's optimizers keep on the host."""
GROUPS, GROUP_SLOTS = "group ", ("k", "weight_sum", "lr_max")
"""Numbers that schedule-free AdamW keeps for each group of parameters."""


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, *, fused: bool, lr_factors: Mapping[str, float] | None = None
) -> Optimizer:
    """The optimizer of ``config`` for the trainable parameters of ``model``.

    Each parameter group holds ``peak_lr``, which set_lr multiplies by the schedule's factor. Weight decay applies to
    parameters with two or more dimensions, not to gains and biases (as in Radford et al. 2018 and nanoGPT), unless
    ``decay_on`` is all.
    lr_factors: name -> what the parameter's peak learning rate is multiplied by (default 1).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors = {id(p): (lr_factors or {}).get(name, 1.0) for name, p in named}
    if isinstance(config, MuonConfig):
        optimizer = _build_muon(config, model, named, factors)
    else:
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay, "lr": config.lr},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": _gain_decay(config), "lr": config.lr},
        ]
        optimizer = _build_of_groups(config, list(_split(groups, factors)), fused=fused)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def _build_of_groups(config: OptimizerConfig, groups: list[dict[str, Any]], *, fused: bool) -> Optimizer:
    """One that treats all parameters alike, but for what the groups say."""
    lr = config.lr
    if isinstance(config, NadamConfig):
        return _without_compiler(torch.optim.NAdam)(
            groups,
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            momentum_decay=config.momentum_decay,
            decoupled_weight_decay=True,
        )
    if isinstance(config, ScheduleFreeConfig):
        return _build_schedule_free(config, groups)
    if isinstance(config, AdamConfig):
        kind: type[torch.optim.Adam] = torch.optim.AdamW if isinstance(config, AdamwConfig) else torch.optim.Adam
        betas = (config.beta1, config.beta2)
        return _without_compiler(kind)(groups, lr=lr, betas=betas, eps=config.eps, fused=fused or None)
    if isinstance(config, SgdConfig):
        return _without_compiler(_Sgd)(
            groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused or None
        )
    if isinstance(config, AdagradConfig):
        return _without_compiler(torch.optim.Adagrad)(groups, lr=lr, eps=config.eps)
    if isinstance(config, AdadeltaConfig):
        return _without_compiler(torch.optim.Adadelta)(groups, lr=lr, rho=config.rho, eps=config.eps)
    if isinstance(config, RmspropConfig):
        return _without_compiler(torch.optim.RMSprop)(
            groups, lr=lr, alpha=config.alpha, momentum=config.momentum, eps=config.eps
        )
    raise TypeError(f"no optimizer for {type(config).__name__}")


def _without_compiler(kind: type[Kind]) -> type[Kind]:
    """The same optimizer, with methods that do not step out of a graph that is being compiled.

    torch's own do, in every call, and import its compiler for it: a second before the first step. Here a step is never
    part of a compiled graph.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


class _Sgd(torch.optim.SGD):
    """SGD whose fused kernels take a parameter that has its first gradient later than others, too: torch's own end with
    a TypeError there, unless it has a momentum, and from zeros the first one is the gradient all the same."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"] if group["fused"] and group["momentum"] else ():
                if p.grad is not None and self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        inspect.unwrap(torch.optim.SGD.step)(self, closure)


def _gain_decay(config: OptimizerConfig) -> float:
    """Weight decay of gains and biases."""
    return config.weight_decay if config.decay_on is Decay.all else 0.0


def _split(groups: Iterable[dict[str, Any]], factors: Mapping[int, float]) -> Iterator[dict[str, Any]]:
    """The groups cut by learning rate, the highest first; empty ones are left out. factors: by id of the parameter."""
    for group in groups:
        for factor in sorted({factors[id(p)] for p in group["params"]}, reverse=True):
            params = [p for p in group["params"] if factors[id(p)] == factor]
            yield {**group, "params": params, "lr": group["lr"] * factor}


def _build_muon(
    config: MuonConfig, model: nn.Module, named: list[tuple[str, nn.Parameter]], factors: Mapping[int, float]
) -> Optimizer:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for name, p in named if p.ndim == 2 and id(p) not in tables and not name.startswith("head.")]
    chosen = {id(p) for p in matrices}
    tables_and_head = [p for _, p in named if p.ndim >= 2 and id(p) not in chosen]
    rest = [p for _, p in named if p.ndim < 2]
    adam: dict[str, Any] = {"kind": "adam", "lr": config.adam_lr}
    groups = [
        {"params": matrices, "kind": "muon", "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": tables_and_head, "weight_decay": config.weight_decay, **adam},
        {"params": rest, "weight_decay": _gain_decay(config), **adam},
    ]
    return _without_compiler(Muon)(_split(groups, factors), config)


def _build_schedule_free(config: ScheduleFreeConfig, groups: list[dict[str, Any]]) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    betas = (config.beta1, config.beta2)
    optimizer: Optimizer = AdamWScheduleFree(groups, lr=config.lr, betas=betas, eps=config.eps)
    optimizer.train()  # type: ignore[attr-defined]  # and so it stays: the average is made beside it
    return optimizer


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def newton_schulz(matrix_MN: Tensor, steps: int) -> Tensor:
    """Approximately replace the singular values of a matrix by 1 (they land between about 0.7 and 1.2).

    The quintic iteration of Jordan et al. 2024 ("Muon: An optimizer for hidden layers"), with its coefficients.
    In fp32 on CPUs, in bf16 on CUDA.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix_MN.bfloat16() if matrix_MN.device.type == "cuda" else matrix_MN.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        poly = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, poly, x, beta=a)
    return (x.T if tall else x).to(matrix_MN.dtype)


class Muon(Optimizer):
    """Muon for hidden matrices and AdamW for the rest, in one optimizer (Jordan et al. 2024).

    The update of a matrix is scaled by sqrt(max(1, rows / columns)). All decay is decoupled.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: MuonConfig) -> None:
        super().__init__(list(groups), {})
        self.config = config

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                if group["kind"] == "muon":
                    self._muon(p, group["lr"])
                else:
                    self._adam(p, group["lr"])

    def _muon(self, p: Tensor, lr: float) -> None:
        state, grad = self.state[p], p.grad
        if grad is None:
            return
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(grad, 1.0 - self.config.momentum)
        matrix = whole(grad.lerp(state["momentum"], self.config.momentum))
        direction = pieced(newton_schulz(matrix, self.config.ns_steps), like=p)
        p.add_(direction, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)

    def _adam(self, p: Tensor, lr: float) -> None:
        config, state, grad = self.config, self.state[p], p.grad
        if grad is None:
            return
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1.0 - config.beta1)
        state["exp_avg_sq"].lerp_(grad.square(), 1.0 - config.beta2)
        step = float(state["step"])
        mean_scale = 1.0 / (1.0 - config.beta1**step)
        denominator = (state["exp_avg_sq"] / (1.0 - config.beta2**step)).sqrt_().add_(config.eps)
        p.addcdiv_(state["exp_avg"], denominator, value=-lr * mean_scale)


def optimizer_tensors(optimizer: Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, ``<parameter name>/<slot>``, for a checkpoint.

    ``parameters``: by name, in the model's order; a tied one goes by the first of its names.
    """
    names = {id(p): name for name, p in reversed(parameters.items())}
    tensors: dict[str, Tensor] = {}
    for p, slots in optimizer.state.items():
        for slot, value in slots.items():
            if value is not None:
                tensors[f"{names[id(p)]}/{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    for number, group in enumerate(optimizer.param_groups):
        tensors |= {
            f"{GROUPS}{number}/{slot}": torch.tensor(group[slot], dtype=torch.float64)
            for slot in GROUP_SLOTS
            if slot in group
        }
    return tensors


def load_optimizer_tensors(optimizer: Optimizer, parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Put back what optimizer_tensors returned; the inverse, bit for bit. Names that fit nothing are a ValueError."""
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name.startswith(GROUPS):
            optimizer.param_groups[int(name.removeprefix(GROUPS))][slot] = value.item()
            continue
        if name not in parameters:
            raise ValueError(f"optimizer state {key!r} belongs to no parameter of the model")
        p = parameters[name]
        on_host = is_on_host(optimizer, slot)
        optimizer.state[p][slot] = value.clone() if on_host else pieced(value.to(p.device, copy=True), like=p)
    if isinstance(optimizer, torch.optim.RMSprop):  # which makes it with the rest of a state only
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if slots := optimizer.state.get(p):
                    slots.setdefault("momentum_buffer", torch.zeros_like(p))


def is_on_host(optimizer: Optimizer, slot: str) -> bool:
    """Whether this part of the optimizer's state is a number that the host keeps, wherever the parameters lie."""
    counts_on_device = any(
        bool(group.get("fused")) or bool(group.get("capturable")) for group in optimizer.param_groups
    )
    return slot in HOST_SLOTS and not counts_on_device
