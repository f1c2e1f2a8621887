"""The UNet on OpenVINO, ONNX Runtime, torch.compile and PyTorch, by hand: python tests/campaign_runtimes.py.

Times the bundled pipeline's UNet as it is deployed, float32, on a CPU that has nothing else to do: one thread and two,
at 64 and 96 px, at batch 1, 8 and 16. In each round every runtime has one turn, in random order: a forward that warms
the caches, and one that is timed. A matrix product of PyTorch has a turn too, so that its rate is that of the same
seconds. Writes a table (--out), with what made it in provenance.json and SHA256SUMS beside it; --table prints the
table that is there as Markdown. About four minutes; torch.compile takes longer than that to compile all sizes, so
those that it has not compiled in half of --minutes are not run.

OpenVINO is the project's extra [cpu]. ONNX and ONNX Runtime belong to no extra: pip install onnx onnxruntime.
torch.compile needs a C++ compiler; without one its rows say so.
"""

import copy
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lora_distill import devices, storage
from lora_distill.cpu_runtime import OpenvinoUNet
from lora_distill.deployment import deployed
from lora_distill.judge.timing import threads
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline, with_unet
from lora_distill.publish import stamps
from lora_distill.publish.figures import provenance_text, read_provenance
from lora_distill.sampling import Sampler, initial_noise, sample
from lora_distill.writing import atomic_write

OUT = Path(__file__).parents[1] / "figures" / "bench" / "runtimes.csv"
THREADS, RESOLUTIONS, BATCHES = (1, 2), (64, 96), (1, 8, 16)
TOKENS = 36  # of a prompt, as the bundled pipeline has them
SIDE = 1024  # of the matrices whose product tells the rate
PROMPTS = ["a lion", "an owl", "a bus", "a tree"]  # of the pictures; guided, they are a batch of 8
SHARE_FOR_COMPILING = 0.5  # of the minutes
Case = tuple[int, int, int]  # threads, resolution, batch


@dataclass
class Runtime:
    """A UNet that runs somewhere, and what it took: seconds to convert, MB on disk, grey levels from PyTorch."""

    unet: nn.Module
    convert_seconds: float = 0.0
    kept: Path | None = None
    grey_levels: int = 0
    planned: set[Case] = field(default_factory=set)  # in the seconds to convert


# ---------------------------------------------------------------------------------------------- the runtimes


class OnnxUNet(nn.Module):
    """A UNet on ONNX Runtime, called as the `UNet2DConditionModel` that it stands for."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, unet: nn.Module, file: Path):
        super().__init__()
        self.config, self.file = unet.config, file
        side, rows = unet.config.sample_size, {0: "rows"}
        example = torch.zeros(2, 4, side, side), torch.tensor(0.0), torch.zeros(2, 7, unet.config.cross_attention_dim)
        axes = {"sample": rows | {2: "height", 3: "width"}, "encoder_hidden_states": rows | {1: "tokens"}}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's, of branches that depend on a shape
            torch.onnx.export(
                _First(unet), example, str(file), input_names=["sample", "timestep", "encoder_hidden_states"],
                dynamic_axes=axes, opset_version=17, dynamo=False,
            )  # fmt: skip
        self.session = lru_cache(self._session)
        self.session(torch.get_num_threads())

    def _session(self, count: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = count, 1
        return onnxruntime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])

    def forward(self, sample, timestep, encoder_hidden_states, timestep_cond=None) -> UNet2DConditionOutput:
        inputs = {"sample": sample, "timestep": timestep.float(), "encoder_hidden_states": encoder_hidden_states}
        session = self.session(torch.get_num_threads())
        output = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        return UNet2DConditionOutput(sample=torch.from_numpy(output))


class _First(nn.Module):
    """A UNet whose forward takes its three inputs in order and returns a tensor, as the exporter asks."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def on_openvino(unet: nn.Module, folder: Path) -> Runtime:
    return Runtime(OpenvinoUNet(unet, folder), kept=folder)


def on_onnx_runtime(unet: nn.Module, folder: Path) -> Runtime:
    return Runtime(OnnxUNet(unet, folder / "unet.onnx"), kept=folder)


def compiled(unet: nn.Module, folder: Path, case: Case) -> Runtime:
    """As the setting `compile` of a profile does it; its first forward is in the seconds."""
    unet = copy.deepcopy(unet)
    devices.compiled(unet)
    unet(*inputs_of(unet, case))
    return Runtime(unet, kept=folder, planned={case})


def no_compiler(folder: Path) -> str | None:
    """Why torch.compile does not work here; None where it does. What it compiles goes to the folder from now on."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "not run: no C++ compiler"
    reason = devices._cannot_compile("cpu")
    return reason and f"not run: {reason}"


def made(make: Callable[..., Runtime], *arguments: Any) -> Runtime:
    """A runtime from nothing, with the seconds that it took."""
    start = time.perf_counter()
    runtime = make(*arguments)
    runtime.convert_seconds = time.perf_counter() - start
    return runtime


# ---------------------------------------------------------------------------------------------- what is measured


def inputs_of(unet: nn.Module, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, a timestep and embeddings of the case's sizes, from one seed."""
    _, resolution, batch = case
    generator = torch.Generator().manual_seed(0)
    side, dim = resolution * unet.config.sample_size // RESOLUTIONS[0], unet.config.cross_attention_dim
    noise = torch.randn(batch, unet.config.in_channels, side, side, generator=generator)
    return noise, torch.tensor(500), torch.randn(batch, TOKENS, dim, generator=generator)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pictures(pipe: StableDiffusionPipeline, unet: nn.Module) -> np.ndarray:
    """Four guided pictures of eight steps with this UNet, (4, 64, 64, 3) uint8; the decoder is PyTorch's."""
    pipe = with_unet(pipe, unet)
    embeds = encode_prompts(pipe, PROMPTS), encode_prompts(pipe, [""])
    return decode_latents(pipe, sample(pipe, Sampler(8, 3.0), initial_noise(pipe, len(PROMPTS), seed=0), *embeds))


def rounds(calls: dict[str, Callable[[], Any]], count: int, bar: tqdm) -> dict[str, np.ndarray]:
    """Seconds (count,) of each call: in each round every one, in random order, runs once to warm up and once timed."""
    rng, seconds = random.Random(0), {name: [] for name in calls}
    for _ in range(count):
        for name in rng.sample(list(calls), len(calls)):
            calls[name]()
            seconds[name].append(seconds_of(calls[name]))
        bar.update()
    return {name: np.array(values) for name, values in seconds.items()}


def rows_of(case: Case, runtimes: dict[str, Runtime | str], count: int, until: float, bar: tqdm) -> list[dict]:
    """The case's rows, one a runtime. What would compile after the time `until` is not run."""
    number, resolution, batch = case
    eager = runtimes["PyTorch"].unet
    inputs = inputs_of(eager, case)
    with FlopCounterMode(display=False) as counter:
        eager(*inputs)
    left, calls, first, notes = torch.ones(SIDE, SIDE), {}, {}, {}
    for name, runtime in runtimes.items():
        if isinstance(runtime, str):
            notes[name] = runtime
            continue
        call = partial(runtime.unet, *inputs)
        try:
            with torch.compiler.set_stance("default" if time.monotonic() < until else "fail_on_recompile"):
                first[name] = seconds_of(call)
            calls[name] = call
        except RuntimeError:  # of the stance
            notes[name] = "not run: no time left to compile"
    seconds = rounds(calls | {"product": lambda: left @ left}, count, bar)
    product_rate, flops = 2 * SIDE**3 / seconds["product"], counter.get_total_flops()
    rows = []
    for name, runtime in runtimes.items():
        row = {"runtime": name, "threads": number, "resolution": resolution, "batch": batch}
        ms = 1e3 * seconds[name] if name in calls else None
        low, middle, high = (None,) * 3 if ms is None else np.percentile(ms, (25, 50, 75))
        plan = None if ms is None or case in runtime.planned else max(0.0, first[name] - middle / 1e3)
        share = None if ms is None else np.median(flops / seconds[name] / product_rate)
        row |= {"ms": middle, "ms_q1": low, "ms_q3": high, "repeats": count if name in calls else 0}
        row |= {"mflop": flops / 1e6, "product_gflops": np.median(product_rate) / 1e9, "share_of_product": share}
        rows.append(_rounded(row | {"plan_seconds": plan, "note": notes.get(name)}))
    return rows


def _of_runtime(runtime: Runtime | str) -> dict[str, float | int | None]:
    if isinstance(runtime, str):
        return {"convert_seconds": None, "kept_mb": None, "grey_levels": None}
    files = runtime.kept.rglob("*") if runtime.kept else ()
    kept = sum(path.stat().st_size for path in files if path.is_file()) / 1e6
    return {"convert_seconds": runtime.convert_seconds, "kept_mb": kept, "grey_levels": runtime.grey_levels}


# ---------------------------------------------------------------------------------------------- the campaign


@torch.no_grad()
def campaign(minutes: float, repeats: int, cases: list[Case], folder: Path) -> list[dict]:
    """The rows of all cases; `repeats` are those of batch 1, a larger batch has half."""
    start, pipe = time.monotonic(), load_pipeline("bundled")
    eager = deployed(pipe).unet
    places = {name: folder / name for name in ("openvino", "onnx", "compiled")}
    for place in places.values():
        place.mkdir()
    counts = {case: repeats if case[2] == 1 else max(1, repeats // 2) for case in cases}
    with tqdm(total=sum(counts.values()), desc="converting") as bar:
        with threads(cases[0][0]):
            runtimes: dict[str, Runtime | str] = {
                "OpenVINO": made(on_openvino, eager, places["openvino"]),
                "ONNX Runtime": made(on_onnx_runtime, eager, places["onnx"]),
                "torch.compile": no_compiler(places["compiled"]) or made(compiled, eager, places["compiled"], cases[0]),
                "PyTorch": Runtime(eager),
            }
        until, rows = start + 60 * minutes * SHARE_FOR_COMPILING, []
        for case in cases:
            bar.set_description("{} thread(s), {} px, batch {}".format(*case))
            with threads(case[0]):
                rows += rows_of(case, runtimes, counts[case], until, bar)
    # after the cases: what is drawn plans sizes of its own
    with threads(cases[0][0]):
        wanted = pictures(pipe, eager).astype(int)
        for runtime in runtimes.values():
            if not isinstance(runtime, str):
                runtime.grey_levels = int(abs(pictures(pipe, runtime.unet).astype(int) - wanted).max())
    return [row | _rounded(_of_runtime(runtimes[row["runtime"]])) for row in rows]


def _rounded(values: dict) -> dict:
    return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in values.items()}


def save(rows: list[dict], out: Path) -> None:
    """Write the table, and beside it what made it and the digests."""
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.save_table(out, rows)
    source = {
        "commit": storage.git_commit(),
        "device": storage.device_name("cpu"),
        "platform": platform.platform(),
        "versions": storage.versions() | {name: version(name) for name in ("onnx", "onnxruntime")},
        "written": storage.now(),
        "sha256": {out.name: storage.file_digest(out)},
    }
    known = read_provenance(out.parent)
    atomic_write(out.parent / stamps.PROVENANCE, provenance_text(known | {out.stem: source}))
    stamps.write_sums(out.parent)


# ---------------------------------------------------------------------------------------------- the table as Markdown


def markdown(rows: list[dict]) -> str:
    """Two tables: milliseconds a forward (quartiles) and share of the product's rate; and what a runtime takes."""
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    cases = list(dict.fromkeys((row["threads"], row["resolution"], row["batch"]) for row in rows))
    found = {(row["runtime"], row["threads"], row["resolution"], row["batch"]): row for row in rows}
    lines = [["threads", "px", "batch", "product, GFLOP/s", *names]]
    for case in cases:
        rate = found[names[0], *case]["product_gflops"]
        lines.append([*map(str, case), f"{rate:.0f}", *(_cell(found[name, *case]) for name in names)])
    per = [["runtime", "seconds to convert", "seconds to plan a size", "MB kept", "grey levels from PyTorch"]]
    for name in names:
        own = [row for row in rows if row["runtime"] == name]
        plans = [row["plan_seconds"] for row in own if row["plan_seconds"] is not None]
        span = f"{min(plans):.2f} to {max(plans):.2f}" if plans else "–"
        values = [own[0][key] for key in ("convert_seconds", "kept_mb", "grey_levels")]
        convert, kept, grey = ("–" if value is None else f"{value:.3g}" for value in values)
        per.append([name, convert, span, kept, grey])
    return "\n\n".join("\n".join(_lines(each)) for each in (lines, per))


def _cell(row: dict) -> str:
    if row["ms"] is None:
        return row["note"]
    return f"{row['ms']:.3g} ms ({row['ms_q1']:.3g} to {row['ms_q3']:.3g}), {100 * row['share_of_product']:.0f} %"


def _lines(cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (cells[0], ["---"] * len(cells[0]), *cells[1:])]


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the table that is written or, with --table, read")
    parser.add_argument("--table", action="store_true", help="print the table that is there as Markdown")
    parser.add_argument("--minutes", type=float, default=4.0, help="torch.compile compiles in the first half of them")
    parser.add_argument("--repeats", type=int, default=30, help="rounds at batch 1; a larger batch has half")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--resolutions", type=int, nargs="+", default=RESOLUTIONS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    asked = parser.parse_args()
    if asked.table:
        print(markdown(storage.read_table(asked.out)))
        return
    if missing := [name for name in ("openvino", "onnx", "onnxruntime") if find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(missing)}; pip install openvino onnx onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        cases = list(product(asked.threads, asked.resolutions, asked.batches))
        rows = campaign(asked.minutes, asked.repeats, cases, Path(folder))
    save(rows, asked.out)
    print(markdown(storage.read_table(asked.out)))


if __name__ == "__main__":
    main()
