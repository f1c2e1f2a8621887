"""Kill the series at random times, let it end, and compare: `python tests/campaign_series.py --kills 10`.

Not collected by pytest. A run of one notebook with tiny settings is never disturbed; another one is ended by SIGKILL at
random times, started again each time, and at last let run to its end. Tables, results, LoRA files and pictures must be
equal to the bit, no kernel may live on, and no temporary file may be left.
"""

import argparse
import csv
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from lora_distill.settings import repository_root

MARK = "LORA_DISTILL_CAMPAIGN"  # in the environment of every process that the campaign starts
TINY = {"full_copies": True, "train_steps": 6, "checkpoint_every": 1, "eval_every": 3, "teacher_images": 8}
SECONDS = "second"  # in the names of columns that no two runs have equal
PATIENCE = 10.0  # seconds that a kernel may outlive its process


def main() -> None:
    """Run the campaign; exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--notebook", default="02_guided_distillation")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    options = parser.parse_args()
    token, rng = secrets.token_hex(4), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        start = {
            name: _command(Path(folder), f"campaign-{token}-{name}", options.notebook) for name in ("whole", "cut")
        }
        runs = {name: repository_root() / "runs" / f"campaign-{token}-{name}" for name in start}
        try:
            clock = time.monotonic()
            _run(start["whole"], token)
            length = time.monotonic() - clock
            print(f"undisturbed: {length:.0f} s", flush=True)
            problems, kills = [], 0
            while kills < options.kills and not problems:
                killed, found = _kill(start["cut"], token, rng.uniform(1, 0.9 * length))
                problems, kills = problems + found, kills + killed
                if not killed:  # it has ended: begin anew
                    problems += _differences(runs["whole"], runs["cut"])
                    shutil.rmtree(runs["cut"])
            _run(start["cut"], token)
            problems += _differences(runs["whole"], runs["cut"])
        finally:
            for run in runs.values():
                shutil.rmtree(run, ignore_errors=True)
    print("\n".join(problems) or f"{options.kills} kills: equal")
    sys.exit(bool(problems))


def _command(folder: Path, profile: str, notebook: str) -> list[str]:
    """The command that runs a notebook with the settings of smoke, made smaller, as a profile of its own."""
    smoke = yaml.safe_load((repository_root() / "params" / "smoke.yaml").read_text(encoding="utf-8"))
    path = folder / f"{profile}.yaml"
    path.write_text(yaml.safe_dump(smoke | TINY | {"profile": profile}), encoding="utf-8")
    return [sys.executable, "-m", "lora_distill", "reproduce", "--profile", str(path), "--notebook", notebook]


def _run(command: list[str], token: str) -> None:
    done = subprocess.run(
        command, cwd=repository_root(), env=os.environ | {MARK: token}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"a run failed:\n{done.stdout}{done.stderr}")


def _kill(command: list[str], token: str, after: float) -> tuple[bool, list[str]]:
    """Start a run and kill it after some seconds; whether it was still running, and what is wrong afterwards."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, cwd=repository_root(), env=os.environ | {MARK: token}, **quiet)
    try:
        child.wait(timeout=after)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
    killed = child.returncode < 0
    print(f"after {after:.0f} s: {'killed' if killed else 'it had ended'}", flush=True)
    deadline = time.monotonic() + PATIENCE
    while (left := _processes(token)) and time.monotonic() < deadline:
        time.sleep(0.2)
    problems = [f"process {process.pid} lives on" for process in left]
    return killed, problems + ([f"a start failed with {child.returncode}"] if child.returncode > 0 else [])


def _processes(token: str) -> list[psutil.Process]:
    """The processes that the campaign started and that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _differences(whole: Path, cut: Path) -> list[str]:
    """What is not equal in two runs."""
    problems = [f"left: {path.relative_to(cut)}" for path in cut.rglob(".*.tmp")]
    patterns = ("figures/*.csv", "figures/*_results.json", "*.safetensors", "images/*/*/*/*.png")
    for name in sorted({path.relative_to(run) for run in (whole, cut) for p in patterns for path in run.glob(p)}):
        if not ((whole / name).is_file() and (cut / name).is_file()):
            problems.append(f"only in one: {name}")
        elif _content(whole / name) != _content(cut / name):
            problems.append(f"differs: {name}")
    return problems


def _content(path: Path) -> bytes | list[list[str]]:
    """A file's bytes; of a table the rows without columns of seconds."""
    if path.suffix != ".csv":
        return path.read_bytes()
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    kept = [number for number, name in enumerate(rows[0]) if SECONDS not in name]
    return [[row[number] for number in kept] for row in rows]


if __name__ == "__main__":
    main()
