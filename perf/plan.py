"""Compares predictions of `robbench plan` with runs: `python perf/plan.py [--clock cpu] MODEL:SUITE:SAMPLES …`.

With `--clock cpu`, predicted and measured seconds are CPU time of this process, so other load on the machine does not
count. It uses one thread.
"""

import argparse
import os
import time

import torch

from robbench.core.machine import describe_device, versions
from robbench.core.types import Status
from robbench.evaluation import planning
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import make_run, run_here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--pilot", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    planning.clock = clock
    machine = f"{describe_device(torch.device('cpu'))}; {versions()}"
    print(f"{machine}; {args.clock} time, --pilot {args.pilot}")
    for case in args.cases:
        model, suite, samples = case.split(":")
        begin = clock()
        p = planning.plan(model, suite, pilot=args.pilot, samples=int(samples))
        planned = clock() - begin
        run = make_run(RunRequest.of(model, suite, samples=int(samples)))
        begin = clock()
        run_here(run)
        taken = clock() - begin
        rows = run.shards.collect_rows()
        attacked = int(rows["status"].isin([Status.BROKEN, Status.ROBUST]).sum())
        passes = int(rows["forwards"].sum() + rows["backwards"].sum())
        predicted = sum(s.forwards + s.backwards for s in p.stages)
        print(
            f"{model} {suite} n={samples}: passes {predicted} predicted, {passes} taken "
            f"({100 * (predicted / passes - 1):+.0f} %); "
            f"seconds {p.seconds:.1f} predicted ± {100 * p.uncertainty:.0f} %, {taken:.1f} taken "
            f"({100 * (p.seconds / taken - 1):+.0f} %); {attacked} records; planning took {planned:.0f} s; "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
