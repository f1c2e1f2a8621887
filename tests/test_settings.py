"""Settings: what is accepted, and that everything else is refused in one clear line."""

import math
from pathlib import Path

import pydantic
import pytest
import yaml

from lora_distill import settings
from lora_distill.settings import Settings, SettingsError, check_paths, from_notebook, load_settings, repository_root

PARAMS = Path(__file__).parents[1] / "params"


@pytest.fixture
def written(tmp_path):
    """Load settings from a YAML text, as the file x.yaml."""

    def load(text: str) -> Settings:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return load_settings(path)

    return load


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_valid_and_complete(path):
    assert load_settings(path.stem).profile == path.stem
    assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() == Settings.model_fields.keys()


def test_defaults_are_the_cpu_profile():
    assert load_settings("cpu") == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnak: 8", r"/x.yaml, line 2: unknown key 'lora_rnak'; did you mean 'lora_rank'\?$"),
        ("train_setps: 8", r"did you mean 'train_steps'\?"),
        ("1: 2", "unknown key '1'"),
        (
            "learning_rate: 1e-4",
            r"x.yaml, line 2: learning_rate: expected a number, got the text '1e-4' "
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
        ("a: [", "x.yaml, line 2: not YAML"),
        # what settings can know
        ("seed: 4294967296", "seed: expected at most 4294967295, got 4294967296"),
        ("eval_seeds: [0, 18446744073709551616]", r"eval_seeds\[1\]: expected at most 4294967295"),
        ("more_train_seeds: [4294967296]", r"more_train_seeds\[0\]: expected at most 4294967295"),
        ("lora_rank: 1000000000000", "lora_rank: expected at most 1280, got 1000000000000"),
        ("lcm_rank: 2000", "lcm_rank: expected at most 1280, got 2000"),
        ("lora_alpha: 100000", "lora_alpha: expected at most 10000, got 100000"),
        ("teacher_images: 1000000000000", "teacher_images: expected at most 1000000, got"),
        ("batch_size: 10000000000", "batch_size: expected at most 1000000000, got"),
        ("timing_repeats: 10000000", "timing_repeats: expected at most 100000, got"),
        ("guidance_scale: 1.0e+30", r"guidance_scale: expected at most 1000.0, got 1e\+30"),
        ("guidance_scales: [1, .inf]", r"guidance_scales\[1\]: expected a finite number, got inf"),
        ("guidance_scales: [1, 1.0]", "guidance_scales: must differ from each other, got"),
        ("w_max: 1.0e+9", "w_max: expected at most 1000.0, got 1000000000.0"),
        ("sampling_steps: 2000", "sampling_steps: must be at most 1000, the timesteps of the noise schedule, got 2000"),
        ("ddim_skip: 7", "ddim_skip: must divide 1000, the timesteps of the noise schedule, and be less; got 7"),
        ("ddim_skip: 1000", "ddim_skip: must divide 1000, .* and be less; got 1000"),
        ("resolution: 65", "resolution: must be a multiple of 8, the VAE's factor, got 65"),
        ("resolution: 1000000", "resolution: expected at most 4096, got 1000000"),
        ("mse_weight: 0\nkl_weight: 0", "mse_weight: must be above 0 where kl_weight is 0"),
        ("optimizer: adamw-8bit\ndevice: cpu", "optimizer: adamw-8bit needs a GPU, and device is cpu"),
        ("device: mps", "device: mps is refused: consistency training computes in float64, .*; auto or cpu would do"),
        ("device: mps:0", "device: mps is refused"),
        ("device: 'cuda:'", "device: expected auto, cpu, cuda or cuda:N"),
        ("device: cuda:-1", "device: expected auto, cpu, cuda or cuda:N"),
        ("device: CUDA", "device: expected auto, cpu, cuda or cuda:N"),
        ("profile: Con", "profile: Con cannot be a folder's name on Windows"),
        ("profile: nul.x", "profile: nul.x cannot be a folder's name on Windows"),
        ("profile: lpt1", "cannot be a folder's name on Windows"),
        ("profile: x.", "profile: expected name of the run, .*: letters, digits, _, - and, inside, dots"),
        ("flickr_8k: scenes/oil/8k", "flickr_8k: expected scenes/noto or scenes/fluent with /8k or /30k, got the text"),
        ("flickr_8k: scenes", "flickr_8k: expected scenes/noto or"),
        ("flickr_30k: none", "flickr_30k: expected a folder or a hub id, or \"\" for none, got the text 'none'"),
        ("clip: None", "clip: expected a folder or a hub id, or"),
        ("data: 'null'", "data: expected a folder or a hub id, got the text 'null'"),
        ("extractors: {CLIP: none}", "extractors: expected a folder or a hub id, got the text 'none'"),
        ("flickr_8k: bundled", "flickr_8k: bundled is a value of pipeline; expected a folder or a hub id here"),
        ("pipeline: scenes/noto/8k", "pipeline: scenes/noto/8k is a value of data;"),
        ("data: scenes/noto/9k", "data: expected scenes/noto or scenes/fluent"),
        ("data: ~nobody-of-this-name/x", "data: '~nobody-of-this-name/x': expected a file, a folder or a hub id"),
        ("device: cuda:01", "device: expected auto, cpu, cuda or cuda:N"),
        ("pipeline: Bundled", "pipeline: expected bundled in small letters, got 'Bundled'"),
        ("flickr_8k: Scenes/Noto/8K", "flickr_8k: expected scenes/noto/8k in small letters"),
        ("flickr_30k: ' '", "flickr_30k: expected no spaces around it and no control characters, got ' '"),
        ("pipeline: ' bundled'", "pipeline: expected no spaces around it"),
        ('clip: "a\\0b"', "clip: expected no spaces around it and no control characters, got"),
        ('extractors: {CLIP: "\\ud800"}', r"extractors\[CLIP\]: expected text, got the text"),
        ("LORA-RANK: 8", "unknown key 'LORA-RANK'; did you mean 'lora_rank'"),
        # what is text
        ("mirror: 'true'", r"mirror: expected true or false, got the text 'true' \(write it without quotes\)"),
        ("mirror: maybe", "mirror: expected true or false, got the text 'maybe'$"),
        ("lora_rank: '8'", r"lora_rank: expected a whole number, got the text '8' \(write it without quotes\)"),
        ("eval_seeds: '[0, 1]'", r"eval_seeds: expected a list, got the text '\[0, 1\]' \(write it without quotes\)"),
        ("extractors: {Foo: x}", r"extractors\[Foo\]: expected 'Inception', 'DINOv2' or 'CLIP', got the text 'Foo'"),
    ],
)
def test_refuses(written, text, message):
    with pytest.raises(SettingsError, match=message) as refusal:
        written(text if text.startswith(("profile", "-")) else f"profile: x\n{text}")
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"no profile '' in /.*/params; available: cpu, "),
        ("/", "no profile '/' in /.*/params; available: cpu, "),
        ("../x", r"no profile '\.\./x' in "),
        ("params/cpu", "no profile 'params/cpu' in "),
        ("nope.yml", r"no file nope\.yml; a profile of /.*/params would do too: cpu, "),
        ("/nowhere/x.yaml", r"no file /nowhere/x\.yaml; "),
        ("a" * 300, "no profile 'a*...a*': File name too long"),
        ("a\0b", "no profile 'a.x00b'"),
    ],
)
def test_what_is_no_profile_is_one_line(name, message):
    with pytest.raises(SettingsError, match=f"^{message}") as error:
        load_settings(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


class TestFromNotebook:
    def test_takes_keys_and_passes_over_code(self):
        namespace = {"__name__": "x", "_dh": [], "In": [], "Out": {}, "math": math, "pipeline": math, "style": print}
        assert from_notebook({**namespace, "lora_rank": 8}).lora_rank == 8

    def test_accepts_every_key_of_every_profile(self):
        assert from_notebook(load_settings("smoke").model_dump()) == load_settings("smoke")

    def test_refuses_unknown_names_on_the_first_run(self):
        with pytest.raises(SettingsError, match="the parameters cell: unknown key 'setps'; did you mean"):
            from_notebook({"setps": 3})

    @pytest.mark.parametrize(
        ("key", "value", "hint"),
        [
            ("mirror", "true", "papermill -p passes text: give -y 'mirror: true'"),
            ("lora_rank", " 8", "papermill -p passes text: give -y 'lora_rank: 8'"),
            ("learning_rate", "0.5", "papermill -p passes text: give -y 'learning_rate: 0.5'"),
            ("eval_seeds", "[0, 1, 2]", r"papermill -p passes text: give -y 'eval_seeds: \[0, 1, 2\]'"),
            ("extractors", "{CLIP: x}", "papermill -p passes text: give -y 'extractors: {CLIP: x}'"),
        ],
    )
    def test_says_how_papermill_gives_what_is_no_text(self, key, value, hint):
        with pytest.raises(SettingsError, match=rf"^the parameters cell: {key}: expected .*, got .* \({hint}\)$"):
            from_notebook({key: value})

    @pytest.mark.parametrize("kind", ["number", "numbers", "text", "list", "braces"])
    def test_says_what_is_wrong_in_a_short_line_whatever_the_value(self, kind):
        long = 10**5000  # Python does not write it
        values = {"number": long, "numbers": [long], "text": "x" * 10**6, "list": list(range(10**5))}
        value = values.get(kind, {"a": "{braces}"})
        for key in ("lora_rank", "mirror", "learning_rate", "style", "profile", "eval_seeds", "nonsense"):
            with pytest.raises(SettingsError) as error:
                from_notebook({key: value})
            assert len(str(error.value)) < 500 and "\n" not in str(error.value)

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


class TestPaths:
    """Sources are files, folders or hub ids; relative paths start at the checkout's root."""

    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """A checkout with a pipeline and a CLIP, and a working folder elsewhere in it, as a notebook has."""
        for file in ("params/cpu.yaml", "models/sd/model_index.json", "models/clip/config.json", "photos/captions.txt"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("x", encoding="utf-8")
        (tmp_path / "notebooks").mkdir()
        monkeypatch.setattr(settings, "PACKAGE", tmp_path / "lora_distill")
        monkeypatch.chdir(tmp_path / "notebooks")
        return tmp_path

    def test_a_relative_path_means_the_same_folder_in_a_command_and_in_a_notebook(self, root, monkeypatch):
        sources = {
            "pipeline": "models/sd",
            "data": "photos",
            "clip": "./models/clip",
            "extractors": {"CLIP": "models/clip"},
        }
        in_notebook = from_notebook(dict(sources))
        monkeypatch.chdir(root)
        assert Settings(**sources) == in_notebook
        assert Path(in_notebook.pipeline) == root / "models" / "sd"
        assert Path(in_notebook.extractors["CLIP"]) == Path(in_notebook.clip) == root / "models" / "clip"
        assert from_notebook(in_notebook.model_dump()) == in_notebook
        check_paths(in_notebook)

    @pytest.mark.parametrize("source", ["openai/clip-vit-base-patch32", "jxie/flickr8k", "o/set@refs/convert/parquet"])
    def test_a_hub_id_stays_as_it_is_and_is_not_looked_up(self, root, source):
        checked = Settings(data=source, flickr_8k=source, clip=source)
        assert checked.data == checked.clip == source
        check_paths(checked)

    @pytest.mark.parametrize("name", ["cpu", "smoke", "full", "sd15-shape", "sd15-flickr8k", "sd15-flickr30k"])
    def test_every_profile_that_needs_no_file_passes(self, name):
        check_paths(load_settings(name))

    @pytest.mark.parametrize(
        ("key", "source"),
        [
            ("pipeline", "models/sd21"),
            ("pipeline", "/nowhere/sd"),
            ("data", "./photos8k"),
            ("data", "photos/8k"),
            ("flickr_8k", "~/Flickr 8k"),
            ("flickr_30k", "../flickr30k"),
            ("clip", "models/clip/large"),
            ("extractors: Inception", "models/weights-inception.pth"),
        ],
    )
    def test_a_path_that_is_not_there_is_one_line_with_its_key(self, root, key, source):
        name, _, extractor = key.partition(": ")
        checked = Settings(**{name: {extractor: source} if extractor else source})
        with pytest.raises(SettingsError) as error:
            check_paths(checked)
        message = str(error.value)
        assert message.startswith(f"{key}: no file or folder /") and "\n" not in message
        assert message.endswith(f"; relative paths start at {root}")

    @pytest.mark.parametrize(
        ("name", "source", "missing"),
        [("Inception", "photos", "photos"), ("CLIP", "photos", "photos/config.json"), ("DINOv2", "models", "models/c")],
    )
    def test_weights_of_an_extractor_that_are_something_else(self, root, name, source, missing):
        with pytest.raises(SettingsError, match=f"^extractors: {name}: no file {root / missing}"):
            check_paths(Settings(extractors={name: source}))

    @pytest.mark.parametrize("content", ["[]", "{", '{"num_train_timesteps": true}', '{"num_train_timesteps": "9"}'])
    def test_a_schedule_that_cannot_be_read_is_left_to_who_loads_it(self, root, content):
        (root / "models" / "sd" / "scheduler").mkdir()
        file = root / "models" / "sd" / "scheduler" / "scheduler_config.json"
        file.write_text(content, encoding="utf-8")
        assert Settings(pipeline="models/sd", sampling_steps=600).sampling_steps == 600
        file.write_text('{"num_train_timesteps": 500}', encoding="utf-8")
        with pytest.raises(ValueError, match="sampling_steps: must be at most 500"):
            Settings(pipeline="models/sd", sampling_steps=600)
        assert Settings(pipeline="models/sd", ddim_skip=125).ddim_skip == 125

    def test_the_factor_of_the_pipeline_s_own_vae_counts(self, root):
        (root / "models" / "sd" / "vae").mkdir()
        config = '{"block_out_channels": [1, 2, 3, 4, 5]}'
        (root / "models" / "sd" / "vae" / "config.json").write_text(config, encoding="utf-8")
        with pytest.raises(ValueError, match="resolution: must be a multiple of 16, the VAE's factor, got 72"):
            Settings(pipeline="models/sd", resolution=72)

    def test_an_empty_folder_and_a_file_are_no_data(self, root):
        (root / "empty").mkdir()
        said = "^data: expected a folder with images and captions, got"
        for source in ("empty", "photos/captions.txt"):
            with pytest.raises(SettingsError, match=f"{said} {root / source}$"):
                check_paths(Settings(data=source))

    def test_a_working_folder_that_is_gone_is_one_line(self, root, monkeypatch):
        (root / "gone").mkdir()
        monkeypatch.chdir(root / "gone")
        (root / "gone").rmdir()
        assert repository_root() == root
        monkeypatch.setattr(settings, "PACKAGE", root / "site-packages" / "lora_distill")
        with pytest.raises(ValueError, match="not found; expected a folder that is there"):
            repository_root()
        monkeypatch.chdir(root)

    @pytest.mark.parametrize(("key", "file"), [("pipeline", "model_index.json"), ("clip", "config.json")])
    def test_a_folder_of_something_else(self, root, key, file):
        with pytest.raises(SettingsError, match=f"^{key}: no {file} in {root / 'photos'}$"):
            check_paths(Settings(**{key: "photos"}))


def test_the_rehearsal_has_the_settings_of_sd15_flickr8k_but_for_sizes_counts_and_files():
    rehearsal, model = load_settings("rehearsal").model_dump(), load_settings("sd15-flickr8k").model_dump()
    assert {key for key, value in model.items() if rehearsal[key] != value} == {
        "profile", "pipeline", "data", "flickr_8k", "flickr_30k", "clip", "extractors",  # files
        "teacher_images", "train_steps", "warmup_steps", "gradient_accumulation", "log_every", "checkpoint_every",
        "lcm_steps", "lcm_rank", "finetune_steps", "sampling_steps", "resolution", "eval_prompts", "curve_prompts",
        "eval_every", "eval_seeds", "guidance_scales", "finetune_guidance_scales", "timing_batch", "timing_repeats",
    }  # fmt: skip
