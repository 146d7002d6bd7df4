"""Attention over rows that lie end to end in one, none of which sees another.

model = load_base(path, "nf4", "bf16", "cuda:0", register_packed_attention())
model(input_ids=[[5, 6, 7, 8, 9]], position_ids=[[0, 1, 2, 0, 1]], cu_seq_lens_q=[0, 3, 5], max_length_q=3, …)     rows 5 6 7 and 8 9
"""

import functools
import inspect
from itertools import pairwise

PACKED = "packed"


def register_packed_attention() -> str:
    """Teach transformers the attention "packed" and return its name. Without cu_seq_lens_q it is torch's own, with the usual mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args, attention_mask=None, **kwargs):
        return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, mask)
    return PACKED


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    sliding_window=None,
    **kwargs,
):
    """Causal attention of shape (1, heads, tokens, dim) within each of the packed rows; on a GPU by flash-attn or torch's own variable-length kernel."""
    import torch

    if cu_seq_lens_q is None or query.shape[0] != 1:
        positions = kwargs.get("position_ids")
        if (
            attention_mask is None
            and query.shape[2] > 1
            and positions is not None
            and bool((positions[:, 1:] == 0).any())
        ):
            raise ValueError(
                "rows are packed, and cu_seq_lens_q does not say where each begins: they would see each other"
            )
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    left = -1 if sliding_window is None or sliding_window >= max_length_q else sliding_window - 1
    if query.is_cuda and query.dtype != torch.float32:  # the kernels know no fp32
        q, k, v = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
        return _varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, left)[None], None
    return _by_row(query, key, value, cu_seq_lens_q.tolist(), scaling, left), None


@functools.cache
def _find_kernel() -> tuple[str, object, dict]:
    """The variable-length kernel's name, its function and what it needs to be told; looked for once, because an import that fails is slow each time."""
    try:
        import flash_attn
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        return (
            "torch varlen",
            varlen_attn,
            {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {},
        )
    return f"flash-attn {flash_attn.__version__}", flash_attn.flash_attn_varlen_func, {"causal": True}


def _varlen(q, k, v, bounds, longest, scaling, left):
    name, kernel, values = _find_kernel()
    scale = {"scale" if name == "torch varlen" else "softmax_scale": scaling}
    return kernel(q, k, v, bounds, bounds, longest, longest, window_size=(left, 0), **scale, **values)


def _by_row(query, key, value, bounds, scaling, left):
    """The same, row by row, where there is no variable-length kernel."""
    import torch

    parts = []
    for start, end in pairwise(bounds):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        mask = None
        if left >= 0:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device)
            mask = ones.tril().triu(-left)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def name_packed_kernel(device: str) -> str:
    """Which kernel the attention "packed" uses on a device, for the log."""
    return _find_kernel()[0] if device.startswith("cuda") else "torch, row by row"
