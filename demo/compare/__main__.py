"""Puts PSO beside its rivals on the demo, compared at equal gain: one artist preferred over the others, a new style, a
new concept.

    python -m demo.compare --output_dir outputs/compare

Every row of `ROWS` is trained at several learning rates with the first seed, its best rate again with the other seeds,
and measured along training. `tables.md` and, for each of `TASKS`, pictures of curves and samples say what came out. A
run that is finished is not run again: start the script again to go on.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from demo.compare.report import BEGIN, END, has_marks, report
from demo.compare.rows import ROWS, chosen_rate, prepare, run
from demo.compare.tasks import UNTUNED_MODELS, measure_untuned, start_worker
from demo.tasks import write_tasks


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="The first one tunes the rates.")
    parser.add_argument("--learning_rates", type=int, default=3, help="How many of each row's to try.")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at once; each gets its part of the cores.")
    parser.add_argument("--num_images", type=int, default=110, help="For each number of steps and kind of prompt.")
    parser.add_argument("--fraction", type=float, default=1.0, help="Of all step and image counts, for a trial.")
    parser.add_argument("--report_only", action="store_true", help="Only write the tables and pictures anew.")
    parser.add_argument("--readme", type=Path, help="Put the report into this file too, between its marks.")
    args = parser.parse_args(argv)
    for name in args.rows:
        if ROWS[name].needs not in (None, *args.rows):
            parser.error(f"--rows {name} needs {ROWS[name].needs}: add it")
    if args.readme and not has_marks(args.readme):
        parser.error(
            f"--readme {args.readme}: pass a file with the lines {BEGIN} and {END}, between which the report goes"
        )
    args.output_dir = args.output_dir.resolve()
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    counts, path = {"fraction": args.fraction, "num_images": args.num_images}, args.output_dir / "counts.json"
    if path.exists() and json.loads(path.read_text()) != counts:
        parser.error(f"--output_dir holds runs of {json.loads(path.read_text())}: pass the same, or another folder")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counts))
    return args


def in_parallel(pool, args, tasks: list[tuple]):
    """Runs tasks (function, *arguments), and says which are done."""
    futures = [pool.submit(function, args, *arguments) for function, *arguments in tasks]
    try:
        for future in as_completed(futures):
            print(time.strftime("%H:%M:%S"), future.result(), flush=True)
    except BaseException:  # an interrupt, too: it is raised again
        pool.shutdown(wait=False, cancel_futures=True)  # a failure ends the comparison once what runs is done
        raise


def train_and_measure(args):
    write_tasks(args.output_dir / "tasks")
    tasks = list(dict.fromkeys(ROWS[name].task for name in args.rows))
    first, *others = args.seeds
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    with ProcessPoolExecutor(args.jobs, context, start_worker, (args.threads,)) as pool:
        in_parallel(pool, args, [(measure_untuned, task, model) for task in tasks for model in UNTUNED_MODELS])
        for later in (False, True):
            rows = [name for name in args.rows if bool(ROWS[name].needs) == later]
            prepared = [name for name in rows if ROWS[name].prepare]
            rates = {name: ROWS[name].learning_rates[: args.learning_rates] for name in rows}
            tuning = {name: [(run, name, rate, first) for rate in rates[name]] for name in rows}
            ready = [task for name in rows if name not in prepared for task in tuning[name]]
            in_parallel(pool, args, [(prepare, name) for name in prepared] + ready)
            in_parallel(pool, args, [task for name in prepared for task in tuning[name]])
            in_parallel(pool, args, [(run, n, chosen_rate(args, n), seed) for n in rows for seed in others])


def main(argv=None):
    args = parse_args(argv)
    if not args.report_only:
        train_and_measure(args)
    report(args)
    print((args.output_dir / "tables.md").read_text())


if __name__ == "__main__":
    main()
