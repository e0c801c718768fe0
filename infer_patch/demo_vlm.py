"""The vision-language model of the demo: a 7.6 M LLaVA, inside this package, that knows drawn scenes and nothing else.

It answers from the picture, so a method that hides visual tokens can be seen to do harm. `infer_patch.evals.scenes`
draws such scenes; `data/demo_vlm/README.md` lists what it can be asked, and how well it answers.
"""

from pathlib import Path
from typing import Any

import torch

from infer_patch.availability import require


def demo_vlm_path() -> Path:
    """Folder of the weights, in the layout of transformers."""
    return Path(__file__).parent / "data" / "demo_vlm"


def load_demo_vlm(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model in eval mode on the CPU, and its processor; nothing is downloaded.

    Parameters
    ----------
    dtype : torch.dtype
        Precision of the weights; the file holds bfloat16.
    """
    require("pillow", "The demo vision-language model")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = demo_vlm_path()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
