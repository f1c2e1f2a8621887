"""Training steps of this checkout and of others, in turns, by hand: python tests/campaign_versus.py OTHER [OTHER ...].

Each OTHER is a checkout of another commit, for instance of `git worktree add --detach ../before 1257b89`, with or
without the trajectories. Every checkout trains in a process of its own, on the same batch of random values and the same
weights, those of the bundled pipeline here; each in its turn does one step, in random order. Prints medians with
quartiles, and the ratio round by round to the first checkout; --out writes them as CSV too.
"""

import os
import random
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "lora_distill" / "assets" / "pipeline"
BATCH, WARM_UP = 16, 3
LCM, GUIDED, RECORDED = "LCM-LoRA, rank 16, all layers", "guided distillation, rank 4", "the same on trajectories"


def worker(method: str, threads: int) -> None:
    """Train for ever; before each step say how long the last one took, and wait for a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # progress bars
    import torch

    torch.set_num_threads(threads)
    from lora_distill.pipeline import encode_prompts, load_pipeline

    try:
        from lora_distill.train import objectives
        from lora_distill.train.loop import train
        from lora_distill.train.step import Schedule
    except ImportError:  # as it was before the wings
        from lora_distill.training import Schedule, train

        from lora_distill import objectives
    from lora_distill.adapters import add_adapter

    pipe = load_pipeline(str(PIPELINE))
    unet, empty = pipe.unet.requires_grad_(False), encode_prompts(pipe, [""])
    side, generator = unet.config.sample_size, torch.Generator().manual_seed(0)
    names = ("latents", "eps", "x_t", "uncond", "cond")
    batch = {name: torch.randn(BATCH, 4, side, side, generator=generator) for name in names}
    batch["prompt_embeds"] = torch.randn(BATCH, *empty.shape[1:], generator=generator)
    batch["timesteps"] = torch.randint(2, 50, (BATCH,), generator=generator) * 20 - 1
    batch |= {"guidance_scale": torch.full((BATCH,), 3.0), "inside": torch.arange(BATCH)}
    add_adapter(
        unet, "student", **{LCM: {"rank": 16, "alpha": 16, "targets": "all"}}.get(method, {"rank": 4, "alpha": 4})
    )
    if method == LCM:
        objective = objectives.ConsistencyDistillation(unet, unet, pipe.scheduler, empty)
    elif method == GUIDED:
        objective = objectives.GuidanceDistillation(unet, unet, pipe.scheduler, 3.0, empty)
    else:
        objective = objectives.TrajectoryDistillation(unet, 3.0)
    started = []

    def draw_batch(*_):
        print(time.perf_counter() - started[-1] if started else "ready", file=answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        started.append(time.perf_counter())
        return batch

    never = 10**7
    plan = {"steps": never, "learning_rate": 1e-4, "log_every": never, "checkpoint_every": 2 * never}
    with TemporaryDirectory() as folder:
        schedule = Schedule(batch_size=BATCH, ema_decay=0.95 if method == LCM else 0.0, **plan)
        train(objective, draw_batch, schedule, Path(folder))


def started(checkout: Path, method: str, threads: int) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", method, "--threads", str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, env=variables, cwd=checkout, **pipes)
    if process.stdout.readline().strip() != "ready":
        sys.exit(f"{checkout}: {method} does not train there")
    return process


def in_turns(sides: dict[str, tuple[Path, str]], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each side, an entry a round."""
    processes = {name: started(checkout, method, threads) for name, (checkout, method) in sides.items()}
    seconds = {name: [] for name in sides}
    for number in range(WARM_UP + rounds):
        for name in random.Random(number).sample(list(sides), len(sides)):
            processes[name].stdin.write("go\n")
            processes[name].stdin.flush()
            found = float(processes[name].stdout.readline())
            seconds[name] += [found] if number >= WARM_UP else []
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return seconds


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("others", nargs="*", type=Path, help="checkouts of other commits, the first is compared with")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    parser.add_argument("--worker", help="(how the script starts itself)")
    parser.add_argument("--threads", type=int, default=0, help="by default one, then two")
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker, asked.threads)
    rows = []
    for threads in [asked.threads] if asked.threads else (1, 2):
        for method in (LCM, GUIDED):
            sides = {commit(other): (other.resolve(), method) for other in asked.others}
            sides[commit(ROOT)] = ROOT, method
            if method == GUIDED:
                sides[f"{commit(ROOT)}, trajectories"] = ROOT, RECORDED
            seconds = in_turns(sides, threads, asked.rounds)
            first = next(iter(seconds.values()))
            for name, own in seconds.items():
                low, _, high = quantiles(own, n=4)
                ratio = median(theirs / ours for theirs, ours in zip(first, own, strict=True))
                rows.append({"training": method, "threads": threads, "commit": name, "batch": BATCH,
                             "rounds": asked.rounds, "ms_a_step": round(1e3 * median(own), 1),
                             "lower_quartile": round(1e3 * low, 1), "upper_quartile": round(1e3 * high, 1),
                             "images_per_s": round(BATCH / median(own), 1),
                             "times_as_fast": round(ratio, 3)})  # fmt: skip
                print(rows[-1], flush=True)
    from lora_distill.storage import device_name, save_table

    if asked.out:
        save_table(asked.out, [row | {"device": device_name("cpu")} for row in rows])


if __name__ == "__main__":
    main()
