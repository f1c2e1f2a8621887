"""Folders of pictures as people bring them: each is read image for image and caption for caption, or refused by name.

Every picture has a colour of its own, by which a test sees that captions and picture belong together.
"""

import csv
import io
import json
import os
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_distill.data.captioned import SPLITS, captioned_images, set_names, split_by_id
from lora_distill.errors import InputError

COUNT = 12
IMAGES = [f"g{number}.jpg" for number in range(COUNT)]
SAID = {image: f"picture {number}, in colour" for number, image in enumerate(IMAGES)}
HOME = {image: SPLITS[number % 3] for number, image in enumerate(IMAGES)}


def content(number: int) -> bytes:
    """A PNG in a colour of its own, whatever the file is called."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), (20 * number % 256, number, 7)).save(buffer, "png")
    return buffer.getvalue()


def picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(number))
    return path


def pictures(folder: Path, names=IMAGES) -> Path:
    for number, name in enumerate(names):
        picture(folder / name, number)
    return folder


def text(path: Path, *lines: str, encoding: str = "utf-8", end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def records(path: Path, images, **more) -> Path:
    return text(path, *(json.dumps({"file_name": image, "text": SAID[Path(image).name], **more}) for image in images))


def whole(source, **more) -> dict[int, tuple[list[str], str]]:
    """Captions and split of each picture, by its number; no picture is in two splits."""
    found = {}
    for split in SPLITS:
        try:
            dataset = captioned_images(source, split, **more)
        except InputError as error:
            if "no images in split" not in str(error):
                raise
            continue
        for row in dataset:
            _, number, seven = row["image"].convert("RGB").getpixel((3, 3))
            assert seven == 7 and number not in found and row["split"] == split
            found[number] = (row["captions"], split)
    return found


def everything(source, **more) -> dict[int, list[str]]:
    return {number: captions for number, (captions, _) in whole(source, **more).items()}


ALL = {number: [SAID[image]] for number, image in enumerate(IMAGES)}
AT_HOME = {number: ([SAID[image]], HOME[image]) for number, image in enumerate(IMAGES)}


def refused(source, match: str, split: str = "train", **more) -> None:
    with pytest.raises(InputError, match=match) as refusal:
        captioned_images(source, split, **more)
    assert "\n" not in str(refusal.value)


class TestOwnPictures:
    def test_metadata_with_text(self, tmp_path):
        pictures(tmp_path / "images")
        records(tmp_path / "metadata.jsonl", [f"images/{image}" for image in IMAGES])
        assert everything(tmp_path) == ALL

    @pytest.mark.parametrize("column", ["text", "caption", "captions"])
    def test_metadata_csv(self, tmp_path, column):
        pictures(tmp_path)
        with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerows([("file_name", column, "split"), *((image, SAID[image], HOME[image]) for image in IMAGES)])
        assert whole(tmp_path) == AT_HOME

    def test_several_captions_in_a_cell_or_in_columns(self, tmp_path):
        pictures(tmp_path, IMAGES[:1])
        text(tmp_path / "metadata.csv", "file_name,captions", 'g0.jpg,"[""a"", ""b, c""]"')
        assert captioned_images(tmp_path, "all")["captions"][:] == [["a", "b, c"]]
        text(tmp_path / "metadata.csv", "file_name,caption_0,caption_1,caption_10", 'g0.jpg,a,"b, c",')
        assert captioned_images(tmp_path, "all")["captions"][:] == [["a", "b, c"]]

    @pytest.mark.parametrize("suffix", [".txt", ".caption"])
    def test_a_text_beside_each_picture(self, tmp_path, suffix):
        pictures(tmp_path / "10_dog")
        for image in IMAGES:
            text(tmp_path / "10_dog" / (Path(image).stem + suffix), SAID[image], "", "a second caption")
        assert everything(tmp_path) == {number: [*said, "a second caption"] for number, said in ALL.items()}

    def test_a_folder_for_each_split(self, tmp_path):
        folders = {"train": "train", "val": "validation", "test": "test"}
        for number, image in enumerate(IMAGES):
            picture(tmp_path / folders[HOME[image]] / image, number)
            text((tmp_path / folders[HOME[image]] / image).with_suffix(".txt"), SAID[image])
        assert whole(tmp_path) == AT_HOME

    @pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.txt", "words.csv"])
    @pytest.mark.parametrize("same_names", [False, True])
    def test_a_folder_for_each_split_with_its_own_captions(self, tmp_path, name, same_names):
        for split, folder in (("train", "train"), ("val", "val"), ("test", "test")):
            mine = [number for number, image in enumerate(IMAGES) if HOME[image] == split]
            names = [f"{place}.jpg" if same_names else IMAGES[number] for place, number in enumerate(mine)]
            for number, image in zip(mine, names, strict=True):
                picture(tmp_path / folder / image, number)
            said = [(image, SAID[IMAGES[number]]) for number, image in zip(mine, names, strict=True)]
            if name.endswith("jsonl"):
                text(tmp_path / folder / name, *(json.dumps({"file_name": i, "text": t}) for i, t in said))
            else:
                text(tmp_path / folder / name, "file_name,text", *(f'{i},"{t}"' for i, t in said))
        assert whole(tmp_path) == AT_HOME

    def test_a_caption_file_for_each_split_beside_one_folder_of_images(self, tmp_path):
        pictures(tmp_path / "images")
        for split in SPLITS:
            mine = [image for image in IMAGES if HOME[image] == split]
            text(tmp_path / f"{split}.csv", "image,caption", *(f"{image},{SAID[image]}" for image in mine))
        assert whole(tmp_path) == AT_HOME

    def test_one_folder_called_train_is_no_split(self, tmp_path):
        pictures(tmp_path / "train")
        records(tmp_path / "train" / "metadata.jsonl", IMAGES)
        assert {split for _, split in whole(tmp_path).values()} > {"train"}

    def test_a_folder_of_a_split_beside_others_is_refused(self, tmp_path):
        for number, image in enumerate(IMAGES):
            picture(tmp_path / ("test" if number < 3 else "holiday") / image, number)
        records(tmp_path / "metadata.jsonl", IMAGES)
        refused(tmp_path, "image g0.jpg lies in a folder of a split, image g3.jpg does not; move all into train/")
        assert len(captioned_images(tmp_path, "all")) == COUNT

    def test_the_split_of_a_record_counts_more_than_the_folder_of_its_picture(self, tmp_path):
        for number, image in enumerate(IMAGES):
            picture(tmp_path / ("train" if number % 2 else "test") / image, number)
        lines = [json.dumps({"file_name": image, "text": SAID[image], "split": HOME[image]}) for image in IMAGES]
        text(tmp_path / "metadata.jsonl", *lines)
        assert whole(tmp_path) == AT_HOME

    def test_class_folders_without_captions_are_refused(self, tmp_path):
        pictures(tmp_path / "cats", IMAGES[:3])
        refused(tmp_path, "no captions for 3 images; expected metadata.jsonl, .*a .txt beside each image")

    def test_boxes_beside_pictures_are_no_captions(self, tmp_path):
        text(picture(tmp_path / "g0.jpg", 0).with_suffix(".txt"), "0 0.5 0.5 0.25 0.125")
        refused(tmp_path, "g0.txt, line 1: expected a caption, got numbers")

    def test_json_as_a_dictionary_a_list_and_coco(self, tmp_path):
        pictures(tmp_path)
        path = tmp_path / "captions.json"
        path.write_text(json.dumps(SAID), encoding="utf-8")
        assert everything(tmp_path) == ALL
        path.write_text(json.dumps([{"image": i, "caption": [SAID[i]]} for i in IMAGES]), encoding="utf-8")
        assert everything(tmp_path) == ALL
        coco = {
            "images": [{"id": n, "file_name": image} for n, image in enumerate(IMAGES)],
            "annotations": [{"id": 99 - n, "image_id": n, "caption": SAID[image]} for n, image in enumerate(IMAGES)],
        }
        path.write_text(json.dumps(coco), encoding="utf-8")
        assert everything(tmp_path) == ALL

    def test_a_caption_file_or_a_parquet_file_may_be_the_source(self, tmp_path):
        pictures(tmp_path)
        text(tmp_path / "mine.csv", "image,caption", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        text(tmp_path / "captions.txt", "image,caption", *(f"{image},other" for image in IMAGES))
        assert everything(tmp_path / "mine.csv") == ALL
        assert everything(tmp_path / "captions.txt") == {number: ["other"] for number in range(COUNT)}
        (tmp_path / "set.zip").write_bytes(b"PK")
        refused(tmp_path / "set.zip", "set.zip: expected a folder, a parquet file or a file with captions")

    @pytest.mark.parametrize("name", ["{stem}.TXT", "{stem}.jpg.txt", "{stem}.Caption"])
    def test_a_text_beside_each_picture_by_other_names(self, tmp_path, name):
        pictures(tmp_path)
        for image in IMAGES:
            text(tmp_path / name.format(stem=Path(image).stem), SAID[image])
        assert everything(tmp_path) == ALL

    def test_kohyas_json_and_the_hubs_table_of_flickr30k(self, tmp_path):
        pictures(tmp_path)
        path = tmp_path / "meta_cap.json"
        path.write_text(json.dumps({image: {"caption": said} for image, said in SAID.items()}), encoding="utf-8")
        assert everything(tmp_path) == ALL
        path.unlink()
        rows = (f'"[""{SAID[i]}""]","[1, 2]",{HOME[i]},{i},{n}' for n, i in enumerate(IMAGES))
        text(tmp_path / "flickr_annotations_30k.csv", "raw,sentids,split,filename,img_id", *rows)
        assert whole(tmp_path) == AT_HOME

    @pytest.mark.parametrize(
        ("lines", "encoding"),
        [
            (['"image","caption"', '"a.jpg","one, two"'], "utf-8-sig"),
            (["image\tcaption", "a.jpg\tone, two"], "utf-16"),
            (["caption,image", '"one, two",a.jpg'], "utf-8"),
            (["IMAGE , Caption", "a.jpg,one, two"], "utf-8"),
            (["image,comment_number,comment", "a.jpg,0,one, two"], "utf-8"),
            (["a.jpg#0,one, two"], "utf-8"),
            (["a.jpg,0,one, two"], "utf-8"),
            (["a.jpg;one, two"], "utf-8"),
        ],
    )
    def test_tables_as_spreadsheets_and_scripts_write_them(self, tmp_path, lines, encoding):
        picture(tmp_path / "a.jpg", 0)
        text(tmp_path / "captions.csv", *lines, encoding=encoding, end="\r\n")
        assert everything(tmp_path) == {0: ["one, two"]}

    def test_what_is_packed_is_named(self, tmp_path):
        (tmp_path / "flickr8k.zip").write_bytes(b"PK")
        refused(tmp_path, "no captions for 0 images; .*; unpack flickr8k.zip")


class TestTelling:
    """Which files count is decided by the images that they name."""

    def test_what_the_system_left_is_no_data(self, tmp_path):
        pictures(tmp_path / "Images")
        text(tmp_path / "captions.txt", "image,caption", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        for folder in ("__MACOSX/Images", "@eaDir", ".cache", "Images/.ipynb_checkpoints"):
            picture(tmp_path / folder / "g0.jpg", 99)
            (tmp_path / folder / "._captions.txt").write_bytes(b"\0\xb0\xff")
        for name in ("._train.parquet", "._Flickr_8k.trainImages.txt", "._metadata.jsonl", ".DS_Store"):
            (tmp_path / name).write_bytes(b"\0\5\x16\7\xff")
        assert everything(tmp_path) == ALL

    def test_of_karpathys_three_files_the_one_that_fits(self, tmp_path):
        pictures(tmp_path / "flickr30k-images")
        for name, images in (("8k", ["1.jpg"]), ("30k", IMAGES), ("coco", ["2.jpg"])):
            lines = [
                {"filename": image, "split": HOME.get(image, "train"), "sentences": [{"raw": SAID.get(image, "x")}]}
                for image in images
            ]
            dataset = tmp_path / f"dataset_{name.replace('8k', 'flickr8k').replace('30k', 'flickr30k')}.json"
            dataset.write_text(json.dumps({"images": lines}), encoding="utf-8")
        assert whole(tmp_path) == AT_HOME

    def test_karpathys_splits_for_kaggles_captions(self, tmp_path):
        """Kaggle's file has more images than Karpathy's: what is in no split is left out, and counted."""
        pictures(tmp_path / "Images")
        text(tmp_path / "captions.txt", "image,caption", *(f"{image},{SAID[image]}" for image in IMAGES))
        lines = [{"filename": i, "split": HOME[i], "sentences": [{"raw": SAID[i]}]} for i in IMAGES[:-2]]
        (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": lines}), encoding="utf-8")
        with pytest.warns(UserWarning, match="2 of 12 images are in no split of dataset_flickr8k.json: g10.jpg, g11.j"):
            assert whole(tmp_path) == {n: said for n, said in AT_HOME.items() if n < 10}

    def test_two_that_fit_equally_and_differ_are_named(self, tmp_path):
        pictures(tmp_path)
        records(tmp_path / "metadata.jsonl", IMAGES)
        text(tmp_path / "captions.txt", "image,caption", *(f"{image},other" for image in IMAGES))
        with pytest.warns(UserWarning, match="metadata.jsonl and captions.txt have .* and differ; metadata.jsonl is"):
            assert everything(tmp_path) == ALL

    def test_two_that_say_the_same_are_one(self, tmp_path, recwarn):
        pictures(tmp_path)
        records(tmp_path / "metadata.jsonl", IMAGES)
        text(tmp_path / "captions.txt", "image,caption", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        assert everything(tmp_path) == ALL and not len(recwarn)

    def test_a_damaged_file_beside_a_whole_one_is_named(self, tmp_path):
        pictures(tmp_path)
        text(tmp_path / "metadata.jsonl", '{"file_name": "g0.jp')
        text(tmp_path / "captions.txt", "image,caption", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        with pytest.warns(UserWarning, match="metadata.jsonl, line 1: expected .*; captions.txt is read in its place"):
            assert everything(tmp_path) == ALL

    def test_other_tables_and_texts_are_passed_over(self, tmp_path):
        pictures(tmp_path)
        records(tmp_path / "metadata.jsonl", IMAGES)
        text(tmp_path / "scores.csv", "name,score", "g0.jpg,0.5")
        text(tmp_path / "ExpertAnnotations.txt", "g0.jpg\tg1.jpg#2\t1\t1\t1")
        text(tmp_path / "README.md", "# Mine")
        text(tmp_path / "config.json", '{"a": 1}')
        text(tmp_path / "tokenizer.json", "{}")
        text(tmp_path / "latin.csv", "café", encoding="latin-1")
        assert everything(tmp_path) == ALL

    def test_numbers_for_pictures_are_no_captions(self, tmp_path):
        """A table of another name has to say in a header that it has captions."""
        pictures(tmp_path)
        text(tmp_path / "scores.csv", *(f"{image},0.5" for image in IMAGES))
        refused(tmp_path, "no captions for 12 images; .*scores.csv, line 1: expected a header")
        text(tmp_path / "captions.csv", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        assert everything(tmp_path) == ALL

    def test_half_of_the_pictures_in_one_layout_and_half_in_another(self, tmp_path):
        pictures(tmp_path)
        records(tmp_path / "metadata.jsonl", IMAGES[:6])
        for image in IMAGES[6:]:
            text((tmp_path / image).with_suffix(".txt"), SAID[image])
        refused(tmp_path, "6 of 12 images have no caption in metadata.jsonl: g10.jpg, ")

    def test_flickrs_lemmas_are_not_its_captions(self, tmp_path):
        pictures(tmp_path / "Flicker8k_Dataset")
        text(tmp_path / "Flickr8k.lemma.token.txt", *(f"{image}#0\tbe" for image in IMAGES))
        text(tmp_path / "Flickr8k.token.txt", *(f"{image}#0\t{SAID[image]}" for image in IMAGES))
        assert everything(tmp_path) == ALL


class TestFindingImages:
    def test_a_linked_folder_is_followed_and_a_circle_ends(self, tmp_path):
        pictures(tmp_path / "elsewhere")
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "Images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (folder / "again").symlink_to(folder, target_is_directory=True)
        (folder / "self").symlink_to(folder / "self")
        (folder / "gone").symlink_to(tmp_path / "nothing")
        text(folder / "captions.txt", "image,caption", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        assert everything(folder) == ALL

    def test_a_link_to_what_is_around_the_folder_is_not_followed(self, tmp_path):
        pictures(tmp_path / "others")
        picture(tmp_path / "mine" / "g0.jpg", 0)
        for name, target in (("up", ".."), ("root", "/"), ("here", ".")):
            (tmp_path / "mine" / name).symlink_to(target, target_is_directory=True)
        text(tmp_path / "mine" / "captions.txt", "image,caption", "g0.jpg,a dog")
        assert everything(tmp_path / "mine") == {0: ["a dog"]}

    def test_folders_may_lie_deep(self, tmp_path):
        deep = tmp_path.joinpath(*["d"] * 1200)
        for folder in reversed([deep, *deep.parents]):
            folder.mkdir(exist_ok=True)
        picture(deep / "g0.jpg", 0)
        text(tmp_path / "captions.txt", "image,caption", "g0.jpg,a dog")
        assert everything(tmp_path) == {0: ["a dog"]}
        (deep / "g0.jpg").unlink()
        for folder in [deep, *deep.parents][:1200]:  # pytest, which deletes old folders, cannot go as deep
            folder.rmdir()

    def test_a_picture_by_the_name_of_a_second_link_is_the_same_picture(self, tmp_path):
        pictures(tmp_path / "real")
        (tmp_path / "Images").symlink_to(tmp_path / "real", target_is_directory=True)
        records(tmp_path / "metadata.jsonl", [f"Images/{image}" for image in IMAGES])
        assert everything(tmp_path) == ALL
        lines = [
            {"file_name": f"{f}/g0.jpg", "text": "a", "split": s} for f, s in (("Images", "test"), ("real", "train"))
        ]
        pictures_elsewhere = [image for image in IMAGES if image != "g0.jpg"]
        for image in pictures_elsewhere:
            (tmp_path / "real" / image).unlink()
        text(tmp_path / "metadata.jsonl", *map(json.dumps, lines))
        refused(tmp_path, "is in test and in train")

    @pytest.mark.parametrize(
        ("written", "stored"), [("Zo\u00eb.jpg", "Zoe\u0308.jpg"), ("Zoe\u0308.jpg", "Zo\u00eb.jpg")]
    )
    def test_composed_and_decomposed_names_are_one(self, tmp_path, written, stored):
        picture(tmp_path / stored, 0)
        for path, line in (("captions.txt", f"{written},a dog"), ("a.token", f"{written}#0\ta dog")):
            found = text(tmp_path / path, line)
            assert everything(tmp_path) == {0: ["a dog"]}
            found.unlink()

    def test_two_files_whose_names_differ_in_composition_alone(self, tmp_path):
        names = ["Zo\u00eb.jpg", "Zoe\u0308.jpg"]
        pictures(tmp_path, names)
        text(tmp_path / "metadata.jsonl", *(json.dumps({"file_name": i, "text": str(n)}) for n, i in enumerate(names)))
        assert everything(tmp_path) == {0: ["0"], 1: ["1"]}

    @pytest.mark.parametrize(
        ("written", "stored"),
        [
            ("./images/g0.jpg", "images/g0.jpg"),
            ("images//g0.jpg", "images/g0.jpg"),
            ("images\\g0.jpg", "images/g0.jpg"),
            ("Images/g0.jpg", "images/g0.jpg"),
            ("g0.jpg", "images/g0.jpg"),
            ("g0.jpg", "G0.JPG"),
            ("images/../g0.jpg", "g0.jpg"),
            (" g0.jpg ", "g0.jpg"),
            ("my dog 1.jpg", "my dog 1.jpg"),
            ("a, b.jpg", "a, b.jpg"),
            ("a#1.jpg", "a#1.jpg"),
            (".hidden.jpg", ".hidden.jpg"),
            ("100%.jpg", "100%.jpg"),
            ("[a] (1).jpg", "[a] (1).jpg"),
            ("no suffix", "no suffix"),
            ("a.JPEG.jpg.1", "a.JPEG.jpg.1"),
        ],
    )
    def test_one_spelling_and_another(self, tmp_path, written, stored):
        picture(tmp_path / stored, 0)
        text(tmp_path / "metadata.jsonl", json.dumps({"file_name": written, "text": "a dog"}))
        assert everything(tmp_path) == {0: ["a dog"]}

    def test_two_files_of_one_name_that_differ_are_refused(self, tmp_path):
        picture(tmp_path / "a" / "g0.jpg", 0), picture(tmp_path / "b" / "g0.jpg", 1)
        text(tmp_path / "captions.txt", "image,caption", "g0.jpg,a dog")
        refused(tmp_path, r"line 2: image g0.jpg could be a/g0.jpg or b/g0.jpg; give its path")

    def test_two_copies_of_one_name_are_one(self, tmp_path):
        picture(tmp_path / "a" / "g0.jpg", 0), picture(tmp_path / "a" / "a" / "g0.jpg", 0)
        text(tmp_path / "captions.txt", "image,caption", "g0.jpg,a dog")
        assert everything(tmp_path) == {0: ["a dog"]}

    @pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "images/../../secret.jpg", "C:\\secret.jpg"])
    def test_names_that_lead_out_of_the_folder_are_refused(self, tmp_path, name):
        picture(tmp_path / "secret.jpg", 9)
        picture(tmp_path / "mine" / "g0.jpg", 0)
        for path, line in (
            ("metadata.jsonl", json.dumps({"file_name": name, "text": "x"})),
            ("captions.txt", f"image,caption\n{name},x"),
            ("all.token", f"{name}#0\tx"),
            (
                "dataset.json",
                json.dumps({"images": [{"filename": name, "split": "train", "sentences": [{"raw": "x"}]}]}),
            ),
        ):
            found = text(tmp_path / "mine" / path, line)
            refused(tmp_path / "mine", "leads out of the folder")
            found.unlink()

    def test_an_absolute_name_inside_the_folder_is_read(self, tmp_path):
        path = picture(tmp_path / "g0.jpg", 0)
        text(tmp_path / "metadata.jsonl", json.dumps({"file_name": str(path), "text": "a dog"}))
        assert everything(tmp_path) == {0: ["a dog"]}

    def test_relative_sources_and_homes(self, tmp_path, monkeypatch):
        pictures(tmp_path / "a@b [1] 50%" / "x::y")
        records(tmp_path / "a@b [1] 50%" / "metadata.jsonl", IMAGES)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for source in ("a@b [1] 50%", "./a@b [1] 50%/", "~/a@b [1] 50%", Path("a@b [1] 50%")):
            assert everything(source) == ALL
        assert set_names("a@b [1] 50%", "~/a@b [1] 50%") == ["a_b_1_50", "a_b_1_50_2"]

    @pytest.mark.parametrize("source", ["/no/such", "~no-such-user/x", "a\0b", "no such folder", "x" * 5000, ""])
    def test_no_such_source(self, source):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            captioned_images(source, "train")


class TestNothingLost:
    def test_pictures_without_captions_are_counted(self, tmp_path):
        pictures(tmp_path)
        records(tmp_path / "metadata.jsonl", IMAGES[:5])
        message = r"7 of 12 images have no caption in metadata.jsonl: g10.jpg, g11.jpg, g5.jpg, g6.jpg, g7.jpg, \.\.\."
        refused(tmp_path, message)
        with pytest.warns(UserWarning, match=message):
            assert everything(tmp_path, skip_unusable=True) == {n: ALL[n] for n in range(5)}

    def test_a_text_missing_beside_one_picture(self, tmp_path):
        pictures(tmp_path)
        for image in IMAGES[1:]:
            text((tmp_path / image).with_suffix(".txt"), SAID[image])
        refused(tmp_path, r"1 of 12 images have no caption in g1.txt and 10 more: g0.jpg")

    def test_an_empty_text_beside_a_picture(self, tmp_path):
        pictures(tmp_path)
        for image in IMAGES:
            text((tmp_path / image).with_suffix(".txt"), SAID[image] if image != "g3.jpg" else " ")
        refused(tmp_path, r"1 of 12 images have no caption in \S+ and 11 more: g3.jpg")

    @pytest.mark.parametrize(
        ("said", "got"), [("", r"\[''\]"), ("  ", r"\[''\]"), ([], r"\[\]"), (["a", ""], r"\['a', ''\]")]
    )
    def test_an_empty_caption_is_refused_or_left_out(self, tmp_path, said, got):
        pictures(tmp_path, IMAGES[:2])
        lines = [
            json.dumps({"file_name": i, "text": t, "split": "train"}) for i, t in (("g0.jpg", said), ("g1.jpg", "b"))
        ]
        text(tmp_path / "metadata.jsonl", *lines)
        refused(tmp_path, rf"(metadata.jsonl, line 1: expected captions, none of them empty, got {got}|g0.jpg)")
        with pytest.warns(UserWarning):
            kept = everything(tmp_path, skip_unusable=True)
        assert kept == ({0: ["a"], 1: ["b"]} if said == ["a", ""] else {1: ["b"]})

    def test_a_split_that_is_no_text_or_empty_is_refused(self, tmp_path):
        pictures(tmp_path, IMAGES[:1])
        for split in ("", "x", 3, ["train"], True):
            text(tmp_path / "metadata.jsonl", json.dumps({"file_name": "g0.jpg", "text": "a", "split": split}))
            refused(tmp_path, r"line 1: no split is called .*; expected one of train, ")

    def test_one_picture_in_two_splits_by_two_spellings(self, tmp_path):
        picture(tmp_path / "g0.jpg", 0)
        lines = [{"file_name": i, "text": "a", "split": s} for i, s in (("g0.jpg", "train"), ("./g0.jpg", "test"))]
        text(tmp_path / "metadata.jsonl", *map(json.dumps, lines))
        refused(tmp_path, "line 2: image g0.jpg is in test and in train")
        with pytest.warns(UserWarning, match="1 images are in two splits: g0.jpg; left out of the earlier"):
            assert whole(tmp_path, skip_unusable=True) == {0: (["a", "a"], "test")}

    def test_copies_of_a_picture_in_two_splits(self, tmp_path):
        picture(tmp_path / "a.jpg", 0), picture(tmp_path / "b.jpg", 0), picture(tmp_path / "c.jpg", 1)
        homes = (("a.jpg", "train"), ("b.jpg", "test"), ("c.jpg", "train"))
        text(tmp_path / "metadata.jsonl", *(json.dumps({"file_name": i, "text": i, "split": s}) for i, s in homes))
        refused(tmp_path, "image b.jpg, which is the same picture as a.jpg, is in test and in train")
        with pytest.warns(UserWarning, match="1 images are in two splits: a.jpg; left out of the earlier"):
            assert whole(tmp_path, skip_unusable=True) == {0: (["b.jpg"], "test"), 1: (["c.jpg"], "train")}
        assert len(captioned_images(tmp_path, "all")) == 3

    def test_copies_in_a_set_without_splits_stay_together(self, tmp_path):
        names = ["d.jpg", "e.jpg", "o.jpg"]
        for name in names:
            picture(tmp_path / name, 0)
        text(tmp_path / "captions.txt", "image,caption", *(f"{name},a" for name in names))
        assert {split_by_id(name) for name in names} == set(SPLITS)
        assert captioned_images(tmp_path, "test")["id"][:] == names

    def test_what_a_split_file_names_has_to_be_there(self, tmp_path):
        pictures(tmp_path)
        text(tmp_path / "captions.txt", "image,caption", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
            mine = [image for image in IMAGES if HOME[image] == split]
            text(tmp_path / f"Flickr_8k.{word}Images.txt", *mine, *(["a b.jpg", "c.jpg"] if word == "dev" else []))
        refused(tmp_path, r"devImages.txt: 2 images \(a b.jpg, c.jpg\) have no captions in captions.txt")
        with pytest.warns(UserWarning, match="have no captions in captions.txt; left out"):
            assert whole(tmp_path, skip_unusable=True) == AT_HOME

    @pytest.mark.parametrize("form", ["{stem}.jpg", "{stem}", "./images/{stem}.jpg", "images\\{stem}.jpg"])
    def test_lists_of_splits_by_other_names(self, tmp_path, form):
        """As Flickr30k Entities has them: train.txt, val.txt and test.txt, of names or numbers."""
        pictures(tmp_path / "images")
        text(tmp_path / "captions.txt", "image,caption", *(f'{image},"{SAID[image]}"' for image in IMAGES))
        for split in SPLITS:
            mine = [form.format(stem=Path(image).stem) for image in IMAGES if HOME[image] == split]
            text(tmp_path / "lists" / f"{split}.txt", *mine)
        assert whole(tmp_path) == AT_HOME

    def test_one_list_in_two_folders(self, tmp_path):
        pictures(tmp_path, IMAGES[:2])
        text(tmp_path / "captions.txt", "g0.jpg,a", "g1.jpg,b")
        for folder in "ab":
            text(tmp_path / folder / "trainImages.txt", "g0.jpg", "g1.jpg")
        assert whole(tmp_path) == {0: (["a"], "train"), 1: (["b"], "train")}

    def test_split_files_with_blanks_and_paths(self, tmp_path):
        picture(tmp_path / "images" / "my dog 1.jpg", 0), picture(tmp_path / "images" / "1.jpg", 1)
        text(tmp_path / "captions.txt", "my dog 1.jpg,a", "1.jpg,b")
        text(tmp_path / "trainImages.txt", "my dog 1.jpg  ", "", end="\r\n")
        text(tmp_path / "testImages.txt", "images/1.jpg")
        assert whole(tmp_path) == {0: (["a"], "train"), 1: (["b"], "test")}


class TestTables:
    def written(self, folder: Path, *lines: str, images="abc", name="captions.txt", **form) -> Path:
        pictures(folder, [f"{image}.jpg" for image in images])
        text(folder / name, *lines, **form)
        return folder

    def test_without_a_header_the_first_caption_counts(self, tmp_path):
        assert everything(self.written(tmp_path, "a.jpg,one", "b.jpg,two, and more", "c.jpg,three")) == {
            0: ["one"],
            1: ["two, and more"],
            2: ["three"],
        }

    def test_without_a_header_and_with_numbers(self, tmp_path):
        lines = ["a.jpg| 0| one", "b.jpg| 0| two", "c.jpg| 0| three | four"]
        assert everything(self.written(tmp_path, *lines, name="results.csv")) == {
            0: ["one"],
            1: ["two"],
            2: ["three | four"],
        }

    def test_a_header_that_nobody_knows_is_refused(self, tmp_path):
        refused(
            self.written(tmp_path, "pic,words", "a.jpg,one"), "captions.txt, line 1: expected a header with a column"
        )

    @pytest.mark.parametrize("lone", ['b.jpg,2,"a sign reads stop .', 'b.jpg,2,"a sign', '"b.jpg,2,a sign'])
    def test_a_quote_that_never_closes_is_refused_with_its_line(self, tmp_path, lone):
        for rest in (["c.jpg,0,three"], ['c.jpg,0,"three"'], []):
            lines = ["image,number,caption", "a.jpg,0,one", lone, *rest]
            refused(
                self.written(tmp_path, *lines, images="ab"),
                r"captions.txt, line 3: a quotation mark is not",
            )

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('a.jpg,"stop" says the sign', '"stop" says the sign'),
            ('a.jpg,a sign says "stop", twice', 'a sign says "stop", twice'),
            ('a.jpg,"Bob, the dog", runs', '"Bob, the dog", runs'),
            ('a.jpg,"a ""big"" dog, here"', 'a "big" dog, here'),
            ('"a.jpg","one"', "one"),
            ('a.jpg,"one\ntwo"', "one\ntwo"),
            ("a.jpg,it's 5'9\" tall", "it's 5'9\" tall"),
            ("a.jpg,one ,two;three|four\tfive", "one ,two;three|four\tfive"),
            ("a.jpg,   one   ", "one"),
            ("a.jpg#3,one", "one"),
            ("a.jpg,one\u2028two\x85three\x0cfour", "one\u2028two\x85three\x0cfour"),
        ],
    )
    def test_quotation_marks_and_delimiters_in_captions(self, tmp_path, line, said):
        assert everything(self.written(tmp_path, "image,caption", line, images="a")) == {0: [said]}
        assert everything(self.written(tmp_path, line, images="a")) == {0: [said]}

    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    def test_any_delimiter(self, tmp_path, delimiter):
        self.written(tmp_path)
        said = ["one, two", 'three; "four"', "five | six\tseven"]
        with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerows([("Image Name", "Caption"), *zip(("a.jpg", "b.jpg", "c.jpg"), said, strict=True)])
        (tmp_path / "captions.txt").unlink()
        assert everything(tmp_path) == {n: [one] for n, one in enumerate(said)}

    def test_columns_in_any_order_and_more_of_them(self, tmp_path):
        lines = [
            ",id,caption,split,image,",
            '0,7,"one, two",Train,a.jpg,',
            "1,8,two,TEST,b.jpg,",
            "2,9,x,Validation,c.jpg,",
        ]
        assert whole(self.written(tmp_path, *lines, name="mine.csv")) == {
            0: (["one, two"], "train"),
            1: (["two"], "test"),
            2: (["x"], "val"),
        }

    @pytest.mark.parametrize(
        ("lines", "match"),
        [
            (
                ["image,caption,split", "a.jpg,one"],
                "line 2: expected image, number, caption, got",
            ),
            (["image,caption,text", "a.jpg,one,two"], "line 1: captions in two columns, caption and text"),
            (["image,caption,caption", "a.jpg,one,two"], "line 1: two columns are called caption"),
            (["image,caption,split", "a.jpg,one,three,train"], "line 2: expected"),
            (["image,caption", ",one"], "line 2: expected an image's name, got ''"),
        ],
    )
    def test_what_does_not_fit_its_header(self, tmp_path, lines, match):
        refused(self.written(tmp_path, *lines, images="a"), match)

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_marked_encodings(self, tmp_path, encoding):
        folder = self.written(tmp_path, "image,caption", "a.jpg,café", images="a", encoding=encoding, end="\r\n")
        assert everything(folder) == {0: ["café"]}

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-16-be"])
    def test_other_encodings_are_refused_with_the_line(self, tmp_path, encoding):
        for name in ("captions.txt", "a.token", "metadata.jsonl", "a.txt", "metadata.csv"):
            (tmp_path / name).mkdir()
            self.written(tmp_path / name, "image,caption", "a.jpg,café", images="a", encoding=encoding, name=name)
            refused(tmp_path / name, rf"{name}, line \d: expected text in UTF-8")

    def test_nul_bytes_and_endless_fields_are_refused(self, tmp_path):
        refused(self.written(tmp_path, "image,caption", "a.jpg,o\0ne", images="a"), "line 2: expected text in UTF-8")
        refused(self.written(tmp_path, "image,caption", f"a.jpg,{'x' * 200_000}", images="a"), "line 2: field larger")

    def test_token_files_by_any_name(self, tmp_path):
        lines = ["a.jpg#0\tone\ttwo", "a.jpg#1\tthree", "b.jpg#0\tfour", "c.jpg#0\tfive"]
        said = {0: ["one\ttwo", "three"], 1: ["four"], 2: ["five"]}
        for name in ("captions.txt", "my_tokens.txt", "results_2024.token"):
            assert everything(self.written(tmp_path, *lines, name=name)) == said
            (tmp_path / name).unlink()

    def test_keys_and_columns_that_are_there_twice(self, tmp_path):
        pictures(tmp_path, ["a.jpg"])
        text(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "text": "one", "text": "two"}')
        refused(tmp_path, "metadata.jsonl, line 1: the key 'text' is there twice")
        text(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "text": "one", "caption": "two"}')
        refused(tmp_path, "metadata.jsonl, line 1: captions in two columns, caption and text")

    @pytest.mark.parametrize(
        "line", ["[" * 100_000, "null", '"a"', '{"file_name": 3, "text": "a"}', '{"file_name": "a.jpg"}']
    )
    def test_json_of_another_kind(self, tmp_path, line):
        pictures(tmp_path, ["a.jpg"])
        text(tmp_path / "metadata.jsonl", line)
        refused(tmp_path, 'metadata.jsonl, line 1: expected {"file_name"')
        (tmp_path / "metadata.jsonl").unlink()
        text(tmp_path / "dataset.json", line)
        refused(tmp_path, 'dataset.json.*: expected {"')


class TestParquet:
    def table(self, path: Path, numbers, name=lambda n: f"g{n}.jpg", said=lambda n: SAID[IMAGES[n]], **columns) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {"image": [n if n is None else {"bytes": content(n), "path": None} for n in numbers]}
        rows |= {"text": [said(n) for n in numbers]} | ({"filename": [name(n) for n in numbers]} if name else {})
        pq.write_table(pa.table(rows | columns), path, row_group_size=5)
        return path

    @pytest.mark.parametrize("where", ["me@home/a [1] 50%.parquet", "mine/data/train-0-of-1.parquet", "x y/z.PARQUET"])
    def test_a_file_a_folder_and_a_relative_path(self, tmp_path, monkeypatch, where):
        path = self.table(tmp_path / where, range(COUNT))
        monkeypatch.chdir(tmp_path)
        for source in (path, path.parent, where, where.partition("/")[0]):
            assert everything(source, cache_dir=tmp_path / "cache") == ALL

    def test_shards_of_splits(self, tmp_path):
        for word, split in (("train", "train"), ("validation", "val"), ("test", "test")):
            mine = [number for number, image in enumerate(IMAGES) if HOME[image] == split]
            for shard in range(2):
                self.table(tmp_path / "data" / f"{word}-0000{shard}-of-00002.parquet", mine[shard::2])
        text(tmp_path / "README.md", "# Mine")
        assert whole(tmp_path, cache_dir=tmp_path / "c") == AT_HOME

    def test_a_shard_of_no_split_beside_others_is_refused(self, tmp_path):
        self.table(tmp_path / "train.parquet", range(5)), self.table(tmp_path / "more.parquet", range(5, 9))
        refused(tmp_path, "train.parquet is a split by its name, more.parquet is not; rename one")

    def test_row_numbers_are_no_names(self, tmp_path):
        """A row a caption, and the number of the row as id: the pictures decide."""
        numbers = [number for number in range(COUNT) for _ in range(5)]
        path = self.table(tmp_path / "a.parquet", numbers, name=None, id=list(range(5 * COUNT)))
        assert everything(path, cache_dir=tmp_path / "c") == {number: said * 5 for number, said in ALL.items()}

    @pytest.mark.parametrize("names", [[None] * 3, ["same.jpg"] * 3, [None, "a.jpg", "a.jpg"]])
    def test_names_that_are_null_or_repeated_are_not_trusted(self, tmp_path, names):
        path = self.table(tmp_path / "a.parquet", range(3), name=names.__getitem__)
        assert everything(path, cache_dir=tmp_path / "c") == {number: ALL[number] for number in range(3)}

    def test_a_picture_that_is_null_is_named(self, tmp_path):
        path = self.table(tmp_path / "a.parquet", [0, None, 2], name=lambda n: f"g{n}", said=str, split=["train"] * 3)
        refused(path, r"1 of 3 images are missing or unreadable: gNone \(missing\)", cache_dir=tmp_path / "c")
        with pytest.warns(UserWarning, match="left out"):
            assert everything(path, cache_dir=tmp_path / "c", skip_unusable=True) == {0: ["0"], 2: ["2"]}

    def test_a_caption_that_is_null(self, tmp_path):
        path = self.table(tmp_path / "a.parquet", range(3), said=lambda n: "x" if n else None, split=["train"] * 3)
        refused(path, r"a.parquet, row 0: expected captions, none of them empty, got \[\]", cache_dir=tmp_path / "c")

    def test_bytes_as_they_are(self, tmp_path):
        pq.write_table(pa.table({"image": [content(0), content(1)], "caption": ["a", "b"]}), tmp_path / "a.parquet")
        assert everything(tmp_path, cache_dir=tmp_path / "c") == {0: ["a"], 1: ["b"]}

    def test_names_of_pictures_in_the_folder(self, tmp_path):
        pictures(tmp_path / "images")
        names = [f"images/{image}" for image in IMAGES]
        pq.write_table(pa.table({"file_name": names, "text": list(SAID.values())}), tmp_path / "metadata.parquet")
        assert everything(tmp_path) == ALL

    def test_a_path_in_the_table_stays_in_the_folder(self, tmp_path):
        picture(tmp_path / "secret.jpg", 9), picture(tmp_path / "mine" / "g0.jpg", 0)
        for path, match in ((str(tmp_path / "secret.jpg"), "leads out of the folder"), ("../secret.jpg", "leads out")):
            image = [{"bytes": None, "path": path}]
            pq.write_table(pa.table({"image": image, "text": ["a"]}), tmp_path / "mine" / "a.parquet")
            refused(tmp_path / "mine", match, cache_dir=tmp_path / "c")

    @pytest.mark.parametrize("damage", [b"", b"PAR1", b"not parquet at all"])
    def test_what_is_no_parquet(self, tmp_path, damage):
        (tmp_path / "a.parquet").write_bytes(damage)
        refused(tmp_path, "a.parquet: expected a parquet file with images and captions")

    def test_a_damaged_page_is_refused(self, tmp_path):
        path = self.table(tmp_path / "a.parquet", range(COUNT))
        whole = bytearray(path.read_bytes())
        whole[4:400] = bytes(396)
        path.write_bytes(whole)
        refused(path, "a.parquet: ", cache_dir=tmp_path / "c")

    def test_other_parquet_beside_pictures_is_passed_over(self, tmp_path):
        pictures(tmp_path)
        records(tmp_path / "metadata.jsonl", IMAGES)
        pq.write_table(pa.table({"key": ["a"], "embedding": [[0.5, 0.5]]}), tmp_path / "embeddings.parquet")
        assert everything(tmp_path) == ALL

    def test_pictures_beside_a_set_in_parquet_are_counted(self, tmp_path):
        self.table(tmp_path / "data" / "train.parquet", range(COUNT))
        picture(tmp_path / "preview.png", 77)
        with pytest.warns(UserWarning, match=r"data/train.parquet is read, 1 images beside it are not: preview.png"):
            assert everything(tmp_path, cache_dir=tmp_path / "c") == ALL

    def test_pictures_in_parquet_and_the_same_number_beside_it(self, tmp_path):
        pictures(tmp_path / "images")
        records(tmp_path / "metadata.jsonl", IMAGES)
        self.table(tmp_path / "x.parquet", range(COUNT), said=str)
        with pytest.warns(UserWarning, match="metadata.jsonl is read, 12 rows of pictures in parquet are not"):
            assert everything(tmp_path) == ALL

    def test_a_damaged_shard_beside_whole_ones_is_refused(self, tmp_path):
        self.table(tmp_path / "train-0.parquet", range(5)), self.table(tmp_path / "train-1.parquet", range(5, 9))
        (tmp_path / "train-1.parquet").write_bytes((tmp_path / "train-1.parquet").read_bytes()[:-9])
        refused(tmp_path, "train-1.parquet: expected a parquet file with images and captions")
        pq.write_table(pa.table({"image": [content(9)], "words": ["a"]}), tmp_path / "train-1.parquet")
        refused(tmp_path, "train-1.parquet: expected the columns image, and")

    def test_a_table_without_rows(self, tmp_path):
        self.table(tmp_path / "x.parquet", [0])
        pq.write_table(pq.read_table(tmp_path / "x.parquet").slice(0, 0), tmp_path / "x.parquet")
        refused(tmp_path, "x.parquet: holds no rows")

    @pytest.mark.parametrize("size", [0, 10, 300])
    def test_a_cut_copy_in_the_cache_is_made_again(self, tmp_path, size):
        path = self.table(tmp_path / "a.parquet", range(COUNT))
        assert everything(path, cache_dir=tmp_path / "c") == ALL
        for copy in (tmp_path / "c").rglob("*.arrow"):
            copy.write_bytes(copy.read_bytes()[:size])
        with pytest.warns(UserWarning, match="made again"):
            assert everything(path, cache_dir=tmp_path / "c") == ALL

    def test_a_file_written_anew_is_read_anew(self, tmp_path):
        path = self.table(tmp_path / "a.parquet", range(3))
        assert len(everything(path, cache_dir=tmp_path / "c")) == 3
        self.table(tmp_path / "a.parquet", range(3, 9))
        os.utime(path, ns=(1, 1))
        assert set(everything(path, cache_dir=tmp_path / "c")) == set(range(3, 9))


class TestShares:
    @pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), float("inf")])
    def test_a_share_is_a_fraction(self, tmp_path, share):
        pictures(tmp_path)
        records(tmp_path / "metadata.jsonl", IMAGES)
        for source in (tmp_path, "scenes/fluent/8k"):
            refused(source, "share: expected a fraction above 0 and at most 1, got", share=share)

    def test_a_set_is_not_compared_with_itself_by_another_path(self, tmp_path):
        pictures(tmp_path / "mine")
        records(tmp_path / "mine" / "metadata.jsonl", IMAGES)
        (tmp_path / "link").symlink_to(tmp_path / "mine", target_is_directory=True)
        count = len(captioned_images(tmp_path / "mine", "train"))
        for same in (f"{tmp_path}/mine/", f"{tmp_path}/mine/../mine", str(tmp_path / "link")):
            assert len(captioned_images(tmp_path / "mine", "train", without=same)) == count

    def test_that_all_of_a_set_is_judged_elsewhere_is_an_error(self, tmp_path):
        for name in ("mine", "judged"):
            pictures(tmp_path / name)
            records(tmp_path / name / "metadata.jsonl", IMAGES, split="train" if name == "mine" else "test")
        refused(tmp_path / "mine", "all images of split 'train' are in the test split of", without=tmp_path / "judged")


# ---------------------------------------------------------------------------------------------- found by strangers


def beside(folder: Path, numbers) -> None:
    for number in numbers:
        picture(folder / f"g{number}.jpg", number)
        text(folder / f"g{number}.txt", SAID[f"g{number}.jpg"])


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train2017", "test2017"),
        ("training_set/cats", "test_set/cats"),
        ("train_images", "test_images"),
        ("images-train", "images-test"),
        ("training/train", "training/test"),
        ("dev/train", "dev/test"),
    ],
)
def test_folders_of_splits_by_other_names(tmp_path, train, test):
    beside(tmp_path / train, range(8))
    beside(tmp_path / test, range(8, COUNT))
    splits = {number: split for number, (_, split) in whole(tmp_path).items()}
    assert splits == {number: "train" if number < 8 else "test" for number in range(COUNT)}


@pytest.mark.parametrize(("train", "test"), [("split=train", "split=test"), ("default/partial-train", "default/test")])
def test_folders_of_splits_in_parquet_by_other_names(tmp_path, train, test):
    for folder, numbers in ((train, range(8)), (test, range(8, COUNT))):
        table = {"image": [content(number) for number in numbers], "caption": [SAID[f"g{n}.jpg"] for n in numbers]}
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table(table), tmp_path / folder / "0.parquet")
    splits = {number: split for number, (_, split) in whole(tmp_path, cache_dir=tmp_path / "kept").items()}
    assert splits == {number: "train" if number < 8 else "test" for number in range(COUNT)}


@pytest.mark.parametrize("names", ["training testing", "train_images test_images", "train_list test_list"])
def test_lists_of_splits_by_long_names(tmp_path, names):
    beside(tmp_path / "img", range(COUNT))
    first, second = names.split()
    text(tmp_path / f"{first}.txt", *IMAGES[:8])
    text(tmp_path / f"{second}.txt", *IMAGES[8:])
    splits = {number: split for number, (_, split) in whole(tmp_path).items()}
    assert splits == {number: "train" if number < 8 else "test" for number in range(COUNT)}


def test_splits_that_are_not_read_are_named(tmp_path):
    beside(tmp_path, range(COUNT))
    text(tmp_path / "splits.json", json.dumps({"train": IMAGES[:8], "test": IMAGES[8:]}))
    with pytest.warns(UserWarning, match=r"splits\.json is not read"):
        captioned_images(tmp_path, "train")


@pytest.mark.parametrize("column", ["Split", "subset"])
def test_columns_of_splits_by_other_names(tmp_path, column):
    pictures(tmp_path)
    text(tmp_path / "metadata.jsonl", *(json.dumps({"file_name": i, "text": SAID[i], column: HOME[i]}) for i in IMAGES))
    assert whole(tmp_path) == AT_HOME


@pytest.mark.parametrize("write", [str, json.dumps])
def test_lists_of_captions_in_a_cell(tmp_path, write):
    pictures(tmp_path)
    with open(tmp_path / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "caption"], *([i, write([SAID[i], "it's two"])] for i in IMAGES)])
    assert everything(tmp_path) == {number: [*said, "it's two"] for number, said in ALL.items()}


def test_a_list_without_commas_is_refused(tmp_path):
    pictures(tmp_path)
    text(tmp_path / "captions.csv", "image,caption", *(f"{image},['one' 'two']" for image in IMAGES))
    refused(tmp_path, "expected commas between the captions")


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["version https://git-lfs.github.com/spec/v1", "size 21"], "run git lfs pull"),
        (["a dog", "Negative prompt: blurry", "Steps: 20, Sampler: Euler a"], "a program that draws"),
        (['{"caption": "a dog"}'], "got JSON"),
        (["{\\rtf1\\ansi a dog}"], "got a document"),
        (["<!DOCTYPE html>", "404"], "got a document"),
    ],
)
def test_what_is_no_caption_beside_a_picture_is_refused(tmp_path, lines, what):
    beside(tmp_path, range(2))
    text(tmp_path / "g1.txt", *lines)
    refused(tmp_path, what)


def test_a_picture_behind_a_broken_link_is_missing(tmp_path):
    beside(tmp_path, range(COUNT))
    (tmp_path / "g3.jpg").unlink()
    (tmp_path / "g3.jpg").symlink_to("../blobs/g3")
    with pytest.raises(InputError, match=r"g3\.jpg \(missing\)"):
        captioned_images(tmp_path, "all")


@pytest.mark.parametrize("name", ["a\nb.jpg", "a.jpg "])
def test_odd_names_of_pictures_are_read(tmp_path, name):
    beside(tmp_path, range(2))
    picture(tmp_path / name, 2)
    text(tmp_path / f"{name.partition('.')[0]}.txt", "odd")
    assert len(captioned_images(tmp_path, "all")) == 3


def test_a_text_beside_what_is_no_picture_by_its_name_is_refused(tmp_path):
    beside(tmp_path, range(2))
    text(tmp_path / "a.psd", "8BPS")
    text(tmp_path / "a.txt", "a drawing")
    refused(tmp_path, r"no pictures by their names: a\.psd", split="all")
    with pytest.warns(UserWarning, match=r"a\.psd; left out"):
        assert len(captioned_images(tmp_path, "all", skip_unusable=True)) == 2


def test_byte_order_marks_between_lines_and_texts_that_cannot_be_seen(tmp_path):
    pictures(tmp_path)
    text(tmp_path / "metadata.jsonl", *("\ufeff" + json.dumps({"file_name": i, "text": SAID[i]}) for i in IMAGES))
    assert everything(tmp_path) == ALL
    text(tmp_path / "metadata.jsonl", *(json.dumps({"file_name": i, "text": "\u200b"}) for i in IMAGES))
    refused(tmp_path, "12 of 12 images have no caption")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_names_in_parquet_by_other_types(tmp_path, kind):
    pictures(tmp_path)
    table = pa.table({"file_name": pa.array(IMAGES).cast(kind), "text": list(SAID.values())})
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert everything(tmp_path) == ALL
