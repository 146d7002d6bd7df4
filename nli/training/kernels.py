"""The same sums with fewer passes over memory: adapters, gated MLPs, norms.

model = add_lora(load_base(...), ...)
speed_up(model)                     # ["adapters", "mlp", "liger"]: what was found to put in

Adapters: fp32 master weights, cast to the input's type where they are used, so that no autocast surrounds the model. Modules that read one input (q, k and v)
share one pass over it and one dropout mask. A layer of 4-bit weights keeps nothing for its backward pass, which dequantises them again.
"""

import functools
import importlib.util
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


class FrozenWeight:
    """The weight of a linear layer that is not trained. 4-bit weights are dequantised at each reading, from block scales that are unpacked once."""

    def __init__(self, layer):
        import torch

        self.layer, self.weight, self.arguments = layer, layer.weight, None
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            return
        scales = state.absmax
        if state.nested:
            import bitsandbytes.functional

            scales = (bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        self.dequantise = torch.ops.bitsandbytes.dequantize_4bit.default
        self.arguments = (layer.weight.data, scales, state.blocksize, state.quant_type, state.shape, state.dtype)

    def read(self, dtype: "torch.dtype") -> "torch.Tensor":
        """The matrix (out, in) in `dtype`."""
        if self.layer._parameters["weight"] is not self.weight:  # merging an adapter puts another weight there
            self.__init__(self.layer)
        return (self.weight if self.arguments is None else self.dequantise(*self.arguments)).to(dtype)


def is_frozen_linear(layer) -> bool:
    """Whether `FrozenWeight` can read a layer: 4-bit or plain, and not trained."""
    import torch

    if type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith(
        "bitsandbytes"
    ):  # PEFT has a Linear4bit too
        return getattr(layer.weight, "quant_state", None) is not None
    return type(layer) is torch.nn.Linear and not layer.weight.requires_grad


# adapters


def _lora_function():
    import torch

    class LoraGroup(torch.autograd.Function):
        """Outputs of linear layers that read one input: x W' + s (drop(x) A') B' for each. Weights given as None add no x W'."""

        @staticmethod
        def forward(ctx, x, weights, biases, scalings, probability, *adapters):
            flat, count, dtype = x.reshape(-1, x.shape[-1]), len(scalings), x.dtype
            ranks = [a.shape[0] for a in adapters[:count]]
            down = (torch.cat(adapters[:count]) if count > 1 else adapters[0]).to(dtype)
            ups = [(b * scaling).to(dtype) for b, scaling in zip(adapters[count:], scalings, strict=True)]
            dropped, mask = (flat, None) if probability == 0 else torch.native_dropout(flat, probability, True)
            low = dropped @ down.t()
            outputs = []
            for number, (part, up) in enumerate(zip(low.split(ranks, dim=1), ups, strict=True)):
                if weights is None:
                    outputs.append((part @ up.t()).view(*x.shape[:-1], up.shape[0]))
                    continue
                out = torch.nn.functional.linear(flat, weights[number].read(dtype), biases[number]).addmm_(part, up.t())
                outputs.append(out.view(*x.shape[:-1], out.shape[-1]))
            ctx.save_for_backward(flat, mask, low, down, *ups)
            ctx.weights, ctx.scalings, ctx.probability, ctx.shape, ctx.ranks = (
                weights,
                scalings,
                probability,
                x.shape,
                ranks,
            )
            ctx.kept_dtype = adapters[0].dtype
            return tuple(outputs)

        @staticmethod
        def backward(ctx, *gradients):
            flat, mask, low, down, *ups = ctx.saved_tensors
            scale = 1 / (1 - ctx.probability)
            gradients = [g.reshape(-1, g.shape[-1]) for g in gradients]
            lows = [g @ up for g, up in zip(gradients, ups, strict=True)]
            d_low = torch.cat(lows, dim=1) if len(lows) > 1 else lows[0]
            dropped = flat if mask is None else torch.ops.aten.native_dropout_backward(flat, mask, scale)
            d_down = (d_low.t() @ dropped).to(ctx.kept_dtype).split(ctx.ranks)
            parts = zip(gradients, low.split(ctx.ranks, dim=1), ctx.scalings, strict=True)
            d_up = [(g.t() @ part).to(ctx.kept_dtype).mul_(scaling) for g, part, scaling in parts]
            d_x = None
            if ctx.needs_input_grad[0]:
                for number, g in enumerate(gradients if ctx.weights is not None else ()):
                    weight = ctx.weights[number].read(flat.dtype)
                    d_x = g @ weight if d_x is None else d_x.addmm_(g, weight)
                if mask is not None:
                    through = torch.ops.aten.native_dropout_backward(d_low @ down, mask, scale)
                    d_x = through if d_x is None else d_x.add_(through)
                else:
                    d_x = d_low @ down if d_x is None else d_x.addmm_(d_low, down)
                d_x = d_x.view(ctx.shape)
            return (d_x, None, None, None, None, *d_down, *d_up)

    return LoraGroup


class AdapterGroup:
    """PEFT's modules that read one input. The first that is called computes for all; the others take theirs."""

    def __init__(self, modules: list, function: type):
        self.modules, self.function, self.adapter = modules, function, modules[0].active_adapters[0]
        self.bases = [module.get_base_layer() for module in modules]
        fused = all(map(is_frozen_linear, self.bases))
        self.weights = [FrozenWeight(base) for base in self.bases] if fused else None
        self.dropout = modules[0].lora_dropout[self.adapter]
        self.input, self.pending = None, {}

    def forward(self, module, x):
        """The output of `module` for `x`."""
        if x is not self.input or id(module) not in self.pending:
            self.input, self.pending = x, dict(zip(map(id, self.modules), self.compute(x), strict=True))
        output = self.pending.pop(id(module))
        if not self.pending:
            self.input = None
        return output

    def compute(self, x):
        """The outputs of all modules for `x`."""
        name, modules = self.adapter, self.modules
        probability = getattr(self.dropout, "p", 0.0) if modules[0].training else 0.0
        adapters = [module.lora_A[name].weight for module in modules] + [
            module.lora_B[name].weight for module in modules
        ]
        scalings = [module.scaling[name] for module in modules]
        if self.weights is None:
            outputs = self.function.apply(x, None, None, scalings, probability, *adapters)
            return [base(x) + out for base, out in zip(self.bases, outputs, strict=True)]
        biases = [None if base.bias is None else base.bias.to(x.dtype) for base in self.bases]
        return self.function.apply(x, self.weights, biases, scalings, probability, *adapters)


def fuse_adapters(model) -> int:
    """Give PEFT's plain LoRA modules a forward that computes in the input's type, q, k and v at once; returns how many modules."""
    from peft.tuners.lora import LoraLayer

    function, count = _lora_function(), 0
    for parent in list(model.modules()):
        children = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, LoraLayer) and _is_plain_lora(child)
        }
        shared = [
            [children.pop(name) for name in names] for names in SHARED_INPUTS if all(name in children for name in names)
        ]
        for modules in [*shared, *([child] for child in children.values())]:
            group = AdapterGroup(modules, function)
            for module in modules:
                _replace_forward(module, group)
                count += 1
    return count


def _is_plain_lora(module) -> bool:
    """Whether a module is a linear layer with one adapter and nothing beside A and B."""
    names = module.active_adapters
    return (
        len(names) == 1
        and names[0] in module.lora_A
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and not module.merged
    )


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
            g = torch.nn.functional.linear(x, gate.read(x.dtype))
            u = torch.nn.functional.linear(x, up.read(x.dtype))
            ctx.save_for_backward(g, u)
            ctx.weights = (gate, up, down)
            return torch.nn.functional.linear(_silu_product(g, u), down.read(x.dtype))

        @staticmethod
        def backward(ctx, gradient):
            g, u = ctx.saved_tensors
            gate, up, down = ctx.weights
            d_gate, d_up = _silu_product_backward(g, u, gradient @ down.read(g.dtype))
            d_x = d_gate.reshape(-1, d_gate.shape[-1]) @ gate.read(g.dtype)
            d_x.addmm_(d_up.reshape(-1, d_up.shape[-1]), up.read(g.dtype))
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

        weights = [FrozenWeight(layer) for layer in layers]
        module.forward = functools.partial(_run_mlp, function, weights)
        count += 1
    return count


def _run_mlp(function, weights, x):
    return function.apply(x, *weights)


# library kernels


@functools.cache
def has_liger() -> bool:
    """Whether liger's kernels are installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def use_liger(model, swiglu: bool) -> bool:
    """Put liger's RMS norm, rotary embedding and, if asked, SwiGLU into a model on a GPU; False where there is none or no kernels for the model."""
    if next(model.parameters()).device.type != "cuda" or not has_liger():
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(
        base, rope=True, rms_norm=True, swiglu=swiglu, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return True
