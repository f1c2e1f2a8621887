"""Two processes on the CPU, as torchrun starts them, train what one process trains, and share caches and files."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_distill import processes
from lora_distill.arrays import mapped_rows
from lora_distill.errors import InputError
from lora_distill.storage import load_tensors
from lora_distill.train.checkpoint import CHECKPOINT, LOG, RESULT
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule

TESTS = Path(__file__).parent

SETUP = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from diffusers import DDIMScheduler
from conftest import small_unet
from lora_distill import processes
from lora_distill.adapters import add_adapter, plain_copy
from lora_distill.data.encoded import consistency_batches
from lora_distill.arrays import mapped_rows
from lora_distill.storage import save_tensors
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule
from lora_distill.train.objectives import ConsistencyDistillation, ConsistencyMimicry, GuidanceDistillation

torch.set_num_threads(1)
processes.connect(cpu=True)
here = Path(sys.argv[1])
plan = Schedule(4, 4, 1e-2, warmup_steps=1, gradient_accumulation=2, log_every=1, checkpoint_every=2)
empty = torch.zeros(1, 5, 8)

def draw(step, batch_size, generator):
    return {
        "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "eps": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timesteps": torch.randint(1000, (batch_size,), generator=generator),
        "prompt_embeds": torch.randn(batch_size, 5, 8, generator=generator),
    }

def student(dtype=torch.float32):
    unet = small_unet().to(dtype)
    return unet, add_adapter(unet, "student", rank=2, alpha=2, dtype=dtype)

def guided(dtype):
    unet, parameters = student(dtype)
    return GuidanceDistillation(unet, unet, DDIMScheduler(), 3.0, empty), parameters, draw

def full():
    copy = plain_copy(small_unet()).requires_grad_(True)
    return GuidanceDistillation(copy, small_unet(), DDIMScheduler(), 3.0, empty), list(copy.parameters()), draw

def consistency():
    unet, parameters = student()
    objective = ConsistencyDistillation(unet, unet, DDIMScheduler(), empty)
    return objective, parameters, consistency_batches(draw, 1000, 20, 2.0, 5.0)

def mimicry():
    unet, parameters = student()
    objective = ConsistencyMimicry(unet, small_unet(seed=5), DDIMScheduler())
    return objective, parameters, consistency_batches(draw, 1000, 20, 2.0, 5.0)

def fit(name, made, plan=plan, **options):
    objective, parameters, draw_batch = made
    save_tensors(here / name / "start.safetensors", {str(i): p for i, p in enumerate(parameters)})
    log = train(objective, draw_batch, plan, here / name, device="cpu", title=name, **options)
    save_tensors(here / name / "trained.safetensors", {str(i): p for i, p in enumerate(parameters)})
    return log
"""

TRAININGS = """
seen = []
def measure(step):
    seen.append(step)
    return {"process": processes.index(), "step_seen": step}

log = fit("guided", guided(torch.float32), milestones=(2, measure, "measured"))
assert seen == [0, 2, 4], seen
assert all(row["process"] == 0 for row in log if "process" in row), "the main process's numbers"
again = fit("guided", guided(torch.float32))
assert again == log, "read back by every process"
fit("guided bf16", guided(torch.bfloat16))
fit("guided fp16", guided(torch.float16))
fit("guided autocast", guided(torch.float32), replace(plan, mixed_precision="bf16"))
fit("full copy", full())
fit("consistency", consistency(), replace(plan, ema_decay=0.9))
fit("mimicry", mimicry())

mapped = mapped_rows(here / "cache" / "rows.npy", (20, 2), 3,
                     lambda parts: (torch.arange(40.0).view(20, 2)[part] for part in parts))
assert (mapped == torch.arange(40.0).view(20, 2).numpy()).all()
try:
    train(*consistency()[::2], replace(plan, batch_size=3), here / "uneven", device="cpu")
except ValueError as error:
    print("refused:", error)
"""

KILLED = """
def draw_until_killed(step, batch_size, generator):
    if step == 3 and processes.index() == 1 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(step, batch_size, generator)

objective, parameters, _ = guided(torch.float32)
fit("guided", (objective, parameters, draw_until_killed))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def command(script: Path, *arguments, count: int) -> list:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", count, "--master_port", free_port()]
    return [str(part) for part in [sys.executable, *(launcher if count > 1 else []), script, *arguments]]


def started(line: list[str]) -> subprocess.Popen:
    path = ":".join(filter(None, [str(TESTS), *sys.path]))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(Path.home())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment, **pipes)


def run(folder: Path, body: str, *arguments, count: int) -> tuple[int, str, str]:
    folder.mkdir(exist_ok=True)
    script = folder / "run.py"
    script.write_text(textwrap.dedent(SETUP + body))
    process = started(command(script, folder, *arguments, count=count))
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, errors


def weights(folder: Path, name: str, file: str = "trained") -> torch.Tensor:
    """All trained weights, (n,) float32."""
    tensors = load_tensors(folder / name / f"{file}.safetensors")[0]
    return torch.cat([tensors[key].float().flatten() for key in sorted(tensors)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where one process and where two have trained, and what the two have printed."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    code, out, errors = run(two, TRAININGS, count=2)
    assert code == 0, errors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", str(one)])
        threads = torch.get_num_threads()
        exec(compile(SETUP + TRAININGS, "run.py", "exec"), {})  # here: a process of its own would import for seconds
        torch.set_num_threads(threads)
    return one, two, out, errors


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("guided", 1e-3),
        ("guided bf16", 0.2),
        ("guided fp16", 0.05),
        ("guided autocast", 0.2),
        ("full copy", 1e-2),  # weights without a gradient move by rounding alone, and AdamW makes steps of that
        ("consistency", 1e-3),
        ("mimicry", 1e-3),
    ],
)
def test_two_processes_train_the_adapter_of_one(folders, name, share):
    start = weights(folders[0], name, "start")
    one, two = (weights(folder, name) for folder in folders[:2])
    assert (one - two).norm() < share * (one - start).norm() and torch.equal(weights(folders[1], name, "start"), start)


def test_the_logged_loss_is_that_of_the_whole_batch(folders):
    one, two = ([json.loads(line) for line in (folder / "mimicry" / LOG).open()] for folder in folders[:2])
    for key in ("loss", "mse", "kl"):
        assert [row[key] for row in one] == pytest.approx([row[key] for row in two], rel=1e-4)


def test_two_processes_leave_the_files_of_one(folders):
    one, two = ({str(path.relative_to(folder)) for path in folder.rglob("*/[!.]*.*")} for folder in folders[:2])
    assert {path for path in one if not path.startswith("uneven")} == two


def test_bars_come_from_one_process(folders):
    assert folders[2].count("mimicry: 100%") == 1


def test_a_batch_that_two_processes_cannot_share_evenly_is_one_line(folders):
    assert "refused: batch_size: expected a multiple of the 2 processes, got 3" in folders[2]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "two"},
            "WORLD_SIZE: expected a number as accelerate launch or torchrun sets",
        ),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK: expected a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT: not set, though RANK is; accelerate launch and"),
        ({processes.IN_SERIES: "many"}, "LORA_DISTILL_PROCESSES: expected a number"),
    ],
)
def test_what_a_launcher_never_sets_is_one_line(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{message}"):
        processes.index(), processes.in_series(), processes.connect()


def test_processes_without_a_shared_disk_are_told_so(tmp_path, monkeypatch):
    """As a process sees it that is not the main one, when that one has a file."""
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(processes, "agree", lambda value: True)
    line = nn.Linear(1, 1)
    with pytest.raises(FileNotFoundError, match=f"{RESULT}: the main process reads it .* they must share runs/"):
        train(line, lambda *_: {}, Schedule(1, 1, 1e-3), tmp_path)
    monkeypatch.setattr(processes, "agree", lambda value: False)
    with pytest.raises(FileNotFoundError, match=r"rows.npy: the main process reads it .* they must share runs/"):
        mapped_rows(tmp_path / "rows.npy", (1,), 1, lambda parts: [])


def test_a_killed_process_ends_the_job_and_the_next_start_goes_on_to_the_same_bits(folders, tmp_path):
    begin = time.monotonic()
    code, _, errors = run(tmp_path, KILLED, "kill", count=2)
    assert code != 0 and time.monotonic() - begin < 60
    assert (tmp_path / "guided" / CHECKPOINT).exists() and not (tmp_path / "guided" / RESULT).exists()
    code, _, errors = run(tmp_path, KILLED, "go on", count=2)
    assert code == 0, errors
    assert torch.equal(weights(tmp_path, "guided"), weights(folders[1], "guided"))
