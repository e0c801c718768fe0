"""Context first, question last: how answers come to depend on what a method keeps in the cache.

A one-token answer is read off the prefill, where attention still has every key as it was. Only a question that is fed
after what it asks about has been cached reads the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infer_patch.availability import continues_3d_positions
from infer_patch.errors import PatchError
from infer_patch.evals.prompts import encode, question_length
from infer_patch.evals.task import Item, Task
from infer_patch.families import describe
from infer_patch.plan import Plan


def feeds_question_last(
    model: Any, processor: Any, task: Task, plans: Sequence[Plan], item: Item, wanted: bool | None
) -> bool:
    """Whether all runs of a task read their question last; its first item tells for all of them.

    By default where a plan changes the cache and none prunes visual tokens: a pruning method is led by the question,
    and reads it in the prefill.

    Raises
    ------
    PatchError
        When it is `wanted` and cannot be done; the message says why.
    """
    ports = {port for plan in plans for method in plan for port in method.active_ports()}
    if wanted is False or (wanted is None and "store" not in ports):
        return False
    reason = _why_not(model, processor, task, ports, item)
    if wanted and reason is not None:
        raise PatchError(reason)
    return reason is None


def question_tokens(model: Any, items: Sequence[Item], inputs: Sequence[dict[str, Any]]) -> int:
    """The length of the shortest question of a batch; 0 where one has none."""
    visual = describe(model).image_token_ids
    return min(question_length(item.prompt, x["input_ids"], visual) or 0 for item, x in zip(items, inputs))


def _why_not(model: Any, processor: Any, task: Task, ports: set[str], item: Item) -> str | None:
    if "reduce" in ports:
        return (
            "plans that prune visual tokens must read the question in the prefill; evaluate those that change "
            "the cache by themselves."
        )
    if hasattr(getattr(model, "model", None), "rope_deltas") and not continues_3d_positions():
        return "transformers 5.2 gives this model wrong positions in a second call; take 5.3 or newer."
    encoded = encode(item.prompt, processor, model, task.chat)
    if not task.answers_prompts or not question_tokens(model, [item], [encoded]):
        return f"the prompts of {task.name} have no question at their end that could be fed by itself."
    return None
