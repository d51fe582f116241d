"""Exported pictures have no metadata, and are still recognized as the same pictures."""

import io

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mgll_encoder.common.images import open_image
from mgll_encoder.common.picture_bytes import clean_copy, picture_digest, picture_digests, without_metadata

WORDS = b"Jane Roe, born 1948"


@pytest.fixture(scope="module")
def photograph(photographs):
    return min(photographs.rglob("*.jpg"))


def exif(**more):
    found = Image.Exif()
    found[0x010E] = WORDS.decode()  # ImageDescription
    for tag, value in more.items():
        found[int(tag[1:])] = value
    return found


def written(image: Image.Image, path, **how):
    image.save(path, **how)
    assert WORDS in path.read_bytes()
    return path


def test_a_jpeg_loses_its_words_and_no_pixel(photograph, tmp_path):
    image = Image.open(photograph)
    marked = written(image, tmp_path / "a.jpg", exif=exif(), comment=WORDS, xmp=WORDS, icc_profile=WORDS,
                     quality="keep", progressive=True)  # fmt: skip
    marked.write_bytes(marked.read_bytes() + WORDS)
    clean, suffix = clean_copy(marked)
    assert suffix == "jpg"
    assert WORDS not in clean
    found = Image.open(io.BytesIO(clean))
    assert not found.getexif()
    assert set(found.info) <= {
        "jfif",
        "jfif_version",
        "jfif_unit",
        "jfif_density",
        "progressive",
        "progression",
    }
    assert found.convert("RGB").tobytes() == open_image(marked).tobytes()
    assert without_metadata(clean) == clean
    (tmp_path / "b.jpg").write_bytes(clean)
    assert picture_digest(marked) == picture_digest(tmp_path / "b.jpg")


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "I;16"])
def test_a_png_loses_its_words_and_no_pixel(tmp_path, mode):
    gradient = Image.linear_gradient("L")
    image = gradient.convert("I;16") if mode == "I;16" else gradient.convert(mode)
    words = PngInfo()
    words.add_text("Patient", WORDS.decode())
    words.add_text("Comment", WORDS.decode() * 9, zip=True)
    words.add_itxt("XML:com.adobe.xmp", WORDS.decode())
    marked = written(image, tmp_path / "a.png", pnginfo=words, exif=exif(), icc_profile=WORDS)
    clean, suffix = clean_copy(marked)
    assert suffix == "png"
    found = Image.open(io.BytesIO(clean))
    found.load()
    assert not found.getexif()
    assert not [name for name in found.info if name not in ("transparency",)]
    assert WORDS not in clean
    (tmp_path / "b.png").write_bytes(clean)
    assert open_image(tmp_path / "b.png").tobytes() == open_image(marked).tobytes()
    assert picture_digest(marked) == picture_digest(tmp_path / "b.png")


def test_what_has_to_be_turned_or_is_of_another_format_becomes_a_png_of_what_models_see(photograph, tmp_path):
    image = Image.open(photograph).convert("RGB")
    turned = written(image, tmp_path / "turned.jpg", exif=exif(t274=6))
    other = written(image, tmp_path / "a.tif", exif=exif())
    for path in (turned, other):
        clean, suffix = clean_copy(path)
        assert suffix == "png"
        assert WORDS not in clean
        found = Image.open(io.BytesIO(clean))
        assert found.info == {}
        assert found.tobytes() == open_image(path).tobytes()


def test_a_picture_is_told_by_its_content_and_by_how_it_is_turned(photograph, tmp_path):
    image = Image.open(photograph)
    same = written(image, tmp_path / "same.jpg", exif=exif(), quality="keep")
    turned = written(image, tmp_path / "turned.jpg", exif=exif(t274=6), quality="keep")
    other = tmp_path / "other.jpg"
    image.point(lambda value: 255 - value).save(other)
    kept = tmp_path / "kept.jpg"
    image.save(kept, quality="keep")
    digests = picture_digests([kept, same, turned, other], "hashing")
    assert digests[kept] == digests[same]
    assert len(set(digests.values())) == 3


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xda\0\2abc"]
)
def test_what_is_damaged_or_foreign_is_left_to_the_reader(data):
    assert without_metadata(data) is None
