"""What is found out about a model by its structure."""

import pytest
import torch
from miniatures import MINIATURES, text_inputs, vision_inputs

from infer_patch.families import describe


@pytest.mark.parametrize("name", MINIATURES)
@torch.no_grad()
def test_heads_are_those_of_the_keys(name):
    mini = MINIATURES[name]
    model = mini.build()
    parts = describe(model)
    inputs = text_inputs(mini, lengths=(20,)) if mini.kind == "text" else vision_inputs(mini)
    for layer in model(**inputs, use_cache=True).past_key_values.layers:
        assert (layer.keys.shape[1], layer.keys.shape[3]) == (parts.num_kv_heads, parts.head_dim)
