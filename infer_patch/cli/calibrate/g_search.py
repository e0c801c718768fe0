"""`infer-patch calibrate g-search`: the fewest visual tokens in each layer of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate import visual_options as option
from infer_patch.cli.calibrate.schedule_run import calibrate
from infer_patch.cli.common import Device, Dtype

if TYPE_CHECKING:
    from infer_patch.calibration.visual_questions import Source


@calibrations.command("g-search")
def g_search(
    model: option.Model,
    out: option.Out,
    trace: option.TraceFile = None,
    metric: option.Metric = "agreement",
    eps: Annotated[float, typer.Option(help="Quality that may be lost, as a difference of shares.")] = 0.01,
    questions: option.QuestionFiles = None,
    images: option.Images = None,
    pictures: option.Pictures = 12,
    held_out: option.HeldOut = 12,
    grid: Annotated[int | None, typer.Option(help="Numbers tried are multiples of this. [visual tokens / 36]")] = None,
    group: Annotated[int, typer.Option(help="So many layers in a row share a number.")] = 1,
    least: Annotated[int, typer.Option(help="The least number of tokens in a layer.")] = 0,
    confirm: Annotated[int, typer.Option(help="Smaller numbers tried where one is rejected.")] = 1,
    first: option.First = 2,
    query: option.Query = "instruction",
    batch_size: option.BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: option.Seed = 0,
) -> None:
    """Find the fewest visual tokens in each layer that keep the quality, from the first layers to the last.

    Every measurement is kept, so an interrupted run goes on where it stopped.
    """

    def run(source: Source, *given: Any) -> dict[str, Any]:
        from infer_patch.calibration.keep_schedules import calibrate_g_search
        from infer_patch.calibration.schedule_settings import SearchSettings

        settings = SearchSettings(
            source=source,
            metric=metric,
            query=query,
            first=first,
            eps=eps,
            grid=grid,
            group=group,
            least=least,
            confirm=confirm,
        )
        return calibrate_g_search(given[0], given[1], settings, *given[2:])

    calibrate(run, model, out, trace, questions, images, pictures, held_out, batch_size, device, dtype, seed)
