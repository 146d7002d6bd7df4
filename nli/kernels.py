"""The same sums with fewer passes over memory: adapters, gated MLPs, norms.

model = add_lora(load_base(...), ...)
speed_up(model)                     # ["adapters", "mlp", "liger"]: what was found to put in

Adapters: fp32 master weights, cast to the input's type where they are used, so that no autocast surrounds the model. Modules that read one input (q, k and v)
share one pass over it and one dropout mask. A layer of 4-bit weights keeps nothing for its backward pass, which dequantises them again.
"""

from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def speed_up(model, adapters: bool = True, mlp: bool = True, liger: bool = True) -> list[str]:
    """Put the fused forms into a model with adapters, where its modules allow; returns the names of those that found a place."""
    done = []
    if adapters and fuse_adapters(model):
        done.append("adapters")
    if mlp and fuse_mlps(model):
        done.append("mlp")
    if liger and use_liger(model, swiglu="mlp" not in done):
        done.append("liger")
    return done


# linear layers whose weights are frozen


def read_weight(layer, dtype: "torch.dtype") -> "torch.Tensor":
    """A linear layer's weight as a matrix (out, in) in `dtype`: 4-bit weights dequantised, others as they are."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).to(dtype)


def is_frozen_linear(layer) -> bool:
    """Whether `read_weight` can read a layer: 4-bit or plain, and not trained."""
    import torch

    if type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes"):  # PEFT has a Linear4bit too
        return getattr(layer.weight, "quant_state", None) is not None
    return type(layer) is torch.nn.Linear and not layer.weight.requires_grad


# adapters


def _lora_function():
    import torch

    class LoraGroup(torch.autograd.Function):
        """Outputs of linear layers that read one input: x W' + s (drop(x) A') B' for each. Layers given as None add no x W'."""

        @staticmethod
        def forward(ctx, x, layers, scalings, probability, *adapters):
            flat = x.reshape(-1, x.shape[-1])
            count = len(layers)
            down = torch.cat([a.to(x.dtype) for a in adapters[:count]])
            dropped, mask = (flat, None) if probability == 0 else torch.native_dropout(flat, probability, True)
            low = dropped @ down.t()
            lows = low.split([a.shape[0] for a in adapters[:count]], dim=1)
            outputs = []
            for layer, scaling, part, b in zip(layers, scalings, lows, adapters[count:], strict=True):
                up = b.to(x.dtype).t()
                if layer is None:
                    out = (part @ up).mul_(scaling)
                else:
                    bias = None if layer.bias is None else layer.bias.to(x.dtype)
                    out = torch.nn.functional.linear(flat, read_weight(layer, x.dtype), bias).addmm_(part, up, alpha=scaling)
                outputs.append(out.view(*x.shape[:-1], out.shape[-1]))
            ctx.save_for_backward(flat, mask, low, *adapters)
            ctx.layers, ctx.scalings, ctx.probability, ctx.shape = layers, scalings, probability, x.shape
            return tuple(outputs)

        @staticmethod
        def backward(ctx, *gradients):
            flat, mask, low, *adapters = ctx.saved_tensors
            count, scale = len(ctx.layers), 1 / (1 - ctx.probability)
            ranks = [a.shape[0] for a in adapters[:count]]
            gradients = [g.reshape(-1, g.shape[-1]) for g in gradients]
            ups = [b.to(flat.dtype) for b in adapters[count:]]
            d_low = torch.cat([(g @ up).mul_(s) for g, up, s in zip(gradients, ups, ctx.scalings, strict=True)], dim=1)
            dropped = flat if mask is None else torch.ops.aten.native_dropout_backward(flat, mask, scale)
            d_down = (d_low.t() @ dropped).split(ranks)
            d_up = [(g.t() @ part).mul_(s) for g, part, s in zip(gradients, low.split(ranks, dim=1), ctx.scalings, strict=True)]
            d_x = None
            if ctx.needs_input_grad[0]:
                for g, layer in zip(gradients, ctx.layers, strict=True):
                    if layer is not None:
                        weight = read_weight(layer, flat.dtype)
                        d_x = g @ weight if d_x is None else d_x.addmm_(g, weight)
                down = torch.cat([a.to(flat.dtype) for a in adapters[:count]])
                if mask is not None:
                    through = torch.ops.aten.native_dropout_backward(d_low @ down, mask, scale)
                    d_x = through if d_x is None else d_x.add_(through)
                else:
                    d_x = d_low @ down if d_x is None else d_x.addmm_(d_low, down)
                d_x = d_x.view(ctx.shape)
            grads = [g.to(a.dtype) for g, a in zip([*d_down, *d_up], adapters, strict=True)]
            return (d_x, None, None, None, *grads)

    return LoraGroup


@dataclass
class AdapterGroup:
    """PEFT's modules that read one input. The first that is called computes for all; the others take theirs."""

    modules: list
    adapter: str
    function: type
    input: object = None
    pending: dict = field(default_factory=dict)

    def forward(self, module, x):
        """The output of `module` for `x`."""
        if x is not self.input or id(module) not in self.pending:
            self.input, self.pending = x, dict(zip(map(id, self.modules), self.compute(x), strict=True))
        output = self.pending.pop(id(module))
        if not self.pending:
            self.input = None
        return output

    def compute(self, x):
        name, modules = self.adapter, self.modules
        bases = [module.get_base_layer() for module in modules]
        fused = all(map(is_frozen_linear, bases))
        dropout = modules[0].lora_dropout[name]
        probability = getattr(dropout, "p", 0.0) if modules[0].training else 0.0
        adapters = [module.lora_A[name].weight for module in modules] + [module.lora_B[name].weight for module in modules]
        scalings = [module.scaling[name] for module in modules]
        outputs = self.function.apply(x, bases if fused else [None] * len(bases), scalings, probability, *adapters)
        return outputs if fused else [base(x) + out for base, out in zip(bases, outputs, strict=True)]


def fuse_adapters(model) -> int:
    """Give PEFT's plain LoRA modules a forward that computes in the input's type, q, k and v at once; returns how many modules."""
    from peft.tuners.lora import LoraLayer

    function, count = _lora_function(), 0
    for parent in list(model.modules()):
        children = {name: child for name, child in parent.named_children() if isinstance(child, LoraLayer) and _is_plain_lora(child)}
        shared = [[children.pop(name) for name in names] for names in SHARED_INPUTS if all(name in children for name in names)]
        for modules in [*shared, *([child] for child in children.values())]:
            group = AdapterGroup(modules, modules[0].active_adapters[0], function)
            for module in modules:
                _replace_forward(module, group)
                count += 1
    return count


def _is_plain_lora(module) -> bool:
    """Whether a module is a linear layer with one adapter and nothing beside A and B."""
    names = module.active_adapters
    return len(names) == 1 and names[0] in module.lora_A and not module.lora_variant and not any(module.lora_bias.values()) and not module.merged


def _replace_forward(module, group: AdapterGroup) -> None:
    plain = module.forward

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters or self.merged or args or kwargs or self.active_adapters != [group.adapter]:
            return plain(x, *args, **kwargs)
        return group.forward(self, x)

    module.forward = MethodType(forward, module)


# gated MLPs


def _mlp_function():
    import torch

    class GatedMLP(torch.autograd.Function):
        """down(silu(gate(x)) * up(x)) of frozen layers: only gate(x) and up(x) are kept."""

        @staticmethod
        def forward(ctx, x, gate, up, down):
            g = torch.nn.functional.linear(x, read_weight(gate, x.dtype))
            u = torch.nn.functional.linear(x, read_weight(up, x.dtype))
            ctx.save_for_backward(g, u)
            ctx.layers = (gate, up, down)
            return torch.nn.functional.linear(_silu_product(g, u), read_weight(down, x.dtype))

        @staticmethod
        def backward(ctx, gradient):
            g, u = ctx.saved_tensors
            gate, up, down = ctx.layers
            d_gate, d_up = _silu_product_backward(g, u, gradient @ read_weight(down, g.dtype))
            d_x = (d_gate @ read_weight(gate, g.dtype)).view(-1, gate.in_features)
            d_x.addmm_(d_up.reshape(-1, d_up.shape[-1]), read_weight(up, g.dtype))
            return d_x.view(*gradient.shape[:-1], -1), None, None, None

    return GatedMLP


def _silu_product(g, u):
    import torch

    if g.is_cuda and has_liger():
        from liger_kernel.ops.swiglu import swiglu_forward

        return swiglu_forward(g, u)[2]
    return torch.nn.functional.silu(g) * u


def _silu_product_backward(g, u, gradient):
    import torch

    if g.is_cuda and has_liger():
        from liger_kernel.ops.swiglu import swiglu_backward

        return swiglu_backward(g, u, gradient.contiguous())  # overwrites g and u, which nobody needs afterwards
    wide, given = g.float(), gradient.float()
    sigmoid = torch.sigmoid(wide)
    d_g = given * u.float() * sigmoid * (1 + wide * (1 - sigmoid))
    return d_g.to(g.dtype), (given * wide * sigmoid).to(u.dtype)


def fuse_mlps(model) -> int:
    """Give gated MLPs of frozen linear layers the fused forward; returns how many."""
    import torch

    function, count = _mlp_function(), 0
    for module in model.modules():
        layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if any(layer is None or not is_frozen_linear(layer) or layer.bias is not None for layer in layers):
            continue
        activation = getattr(module, "act_fn", None)
        if not isinstance(activation, torch.nn.SiLU) and type(activation).__name__ not in ("SiLUActivation", "SiLU"):
            continue

        def forward(self, x, function=function):
            return function.apply(x, self.gate_proj, self.up_proj, self.down_proj)

        module.forward = MethodType(forward, module)
        count += 1
    return count


# library kernels


def has_liger() -> bool:
    """Whether liger's kernels import here."""
    try:
        import liger_kernel.ops.swiglu  # noqa: F401  (only whether it imports matters)
    except ImportError:
        return False
    return True


def use_liger(model, swiglu: bool) -> bool:
    """Put liger's RMS norm, rotary embedding and, if asked, SwiGLU into a model on a GPU; False where there is none or no kernels for the model."""
    if next(model.parameters()).device.type != "cuda" or not has_liger():
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(base, rope=True, rms_norm=True, swiglu=swiglu, cross_entropy=False, fused_linear_cross_entropy=False)
    return True
