"""Reading text from anywhere: encodings, tables, empty captions, and that a damage never gives a wrong pair."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import captions_of as captions_in
from test_data import image_bytes, load, write, write_tar

from common.errors import DataError, UsageError
from common.sampling import read_prompts_file
from common.texts import captions_of, decode, read_records


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "cp932"])
@pytest.mark.parametrize("text", ["café “quoted”", "赤い四角\na second line"])
def test_unicode_is_read_right_and_anything_else_is_refused_by_name(encoding, text):
    try:
        content = text.encode(encoding)
    except UnicodeEncodeError:
        return
    if encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert decode(content, "here") == text
    else:
        with pytest.raises(DataError, match="here is (neither UTF-8 nor UTF-16|not UTF-8)"):
            decode(content, "here")


def test_a_broken_line_has_its_number(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 4 is no JSON"):
        read_records(file)
    assert read_records(write(file, '{"text": "a"}\n\n{"text": "b"}\n'))[1] == (f"{file}, line 3", {"text": "b"})
    with pytest.raises(DataError, match=r"b\.json is no JSON.*line 2"):
        read_records(write(tmp_path / "b.json", "[\n{,"))
    with pytest.raises(UsageError, match=r"c\.json, entry 2, text: a caption there is no text"):
        read_prompts_file(write(tmp_path / "c.json", '["a", 7]'))


def test_csv(tmp_path):
    file = tmp_path / "a.csv"
    right = [
        {"file_name": "1.png", "text": "a cat, on a mat"},
        {"file_name": "2.png", "text": 'a "dog"\nin two lines'},
    ]
    for separator in ",;\t":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["file_name", "text"], delimiter=separator)
        writer.writeheader()
        writer.writerows(right)
        assert [record for _, record in read_records(write(file, text.getvalue()))] == right
    spaced = write(file, 'file_name, text\n1.png, "a cat, on a mat"\n\n2.png\n')
    found = read_records(spaced)
    assert found == [
        (f"{file}, line 2", {"file_name": "1.png", "text": "a cat, on a mat"}),
        (f"{file}, line 4", {"file_name": "2.png", "text": None}),
    ]
    with pytest.raises(DataError, match=r'a\.csv, line 3 has 3 cells and the header 2: put text with "," in it into'):
        read_records(write(file, "file_name,text\n2.png,a dog\n1.png,a cat, on a mat\n"))
    with pytest.raises(DataError, match=r"a\.csv, line 2 is no csv"):
        read_records(write(file, 'file_name,text\n1.png,"never closed\n2.png,b\n'))
    with pytest.raises(DataError, match="names a column twice"):
        read_records(write(file, "text,text\na,b\n"))


def test_an_empty_caption_means_the_same_in_every_format(tmp_path, caplog):
    """Allowed, the empty caption, counted, and said with its place."""
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(["one", None, "three", "  "])]
    sets = {name: tmp_path / name for name in ("jsonl", "csv", "json", "pairs", "tar", "coco", "parquet")}
    for name, folder in sets.items():
        for i in range(4):
            if name not in ("tar", "parquet"):
                write(folder / f"{i}.png", image_bytes())
    write(sets["jsonl"] / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    write(sets["csv"] / "metadata.csv", "file_name,text\n0.png,one\n1.png\n2.png,three\n3.png,\n")
    write(sets["json"] / "captions.json", json.dumps(rows))
    for i, row in enumerate(rows):
        write(sets["pairs"] / f"{i}.txt", row["text"] or "")
    members = {f"{i}.png": image_bytes() for i in range(4)}
    members |= {f"{i}.json": json.dumps({"caption": row["text"]}).encode() for i, row in enumerate(rows)}
    sets["tar"].mkdir()
    write_tar(sets["tar"] / "0.tar", members)
    annotations = [{"image_id": i, "caption": row["text"]} for i, row in enumerate(rows)]
    coco = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)], "annotations": annotations}
    write(sets["coco"] / "annotations/captions_train2017.json", json.dumps(coco))
    sets["parquet"].mkdir()
    import datasets

    cells = {"image": [{"bytes": image_bytes(), "path": None}] * 4, "text": [row["text"] for row in rows]}
    datasets.Dataset.from_dict(cells).to_parquet(sets["parquet"] / "a.parquet")
    for name, folder in sets.items():
        caplog.clear()
        assert captions_in(load(folder)) == ["one", "", "three", ""], name
        assert "2 samples have no caption and train with the empty one, e.g." in caplog.text, name
    assert captions_of(["", "fine", None], "here") == ["fine"]  # beside another one it counts for nothing


def test_prompts_never_move_up(tmp_path, capsys):
    file = write(tmp_path / "p.txt", "\ufeffa\u2028cat\r\n\na dog\n\n\n".encode())
    assert read_prompts_file(file) == ["a\u2028cat", "", "a dog"]
    assert "1 empty prompts, e.g. line 2" in capsys.readouterr().out
    records = '[{"text": "a cat"}, {"text": "a dog"}]'
    assert read_prompts_file(write(tmp_path / "captions.JSON", records)) == ["a cat", "a dog"]
    assert read_prompts_file(write(tmp_path / "p.jsonl", '{"caption": "a, b"}\n')) == ["a, b"]
    assert read_prompts_file(write(tmp_path / "p.csv", "file,caption\n1.png,a cat\n")) == ["a cat"]
    for content, said in (
        (b"\n \n", "has no prompt"),
        ("café".encode("cp1252"), "p.txt is neither"),
        (b"a\0b", "zero"),
    ):
        with pytest.raises(UsageError, match=said):
            read_prompts_file(write(file, content))
    with pytest.raises(UsageError, match="no caption column"):
        read_prompts_file(write(tmp_path / "p.json", '[{"words": "a"}]'))


# Any mixture of formats, encodings, line ends and damages gives every right pair, or a sentence that names the file.

CAPTIONS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=12)
DAMAGES = st.sampled_from([None, "cut", "flip", "append"])
FORMATS = st.sampled_from(["metadata.jsonl", "metadata.csv", "captions.json", "pairs", "0.tar"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    captions=st.lists(CAPTIONS, min_size=1, max_size=4),
    kind=FORMATS,
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    damage=DAMAGES,
    place=st.floats(0, 1),
)
def test_every_right_pair_or_a_sentence_that_names_the_file(
    tmp_path_factory, captions, kind, encoding, newline, damage, place
):
    root = tmp_path_factory.mktemp("any")
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
    content = {
        "metadata.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "captions.json": json.dumps(rows, ensure_ascii=False),
    }
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["file_name", "text"])
    writer.writeheader()
    writer.writerows(rows)
    content["metadata.csv"] = table.getvalue()
    try:
        if kind == "0.tar":
            members = {row["file_name"]: numbered(i) for i, row in enumerate(rows)}
            members |= {f"{i}.txt": caption.encode(encoding) for i, caption in enumerate(captions)}
            write_tar(root / kind, members)
            damaged = root / kind
        else:
            for i in range(len(rows)):
                write(root / f"{i}.png", numbered(i))
                if kind == "pairs":
                    damaged = write(root / f"{i}.txt", captions[i].replace("\n", newline).encode(encoding))
            if kind != "pairs":
                text = content[kind] if kind == "metadata.csv" else content[kind].replace("\n", newline)
                damaged = write(root / kind, text.encode(encoding))
    except UnicodeEncodeError:
        return
    raw = bytearray(damaged.read_bytes())
    at = int(place * max(len(raw) - 1, 0))
    if damage == "cut":
        raw = raw[:at]
    elif damage == "flip" and raw:
        raw[at] ^= 0xFF
    elif damage == "append":
        raw += b"\x80\x81"
    damaged.write_bytes(raw)
    try:
        dataset = load(root)
        found = {}
        for index in range(dataset.size):
            image = dataset[index, 0, 0]
            found.setdefault(number_of(image["pixel_values"]), set()).update(dataset.captions(index))
    except DataError as error:
        assert str(root) in str(error) and "\n" not in str(error)
        assert damage is not None or encoding == "cp1252", error
        return
    clean = {i: caption.strip().replace(newline, "\n") for i, caption in enumerate(captions)}
    if damage is None:
        if encoding != "cp1252":
            assert {i: {c.replace("\r\n", "\n") for c in cs} for i, cs in found.items()} == {
                i: {caption} for i, caption in clean.items()
            }
        return
    wrong = {i: cs for i, cs in found.items() if cs != {clean[i]} and cs != {""}}
    # A damage within one caption that leaves it text can't be known; it never reaches another's.
    assert len(wrong) <= 1


def numbered(i):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def number_of(pixels):
    return round((float(pixels[0, 0, 0]) + 1) * 127.5 / 20)
