"""Files of pictures, whole, odd and damaged: shown as a viewer shows them, or named with the reason."""

import io
import json
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from datasets import Dataset, Features, Image, Value

from lora_distill.data import pictures
from lora_distill.data.captioned import captioned_images
from lora_distill.data.encoded import LONGEST, Framing, views
from lora_distill.data.pictures import content_digest, opened, picture_reader, problem, upright_rgb
from lora_distill.errors import InputError

RED, BLUE = (220, 20, 30), (10, 20, 200)


def saved(picture: PIL.Image.Image, kind: str = "png", **more) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return {"bytes": buffer.getvalue(), "path": None}


def noise(width: int = 60, height: int = 40, mode: str = "RGB") -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def colour(image: dict) -> tuple[int, int, int]:
    return upright_rgb(opened(image)).getpixel((1, 1))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame(kind):
    first, second = (PIL.Image.new("RGB", (16, 16), one) for one in (RED, BLUE))
    image = saved(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "webp" else {}))
    assert problem(image) is None and colour(image) == RED


def test_modes_that_files_have_are_shown_in_colour():
    black_and_white = saved(PIL.Image.new("1", (8, 8), 1))
    assert colour(black_and_white) == (255, 255, 255)
    assert colour(saved(PIL.Image.new("LA", (8, 8), (0, 0)))) == (255, 255, 255), "clear is white"
    assert colour(saved(PIL.Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "tiff")) == (0, 0, 0)
    assert colour(saved(PIL.Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "jpeg")) == (255, 255, 255)
    palette = PIL.Image.new("RGBA", (8, 8), (255, 0, 255, 0)).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert colour(saved(palette)) == (255, 255, 255)
    for order in "<>":
        ramp = PIL.Image.fromarray(np.full((8, 8), 32768, f"{order}u2"))
        assert colour(saved(ramp, "tiff")) == (128, 128, 128)


def test_numbers_in_no_known_range_are_named_when_the_set_is_checked():
    image = saved(PIL.Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)), "tiff")
    assert "in none of the ranges" in problem(image)
    assert "in none of the ranges" in problem(saved(PIL.Image.fromarray(np.full((8, 8), np.nan, np.float32)), "tiff"))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*chunks: bytes) -> dict:
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "path": None}


HEADER = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
UNUSABLE = {
    "empty": {"bytes": b"", "path": None},
    "text": {"bytes": b"<html>404</html>", "path": None},
    "svg": {"bytes": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "path": None},
    "heic": {"bytes": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64), "path": None},
    "pdf": {"bytes": b"%PDF-1.4\n", "path": None},
    "half a jpeg": {"bytes": saved(noise(), "jpeg")["bytes"][:600], "path": None},
    "half a png": {"bytes": saved(noise())["bytes"][:600], "path": None},
    "half a gif": {"bytes": saved(noise(), "gif")["bytes"][:300], "path": None},
    "png of 20,000 x 20,000": png(chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))),
    "png of no size": png(chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0))),
    "png without data": png(chunk(b"IHDR", HEADER), chunk(b"IEND", b"")),
    "png of a bad type": png(chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 7, 9, 0, 0, 0))),
    "png with a text of 2 MB": png(
        chunk(b"IHDR", HEADER), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000))), chunk(b"IEND", b"")
    ),
    "null": None,
    "neither": {"bytes": None, "path": None},
    "a folder": {"bytes": None, "path": "/tmp"},
    "nowhere": {"bytes": None, "path": "/no/such.jpg"},
    "a device": {"bytes": None, "path": "/dev/null"},
}


ROWS = Features({"id": Value("string"), "image": Image()})


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_has_a_reason_on_one_line(name):
    reason = problem(UNUSABLE[name])
    assert reason and "\n" not in reason
    assert pictures.gradients(UNUSABLE[name]) is None
    stored = UNUSABLE[name] if name != "neither" else None
    rows = Dataset.from_dict({"id": ["x.jpg"], "image": [stored]}, features=ROWS)
    with pytest.raises(InputError, match=r"^image x\.jpg cannot be read: "):
        upright_rgb(picture_reader(rows)(0))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "jpeg2000"])
def test_a_damaged_file_is_a_picture_or_a_reason(kind, monkeypatch):
    """Flipped bytes, cut ends: whatever the decoder raises is a reason, and never another error."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)  # a flipped size takes no time
    rng = np.random.default_rng(0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = {"exif": exif} if kind in ("png", "jpeg", "webp", "tiff") else {}
    whole = saved(noise(24, 16, "P" if kind == "gif" else "RGB"), kind, **turned)["bytes"]
    reasons = 0
    for _ in range(40):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, min(len(damaged), 400), 3):
            damaged[place] = rng.integers(256)
        image = {"bytes": bytes(damaged), "path": None}
        reason = problem(image)
        assert reason is None or (reason and "\n" not in reason)
        reasons += reason is not None
        if reason is None:
            assert upright_rgb(opened(image)).mode == "RGB", "what was found usable is usable"
    assert reasons or kind in ("bmp", "ppm")


def test_a_set_with_all_of_them_is_read_without_them(tmp_path):
    rows = []
    for number, image in enumerate([saved(noise()), *UNUSABLE.values()]):
        if image and image["bytes"] is not None:
            (tmp_path / f"{number}.jpg").write_bytes(image["bytes"])
            rows.append({"file_name": f"{number}.jpg", "text": "a"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{len(rows) - 1} of {len(rows)} images are missing or unreadable"):
        captioned_images(tmp_path, "all")
    with pytest.warns(UserWarning, match="left out"):
        assert captioned_images(tmp_path, "all", skip_unusable=True)["id"][:] == ["0.jpg"]


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (5_000, 2)])
def test_a_very_long_picture_is_cut_before_it_is_made_larger(size, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sizes = []
    resize = PIL.Image.Image.resize

    def counted(self, size, *args, **kwargs):
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(PIL.Image.Image, "resize", counted)
    assert views(PIL.Image.fromarray(pixels), Framing(64, random_crops=2), 0).shape == (2, 1, 3, 64, 64)
    assert sizes and max(sizes[0]) <= LONGEST * 64


def test_the_middle_of_a_long_picture_is_what_it_was():
    """The centre of a picture that is cut first is the centre of one that is not."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4 * LONGEST + 40, 3), dtype=np.uint8)
    whole = PIL.Image.fromarray(pixels)
    scaled = np.asarray(whole.resize((64 * (LONGEST + 10), 64), PIL.Image.Resampling.LANCZOS)).astype(np.float32)
    left = (scaled.shape[1] - 64) // 2
    found = (views(whole, Framing(64), 0)[0, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(found - scaled[:, left : left + 64]).max() <= 1.5


def test_a_digest_is_that_of_the_content(tmp_path):
    image = saved(noise())
    path = tmp_path / "a.png"
    path.write_bytes(image["bytes"])
    assert content_digest({"bytes": None, "path": str(path)}) == content_digest(image)
    path.write_bytes(image["bytes"] + b"x")
    assert content_digest({"bytes": None, "path": str(path)}) != content_digest(image)
    assert content_digest(None) is content_digest({"bytes": None, "path": "/no/such"}) is None


def test_floats_a_little_above_one_are_no_black_picture():
    ramp = PIL.Image.fromarray(np.linspace(0, 1.3, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(InputError, match=r"between 0 and 1\.3"):
        upright_rgb(ramp)


def test_a_picture_that_git_lfs_has_not_fetched_says_so(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", encoding="utf-8")
    assert "git lfs pull" in problem({"bytes": None, "path": str(path)})
