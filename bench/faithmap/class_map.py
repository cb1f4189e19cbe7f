"""Names of classes with a model's class indices, and the CSV files that datasets are described in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faithmap.errors import RequestError, nearest

#: Labels beyond this get no entry in the list of names, which is as long as the largest label.
MOST_CLASSES = 100_000


@dataclass(frozen=True, slots=True)
class ClassMap:
    """Names of classes with the model's class indices; a name may be ambiguous until it is used."""

    file: Path
    classes: Mapping[str, frozenset[int]]
    #: What a CSV says in its column `name` of each class, where it says one thing.
    titles: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> ClassMap:
        """Read a class map: a JSON object `{name: class}`, or a CSV as `imagefolder` describes it.

        Raises:
            RequestError: the file is missing, malformed or holds no classes.
        """
        titles: dict[int, set[str]] = {}
        pairs = _json_pairs(file) if file.suffix.lower() == ".json" else _csv_pairs(file, titles)
        classes: dict[str, set[int]] = {}
        for name, index in pairs:
            classes.setdefault(name, set()).add(index)
        return cls(
            file,
            {name: frozenset(indices) for name, indices in classes.items()},
            {index: min(names) for index, names in titles.items() if len(names) == 1},
        )

    def __contains__(self, name: str) -> bool:
        return name in self.classes

    def __getitem__(self, name: str) -> int:
        found = self.classes.get(name)
        if found is None:
            raise RequestError(
                f"class map {self.file} has no class '{name}'; {nearest(name, self.classes)} - add it"
            )
        if len(found) > 1:
            raise RequestError(
                f"class map {self.file} gives '{name}' the classes {sorted(found)}; "
                "use a name that has only one"
            )
        return min(found)


def _json_pairs(file: Path) -> Iterator[tuple[str, int]]:
    try:
        content = json.loads(read_text(file, "class map"))
    except json.JSONDecodeError as error:
        raise RequestError(
            f"class map {file} is not JSON: {error}; expected {{name: class index}}"
        ) from error
    if not isinstance(content, dict) or not content:
        raise RequestError(f"class map {file} holds no classes; expected a JSON object {{name: class index}}")
    for name, index in content.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise RequestError(
                f"class map {file}: '{name}' has the class {index!r}; expected an integer from 0 on"
            )
        yield name, index


def _csv_pairs(file: Path, titles: dict[int, set[str]]) -> Iterator[tuple[str, int]]:
    for line, row in read_rows(file, "class map", ("label",)):
        index = read_label(row["label"], f"class map {file}, line {line}")
        if row.get("name"):
            titles.setdefault(index, set()).add(row["name"])
        yield from ((name, index) for column, name in row.items() if column != "label" and name)


def names_by_label(names: Mapping[int, str]) -> list[str] | None:
    """A list in which the name of each label stands at its place, blank between; None where there is none.

    >>> names_by_label({0: "ant", 2: "zebra"})
    ['ant', '', 'zebra']
    """
    kept = {label: name for label, name in names.items() if name and label < MOST_CLASSES}
    return [kept.get(label, "") for label in range(max(kept) + 1)] if kept else None


def read_label(text: str, where: str) -> int:
    """A class index from the text of a table; `where` says in errors what the text is from.

    Raises:
        RequestError: it is no integer from 0 on.
    """
    if not (text.isascii() and text.isdigit()):
        raise RequestError(
            f"{where}: the label '{text}' is no class index; expected an integer from 0 on, "
            "or give class_map, which says what class a word stands for"
        )
    return int(text)


def read_rows(file: Path, what: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV with the line each ends on, blanks around values removed.

    Args:
        file: the CSV, in UTF-8, its first line the names of the columns.
        what: what the file is, for errors.
        needed: columns that it must have.

    Raises:
        RequestError: the file, a column or a value is missing.
    """
    reader = csv.DictReader(io.StringIO(read_text(file, what), newline=""))
    columns = [column.strip() for column in reader.fieldnames or ()]
    missing = [column for column in needed if column not in columns]
    if missing:
        raise RequestError(
            f"{what} {file} has no column '{missing[0]}'; its columns are {', '.join(columns) or 'none'}, "
            f"expected {', '.join(needed)}"
        )
    reader.fieldnames = columns
    for row in reader:
        values: Mapping[Any, Any] = row
        if None in values or None in values.values():
            raise RequestError(
                f"{what} {file}, line {reader.line_num}: expected {len(columns)} values as in the first "
                "line; put a value that holds commas in double quotes"
            )
        yield reader.line_num, {column: value.strip() for column, value in row.items()}


def read_text(file: Path, what: str) -> str:
    """The text of a file in UTF-8; `what` says in errors what the file is.

    Raises:
        RequestError: it is missing, or in another encoding.
    """
    if not file.is_file():
        raise RequestError(f"no such file: {file}; give the path of the {what}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} {file} is not UTF-8: {error}; save it as UTF-8") from error
