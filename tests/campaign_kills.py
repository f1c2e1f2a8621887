"""Kills at random moments: python tests/campaign_kills.py [KILLS] [SEED] (by hand; about five seconds a kill).

Each piece of work is done once without a kill. Then it is killed, up to three times, goes on, and must leave what the
uninterrupted one left, to the bit, and nothing beside.
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent / "train")]

from conftest import small_unet
from test_precision import consistency, draw_consistency

from lora_distill.adapters import add_adapter, save_adapter
from lora_distill.arrays import mapped_rows
from lora_distill.judge.pictures import kept_pictures
from lora_distill.pretrain import text_to_image
from lora_distill.pretrain.text_to_image import Preset, pretrain
from lora_distill.storage import cached_folder, cached_parts, digest, keep_value, kept_value
from lora_distill.train.loop import train
from lora_distill.train.objectives import GuidanceDistillation
from lora_distill.train.step import Schedule
from lora_distill.writing import locked

CHANGING = ("training.json", "log.jsonl")  # with times in them


def distillation(folder: Path) -> None:
    unet = small_unet()
    add_adapter(unet, "student", rank=2, alpha=2)
    objective = GuidanceDistillation(unet, unet, DDIMScheduler(), 3.0, torch.zeros(1, 5, 8))

    def draw(step, batch_size, generator):
        return {
            "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
            "eps": torch.randn(batch_size, 4, 8, 8, generator=generator),
            "timesteps": torch.randint(1000, (batch_size,), generator=generator),
            "prompt_embeds": torch.randn(batch_size, 5, 8, generator=generator),
        }

    plan = Schedule(30, 2, 1e-2, gradient_accumulation=2, weight_decay=0.1, checkpoint_every=2, log_every=1)
    train(objective, draw, plan, folder / "student")
    save_adapter(unet, "student", folder / "student.safetensors")


def consistency_with_average(folder: Path) -> None:
    objective, _ = consistency(torch.float32, torch.float32)
    plan = Schedule(30, 2, 1e-3, ema_decay=0.95, checkpoint_every=2, log_every=1)
    train(objective, draw_consistency, plan, folder / "consistency")


def pretraining(folder: Path) -> None:
    plan = Schedule(6, 4, 1e-3, checkpoint_every=2, log_every=1)
    names = ("vae_crops", "vae_images", "text_encoder")
    schedules = dict.fromkeys(names, plan) | {"unet": Schedule(6, 4, 1e-3, ema_decay=0.9, checkpoint_every=2)}
    pretrain(Preset(8, schedules), folder / "pipeline", folder / "work")


def caches(folder: Path) -> None:
    values = torch.arange(4000.0).view(100, 40) / 8

    def rows(part: slice) -> torch.Tensor:
        time.sleep(0.004)
        return values[part]

    mapped_rows(folder / "rows.npy", (100, 40), 3, lambda parts: (rows(part) for part in parts))
    cached_parts(folder, "teacher", "key", 100, 7, lambda part: {"latents": rows(part)})
    cached_folder(folder / "scenes", lambda place: [(place / f"{i}").write_bytes(bytes(i) * 99) for i in range(9)])
    images = np.arange(30 * 48, dtype=np.uint8).reshape(30, 4, 4, 3)
    kept_pictures(folder / "images", "key", 30, 4, lambda part: rows(part) is not None and images[part])
    kept_value(folder / "value.json") or keep_value(folder / "value.json", {"total": 3})


WORK = (distillation, consistency_with_average, pretraining, caches)


def beside(work: Callable[[Path], None], folder: Path, seconds: float | None = None) -> bool:
    """Do a piece of work in a process of its own, which is killed after so many seconds; whether it was."""
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            with locked(folder):
                work(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"{work.__name__}: exit {status}"
    return status != 0


def left(folder: Path) -> dict[str, object]:
    """What lies in a folder: of files of tensors those and the metadata that says no time, of others the bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = {key: text for key, text in (file.metadata() or {}).items() if key not in ("log", "digest")}
            found[name] = digest(tensors), sorted(metadata.items())
        elif path.is_file() and path.name not in CHANGING:
            found[name] = path.read_bytes()
    return found


def campaign(kills: int, seed: int) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    texts = text_to_image.grammar_captions(0)[::20]
    text_to_image.grammar_captions = lambda seed: texts
    rng, done = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        expected, seconds = {}, {}
        for work in WORK:
            folder, start = Path(temporary, work.__name__), time.monotonic()
            folder.mkdir()
            beside(work, folder)
            expected[work], seconds[work] = left(folder), time.monotonic() - start
        for number in range(10**6):
            work = WORK[number % len(WORK)]
            folder = Path(temporary, f"{number}")
            folder.mkdir()
            killed = sum(beside(work, folder, rng.uniform(0.02, seconds[work])) for _ in range(rng.randint(1, 3)))
            beside(work, folder)
            found = left(folder)
            differs = sorted(name for name in {*found, *expected[work]} if found.get(name) != expected[work].get(name))
            assert not differs, f"{work.__name__}, seed {seed}, number {number}: {differs}"
            done += killed
            print(f"{work.__name__}: {killed} kills, equal ({done} of {kills})", flush=True)
            if done >= kills:
                return


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    campaign(*(numbers + [30, 0][len(numbers) :]))
