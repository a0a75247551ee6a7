"""Writes tables and figures that compare finished runs.

`python -m train.report --output=DIR [--baseline=NAME] [--target=h100] RUNS...`

Every argument is a workdir or contains workdirs, as the workdir of `train.ablation`
does. Runs that differ by the seed alone are one variant, named after its directory.
Each variant is compared with the baseline's runs of the same seeds. DIR gets
`report.md` with its figures, `summary.csv` with a row for each variant, and
`curves.csv` with a row for each evaluation.
"""

import statistics
from pathlib import Path

from absl import flags

from train import cli
from train.config import flags as config_flags
from train.config.config import ConfigError
from train.config.flags import output_path
from train.engine import initialisation
from train.engine import job as job_lib
from train.reports import measurements, plots, summary
from train.reports.histograms import Distributions, distributions
from train.reports.summary import Mean, Summary
from train.runs import saved_runs, trained
from train.runs.saved_runs import SavedRun
from train.system.files import write_atomically
from train.system.terminal import Terminal

config_flags.output()

_TARGET = config_flags.target()

_BASELINE = flags.DEFINE_string(
    "baseline", "baseline", "The variant that the others are measured against."
)
_HISTOGRAMS = flags.DEFINE_list(
    "histograms",
    None,
    "Variants whose parameters and gradients are drawn beside the baseline's, by "
    "default the first other one by name. Their checkpoints, and the baseline's, have "
    "to be there.",
)


def main(directories: list[Path]) -> None:
    """Reads the runs, measures memory and time of their steps, writes the report."""
    terminal, output, target = Terminal(), output_path(), _TARGET.value
    baseline = _BASELINE.value
    variants = _with_first(saved_runs.find(directories, terminal.say), baseline)
    drawn = _drawn(list(variants), _HISTOGRAMS.value)
    seed = _common_seed([variants[name] for name in drawn])
    for each in variants.values():
        job_lib.check(each[0].config)
    _create_directory(output)

    # Everything that can fail comes before the writing, and what takes longest last.
    terminal.say(f"Computing gradients of {', '.join(drawn)} ...")
    found = {name: _distributions(_of_seed(variants[name], seed)) for name in drawn}
    terminal.say(f"Compiling {len(variants)} steps for {target} ...")
    temp_bytes = {
        name: measurements.allocated(each[0].config, target).temp_bytes
        for name, each in variants.items()
    }
    terminal.say(f"Timing {len(variants)} steps ...")
    summaries = _summaries(variants, baseline, temp_bytes)

    plots.histograms(found, baseline, output / "histograms.png")
    rows = {name: [run.rows for run in each] for name, each in variants.items()}
    for metric in ("accuracy", "loss"):
        plots.against_baseline(rows, baseline, metric, output / f"{metric}.png")
    plots.tradeoff(
        {
            each.variant: (
                each.stored_bytes / 2**20,
                Mean(100 * each.gain.mean, 100 * each.gain.error),
            )
            for each in summaries
        },
        baseline,
        (
            "stored for the backward pass, MiB",
            f"test accuracy over that of {baseline}, points",
        ),
        output / "tradeoff.png",
    )
    write_atomically(output / "summary.csv", summary.to_csv(summaries))
    write_atomically(output / "curves.csv", summary.curves_csv(variants))
    config = variants[baseline][0].config
    write_atomically(
        output / "report.md", summary.to_markdown(summaries, config, target)
    )
    terminal.say(f"Report: {output / 'report.md'}")


def _with_first(
    variants: dict[str, list[SavedRun]], first: str
) -> dict[str, list[SavedRun]]:
    if first not in variants:
        raise ConfigError(f"--baseline={first}: there are {', '.join(variants)}.")
    if len(variants) == 1:
        raise ConfigError(f"There is no finished run of anything but {first}.")
    seeds = {run.config.seed for run in variants[first]}
    for name, each in variants.items():
        if seeds.isdisjoint(run.config.seed for run in each):
            raise ConfigError(
                f"No run of {name} has the seed of one of {first}: "
                f"{', '.join(map(str, sorted(seeds)))}. Train {name} with one "
                "of these seeds: results of different seeds cannot be compared."
            )
    return {first: variants[first]} | variants


def _drawn(names: list[str], chosen: list[str] | None) -> list[str]:
    baseline, *others = names
    for name in chosen or ():
        if name not in names:
            raise ConfigError(f"--histograms={name}: there are {', '.join(names)}.")
    return list(dict.fromkeys([baseline, *(chosen or others[:1])]))


def _common_seed(variants: list[list[SavedRun]]) -> int:
    """Returns the first seed that all variants have.

    Runs of one seed begin with equal parameters.

    Raises:
      ConfigError: they have no seed in common.
    """
    seeds = [[run.config.seed for run in each] for each in variants]
    for seed in seeds[0]:
        if all(seed in each for each in seeds):
            return seed
    raise ConfigError(
        "No seed was trained in all variants of --histograms: "
        + "; ".join(
            f"{each[0].variant}: {', '.join(map(str, own))}"
            for each, own in zip(variants, seeds, strict=True)
        )
    )


def _of_seed(each: list[SavedRun], seed: int) -> SavedRun:
    return next(run for run in each if run.config.seed == seed)


def _summaries(
    variants: dict[str, list[SavedRun]], baseline: str, temp_bytes: dict[str, int]
) -> list[Summary]:
    configs = {name: each[0].config for name, each in variants.items()}
    seconds = measurements.step_seconds(configs)
    of_baseline = {run.config.seed: _accuracy(run) for run in variants[baseline]}
    return [
        Summary(
            variant=name,
            memory=configs[name].memory,
            layers=configs[name].layers,
            policy=summary.policy(configs[name]),
            dropped=measurements.dropped(configs[name]),
            seeds=len(each),
            test_accuracy=Mean.of([_accuracy(run) for run in each]),
            gain=Mean.of(
                [
                    _accuracy(run) - of_baseline[run.config.seed]
                    for run in each
                    if run.config.seed in of_baseline
                ]
            ),
            train_loss=Mean.of([run.rows[-1]["train_loss"] for run in each]),
            stored_bytes=measurements.stored_bytes(configs[name]),
            temp_bytes=temp_bytes[name],
            step_ratio=statistics.median(
                own / other
                for own, other in zip(seconds[name], seconds[baseline], strict=True)
            ),
        )
        for name, each in variants.items()
    ]


def _accuracy(run: SavedRun) -> float:
    return run.rows[-1]["test_accuracy"]


def _create_directory(output: Path) -> None:
    """Creates the directory of the report.

    Raises:
      ConfigError: the directory cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be created: {error}") from error


def _distributions(run: SavedRun) -> Distributions:
    job, last, batch = trained.load(run.config, run.path)
    first = initialisation.initial_state(job)
    return distributions(run.config, (first, last), batch)


if __name__ == "__main__":
    cli.launch_on_directories(main)
