"""Experts that an architecture fuses into 3-D tensors, as linear layers that can be compressed one by one.

transformers keeps all experts of a block in two parameters, `gate_up_proj` and `down_proj`, of shape
(experts, out, in). Before a model is compressed, and again while a compressed one is loaded, such a module
is replaced by one that holds a pair of linears for each expert and computes the same; `fuse_experts` goes
back.
"""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pbsp.errors import ModelError

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative RMS; 16-bit types round at 1e-2
_DOWN = "down"


class ExpertLinears(nn.ModuleList):
    """What a fused module of experts computes, by an `up` (or `gate_up`) and a `down` linear for each.

    The names are not the fused parameters' own, `gate_up_proj` and `down_proj`: transformers merges stored
    tensors with such names in them into a fused one when it loads.

    Args:
        fused: see `is_fused`; it loses its parameters' values once they are copied.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        first = _first_name(fused)
        self.first = first.removesuffix("_proj")
        for expert in range(len(fused.get_parameter(first))):
            pair = {self.first: _linear(fused, first, expert), _DOWN: _linear(fused, "down_proj", expert)}
            self.append(nn.ModuleDict(pair))
        for name, parameter in fused.named_parameters():
            setattr(fused, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
        self._fused = (fused,)  # in a tuple, so that it is no submodule: its parameters hold no values
        self.train(fused.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens features"],
        top_k_index: Int64[Tensor, "tokens chosen"],
        top_k_weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "tokens features"]:
        """The weighted sum of each token's chosen experts; experts that none has chosen are not called."""
        outputs: Tensor | None = None
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            found = self.output(expert, hidden_states[token]) * top_k_weights[token, place, None]
            if outputs is None:
                outputs = found.new_zeros(*top_k_index.shape, found.shape[-1])
            outputs[token, place] = found
        return torch.zeros_like(hidden_states) if outputs is None else outputs.sum(1).to(hidden_states.dtype)

    def output(
        self, expert: int, hidden_states: Float[Tensor, "tokens features"]
    ) -> Float[Tensor, "tokens features"]:
        """What one expert makes of the tokens, before it is weighted."""
        (fused,), pair = self._fused, self._modules[str(expert)]
        assert isinstance(pair, nn.ModuleDict)
        inner: Any = fused._apply_gate if fused.has_gate else fused.act_fn
        return pair[_DOWN](inner(pair[self.first](hidden_states)))  # pyright: ignore[reportCallIssue]

    @property
    def emptied(self) -> nn.Module:
        """The module that stood here; its parameters have no values."""
        return self._fused[0]

    def fused(self) -> nn.Module:
        """The module that stood here, with the linears' present values; they must be dense."""
        (fused,) = self._fused
        pairs = [pair for pair in self.children() if isinstance(pair, nn.ModuleDict)]
        for name in dict(fused.named_parameters()):
            linears = [pair[_DOWN if name.startswith(_DOWN) else self.first] for pair in pairs]
            if name.endswith("_bias"):
                values = [linear.get_parameter("bias").detach() for linear in linears]
            else:
                values = [_turned(fused, linear.get_parameter("weight").detach()) for linear in linears]
            trained = linears[0].get_parameter("weight").requires_grad
            setattr(fused, name, nn.Parameter(torch.stack(values), requires_grad=trained))
        return fused.train(self.training)


def is_fused(module: nn.Module) -> bool:
    """Whether the module is one that `ExpertLinears` can take the place of.

    That is, it follows transformers' convention for experts, and has no parameters beside theirs.
    """
    flags = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    if not all(hasattr(module, flag) for flag in flags) or getattr(module, "has_post_expert_norm", False):
        return False
    names = {_first_name(module), "down_proj"}
    if module.has_bias:
        names |= {f"{name}_bias" for name in names}
    tensors = dict(module.named_parameters())
    return tensors.keys() == names and all(
        tensor.ndim == (2 if name.endswith("_bias") else 3) for name, tensor in tensors.items()
    )


@torch.no_grad()
def split_experts(model: nn.Module, *, holding: Collection[str] | None = None) -> None:
    """Replace the fused experts in the model by linears, in place, and check that the outputs are equal.

    Args:
        model: or a part of it; on the meta device nothing is checked.
        holding: names of linears, perhaps with the base model's prefix or without; only the experts that
            one of them belongs to are replaced.

    Raises:
        ModelError: an expert module's outputs change.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, module in list(model.named_modules()):
        inside = f"{name.removeprefix(prefix)}."
        wanted = holding is None or any(inside in linear for linear in holding)
        if not wanted or not is_fused(module):
            continue
        probe = None if module.get_parameter("down_proj").is_meta else _probe(module)
        expected = None if probe is None else module(*probe)
        split = ExpertLinears(module)
        if probe is not None and expected is not None:
            error = float((split(*probe) - expected).norm() / expected.norm().clamp_min(1e-30))
            if not error <= _TOLERANCE.get(expected.dtype, 1e-2) and bool(torch.isfinite(expected).all()):
                raise ModelError(
                    f"{name}: its experts, taken one by one, give other outputs than the model's own "
                    f"{type(module).__name__} (relative difference {error:.2g}); this architecture cannot be "
                    "compressed"
                )
        model.set_submodule(name, split)


def fuse_experts(model: nn.Module) -> None:
    """The inverse of `split_experts`: put the fused modules back, in place; all linears must be dense."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertLinears):
            model.set_submodule(name, module.fused())


def _first_name(fused: nn.Module) -> str:
    return "gate_up_proj" if fused.has_gate else "up_proj"


def _turned(fused: nn.Module, matrix: Tensor) -> Tensor:
    """Between (out, in) and what the fused module stores for an expert."""
    return matrix.T if fused.is_transposed else matrix


def _linear(fused: nn.Module, name: str, expert: int) -> nn.Linear:
    """One expert's slice, copied, so that its memory can be freed alone."""
    whole = fused.get_parameter(name)
    weight = _turned(fused, whole[expert]).detach().clone(memory_format=torch.contiguous_format)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=bool(fused.has_bias))
    linear.weight = nn.Parameter(weight, requires_grad=whole.requires_grad)
    if fused.has_bias:
        bias = fused.get_parameter(f"{name}_bias")
        linear.bias = nn.Parameter(bias[expert].detach().clone(), requires_grad=bias.requires_grad)
    return linear


def _probe(fused: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens that every expert is chosen for, beside a second one where there is a second."""
    down = fused.get_parameter("down_proj")
    experts, features = len(down), down.shape[2 if fused.is_transposed else 1]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(experts, features, generator=generator).to(down.device, down.dtype)
    chosen = torch.arange(experts, device=down.device)
    both = torch.stack([chosen, (chosen + 1) % experts], 1) if experts > 1 else chosen[:, None]
    weights = torch.rand(both.shape, generator=generator).to(down.device, down.dtype)
    return tokens, both, weights
