"""Evaluates a state on the test examples."""

from collections.abc import Callable

import jax

from train import data
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib
from train.engine.job import Job
from train.engine.meter import Meter
from train.engine.prefetch import Prefetch

Evaluate = Callable[[step_lib.State], Meter]


def evaluator(job: Job) -> Evaluate:
    """Returns a function that evaluates a state on all test examples."""
    step = mesh_lib.compile_evaluation(
        step_lib.evaluation_step(job.config), job.mesh, job.shardings
    )

    def evaluate(state: step_lib.State) -> Meter:
        meter = Meter(may_diverge=True)  # training can still recover
        batches = data.evaluation_batches(
            job.dataset,
            job.config.batch_size,
            workers=job.config.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        placer = mesh_lib.placer(job.mesh)
        with Prefetch(batches, placer, data.check_workers_alive) as prefetch:
            for number, batch in enumerate(prefetch):
                meter.add(number, step(state, batch))
        meter.finish()
        return meter

    return evaluate
