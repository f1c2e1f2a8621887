"""Flickr8k and Flickr30k in every layout they are found in, one's own folders and the scenes: one result, clear errors.

The lines are in the form of the real files, oddities included; the images are small squares of one colour, by which
a test sees that captions and image belong together.
"""

import csv
import io
import json
from pathlib import Path

import PIL.Image
import PIL.PngImagePlugin
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from lora_distill import rehearsal
from lora_distill.data import captioned, parquet, scenes
from lora_distill.data.captioned import SPLITS, captioned_images, scene_dataset, split_by_id, split_scenes
from lora_distill.data.teacher import training_captions

NAMES = [f"{1000268201 + 97 * i}_{i:010x}.jpg" for i in range(12)]
CAPTIONS = {name: [f"A dog number {i} , seen {n} times ." for n in range(5)] for i, name in enumerate(NAMES)}
COLOUR = {name: (20 * i, 250 - 20 * i, 128) for i, name in enumerate(NAMES)}
HOME = {name: ("train", "val", "test")[(i % 6) // 2 if i % 6 < 4 else 2] for i, name in enumerate(NAMES)}
ABSENT = "2258277193_586949ec62.jpg.1"  # Flickr8k.token.txt has captions for it; there is no such image


def jpeg(name: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (20, 12), COLOUR[name]).save(buffer, "jpeg")
    return buffer.getvalue()


def save_images(folder: Path, names: list[str] = NAMES) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(jpeg(name))


def write_tokens(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{name}#{n}\t{c}\n" for name in names for n, c in enumerate(CAPTIONS.get(name, ["a man ."])))
    path.write_text("".join(lines))


def write_split_files(folder: Path) -> None:
    for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
        lines = [name + "\n" for name in NAMES if HOME[name] == split]
        (folder / f"Flickr_8k.{word}Images.txt").write_text("".join(lines))


@pytest.fixture
def tokens(tmp_path):
    """The original Flickr8k, as its two archives unpack."""
    save_images(tmp_path / "Flicker8k_Dataset")
    write_tokens(tmp_path / "Flickr8k_text" / "Flickr8k.token.txt", [*NAMES, ABSENT])
    write_split_files(tmp_path / "Flickr8k_text")
    return tmp_path


@pytest.fixture
def own(tmp_path):
    """A folder of one's own, made by `own(records)`."""

    def make(*records: dict | str, images: list[str] = NAMES) -> Path:
        save_images(tmp_path / "images", images)
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
        return tmp_path

    return make


def record(name: str, **more) -> dict:
    return {"file_name": f"images/{name}", "captions": CAPTIONS[name], **more}


def everything(source, **more) -> dict[str, dict]:
    """All rows of all splits that are not empty, by id; fails when two splits share an id."""
    rows = {}
    for split in SPLITS:
        try:
            dataset = captioned_images(source, split, **more)
        except ValueError as error:
            assert "no images in split" in str(error)
            continue
        assert set(dataset.column_names) == {"id", "image", "captions", "split"}
        for row in dataset:
            assert row["split"] == split and row["id"] not in rows
            rows[row["id"]] = row
    return rows


def check(rows: dict[str, dict], home: dict[str, str]) -> None:
    """The rows are the twelve images, each with its own picture and captions, in its split."""
    assert {name: row["split"] for name, row in rows.items()} == home
    for name, row in rows.items():
        assert row["captions"] == CAPTIONS[name]
        seen = row["image"].convert("RGB").getpixel((5, 5))
        assert max(abs(a - b) for a, b in zip(seen, COLOUR[name], strict=True)) <= 4


BY_ID = {name: split_by_id(name) for name in NAMES}


class TestLayouts:
    def test_flickr8k_token_file_with_its_split_files(self, tokens):
        check(everything(tokens), HOME)

    def test_flickr30k_token_file_is_split_by_id(self, tmp_path):
        save_images(tmp_path / "flickr30k-images")
        write_tokens(tmp_path / "results_20130124.token", NAMES)
        check(everything(tmp_path), BY_ID)

    def test_kaggle_flickr8k(self, tmp_path):
        save_images(tmp_path / "Images")
        with (tmp_path / "captions.txt").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "caption"])
            table.writerows([name, caption] for name in NAMES for caption in CAPTIONS[name])
        assert f'{NAMES[0]},"A dog number 0 , seen 0 times ."' in (tmp_path / "captions.txt").read_text(), "quoted"
        check(everything(tmp_path), BY_ID)

    def test_kaggle_flickr8k_with_split_files_beside_it(self, tmp_path):
        self.test_kaggle_flickr8k(tmp_path)
        write_split_files(tmp_path)
        check(everything(tmp_path), HOME)

    def test_kaggle_flickr30k_with_its_delimiter_and_its_broken_row(self, tmp_path):
        save_images(tmp_path / "flickr30k_images" / "flickr30k_images")
        rows = [f"{name}| {n}| {c}\n" for name in NAMES for n, c in enumerate(CAPTIONS[name])]
        broken = rows[4].replace("| 4| ", "| 4   ")
        assert broken != rows[4]
        header = "image_name| comment_number| comment\n"
        (tmp_path / "flickr30k_images" / "results.csv").write_text("".join([header, *rows[:4], broken, *rows[5:]]))
        check(everything(tmp_path), BY_ID)

    def test_kaggle_flickr30k_by_commas_without_quotes(self, tmp_path):
        save_images(tmp_path / "Images")
        rows = (f"{name},{n},{c}\n" for name in NAMES for n, c in enumerate(CAPTIONS[name]))
        (tmp_path / "captions.txt").write_text("image_name,comment_number,comment\n" + "".join(rows))
        check(everything(tmp_path), BY_ID)

    def test_quotation_marks_in_results_csv_are_text(self, tmp_path):
        save_images(tmp_path / "images", NAMES[:1])
        caption = '" A sign says " stop " .'
        (tmp_path / "results.csv").write_text(f"image_name| comment_number| comment\n{NAMES[0]}| 0| {caption}\n")
        assert everything(tmp_path)[NAMES[0]]["captions"] == [caption]

    @pytest.mark.parametrize("name", ["dataset_flickr8k.json", "dataset_flickr30k.json"])
    def test_karpathy(self, tmp_path, name):
        save_images(tmp_path / "Images")
        images = [
            {
                "sentids": list(range(5 * i, 5 * i + 5)),
                "imgid": i,
                "sentences": [{"tokens": c.lower().split(), "raw": c, "imgid": i} for c in CAPTIONS[image]],
                "split": HOME[image],
                "filename": image,
            }
            for i, image in enumerate(NAMES)
        ]
        (tmp_path / name).write_text(json.dumps({"images": images, "dataset": name[8:-5]}))
        check(everything(tmp_path), HOME)

    def test_own_folder_with_splits(self, own):
        rows = everything(own(*(record(name, split=HOME[name]) for name in NAMES)))
        check({name.removeprefix("images/"): row for name, row in rows.items()}, HOME)

    def test_own_folder_without_splits_is_split_by_id(self, own):
        rows = everything(own(*map(record, NAMES)))
        assert {name: row["split"] for name, row in rows.items()} == {name: split_by_id(name) for name in rows}
        assert len(rows) == len(NAMES)

    def test_of_two_layouts_the_one_that_fits_the_images_counts(self, tokens):
        (tokens / "metadata.jsonl").write_text(json.dumps({"file_name": "x.jpg", "captions": ["x"], "split": "train"}))
        check(everything(tokens), HOME)

    def test_windows_line_ends_and_byte_order_mark(self, tokens):
        for path in (tokens / "Flickr8k_text").iterdir():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        check(everything(tokens), HOME)


class TestParquet:
    """Sets as the hub holds them: the images in the table."""

    FIVE = Features({"image": Image(), **{f"caption_{n}": Value("string") for n in range(5)}})
    LIST = Features({"image": Image(), "caption": List(Value("string")), "filename": Value("string")})

    @staticmethod
    def picture(name: str) -> dict:
        return {"bytes": jpeg(name), "path": None}

    def five_columns(self, names: list[str]) -> Dataset:
        rows = [
            {"image": self.picture(name), **{f"caption_{n}": c for n, c in enumerate(CAPTIONS[name])}} for name in names
        ]
        return Dataset.from_list(rows, features=self.FIVE)

    def listed(self, names: list[str], **columns) -> Dataset:
        rows = [{"image": self.picture(n), "caption": CAPTIONS[n], "filename": n} for n in names]
        table = Dataset.from_list(rows, features=self.LIST)
        for name, values in columns.items():
            table = table.add_column(name, values)
        return table

    def save(self, folder: Path, **parts: Dataset) -> Path:
        for part, table in parts.items():
            path = folder / "set" / "data" / f"{part}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(path)
        return folder / "set"

    def test_five_columns_and_a_file_a_split(self, tmp_path):
        own_names = {"train": "train", "val": "validation", "test": "test"}
        parts = {own_names[s]: self.five_columns([n for n in NAMES if HOME[n] == s]) for s in SPLITS}
        rows = everything(self.save(tmp_path, **parts), cache_dir=tmp_path / "cache")
        named = {next(name for name in NAMES if CAPTIONS[name] == row["captions"]): row for row in rows.values()}
        check(named, HOME)

    def test_lists_with_a_split_column_all_in_test(self, tmp_path):
        folder = self.save(tmp_path, test=self.listed(NAMES, split=[HOME[name] for name in NAMES]))
        check(everything(folder, cache_dir=tmp_path / "cache"), HOME)

    def test_one_split_for_all_is_none(self, tmp_path):
        folder = self.save(tmp_path, test=self.listed(NAMES))
        check(everything(folder, cache_dir=tmp_path / "cache"), BY_ID)

    def test_a_row_for_each_caption_is_one_image(self, tmp_path):
        rows = [{"image": self.picture(n), "text": c} for n in NAMES for c in CAPTIONS[n]]
        folder = self.save(
            tmp_path, train=Dataset.from_list(rows, features=Features({"image": Image(), "text": Value("string")}))
        )
        found = everything(folder, cache_dir=tmp_path / "cache").values()
        assert sorted(row["captions"] for row in found) == sorted(CAPTIONS.values())

    def test_the_same_picture_in_two_splits_is_an_error(self, tmp_path):
        folder = self.save(tmp_path, train=self.five_columns(NAMES[:5]), test=self.five_columns(NAMES[4:]))
        with pytest.raises(
            ValueError, match=r"test-\S+, row 0: image [0-9a-f]{16} is in test and in train \(\S+train-\S+, row 4\)$"
        ):
            captioned_images(folder, "train", cache_dir=tmp_path / "cache")
        options = {"skip_unusable": True, "cache_dir": tmp_path / "cache"}
        for split, count in (("train", 4), ("test", len(NAMES) - 4)):
            with pytest.warns(
                UserWarning, match="1 images are in two splits: [0-9a-f]{16}; left out of the earlier"
            ) as w:
                assert len(captioned_images(folder, split, **options)) == count
            assert w[0].filename == __file__

    def test_other_columns_are_an_error(self, tmp_path):
        folder = self.save(tmp_path, train=self.listed(NAMES).rename_column("caption", "words"))
        with pytest.raises(ValueError, match=r"expected the columns image, and caption_0.* it has image, words, filen"):
            captioned_images(folder, "train", cache_dir=tmp_path / "cache")

    def test_a_picture_that_is_none_is_named(self, tmp_path):
        table = self.listed(NAMES, split=["train"] * len(NAMES))
        rows = [
            {**row, "image": {"bytes": b"no jpeg", "path": None}} for row in table.select([0]).remove_columns("image")
        ]
        spoilt = Dataset.from_list(rows, features=table.features)
        folder = self.save(tmp_path, train=spoilt)
        with pytest.raises(ValueError, match=rf"1 of 1 images .*: {NAMES[0]} \(cannot identify image file\)$"):
            captioned_images(folder, "train", cache_dir=tmp_path / "cache")

    def test_a_hub_id_may_carry_a_revision(self, monkeypatch):
        asked = []

        def load_dataset(name, revision, cache_dir):
            asked.append((name, revision))
            return DatasetDict(test=self.listed(NAMES))

        monkeypatch.setattr(parquet, "load_dataset", load_dataset)
        check(everything("nlphuji/flickr30k@refs/convert/parquet"), BY_ID)
        assert set(asked) == {("nlphuji/flickr30k", "refs/convert/parquet")}

    @pytest.mark.parametrize(
        ("refusal", "error", "message"),
        [
            (
                RuntimeError("Dataset scripts are no longer supported, but found flickr30k.py"),
                ValueError,
                "nlphuji/flickr30k is a loading script; its parquet copy is nlphuji/flickr30k@refs/convert/parquet",
            ),
            (ConnectionError("no route"), FileNotFoundError, "nlphuji/flickr30k: no such folder, nor a set on the hub"),
            (FileNotFoundError("none"), FileNotFoundError, "nlphuji/flickr30k: no such folder, nor a set on the hub"),
        ],
    )
    def test_a_hub_set_that_cannot_be_had(self, monkeypatch, refusal, error, message):
        def load_dataset(*_, **__):
            raise refusal

        monkeypatch.setattr(parquet, "load_dataset", load_dataset)
        with pytest.raises(error, match=message):
            captioned_images("nlphuji/flickr30k", "train")


class TestSplits:
    def test_files_that_overlap_are_an_error(self, tokens):
        train = tokens / "Flickr8k_text" / "Flickr_8k.trainImages.txt"
        shared = next(name for name in NAMES if HOME[name] == "test")
        train.write_text(train.read_text() + shared + "\n")
        message = (
            rf"Flickr_8k.trainImages.txt, line \d: image {shared} is also in Flickr_8k.testImages.txt; splits must"
        )
        with pytest.raises(ValueError, match=message):
            captioned_images(tokens, "val")

    def test_a_split_file_names_an_image_without_captions(self, tokens):
        with (tokens / "Flickr8k_text" / "Flickr_8k.devImages.txt").open("a") as file:
            file.write("17273391_55cfc7d3d4.jpg\n")
        with pytest.raises(
            ValueError, match=r"devImages.txt: image 17273391_55cfc7d3d4.jpg has no captions in Flickr8k.t"
        ):
            captioned_images(tokens, "train")

    def test_images_in_no_split_file_are_left_out(self, tokens):
        path = tokens / "Flickr8k_text" / "Flickr_8k.testImages.txt"
        path.write_text("")
        assert everything(tokens).keys() == {name for name in NAMES if HOME[name] != "test"}

    def test_one_image_in_two_splits_of_its_own_file_is_an_error(self, own):
        folder = own(record(NAMES[0], split="train"), record(NAMES[0], split="test"), images=NAMES[:1])
        with pytest.raises(
            ValueError, match=rf"metadata.jsonl, line 2: image images/{NAMES[0]} is in test and in train"
        ):
            captioned_images(folder, "train")

    def test_either_all_images_have_a_split_or_none(self, own):
        folder = own(record(NAMES[0], split="train"), record(NAMES[1]), images=NAMES[:2])
        with pytest.raises(
            ValueError, match=rf"line 2: image images/{NAMES[1]} has no split, but other images have one"
        ):
            captioned_images(folder, "train")

    def test_an_empty_split_is_an_error_that_counts_the_others(self, own):
        folder = own(record(NAMES[0], split="train"), images=NAMES[:1])
        with pytest.raises(ValueError, match=r"no images in split 'val'; there are {'train': 1, 'val': 0, 'test': 0}"):
            captioned_images(folder, "val")

    def test_all_is_every_image_whatever_its_split(self, own):
        folder = own(*(record(name, split=HOME[name]) for name in NAMES))
        found = captioned_images(folder, "all")
        assert found["id"][:] == [f"images/{name}" for name in NAMES]
        check({row["id"].removeprefix("images/"): row for row in found}, HOME)

    def test_all_needs_no_splits_and_minds_none_that_overlap(self, own):
        records = record(NAMES[0], split="train"), record(NAMES[0], split="test"), record(NAMES[1])
        folder = own(*records, images=NAMES[:2])
        assert captioned_images(folder, "all")["captions"][:] == [CAPTIONS[NAMES[0]] * 2, CAPTIONS[NAMES[1]]]

    def test_by_id_has_the_proportions_of_flickr8k(self):
        splits = [split_by_id(f"{i}.jpg") for i in range(8000)]
        assert [round(splits.count(split) / 8000, 2) for split in SPLITS] == [0.75, 0.13, 0.12]

    def test_by_id_is_settled_for_good(self):
        assert [split_by_id(name) for name in ("d.jpg", "e.jpg", "o.jpg")] == ["train", "test", "val"]


class TestUnusableImages:
    @pytest.fixture
    def spoilt(self, own):
        folder = own(*(record(name, split="train") for name in NAMES))
        (folder / "images" / NAMES[0]).unlink()
        noise = PIL.Image.effect_noise((100, 80), 50)
        noise.save(folder / "images" / NAMES[1])
        cut = (folder / "images" / NAMES[1]).read_bytes()[:-100]
        (folder / "images" / NAMES[1]).write_bytes(cut)
        (folder / "images" / NAMES[2]).write_text("<html>404</html>")
        return folder

    REASONS = (
        rf"3 of 12 images are missing or unreadable: images/{NAMES[0]} \(missing\), "
        rf"images/{NAMES[1]} \(image file is truncated.*\), images/{NAMES[2]} \(cannot identify image file\)"
    )

    def test_are_counted_and_named(self, spoilt):
        with pytest.raises(ValueError, match=self.REASONS + "$"):
            captioned_images(spoilt, "train")

    def test_are_left_out_with_one_warning_when_allowed(self, spoilt):
        with pytest.warns(UserWarning, match=self.REASONS + "; left out$") as warned:
            dataset = captioned_images(spoilt, "train", skip_unusable=True)
        assert dataset["id"][:] == [f"images/{name}" for name in NAMES[3:]]
        assert len(warned) == 1 and warned[0].filename == __file__

    def test_what_a_decoder_raises_beyond_oserror_names_its_image(self, own, monkeypatch):
        folder = own(*(record(name, split="train") for name in NAMES))
        PIL.Image.new("1", (2000, 2000)).save(folder / "images" / NAMES[1], "png")
        chunk = PIL.PngImagePlugin.PngInfo()
        chunk.add_text("comment", "x" * 2_000_000, zip=True)
        PIL.Image.new("RGB", (8, 8)).save(folder / "images" / NAMES[2], "png", pnginfo=chunk)
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1_000_000)
        with pytest.raises(
            ValueError, match=rf"2 of 12 .*{NAMES[1]} \(Image size .*{NAMES[2]} \(Decompressed data too"
        ):
            captioned_images(folder, "train")
        with pytest.warns(UserWarning, match="left out"):
            assert len(captioned_images(folder, "train", skip_unusable=True)) == 10

    def test_only_five_are_named(self, own):
        folder = own(*(record(name, split="train") for name in NAMES), images=[])
        with pytest.raises(ValueError, match=rf"12 of 12 .*{NAMES[4]} \(missing\), \.\.\.$"):
            captioned_images(folder, "train")

    def test_that_none_is_left_is_an_error_in_any_case(self, own):
        folder = own(record(NAMES[0], split="train"), images=[])
        with pytest.raises(ValueError, match="1 of 1 images"):
            captioned_images(folder, "train", skip_unusable=True)

    def test_captions_of_an_absent_image_are_noticed_where_no_split_file_passes_over_them(self, tokens):
        for path in (tokens / "Flickr8k_text").glob("Flickr_8k.*"):
            path.unlink()
        with pytest.raises(ValueError, match=rf"1 of \d+ images are missing or unreadable: {ABSENT} \(missing\)"):
            captioned_images(tokens, split_by_id(ABSENT))


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("metadata.jsonl", "", "metadata.jsonl: holds no captions$"),
            ("metadata.jsonl", '{"file_name": "a.jpg"}', r'line 1: expected {"file_name": ..., "captions": \[...\]}'),
            ("metadata.jsonl", "[]", "line 1: expected {"),
            ("metadata.jsonl", "\n{", "line 2: expected {"),
            ("metadata.jsonl", '{"file_name": "a", "captions": []}', r"line 1: expected captions, none of them empty"),
            ("metadata.jsonl", '{"file_name": "a", "captions": 7}', r"line 1: expected captions.*got 7"),
            ("metadata.jsonl", '{"file_name": "a", "captions": ["b"], "split": "x"}', "line 1: no split is called 'x'"),
            ("dataset_flickr8k.json", "[]", 'dataset_flickr8k.json: expected {"images"'),
            ("dataset_flickr8k.json", '{"images": []}', "holds no captions"),
            (
                "dataset_flickr30k.json",
                '{"images": [{"filename": "a.jpg", "split": "train", "sentences": []}]}',
                "image a.jpg: expected captions",
            ),
            (
                "Flickr8k.token.txt",
                "a.jpg#0\tA dog .\na.jpg A dog .\n",
                "line 2: expected image.jpg#0, a tab and a cap",
            ),
            ("Flickr8k.token.txt", "a.jpg\tA dog .\n", "line 1: expected image.jpg#0"),
            ("Flickr8k.token.txt", "a.jpg#0\t \n", "line 1: expected captions, none of them empty"),
            ("captions.txt", "image,caption\n", "captions.txt: holds no captions"),
            ("captions.txt", "", "captions.txt: holds no captions"),
            ("captions.txt", "image,caption\na.jpg\n", r"line 2: expected image, caption, got \['a.jpg'\]"),
            (
                "captions.txt",
                "image\na.jpg\n",
                r"line 1: expected a header .* or an image and its caption, got",
            ),
            (
                "results.csv",
                "image_name| comment_number| comment\na.jpg| dog\n",
                r"line 2: expected image, number, caption, got \['a.jpg', ' dog'\]",
            ),
            ("results.csv", "image_name| comment_number| comment\na.jpg| 0| \n", "line 2: expected captions, none of"),
        ],
    )
    def test_one_clear_line(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as refusal:
            captioned_images(tmp_path, "train")
        assert "\n" not in str(refusal.value) and name in str(refusal.value)

    def test_text_that_is_not_utf_8(self, tmp_path):
        (tmp_path / "captions.txt").write_bytes("image,caption\na.jpg,café\n".encode("latin-1"))
        with pytest.raises(ValueError, match=r"captions.txt, line 2: expected text in UTF-8 \(byte 0xe9"):
            captioned_images(tmp_path, "train")

    def test_a_folder_without_captions(self, tmp_path):
        save_images(tmp_path / "images")
        with pytest.raises(FileNotFoundError, match=r"no captions for 12 images; expected metadata.jsonl, "):
            captioned_images(tmp_path, "train")

    def test_a_split_that_does_not_exist(self, tmp_path):
        with pytest.raises(ValueError, match="no split 'dev'; there are train, val, test, and all"):
            captioned_images(tmp_path, "dev")


class TestScenes:
    @pytest.mark.parametrize("size", ["8k", "30k"])
    def test_give_the_same_result(self, monkeypatch, tmp_path, size):
        monkeypatch.setitem(scenes.SPLIT_SIZES, size, {"train": 12, "val": 3, "test": 2})
        for split, count in scenes.SPLIT_SIZES[size].items():
            dataset = captioned_images(f"scenes/fluent/{size}", split, cache_dir=tmp_path)
            assert len(set(dataset["id"])) == len(dataset) == count and set(dataset["split"]) == {split}
            assert {len(five) for five in dataset["captions"]} == {5}
            for row in dataset:
                drawn = scenes.draw(scenes.Scene.from_dict(json.loads(row["scene"])))
                assert row["image"].tobytes() == drawn.tobytes()

    @pytest.mark.parametrize("style", scenes.STYLES)
    @pytest.mark.parametrize("size", scenes.SPLIT_SIZES)
    def test_no_two_splits_share_an_image(self, style, size):
        shown = {split: split_scenes(style, size, split, seed=0) for split in SPLITS}
        assert {split: len(them) for split, them in shown.items()} == scenes.SPLIT_SIZES[size]
        assert len(set().union(*shown.values())) == sum(len(set(them)) for them in shown.values())

    def test_the_small_size_is_the_beginning_of_the_large_one(self):
        small, large = (split_scenes("fluent", size, "train", seed=0) for size in ("8k", "30k"))
        assert small == large[: len(small)]

    def test_all_are_the_three_splits(self, monkeypatch, tmp_path):
        monkeypatch.setitem(scenes.SPLIT_SIZES, "8k", {"train": 4, "val": 2, "test": 1})
        found = captioned_images("scenes/fluent/8k", "all", cache_dir=tmp_path)
        assert found["split"][:] == ["train"] * 4 + ["val"] * 2 + ["test"]

    def test_there_are_no_others(self):
        with pytest.raises(ValueError, match="no split 'train' of scenes/oil/8k; there are styles noto, fluent; sizes"):
            captioned_images("scenes/oil/8k", "train")
        with pytest.raises(ValueError, match="no split 'dev' of scenes/noto/8k"):
            scene_dataset("noto", "8k", "dev", seed=0)


def test_captions_to_make_teacher_images_of_are_those_of_training(tokens):
    allowed = {caption for name in NAMES if HOME[name] == "train" for caption in CAPTIONS[name]}
    drawn = training_captions(str(tokens), "noto", 50, seed=0)
    assert len(drawn) == 50 and len(set(drawn)) > 5 and set(drawn) <= allowed
    assert drawn == training_captions(str(tokens), "noto", 50, seed=0) != training_captions(str(tokens), "noto", 50, 1)


@pytest.mark.parametrize("source", ["scenes/fluent/8k", "folder"])
def test_a_share_takes_the_first_images(tokens, source):
    source = str(tokens) if source == "folder" else source
    whole = captioned_images(source, "val")
    half = captioned_images(source, "val", share=0.5)
    count = (len(whole) + 1) // 2
    assert half["id"][:] == whole["id"][:count] and half["captions"][:] == whole["captions"][:count]


# ---------------------------------------------------------------------------------------------- what is judged too


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Made-up photographs as Flickr8k and as Flickr30k, which has three of Flickr8k's test split in training."""
    folder = tmp_path_factory.mktemp("photographs")
    rehearsal.write_photographs(folder / "8k", "flickr8k", train=4, val=2, test=12)
    rehearsal.write_photographs(folder / "30k", "flickr30k", train=8, val=2, test=2)
    return folder


def test_photographs_of_flickr8ks_test_split_are_left_out_of_flickr30ks_training(photographs, capsys):
    test = {name.partition("_")[0] for name in captioned_images(photographs / "8k", "test")["id"]}
    everything = captioned_images(photographs / "30k", "train")
    assert sum(Path(name).stem in test for name in everything["id"]) == 3
    kept = captioned_images(photographs / "30k", "train", without=photographs / "8k")
    assert kept["id"] == [name for name in everything["id"] if Path(name).stem not in test]
    assert capsys.readouterr().out == (
        f"{photographs / '30k'}: 3 photographs left out of training, for they are in the test split of "
        f"{photographs / '8k'}\n"
    )


def test_copies_in_another_size_and_quality_are_left_out_where_names_say_nothing(photographs, tmp_path, capsys):
    judged = captioned_images(photographs / "8k", "test")
    mine = captioned_images(photographs / "8k", "train")
    (tmp_path / "images").mkdir()
    rows = []
    for number, picture in enumerate([*mine["image"], judged[3]["image"], judged[5]["image"]]):
        name = f"images/my picture {number}.jpg"
        width, height = picture.size
        picture.convert("RGB").resize((width * 2 // 3, height * 2 // 3)).save(tmp_path / name, quality=60)
        rows.append({"file_name": name, "captions": ["a dog"], "split": "train"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = captioned_images(tmp_path, "train", without=photographs / "8k")
    assert len(kept) == len(mine) and "2 photographs left out" in capsys.readouterr().out


def test_a_set_is_not_compared_with_itself_nor_with_drawn_scenes(photographs, capsys):
    for without in (photographs / "8k", "scenes/fluent/8k"):
        assert len(captioned_images(photographs / "8k", "train", without=without)) == 4
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["scenes/fluent/8k", "scenes/fluent/30k"], ["8k", "30k"]),
        (["jxie/flickr8k", "nlphuji/flickr30k@refs/convert/parquet"], ["8k", "30k"]),
        (["/data/Flickr_8k", "/data/my holiday"], ["8k", "my_holiday"]),
        (["me/cats", "you/cats"], ["cats", "cats_2"]),
    ],
)
def test_only_flickr_and_what_stands_in_for_it_are_called_8k_and_30k(sources, names):
    assert captioned.set_names(*sources) == names


def test_a_folder_in_flickrs_layout_is_flickr_whatever_its_name(tokens, tmp_path):
    assert captioned.set_names(str(tokens)) == ["8k"]
    rehearsal.write_photographs(tmp_path / "x", "flickr30k", train=1, val=1, test=1)
    assert captioned.set_names(str(tmp_path / "x")) == ["30k"]


def test_a_folder_is_not_named_after_the_folders_around_it(tmp_path):
    for name in ("coco", "mine"):
        (tmp_path / "flickr30k-lora" / name).mkdir(parents=True)
    sources = [str(tmp_path / "flickr30k-lora" / name) for name in ("coco", "mine")]
    assert captioned.set_names(*sources) == ["coco", "mine"]
