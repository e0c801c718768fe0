"""Plain recomputations of what the vision encoder's attention says, for the tests of methods that look into it."""

from miniatures import MINIATURES

SQUARE = ("internvl", "idefics3", "smolvlm", "gemma3")  # 8 x 8 patches, merged two by two


def tower_attentions(model, inputs):
    """Probabilities [pictures or tiles, heads, n, n] of every block, from eager attention, in the order of encoding."""
    base, pixels = model.model, inputs["pixel_values"]
    if hasattr(base, "vision_model"):
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]  # absent pictures are all zero
        return base.vision_model(pixel_values=pixels, output_attentions=True).attentions
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    return base.vision_tower(pixels, output_attentions=True).attentions


def qwen_attentions(model, inputs):
    """The same for Qwen-VL: per block one [1, heads, n, n] per picture, patches in the order that blocks see them."""
    visual = model.model.visual
    module = __import__(type(visual).__module__, fromlist=["apply_rotary_pos_emb_vision"])
    found = []

    def look(attention, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        q, k, _ = attention.qkv(hidden).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
        q, k = module.apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
        lengths = kwargs["cu_seqlens"].diff().tolist()
        logits = [(a @ b) * attention.scaling for a, b in zip(rows(q, lengths), columns(k, lengths))]
        found.append([x.softmax(-1)[None] for x in logits])

    def rows(q, lengths):
        return [x.transpose(0, 1) for x in q.split(lengths)]

    def columns(k, lengths):
        return [x.permute(1, 2, 0) for x in k.split(lengths)]

    hooks = [block.attn.register_forward_pre_hook(look, with_kwargs=True) for block in visual.blocks]
    visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    return found


def token_scores(family, model, inputs, blocks):
    """One score per visual token (None for newlines), picture by picture, from the given encoder blocks."""
    mini = MINIATURES[family]
    if family.startswith("qwen"):
        sums = [sum(block[i].mean((1, 2))[0] for block in blocks_of(qwen_attentions(model, inputs), blocks))
                for i in range(len(inputs["image_grid_thw"]))]  # fmt: skip
        units = [x.view(-1, 4).mean(1) for x in sums]
        if family == "qwen2_5_vl":  # 2 x 4 units in two windows of 2 x 2
            units = [u[[0, 1, 4, 5, 2, 3, 6, 7]] for u in units]
        return [u.tolist() for u in units]
    attentions = blocks_of(tower_attentions(model, inputs), blocks)
    if mini.vision["model_type" if "model_type" in mini.vision else "num_hidden_layers"] == "clip_vision_model" or (
        family == "internvl"
    ):
        scores = sum(a.mean(1)[:, 0, 1:] for a in attentions)
    else:
        scores = sum(a.mean((1, 2)) for a in attentions)
    if family in SQUARE:
        scores = scores.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    if family == "llava_next":  # base view, then rows over both tiles, each with a newline
        pictures = scores.view(-1, 3, 4).tolist()
        return [base + a[:2] + b[:2] + [None] + a[2:] + b[2:] + [None] for base, a, b in pictures]
    return scores.tolist()


def blocks_of(attentions, blocks):
    return [attentions[i] for i in blocks]
