"""Summaries of the variants of a training, their accuracy and cost, as tables."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from ml_collections import ConfigDict

from train import data
from train.config import config as config_lib
from train.runs import records
from train.runs.saved_runs import SavedRun
from train.system import tables

# The fields of a policy that tables show.
POLICY = ("strategy", "granularity", "rate", "chunk_size", "value_dtype", "fill")


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean of values, and its standard error, which is NaN for a single value."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Returns the mean and standard error of values, one for each seed."""
        count = len(values)
        error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
        return cls(statistics.mean(values), error)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Accuracy and cost of a variant.

    Attributes:
      variant: name of the variant.
      memory: preset of `drop` around the loss, or "baseline".
      layers: "flax", or "dropit" for DropIT layers.
      policy: the fields `POLICY` of the policy, by name; empty where none is used.
      dropped: share of the elements of a chunk that are dropped.
      seeds: number of runs of the variant.
      test_accuracy: accuracy in the last evaluation.
      gain: test accuracy minus that of the baseline's run of the same seed.
      train_loss: loss of the last epoch, in nats.
      stored_bytes: bytes that a step stores between forward and backward pass.
      temp_bytes: temporary bytes of a step on a target, without arguments and results.
      step_ratio: median ratio of a step's time on this machine to the baseline's,
        timed in turns.
    """

    variant: str
    memory: str
    layers: str
    policy: Mapping[str, Any]
    dropped: float
    seeds: int
    test_accuracy: Mean
    gain: Mean
    train_loss: Mean
    stored_bytes: int
    temp_bytes: int
    step_ratio: float


def policy(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields `POLICY` of a config's policy; empty if it uses none.

    For whole channels `chunk_size` is `None`.
    """
    if not config_lib.uses_policy(config):
        return {}
    used = config_lib.policy(config)
    fields = {name: getattr(used, name) for name in POLICY}
    if used.granularity == "channel":
        fields["chunk_size"] = None  # whole channels are selected, without chunks
    return fields


def to_csv(summaries: Iterable[Summary]) -> str:
    """Returns a CSV table with a row for each variant."""
    columns = (
        *("variant", "memory", "layers", *POLICY, "dropped", "seeds"),
        *("test_accuracy", "test_accuracy_error", "gain", "gain_error"),
        *("train_loss", "train_loss_error"),
        *("stored_bytes", "temp_bytes", "step_ratio"),
    )
    return tables.to_csv(
        columns,
        (
            {
                "variant": each.variant,
                "memory": each.memory,
                "layers": each.layers,
                **each.policy,
                "dropped": each.dropped,
                "seeds": each.seeds,
                **_columns("test_accuracy", each.test_accuracy),
                **_columns("gain", each.gain),
                **_columns("train_loss", each.train_loss),
                "stored_bytes": each.stored_bytes,
                "temp_bytes": each.temp_bytes,
                "step_ratio": each.step_ratio,
            }
            for each in summaries
        ),
    )


def curves_csv(variants: Mapping[str, Sequence[SavedRun]]) -> str:
    """Returns a CSV table with a row for each evaluation of each run."""
    columns = ("variant", "seed", *records.COLUMNS)
    return tables.to_csv(
        columns,
        (
            {"variant": name, "seed": run.config.seed, **row}
            for name, runs in variants.items()
            for run in runs
            for row in run.rows
        ),
    )


def to_markdown(summaries: Sequence[Summary], config: ConfigDict, target: str) -> str:
    """Returns a page with the tables, and with links to the figures beside it.

    Args:
      summaries: a summary for each variant, the baseline first.
      config: the config of any of the runs.
      target: the GPU of `temp_bytes`.
    """
    steps_per_epoch, steps = config_lib.steps(config)
    examples = data.info(config.dataset, config.data_dir).train_examples
    baseline = summaries[0].variant
    return "\n".join(
        [
            f"{config.model.name} of width {config.model.get('width', '-')} on "
            f"{config.dataset} ({examples:,} images): {steps:,} steps of "
            f"{config.batch_size} images, {steps / steps_per_epoch:.1f} epochs. "
            "Accuracy is that on the test images after the last step, in per cent: the "
            "mean over the seeds ± its standard error, where there are several.",
            "",
            *_rate_table(summaries),
            "## Every variant",
            "",
            *variants_table(summaries, target),
            "",
            "Dropped is the share of a chunk that is dropped: rounding, and the "
            "element that every chunk keeps, make it another than the rate. Gain is in "
            f"points, over the runs of `{baseline}` of the same seeds. Times are a "
            f"step's on this machine, divided by that of `{baseline}`.",
            "",
            "![Stored bytes and accuracy](tradeoff.png)",
            "",
            "![Accuracy](accuracy.png)",
            "",
            "![Loss](loss.png)",
            "",
            "![Parameters and gradients](histograms.png)",
            "",
        ]
    )


def _rate_table(summaries: Sequence[Summary]) -> list[str]:
    """Returns accuracy by policy and rate in Markdown lines, as in the paper's Table 2.

    Has only the variants of DropIT layers whose values are not quantised and
    whose rate is not 0. Empty if there is no such variant.
    """
    cells: dict[str, dict[float, list[str]]] = {}
    for each in summaries:
        p = each.policy
        if not p or p["value_dtype"] in ("int2", "int4", "int8") or not p["rate"]:
            continue
        if each.layers != "dropit":
            continue
        cell, rate = _percent(each.test_accuracy), f"{p['rate']:.1%}"
        if (share := f"{each.dropped:.1%}") != rate:
            cell += f" ({share})"
        line = cells.setdefault(_policy_text(p), {})
        line.setdefault(p["rate"], []).append(cell)
    if not cells:
        return []
    rates = sorted({rate for line in cells.values() for rate in line})
    rows = [
        [line, *("; ".join(of_line.get(rate, ["-"])) for rate in rates)]
        for line, of_line in cells.items()
    ]
    title = f"rate ({summaries[0].variant}: {_percent(summaries[0].test_accuracy)})"
    return [
        "## Granularity, strategy and rate",
        "",
        *tables.to_markdown([title, *(f"{rate:.1%}" for rate in rates)], rows),
        "",
        "In brackets the share that is dropped, where it is not the rate.",
        "",
    ]


def _policy_text(policy: Mapping[str, Any]) -> str:
    """Returns a text for the policy, without the rate."""
    words = [policy["strategy"], f"{policy['granularity']}s"]
    if policy["granularity"] == "element":
        words.append(f"D = {policy['chunk_size'] or 'all'}")
    if policy["value_dtype"]:
        words.append(policy["value_dtype"])
    if policy["fill"] != "zero":
        words.append(policy["fill"])
    return ", ".join(words)


def variants_table(summaries: Sequence[Summary], target: str) -> list[str]:
    """Returns a Markdown table with a row for each summary.

    The first summary is the baseline of the ratios.
    """
    baseline = summaries[0]
    rows = [
        [
            f"`{each.variant}`",
            f"{each.dropped:.1%}" if each.policy else "-",
            str(each.seeds),
            _percent(each.test_accuracy),
            "-" if each is baseline else _percent(each.gain, sign="+"),
            f"{each.train_loss.mean:.3f}",
            f"{each.stored_bytes / 2**20:.2f}",
            f"{each.stored_bytes / baseline.stored_bytes:.2f}",
            f"{each.temp_bytes / 2**20:.2f}",
            f"{each.temp_bytes / baseline.temp_bytes:.2f}",
            f"{each.step_ratio:.2f}",
        ]
        for each in summaries
    ]
    header = [
        "variant",
        "dropped",
        "seeds",
        "accuracy",
        "gain",
        "train loss",
        "stored MiB",
        "ratio",
    ]
    return tables.to_markdown([*header, f"temp MiB on {target}", "ratio", "time"], rows)


def _percent(accuracy: Mean, sign: str = "") -> str:
    text = f"{100 * accuracy.mean:{sign}.1f}"
    return (
        text if math.isnan(accuracy.error) else f"{text} ± {100 * accuracy.error:.1f}"
    )


def _columns(name: str, value: Mean) -> dict[str, Any]:
    """Returns a mean and its error as two columns, not rounded.

    `{"gain": 0.012, "gain_error": 0.003}`; the error of a single value is "".
    """
    error = "" if math.isnan(value.error) else value.error
    return {name: value.mean, f"{name}_error": error}
