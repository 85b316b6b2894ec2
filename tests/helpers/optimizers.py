"""Optimizers whose state_dict is not that of torch's own, after those of third-party packages."""

from __future__ import annotations

import torch

SGD = torch.optim.SGD


class CountingSGD(SGD):
    """Divides the LR by the number of calls, an entry next to "state" and "param_groups"."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, lr=lr, momentum=momentum)
        self.calls = 0
        self.history = {"last": 0.0}

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        self.history["last"] = self.param_groups[0]["lr"]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 / self.calls)
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "calls": self.calls, "history": dict(self.history)}

    def load_state_dict(self, state_dict):
        self.calls = state_dict.pop("calls", 0)  # as for a file of an older version; it takes the entry out
        self.history = state_dict.pop("history", {})
        super().load_state_dict(state_dict)


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer; its state_dict has neither "state" nor "param_groups" at the top."""

    def __init__(self, base, every=2):
        super().__init__(base.param_groups, {})
        self.base, self.every, self.count = base, every, 0
        self.param_groups = base.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss

    def state_dict(self):
        return {"base_optimizer": self.base.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict["base_optimizer"])
        self.param_groups = self.base.param_groups
        self.slow, self.count = [slow.clone() for slow in state_dict["slow"]], state_dict["count"]


class Several(torch.optim.Optimizer):
    """One optimizer for each group; the state_dict is a list."""

    def __init__(self, *members):
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], {})
        self.param_groups = [group for member in members for group in member.param_groups]

    def step(self, closure=None):
        for member in self.members:
            member.step()

    def state_dict(self):
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, state_dict):
        for member, state in zip(self.members, state_dict, strict=True):
            member.load_state_dict(state)
        self.param_groups = [group for member in self.members for group in member.param_groups]


class Quantized(torch.optim.Optimizer):
    """A momentum of 8 bits with a scale, which its state_dict nests under a key, as bitsandbytes does."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "state1": torch.full(p.shape, 128, dtype=torch.uint8), "max1": torch.ones(1)}
                momentum = (state["state1"].float() - 128) / 127 * state["max1"] * 0.9 + p.grad
                state["step"] += 1
                state["max1"] = momentum.abs().max().reshape(1)
                state["state1"] = (momentum / state["max1"] * 127 + 128).round().to(torch.uint8)
                p.sub_(momentum, alpha=group["lr"])

    def state_dict(self):
        packed = super().state_dict()
        packed["state"] = {
            key: {"step": state["step"], "__quantized__": {"state1": state["state1"], "max1": state["max1"]}}
            for key, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict):
        for entry in state_dict["state"].values():
            entry.update(entry.pop("__quantized__"))
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, entry in state_dict["state"].items():
            self.state[parameters[key]] = dict(entry)  # torch would cast them


class ById(CountingSGD):
    """Its state_dict has other ids than 0, 1, 2, …"""

    def state_dict(self):
        packed = super().state_dict()
        packed["state"] = {f"p{key}": state for key, state in packed["state"].items()}
        for group in packed["param_groups"]:
            group["params"] = [f"p{key}" for key in group["params"]]
        return packed


def two_groups(model):
    """The weights and the biases."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim == n]} for n in (2, 1)]


MAKERS = {
    "extra entries": lambda model: CountingSGD(two_groups(model)),
    "a wrapper": lambda model: Lookahead(torch.optim.AdamW(two_groups(model), lr=0.01)),
    "a wrapper of extra entries": lambda model: Lookahead(CountingSGD(two_groups(model))),
    "a list": lambda model: Several(
        SGD(two_groups(model)[0]["params"], lr=0.1, momentum=0.9), torch.optim.Adam(two_groups(model)[1]["params"])
    ),
    "nested buffers": lambda model: Quantized(model.parameters()),
    "other ids": lambda model: ById(two_groups(model)),
}
