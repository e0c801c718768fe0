"""`infer-patch calibrate p-sigmoid`: a curve that says how many visual tokens each layer of one model gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate import visual_options as option
from infer_patch.cli.calibrate.schedule_run import calibrate
from infer_patch.cli.common import Device, Dtype

if TYPE_CHECKING:
    from infer_patch.calibration.visual_questions import Source


@calibrations.command("p-sigmoid")
def p_sigmoid(
    model: option.Model,
    out: option.Out,
    budget: Annotated[float, typer.Option(help="Mean share of visual tokens over all layers.")],
    trace: option.TraceFile = None,
    metric: option.Metric = "agreement",
    starts: Annotated[int, typer.Option(help="Curves tried before the optimisation chooses.")] = 10,
    iterations: Annotated[int, typer.Option(help="Curves that it chooses.")] = 30,
    near: Annotated[Path | None, typer.Option(help="A g_search schedule file; the nearest curve is tried too.")] = None,
    questions: option.QuestionFiles = None,
    images: option.Images = None,
    pictures: option.Pictures = 12,
    held_out: option.HeldOut = 12,
    first: option.First = 2,
    query: option.Query = "instruction",
    batch_size: option.BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: option.Seed = 0,
) -> None:
    """Find the curve that keeps most of the quality with a given number of visual tokens over all layers.

    Needs scikit-learn. Every measurement is kept, so an interrupted run goes on where it stopped.
    """

    def run(source: Source, *given: Any) -> dict[str, Any]:
        from infer_patch.calibration.keep_schedules import calibrate_p_sigmoid
        from infer_patch.calibration.schedule_settings import SigmoidSettings

        settings = SigmoidSettings(
            source=source,
            metric=metric,
            query=query,
            first=first,
            budget=budget,
            starts=starts,
            iterations=iterations,
            near=near,
            seed=seed,
        )
        return calibrate_p_sigmoid(given[0], given[1], settings, *given[2:])

    calibrate(run, model, out, trace, questions, images, pictures, held_out, batch_size, device, dtype, seed)
