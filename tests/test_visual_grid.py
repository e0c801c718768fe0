"""Rows and columns of visual tokens: against real processors, and unknown where tokens form no single grid."""

import pytest
import torch
from miniatures import IMAGE, MINIATURES, vision_inputs

from infer_patch.tokens import image_numbers
from infer_patch.visual_grid import Grid, picture_grids, token_places


def places(mini, inputs):
    image = image_numbers(inputs["input_ids"] == IMAGE, inputs)
    return image, *token_places(image, picture_grids(inputs, mini.config()))


def test_llava_is_row_by_row_in_every_picture_of_a_padded_batch():
    mini = MINIATURES["llava"]
    inputs = vision_inputs(mini, images=(1, 2, 0))
    assert picture_grids(inputs, mini.config()) == [Grid(4, 4)] * 3
    image, row, column = places(mini, inputs)
    for sample, pictures in enumerate((1, 2, 0)):
        assert row[sample][image[sample] >= 0].tolist() == [i // 4 for i in range(16)] * pictures
        assert column[sample][image[sample] >= 0].tolist() == [i % 4 for i in range(16)] * pictures
    assert (row[image < 0] == -1).all() and (column[image < 0] == -1).all()


def test_a_cls_token_has_no_place():
    config = MINIATURES["llava"].config()
    config.vision_feature_select_strategy = "full"
    (grid,) = picture_grids({"pixel_values": torch.zeros(1, 3, 16, 16)}, config)
    assert grid == Grid(4, 4, leading=1) and grid.tokens == 17
    image = torch.tensor([[-1, *[0] * 17, -1]])
    row, column = token_places(image, [grid])
    assert row[0].tolist() == [-1, -1, *[i // 4 for i in range(16)], -1]
    assert column[0].tolist() == [-1, -1, *[i % 4 for i in range(16)], -1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_grids_count_merged_units(family):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(2, 1))
    assert picture_grids(inputs, mini.config()) == [Grid(2, 4)] * 3
    image, row, column = places(mini, inputs)
    assert row[0][image[0] == 1].tolist() == [0] * 4 + [1] * 4
    assert column[1][image[1] == 0].tolist() == [0, 1, 2, 3] * 2


def test_qwen_processor_puts_the_patches_of_a_merged_unit_at_its_place():
    from PIL import Image

    try:  # the one that works without torchvision
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Maker
    except ImportError:  # transformers 5.2
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Maker

    maker = Maker(do_resize=False)
    blank, spot = Image.new("RGB", (28 * 5, 28 * 3)), Image.new("RGB", (28 * 5, 28 * 3))
    spot.paste((255, 255, 255), (28 * 3, 28 * 1, 28 * 4, 28 * 2))  # the unit in row 1, column 3
    made = [maker(images=[picture], return_tensors="pt") for picture in (blank, spot)]
    (changed,) = {int(i) // 4 for i in (made[0].pixel_values != made[1].pixel_values).any(1).nonzero()[:, 0]}
    config = MINIATURES["qwen2_vl"].config()
    row, column = token_places(torch.zeros(1, 15, dtype=torch.long), picture_grids(made[1], config))
    assert (int(row[0, changed]), int(column[0, changed])) == (1, 3)


def test_videos_have_no_single_grid():
    config = MINIATURES["qwen2_vl"].config()
    assert picture_grids({"image_grid_thw": torch.tensor([[3, 4, 8], [1, 4, 8]])}, config) == [None, Grid(2, 4)]


@pytest.mark.parametrize(
    "family",
    ["llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "gemma3", "paligemma"],
)
def test_no_place_is_guessed_in_other_families(family):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(1, 2))
    assert not any(picture_grids(inputs, mini.config()))
    _, row, column = places(mini, inputs)
    assert (row == -1).all() and (column == -1).all()


def test_a_part_of_a_picture_has_no_places():
    image = torch.tensor([[0] * 15 + [-1, 1, 1, 1, 1]])
    row, column = token_places(image, [Grid(4, 4), Grid(2, 2)])
    assert (row[0, :16] == -1).all()
    assert (row[0, 16:].tolist(), column[0, 16:].tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert (token_places(image, [Grid(2, 2)])[0] == -1).all()
    assert picture_grids({"input_ids": image}, MINIATURES["llava"].config()) == []
