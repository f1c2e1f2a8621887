"""The command `dial` in small: what its tables hold, and who is refused."""

import pytest

from lora_distill import dial
from lora_distill.dial import DIAL, EQUAL_SECONDS, GUIDANCE, PAPER, RECORDED, RECORDED_DIAL, SCALED
from lora_distill.publish.plots import FIGURES
from lora_distill.settings import load_settings


@pytest.fixture(scope="module")
def settings():
    changes = {"train_steps": 2, "batch_size": 2, "teacher_images": 2, "sampling_steps": 2, "warmup_steps": 0}
    return load_settings("smoke").model_copy(update=changes | {"log_every": 1, "device": "cpu"})


@pytest.fixture(scope="module")
def tables(settings, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial, "SCALES", (1.5, 3.0))
        patch.setattr(dial, "RANKS", (1,))
        patch.setattr(dial, "ROUNDS", 2)
        return dial.run(settings, tmp_path_factory.mktemp("run"), prompts=4, seeds=(0, 1))


def test_there_is_a_row_a_method_and_w(tables):
    rows, _ = tables
    names = [GUIDANCE, SCALED, DIAL, RECORDED_DIAL, f"{RECORDED_DIAL}, rank 1"]
    assert [(row["method"], row["w"]) for row in rows] == [(name, w) for w in (1.5, 3.0) for name in names]
    for row in rows:
        one_pass = row["method"] != GUIDANCE
        assert row["passes_a_step"] == (1 if one_pass else 2) and row["split"] == "val" and row["n"] == 4
        assert row["weight"] == ((row["w"] - 1) / 2 if one_pass else None)
        one_training = row["method"].endswith("rank 1")
        assert row["trainings"] == (1 if one_training or not one_pass else 2)
        assert row["seeds"] == (1 if one_training else 2)
        assert row["errors_low"] <= row["errors"] <= row["errors_high"]
        if one_pass:
            assert row["psnr_db_low"] <= row["psnr_db"] <= row["psnr_db_high"]
            assert row["errors_of_guidance_times_low"] <= row["errors_of_guidance_times_high"]


def test_the_nearer_w_is_to_1_the_nearer_is_every_student_to_guidance(tables):
    """After two updates none has learnt anything: what guidance adds is what is missing."""
    psnr = {(row["method"], row["w"]): row.get("psnr_db") for row in tables[0]}
    assert all(psnr[name, 1.5] > psnr[name, 3.0] for name in (SCALED, DIAL, RECORDED_DIAL))


def test_students_on_trajectories_are_compared_with_the_papers_at_its_updates_and_its_seconds(tables, settings):
    _, rows = tables
    assert [row["method"] for row in rows] == [PAPER, RECORDED, EQUAL_SECONDS]
    assert [row["updates"] for row in rows] == [2, 2, round(2 * dial.LONGER)]
    for row in rows:
        images = row["updates"] * settings.batch_size
        assert row["training_seconds"] == pytest.approx(images / row["images_per_s"], abs=0.06)
    for row in rows[1:]:
        assert row["psnr_gain_db_low"] <= row["psnr_gain_db"] <= row["psnr_gain_db_high"]
        assert row["psnr_gain_db"] == pytest.approx(row["psnr_db"] - rows[0]["psnr_db"], abs=1e-3)


def test_both_tables_can_be_drawn_and_said(tables):
    for name, rows in zip(("dial", "trajectories"), tables, strict=True):
        assert FIGURES[name].draw(rows).axes
    said = dial.in_words(*tables)
    assert SCALED in said and EQUAL_SECONDS in said


def test_no_guidance_and_several_processes_are_refused_before_anything_is_trained(settings, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="guidance_scale: a dial's w0 must be above 1"):
        dial.run(settings.model_copy(update={"guidance_scale": 1.0}), tmp_path)
    monkeypatch.setattr(dial.processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="dial: expected one process"):
        dial.run(settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_photographs_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="dials are judged on scenes"):
        dial.run(settings.model_copy(update={"data": "my-photographs"}), tmp_path)
