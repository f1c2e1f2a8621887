"""The tables of notebook 02: what guidance adds to each quantity, errors against passes, what is compared with what."""

import pytest
import torch

from lora_distill import diffusion
from lora_distill.judge import guided

ERRORS = [
    {"method": method, "unet_passes": passes, "objects": "4", "compositions": composition, "errors": 0.5}
    for method, passes in (
        *(("teacher, two passes", 50), ("teacher, w = 7.5", 50), ("base, guided, 4 steps", 8)),
        *(("LoRA student", 25), ("LoRA student, 4 steps", 4), ("half guided", 37)),
    )
    for composition in ("all", "seen")
]


class TestDifference:
    @pytest.fixture(scope="class")
    def teacher(self):
        torch.manual_seed(0)
        return {"latents": torch.randn(3, 4, 8, 8), "prompt_embeds": torch.randn(3, 4, 64),
                "empty_embeds": torch.randn(1, 4, 64)}  # fmt: skip

    def test_each_quantity_is_that_of_the_same_outputs(self, bundle, teacher):
        width = bundle.unet.config.cross_attention_dim
        teacher = {name: t if name == "latents" else t[..., :1].expand(-1, -1, width) for name, t in teacher.items()}
        rows = guided.difference_rows(bundle, teacher, 3.0, seed=0)
        assert list(dict.fromkeys(row["quantity"] for row in rows)) == [
            "v, the network's output", "x0, the clean latent", "ε, the noise"
        ]  # fmt: skip
        t = 579
        found = {row["quantity"][:1]: row for row in rows if row["timestep"] == t}
        eps = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        timesteps = torch.full((3,), t)
        alpha, sigma = diffusion.alpha_sigma(bundle.scheduler.alphas_cumprod, timesteps)
        x_t = alpha * teacher["latents"] + sigma * eps
        with torch.no_grad():
            cond = bundle.unet(x_t, timesteps, teacher["prompt_embeds"]).sample
            uncond = bundle.unet(x_t, timesteps, teacher["empty_embeds"].expand(3, -1, -1)).sample
        change = 2 * (cond - uncond)
        assert found["v"]["relative_difference"] == pytest.approx(float(change.norm() / cond.norm()), rel=1e-4)
        x0 = alpha * x_t - sigma * cond
        assert found["x"]["relative_difference"] == pytest.approx(float((sigma * change).norm() / x0.norm()), rel=1e-4)
        noise = alpha * cond + sigma * x_t
        assert found["ε"]["relative_difference"] == pytest.approx(
            float((alpha * change).norm() / noise.norm()), rel=1e-4
        )
        assert found["v"]["loss"] == pytest.approx(float(change.square().mean()), rel=1e-4)

    def test_the_loss_of_an_untrained_student_is_the_mean_over_timesteps(self):
        rows = [{"timestep": t, "quantity": q, "loss": loss} for t, loss in ((1, 0.5), (2, 0.25)) for q in "ab"]
        assert guided.untrained_loss(rows) == {"method": "untrained", "step": None, "loss": 0.375}


def test_curves_against_passes_are_of_samplers_with_fewer_steps():
    rows = guided.passes_rows(ERRORS, "DDIM")
    assert [(row["method"], row["unet_passes"], row["trained"]) for row in rows] == [
        ("DDIM, guided", 50, False), ("DDIM, guided", 8, False), ("LoRA student", 25, True), ("LoRA student", 4, True),
        ("half guided", 37, False),
    ]  # fmt: skip
    assert {row["method"] for row in guided.whole_runs(ERRORS)} == {
        "teacher, two passes", "teacher, w = 7.5", "LoRA student", "half guided"
    }  # fmt: skip


def test_only_what_was_judged_is_compared():
    assert guided.contrasts(["teacher, two passes", "LoRA student", "base, guided, 4 steps"]) == {
        "LoRA student against teacher, two passes": ("LoRA student", "teacher, two passes"),
        "LoRA student against base, guided, 4 steps": ("LoRA student", "base, guided, 4 steps"),
    }
    every = guided.contrasts(["teacher, two passes", "LoRA student", "full copy", "no guidance", "half guided"])
    assert ("LoRA student", "full copy") in every.values() and ("LoRA student", "no guidance") in every.values()
    assert ("full copy", "teacher, two passes") in every.values()
