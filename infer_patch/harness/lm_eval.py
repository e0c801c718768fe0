"""lm-eval with a plan on the model.

    python -m infer_patch.harness.lm_eval --model infer_patch --model_args pretrained=FOLDER,plan=envelope --tasks TASK

is lm-eval's own command line with one model more. In Python, `import infer_patch.harness.lm_eval` registers it.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import torch
from tqdm import tqdm

from infer_patch.api import patch
from infer_patch.availability import require
from infer_patch.errors import PatchError
from infer_patch.evals.loading import load
from infer_patch.harness.outcome import only_stores, read_plan, record, refuse_remote_code, warning

require("lm-eval", "The lm-eval adapter")
require("accelerate", "lm-eval's Hugging Face model")

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

logger = logging.getLogger("lm_eval.infer_patch")  # below lm_eval, whose handler and level it takes
_CACHED_PLAN = "infer_patch plan"  # a key beside the hashes of lm-eval's cache of answers


@register_model("infer_patch")
class InferPatchLM(HFLM):
    """lm-eval's Hugging Face model with a plan on it.

    Loglikelihood batches hold requests of one length, because lm-eval pads them without an attention mask: a plan would
    take padding for text, and scores would depend on the batch.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for lm-eval's `hf`; "demo" is the demo model of infer_patch.
    plan : str
        A preset's name or the path of a YAML plan. "identity" is the baseline.
    device : str, optional
        Default: a GPU if there is one.
    **options
        Every other option of `hf`, but `trust_remote_code`.

    Attributes
    ----------
    handle : Handle
        `handle.report()` says what the plan did; `handle.remove()` takes it off.
    """

    def __init__(
        self,
        pretrained: Any,
        plan: Any = None,
        device: str | None = None,
        dtype: Any = "auto",
        tokenizer: Any = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        wanted = read_plan(plan)
        refuse_remote_code(trust_remote_code)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if pretrained == "demo-vlm":
            raise PatchError("lm-eval's tasks are text; demo-vlm runs in lmms-eval (docs/harness.md).")
        if pretrained == "demo":
            pretrained, own = load("demo", device, dtype)
            tokenizer = tokenizer or own
        super().__init__(pretrained, device=device, dtype=dtype, tokenizer=tokenizer, **options)
        self.handle = patch(self.model, wanted)
        self._warned = False

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._warn_about_one_pass()
        lengths = [min(len(context) + len(continuation), self.max_length + 1) for _, context, continuation in requests]
        if self.batch_size == "auto" and not override_bs and requests:
            override_bs = self._detect_batch_size(requests, max(range(len(requests)), key=lengths.__getitem__))
            self.batch_sizes = {0: override_bs}
        places: dict[int, list[int]] = {}
        for place, length in enumerate(lengths):
            places.setdefault(length, []).append(place)
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Loglikelihoods") as bar:
            for _, group in sorted(places.items(), reverse=True):
                found = super()._loglikelihood_tokens([requests[i] for i in group], True, override_bs)
                for place, answer in zip(group, found):
                    answers[place] = answer
                bar.update(len(group))
        return answers

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """As in `hf`, without counting: the longest text that fits would prove an effect that no request had."""
        stats = self.handle._engine.stats
        before = copy.deepcopy(vars(stats))
        try:
            return super()._detect_batch_size(requests, pos)
        finally:
            vars(stats).update(before)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Called with `--use_cache`: its keys name neither model nor plan, so refuse the answers of another plan."""
        answers = getattr(cache_hook, "dbdict", None)
        if answers is not None:
            own = json.dumps(self.handle.plan.to_dict())
            if answers.get(_CACHED_PLAN, own if len(answers) == 0 else None) != own:
                raise PatchError(
                    f"the answers in this cache were not made with plan {self.handle.plan.name!r}; give each plan a "
                    "--use_cache of its own."
                )
            answers[_CACHED_PLAN] = own
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into `config` of its results: plan and report under `infer_patch`."""
        logger.info("%s", self.handle.report())
        problem = warning(self.handle)
        if problem:
            logger.warning(problem)
        return {**super().get_model_info(), "infer_patch": record(self.handle)}

    def _warn_about_one_pass(self) -> None:
        if only_stores(self.handle.plan) and not self._warned:
            self._warned = True
            logger.warning(
                "plan %s only changes the cache, and a loglikelihood is one pass that reads no cache: its scores say "
                "nothing about this plan. Use tasks that generate.",
                self.handle.plan.name,
            )


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
