import random

import pytest
import torch

from infer_patch.demo_vlm import demo_vlm_path, load_demo_vlm
from infer_patch.errors import PatchError
from infer_patch.evals import loading
from infer_patch.evals.scenes import COLORS, SHAPES, make_scene

NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
SCENES = [make_scene(seed) for seed in range(41)]


@pytest.fixture(scope="module")
def vlm():
    return load_demo_vlm()


def questions(index):
    """Two objects of a scene, and two that it lacks: any one, and a near miss."""
    rng = random.Random(index)
    present = sorted(SCENES[index].names)
    absent = [name for name in NAMES if name not in present]
    near = [name for name in absent if any(set(name.split()) & set(there.split()) for there in present)]
    yes = rng.sample(present, 2) if len(present) > 1 else present * 2
    return [*((name, "yes") for name in yes), (rng.choice(absent), "no"), (rng.choice(near), "no")]


def accuracy(vlm, picture, n_scenes):
    """Share of right answers; `picture` gives the picture to show with the questions about scene `index`."""
    model, processor = vlm
    processor.tokenizer.padding_side = "left"
    right = []
    for start in range(0, n_scenes, 5):
        images, texts, keys = [], [], []
        for index in range(start, start + 5):
            for name, key in questions(index):
                words = f"is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image ?"
                content = [{"type": "image"}, {"type": "text", "text": words}]
                turns = [{"role": "user", "content": content}]
                texts.append(processor.apply_chat_template(turns, add_generation_prompt=True))
                images.append(picture(index))
                keys.append(key)
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [answer.strip() == key for answer, key in zip(answers, keys)]
    return sum(right) / len(right)


def test_right_picture(vlm):
    assert accuracy(vlm, lambda index: SCENES[index].image(), 40) >= 0.9


def test_picture_of_another_scene(vlm):
    assert accuracy(vlm, lambda index: SCENES[index + 1].image(), 20) <= 0.7


def test_grey_picture(vlm):
    from PIL import Image

    assert accuracy(vlm, lambda index: Image.new("RGB", (128, 128), (90, 90, 90)), 20) <= 0.6


def test_files():
    names = {path.name for path in demo_vlm_path().iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in demo_vlm_path().iterdir()) < 16e6


def test_precision_and_no_weights_left_at_random(vlm):
    """What is loaded are the values of the file, all of them."""
    from safetensors.torch import load_file

    stored = load_file(demo_vlm_path() / "model.safetensors")
    model, _ = load_demo_vlm(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and vlm[0].dtype == torch.float32 and not model.training
    sums = sorted(tensor.double().sum().item() for tensor in stored.values())
    loaded = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    assert sorted(tensor.double().sum().item() for tensor in loaded.values()) == sums


def test_loading_by_name():
    model, processor = loading.load("demo-vlm", device="cpu", dtype="bfloat16")
    assert (model.dtype, model.config.model_type, type(processor).__name__) == (
        torch.bfloat16,
        "llava",
        "LlavaProcessor",
    )
    assert loading.load("demo-vlm", device="cpu")[0].dtype == torch.float32
    with pytest.raises(PatchError, match="unknown dtype"):
        loading.load("demo-vlm", device="cpu", dtype="int8")
