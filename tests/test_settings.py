"""Settings: what is accepted, and that everything else is refused in one clear line."""

import math
from pathlib import Path

import pydantic
import pytest
import yaml

from lora_distill import settings
from lora_distill.settings import Settings, SettingsError, from_notebook, load_settings, repository_root

PARAMS = Path(__file__).parents[1] / "params"


@pytest.fixture
def written(tmp_path):
    """Load settings from a YAML text, as the file x.yaml."""

    def load(text: str) -> Settings:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return load_settings(path)

    return load


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_valid_and_complete(path):
    assert load_settings(path.stem).profile == path.stem
    assert yaml.safe_load(path.read_text()).keys() == Settings.model_fields.keys()


def test_defaults_are_the_cpu_profile():
    assert load_settings("cpu") == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnak: 8", r"unknown key 'lora_rnak' in .*/x.yaml; did you mean 'lora_rank'\?"),
        ("train_setps: 8", r"did you mean 'train_steps'\?"),
        ("1: 2", "unknown key '1'"),
        (
            "learning_rate: 1e-4",
            r"x.yaml: learning_rate: expected a number, got the text '1e-4' "
            r"\(YAML reads 1e-4 as text; write 1.0e-4\)",
        ),
        ("learning_rate: 1.0e4", r"write 1.0e\+4\)"),
        ("learning_rate: '0.1'", r"the text '0.1' \(write it without quotes\)"),
        ("learning_rate: fast", r"expected a number, got the text 'fast'$"),
        ("learning_rate: .nan", "learning_rate: expected"),
        ("learning_rate: true", "learning_rate: expected a number, got True"),
        ("lora_rank: true", "lora_rank: expected a whole number, got True"),
        ("lora_rank: 4.0", "lora_rank: expected a whole number, got 4.0"),
        ("lora_rank: 0", "lora_rank: expected at least 1, got 0"),
        ("lora_rank:", "lora_rank: expected a whole number, got nothing"),
        ("ema_decay: 1", "ema_decay: expected less than 1.0, got 1"),
        ("learning_rate: 0", "learning_rate: expected more than 0.0, got 0"),
        ("guidance_scale: 0.5", "guidance_scale: expected at least 1.0, got 0.5"),
        ("guidance_scales: [1, 0.5]", r"guidance_scales\[1\]: expected at least 1.0, got 0.5"),
        ("guidance_scales: 5", "guidance_scales: expected a list, got 5"),
        ("eval_seeds: []", "eval_seeds: expected at least one value"),
        ("eval_seeds: [0, 1, 0]", "eval_seeds: must differ from each other"),
        ("more_train_seeds: [1, 1]", "more_train_seeds: must differ from each other"),
        ("more_train_seeds: [1, 0]", "more_train_seeds: must not hold seed = 0, of the first training"),
        ("more_train_seeds: [1, 2, 3]", "more_train_seeds: 4 trainings need as many eval_seeds, got 3"),
        ("w_min: 6.0", "w_min: must be at most w_max = 5, got 6"),
        ("sampling_steps: 0", "sampling_steps: expected at least 1, got 0"),
        ("train_steps: 9", "warmup_steps: must be at most train_steps = 9, got 20"),
        ("lcm_steps: 9", "warmup_steps: must be at most lcm_steps = 9, got 20"),
        ("finetune_steps: 9", "warmup_steps: must be at most finetune_steps = 9, got 20"),
        ("style: oil", "style: expected 'noto' or 'fluent', got the text 'oil'"),
        ("mixed_precision: no", "got False .YAML reads yes, no"),
        ("device: gpu", "device: expected auto, cpu, cuda or cuda:N, got the text 'gpu'"),
        ("profile: ../x", "profile: expected"),
        ("profile: cpu", "profile: must be 'x' as the file is named, got 'cpu'"),
        ("lora_rank: 0\nseed: -1", r"\(and 1 more\)$"),
        ("- a", "expected lines of 'key: value'"),
        ("a: [", "x.yaml is not YAML"),
    ],
)
def test_refuses(written, text, message):
    with pytest.raises(SettingsError, match=message) as refusal:
        written(text if "profile" in text else f"profile: x\n{text}" if text[0] not in "-" else text)
    assert "\n" not in str(refusal.value)


def test_whole_numbers_are_numbers(written):
    loaded = written("profile: x\nlearning_rate: 1\nguidance_scales: [1, 2.5]")
    assert math.isclose(loaded.learning_rate, 1.0) and loaded.guidance_scales == [1.0, 2.5]


def test_settings_are_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Settings().seed = 1


def test_missing_profile_names_those_there_are():
    with pytest.raises(SettingsError, match=r"no profile 'gpu' in .*available: .*cpu, full.*smoke"):
        load_settings("gpu")


class TestFromNotebook:
    def test_takes_keys_and_passes_over_code(self):
        namespace = {"__name__": "x", "_dh": [], "In": [], "Out": {}, "math": math, "pipeline": math, "style": print}
        assert from_notebook({**namespace, "lora_rank": 8}).lora_rank == 8

    def test_accepts_every_key_of_every_profile(self):
        assert from_notebook(load_settings("smoke").model_dump()) == load_settings("smoke")

    def test_refuses_unknown_names_on_the_first_run(self):
        with pytest.raises(SettingsError, match="unknown key 'setps' in the parameters cell"):
            from_notebook({"setps": 3})

    def test_passes_over_later_names_on_the_second_run(self):
        namespace = {"lora_rank": 8}
        from_notebook(namespace)
        namespace |= {"results": {}, "lora_rank": 2}
        assert from_notebook(namespace).lora_rank == 2

    def test_refuses_wrong_types_on_every_run(self):
        namespace = {"learning_rate": "1e-4"}
        for _ in range(2):
            with pytest.raises(SettingsError, match="the parameters cell: learning_rate"):
                from_notebook(namespace)

    def test_refuses_a_key_that_was_bound_to_something_else(self):
        with pytest.raises(SettingsError, match="pipeline: expected text, got an object of type"):
            from_notebook({"pipeline": object()})


def test_folders_stand_in_the_checkout_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    root = repository_root()
    assert (root / "params" / "cpu.yaml").is_file()
    assert settings.run_dir(Settings()) == root / "runs" / "cpu"
    assert settings.figures_dir(Settings()) == root / "runs" / "cpu" / "figures"


def test_without_a_checkout_the_working_directory_is_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "PACKAGE", tmp_path / "site-packages" / "lora_distill")
    assert repository_root() == tmp_path
