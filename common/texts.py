"""Text files from anywhere: captions, tables and lists of prompts, read in one way wherever they are named.

UTF-8, with or without a byte order mark, or UTF-16 with one; anything else is refused rather than read wrong. Every
DataError names the file, and the line or entry in it.
"""

import codecs
import csv
import io
import json
import logging
from collections import Counter
from pathlib import Path

from common.errors import DataError

logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
NO_CAPTION = "samples have no caption and train with the empty one"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
csv.field_size_limit(2**24)  # of a caption too; Python's own limit, 128 KiB, guards nothing here


class Notes:
    """What a reader left out or took in another way than it stands: counted, and said with an example of each."""

    def __init__(self):
        self.counts, self.examples = Counter(), {}

    def add(self, what, where, count=1):
        """what: a plural that goes on from its number, such as "images don't exist and are left out"."""
        self.counts[what] += count
        self.examples.setdefault(what, where)

    def say(self):
        for what, count in self.counts.items():
            logger.warning("%d %s, e.g. %s", count, what, self.examples[what])


def decode(content, where):
    """The text of bytes; `where` names them in the DataError of those that are no text."""
    encoding = "utf-16" if content.startswith(UTF16) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{where} is neither UTF-8 nor UTF-16 (line {line}): save it as UTF-8.") from None
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{where} is not UTF-8: it has zero bytes in line {line}; save it as UTF-8.")
    return text


def read_text(path):
    return decode(Path(path).read_bytes(), path)


def parse_json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise DataError(f"{where} is no JSON that can be read ({error.msg}: {place}).") from None
    except RecursionError:
        raise DataError(f"{where} is no JSON that can be read: it is nested too deep.") from None


def read_records(path):
    """[(where, record)] of a table: where names the line or entry; a record is a dict, or a bare caption of a list.

    By ending: .csv and .tsv, .jsonl (an object a line), .json (a list).
    """
    path = Path(path)
    kind, text = path.suffix.lower(), read_text(path)
    if kind in (".csv", ".tsv"):
        return list(_csv_records(path, text))
    if kind == ".jsonl":  # not splitlines: a caption may hold other line ends than \n
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(where, parse_json(line, where)) for where, line in lines]
    records = parse_json(text, path)
    if not isinstance(records, list):
        raise DataError(f'{path} is not a list of captions like [{{"text": "a cat"}}].')
    return [(f"{path}, entry {number}", record) for number, record in enumerate(records, 1)]


def _csv_records(path, text):
    """By the separator that its first line has most of: a comma, or a semicolon or tab, as spreadsheets write too."""
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    header, began = None, 1
    try:
        for row in rows:
            where, began = f"{path}, line {began}", rows.line_num + 1
            if not row:  # an empty line
                continue
            if header is None:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header):
                    raise DataError(f"{where} names a column twice: {', '.join(header)}.")
                continue
            if len(row) > len(header):
                raise DataError(
                    f'{where} has {len(row)} cells and the header {len(header)}: put text with "{separator}" in it '
                    "into double quotes."
                )
            yield where, dict(zip(header, row + [None] * (len(header) - len(row))))
    except csv.Error as error:
        raise DataError(f"{path}, line {began} is no csv that can be read ({error}).") from None


def captions_of(values, where, notes=None):
    """The captions, a list of str, that one sample has: `values` is a str, None, or a list of them.

    Empty ones count for nothing beside others; a sample that has no other has the empty one, [""], and is noted.
    """
    values = values if isinstance(values, list) else [values]
    if not all(value is None or isinstance(value, str) for value in values):
        raise DataError(f"{where}: a caption there is no text.")
    found = [value.strip() for value in values if value and value.strip()]
    if not found and notes:
        notes.add(NO_CAPTION, where)
    return found or [""]


def record_captions(record, column, where, notes=None):
    """The captions of a record of a table: those of `column`, or of the first of CAPTION_COLUMNS that it has."""
    record = record if isinstance(record, dict) else {"text": record}
    name = next((name for name in ((column,) if column else CAPTION_COLUMNS) if name in record), None)
    if name is None:
        wanted = f"--caption_column {column!r}" if column else f"caption column ({', '.join(CAPTION_COLUMNS)})"
        raise DataError(f"{where} has no {wanted}; it has {', '.join(map(str, record))}.")
    return captions_of(record[name], f"{where}, {name}", notes)
