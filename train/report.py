"""Tables and figures of finished runs, side by side.

`python -m train.report --output=DIR [--baseline=NAME] [--target=h100] RUNS...`

Every argument is a workdir, or holds some: that of `train.ablation`, for instance. Runs
that differ by the seed alone are one variant, named after its directory. DIR then has
`report.md` with its figures, `summary.csv`, a row a variant, and `curves.csv`, a row an
evaluation.
"""

import statistics
from pathlib import Path

import jax
from absl import flags

from train import cli, measurements, plots, runs, summary, trained, validation
from train import step as step_lib
from train.config import ConfigError
from train.files import write_atomically
from train.histograms import Distributions, distributions
from train.runs import Run
from train.summary import Mean, Summary
from train.target import TARGET
from train.terminal import Terminal

_OUTPUT = flags.DEFINE_string("output", None, "Where the report goes.", required=True)
_BASELINE = flags.DEFINE_string(
    "baseline", "baseline", "The variant that the others are measured against."
)
_HISTOGRAMS = flags.DEFINE_list(
    "histograms",
    None,
    "Variants whose parameters and gradients are drawn beside the baseline's; the "
    "first other one, if none is named. Their checkpoints have to be there.",
)


def main(directories: list[Path]) -> None:
    """Reads the runs, measures what their steps cost, and writes the report."""
    terminal, output, target = Terminal(), Path(_OUTPUT.value), TARGET.value
    baseline = _BASELINE.value
    variants = _with_first(runs.find(directories), baseline)
    drawn = _drawn(list(variants), _HISTOGRAMS.value)
    for each in variants.values():
        validation.validate(each[0].config, jax.device_count())
    output.mkdir(parents=True, exist_ok=True)

    terminal.say(f"Drawing parameters and gradients of {', '.join(drawn)} ...")
    plots.histograms(
        {name: _distributions(variants[name][0], terminal) for name in drawn},
        output / "histograms.png",
    )
    terminal.say(f"Compiling {len(variants)} steps for {target}, and timing them ...")
    summaries = _measured(variants, baseline, target)

    rows = {name: [run.rows for run in each] for name, each in variants.items()}
    for metric in ("accuracy", "loss"):
        plots.against_baseline(rows, baseline, metric, output / f"{metric}.png")
    plots.tradeoff(
        {
            each.variant: (
                each.cached_bytes / 2**20,
                each.test_accuracy.mean,
                each.test_accuracy.error,
            )
            for each in summaries
        },
        ("cached by Conv and Dense in a step, MiB", "test accuracy"),
        baseline,
        output / "tradeoff.png",
    )
    write_atomically(output / "summary.csv", summary.to_csv(summaries))
    write_atomically(output / "curves.csv", summary.curves(variants))
    config = variants[baseline][0].config
    write_atomically(
        output / "report.md", summary.to_markdown(summaries, config, target)
    )
    terminal.say(f"Report: {output / 'report.md'}")


def _with_first(variants: dict[str, list[Run]], first: str) -> dict[str, list[Run]]:
    if first not in variants:
        raise ConfigError(f"--baseline={first}: there are {', '.join(variants)}.")
    return {first: variants[first]} | variants


def _drawn(names: list[str], chosen: list[str] | None) -> list[str]:
    baseline, *others = names
    for name in chosen or ():
        if name not in names:
            raise ConfigError(f"--histograms={name}: there are {', '.join(names)}.")
    return list(dict.fromkeys([baseline, *(others[:1] if chosen is None else chosen)]))


def _measured(
    variants: dict[str, list[Run]], baseline: str, target: str
) -> list[Summary]:
    configs = {name: each[0].config for name, each in variants.items()}
    seconds = measurements.step_seconds(configs)
    return [
        Summary(
            variant=name,
            memory=configs[name].memory,
            policy=summary.policy(configs[name]),
            seeds=len(each),
            test_accuracy=Mean.of([run.rows[-1]["test_accuracy"] for run in each]),
            train_loss=Mean.of([run.rows[-1]["train_loss"] for run in each]),
            cached_bytes=measurements.cached_bytes(configs[name]),
            temp_bytes=measurements.temp_bytes(configs[name], target),
            step_ratio=statistics.median(
                own / other
                for own, other in zip(seconds[name], seconds[baseline], strict=True)
            ),
        )
        for name, each in variants.items()
    ]


def _distributions(run: Run, terminal: Terminal) -> Distributions:
    job, last, batch = trained.load(run.config, run.path, terminal.say)
    first = step_lib.initialise(run.config, job.shardings)
    return distributions(run.config, (first, last), batch)


if __name__ == "__main__":
    cli.launch_on_runs(main)
