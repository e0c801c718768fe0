"""Sinks planted in a LLaVA that has none: massive values in hidden dimensions that nothing else reads or writes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

HUGE = (3000.0, -3000.0)  # beside contents of some hundreds in the demo model's residual stream
FIRST_LAYER = 2  # the first whose keys may read a planted dimension: in real models no token is a sink before it


@torch.no_grad()
def widened(model: Any, width: int) -> Any:
    """A LLaVA with a decoder of `width` hidden dimensions that computes what `model` does in the first of them.

    The others are neither written nor read: zeros in every matrix. RMSNorm takes the mean over all of them, so its
    weights, and the square root of its epsilon, are multiplied by sqrt(narrow / width).
    """
    config = copy.deepcopy(model.config)
    share = config.text_config.hidden_size / width
    config.text_config.hidden_size = width
    config.text_config.rms_norm_eps *= share
    wide = LlavaForConditionalGeneration(config).eval()
    norms = [*norms_of(wide), wide.model.language_model.norm]
    scaled = {id(norm.weight) for norm in norms}
    for (name, narrow), (same, weight) in zip(model.named_parameters(), wide.named_parameters(), strict=True):
        assert name == same, (name, same)
        weight.zero_()
        weight[tuple(map(slice, narrow.shape))] = narrow * math.sqrt(share) if id(weight) in scaled else narrow
    return wide


def norms_of(model: Any) -> list[Any]:
    """The two norms of every decoder layer."""
    layers = model.model.language_model.layers
    return [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]


@torch.no_grad()
def plant(
    model: Any, dims: Sequence[int], places: Sequence[int], first_token: int, values: Sequence[float] = HUGE
) -> None:
    """Give `first_token`, and the visual tokens at `places` of every picture, these values in these dimensions.

    No weight reads or writes these dimensions afterwards, whether or not one did before. The sinks' own content shrinks
    all the same: RMSNorm divides by the root mean square of the whole vector.
    """
    text, columns = model.model.language_model, list(dims)
    for norm in (*norms_of(model), text.norm):
        norm.weight[columns] = 0
    for layer in text.layers:
        for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writes.weight[columns] = 0
    text.embed_tokens.weight[:, columns] = 0
    text.embed_tokens.weight[first_token, columns] = torch.tensor(values)

    def put(module: Any, arguments: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., columns] = 0
        for place in places:
            output[..., place, columns] = output.new_tensor(values)
        return output

    model.model.multi_modal_projector.register_forward_hook(put)


@torch.no_grad()
def pull(model: Any, dims: Sequence[int], count: int, prompts: Sequence[Mapping[str, Any]], share: float) -> None:
    """Let the keys of every layer from `FIRST_LAYER` on read a planted dimension, so that sinks draw attention.

    The key that a sink gets lies along the mean query of the rows behind the picture, in the half of the rotary pairs
    that turn slowest, and is so long that `count` such keys would take about `share` of the attention of a mean row.
    Values do not read the dimension, and tokens that are no sinks have nothing there: their keys stay the same. Called
    on a planted model; `prompts` are read to see its queries.
    """
    text = model.model.language_model
    seen: dict[Any, list[Tensor]] = {}
    attentions = [layer.self_attn for layer in text.layers]
    hooks = [
        projection.register_forward_hook(lambda m, a, out: seen.setdefault(m, []).append(out[0]))
        for attention in attentions
        for projection in (attention.q_proj, attention.k_proj)
    ]
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    own = [[a[0].diagonal(dim1=1, dim2=2) for a in model(**x, output_attentions=True).attentions] for x in prompts]
    model.set_attn_implementation(before)
    for hook in hooks:
        hook.remove()
    image = model.config.image_token_id
    behind = [slice(int((x["input_ids"][0] == image).nonzero().max()) + 1, None) for x in prompts]
    for number, layer in enumerate(text.layers[FIRST_LAYER:], FIRST_LAYER):
        attention = layer.self_attn
        d, scale = attention.head_dim, attention.scaling
        slow = (torch.arange(d) % (d // 2)) >= d // 4
        queries, sums = [], []
        for i, rows in enumerate(behind):
            q, k = (
                seen[p][i].view(-1, p.out_features // d, d).transpose(0, 1)[:, rows]
                for p in (attention.q_proj, attention.k_proj)
            )
            k = k.repeat_interleave(len(q) // len(k), 0)
            queries.append(q * slow)
            # a token's score for itself is not turned; what is left of it after the softmax gives the log of the sum
            sums.append(scale * (q * k).sum(-1) - own[i][number][:, rows].clamp(min=1e-30).log())
        heads = attention.k_proj.out_features // d
        q = torch.cat(queries, 1).view(heads, -1, d).mean(1)
        wanted = torch.cat(sums, 1).view(heads, -1).mean(1) + math.log(share / (1 - share) / count)
        key = q * (wanted / (scale * q.square().sum(-1)))[:, None]
        layer.input_layernorm.weight[dims[0]] = 1
        attention.k_proj.weight[:, dims[0]] = key.flatten() / math.sqrt(model.config.text_config.hidden_size / 2)


@torch.no_grad()
def sizes(model: Any, inputs: Any, layer: int, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of every token where it enters a layer: phi, the max over planted dimensions of |x_d| / rms(x), and the share of
    the vector's length that the other dimensions have; [T] each."""
    x = model(**inputs, output_hidden_states=True).hidden_states[layer][0].double()
    others = x.clone()
    others[:, list(dims)] = 0
    phi = x[:, list(dims)].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
    return phi, others.norm(dim=-1) / x.norm(dim=-1)
