"""Read and write data folders: texts, questions, and the files in which others publish them.

README.md beside this file has the formats. What is wrong with a file is an InputError that names the file,
the line, the value and the fix.
"""
import csv
import io
import json
import logging
import os
import random
import sys
from pathlib import Path

from tqdm import tqdm

from data import processes


class InputError(ValueError):
    """Something the user can mend: the message names the value, the place and the fix."""


def warn(line):
    """Print a line on stderr, above a progress bar, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


# ---- files --------------------------------------------------------------------------------------------

def read_text(path):
    """The text of a UTF-8 file, without the mark that some editors put in front."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 ({e}): convert it")


def once_each(pairs):
    """An object of JSON as a dict; a key that stands there twice is an error."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f'the key "{twice}" stands there twice: keep one')
    return value


def check_kinds(value, kinds, where, fix):
    """Raise InputError unless value is a dict that has, for kinds = {key: type}, each key with its type."""
    if not isinstance(value, dict) or not set(kinds) <= set(value):
        raise InputError(f"{where}: not an object with {' and '.join(kinds)}: {fix}")
    for key, kind in kinds.items():
        if not isinstance(value[key], kind):
            raise InputError(f'{where}: "{key}" is {value[key]!r}: {fix}')


def read_json(path, fix, **kinds):
    """The value of a JSON file, checked by check_kinds() where there are kinds; `fix` ends an error."""
    path = Path(path)
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=once_each)
    except ValueError as e:                      # of json, of once_each, or of a number of 5,000 digits
        raise InputError(f"{path}:{getattr(e, 'lineno', 1)}: not JSON ({e}): {fix}")
    except RecursionError:
        raise InputError(f"{path}:1: not JSON that can be read (nested too deep): {fix}")
    if kinds:
        check_kinds(value, kinds, f"{path}:1", fix)
    return value


def write_text(path, text):
    """Write a file under a temporary name and rename it: a reader never sees half of it. First process only."""
    if processes.rank() > 0:
        return
    tmp = Path(f"{path}.tmp{os.getpid()}")
    try:
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    """write_text of a value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_data(folder, files, meta=None, overwrite=False, beside=()):
    """Write {name: rows} as folder/NAME.jsonl, and meta.json; "where" stays out of the files. What is there
    already and differs is an error, unless overwrite. beside: names that belong to the set as well."""
    texts = {}
    for name, rows in files.items():
        lines = []
        for row in rows:
            lines.append(json.dumps({k: v for k, v in row.items() if k != "where"}) + "\n")
        texts[folder / f"{name}.jsonl"] = "".join(lines)
    if meta:
        texts[folder / "meta.json"] = json.dumps(meta, indent=1) + "\n"
    different = {}
    for path, text in texts.items():
        if not path.exists() or read_text(path).strip() != text.strip():
            different[path] = text
    for path in different:
        if path.exists() and not overwrite:
            raise InputError(f"{path} is there and differs: choose another --out, or replace it with --overwrite")
    others = sorted(path.name for path in folder.glob("*.jsonl") if path.stem not in {*files, *beside})
    if others and any(path.exists() for path in different):
        raise InputError(f"{folder} holds {others[0]}, which this set does not have and would be "
                         "measured with it: choose another --out, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in different.items():
        write_text(path, text)
    for name, rows in files.items():
        print(f"{os.path.relpath(folder / name)}.jsonl: {len(rows):,} rows")


# ---- readers: a path -> pairs of line number and value ------------------------------------------------

def json_lines(path):
    """(line number, value) of each line of a JSON-lines file that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=once_each)
        except InputError as e:
            raise InputError(f"{path}:{number}: {e}")
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}:{number}: not JSON ({e}): one JSON object a line is expected")


def json_values(path):
    """(row number, value) of a .json file, which may hold one array or, as TOFU's do, a value a line."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from json_lines(path)
        return
    yield from enumerate(read_json(path, "is the file cut off? Download it again"), 1)


def csv_rows(path):
    """(line number, list of cells) of a CSV file without a header."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as e:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({e}): is the file cut off? Download it again")


def parquet_rows(path):
    """(row number, dict) of a parquet file; needs the package `datasets`."""
    try:
        from datasets import load_dataset        # not a requirement: only published data sets use parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet takes one more package: pip install datasets")
    logging.getLogger("datasets").setLevel(logging.CRITICAL)   # a broken file is one line, and it is ours
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(rows, 1)
    except (ValueError, OSError) as e:
        raise InputError(f"{path}: not a whole parquet file ({e}): download it again")


READERS = {".parquet": parquet_rows, ".jsonl": json_lines, ".json": json_values, ".csv": csv_rows}


# ---- rows ---------------------------------------------------------------------------------------------

def read_jsonl(path, check, reader=json_lines):
    """The rows of a file, each through check(value) -> row, which raises InputError on a bad one.

    Every row also gets "where", its file and line, for the errors that only show later.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is missing: prepare the data (data/README.md) or point --data elsewhere")
    rows = []
    for number, value in reader(path):
        try:
            rows.append(check(value) | {"where": f"{path}:{number}"})
        except InputError as e:
            raise InputError(f"{path}:{number}: {e}")
    if not rows:
        raise InputError(f"{path} has no rows: write at least one JSON object a line")
    return rows


def is_utf8(text):
    """Can a text be written? Half of a surrogate pair, as JSON and command lines may hold it, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_texts(row, *keys):
    """Raise InputError unless row is a dict with a text that is not empty under each of keys."""
    if not isinstance(row, dict):
        raise InputError(f"needs the keys {', '.join(keys)}, found {type(row).__name__}: see data/README.md")
    if not set(keys) <= set(row):
        found = ", ".join(sorted(row)) or "none"
        raise InputError(f"needs the keys {', '.join(keys)}, found {found}: see data/README.md")
    for key in keys:
        if not isinstance(row[key], str) or not row[key].strip() or not is_utf8(row[key]):
            raise InputError(f'"{key}" is {row[key]!r}: give a text of whole characters, not empty')


def rows_with(*keys):
    """A check for read_jsonl: the row must have these texts, and keeps only them."""
    def check(row):
        check_texts(row, *keys)
        return {key: row[key] for key in keys}
    return check


def text_row(row):
    """Check a row of forget.jsonl or retain.jsonl: {"text"}, {"prompt", "completion"}, or a bare string."""
    if isinstance(row, str):
        row = {"text": row}
    if isinstance(row, dict) and "prompt" in row and "text" not in row:
        check_texts(row, "prompt", "completion")
    else:
        check_texts(row, "text")
    check_fact(row)
    return row


def check_fact(row):
    """Raise InputError where the "fact" of a row is a list or an object, which cannot be looked up."""
    if isinstance(row.get("fact"), (list, dict)):
        raise InputError(f'"fact" is {row["fact"]!r}: give a number or a text')


def mcq_row(row):
    """Check a row of mcq_*.jsonl: {"question", "choices": [4 texts], "answer": 0-3}."""
    check_texts(row, "question")
    if "subject" in row:
        check_texts(row, "subject")
    check_fact(row)
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) != 4:
        raise InputError(f'"choices" is {choices!r}: give a list of exactly 4 texts')
    if not all(isinstance(choice, str) and is_utf8(choice) for choice in choices):
        raise InputError(f'"choices" is {choices!r}: give a list of exactly 4 texts')
    if len({choice.strip() for choice in choices}) == 1:
        raise InputError(f'"choices" are all {choices[0]!r}: give texts that differ')
    answer = row.get("answer")
    if type(answer) is not int or not 0 <= answer <= 3:
        raise InputError(f'"answer" is {answer!r}: give the index of the right choice, 0 to 3')
    return row


# ---- data folders -------------------------------------------------------------------------------------

META_FIELDS = {"prompt": ["{question}"], "qa_prompt": ["{question}", "{answer}"]}


def load_meta(folder):
    """A data folder's meta.json as a dict, {} without one."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return {}
    meta = read_json(path, "mend it or remove it")
    if not isinstance(meta, dict):
        raise InputError(f"{path}:1: not a JSON object but a {type(meta).__name__}: mend it or remove it")
    for key, fields in META_FIELDS.items():
        text = meta.get(key, "".join(fields))
        if not isinstance(text, str) or not is_utf8(text) or not all(field in text for field in fields):
            raise InputError(f'{path}:1: "{key}" is {text!r}: put {" and ".join(fields)} in a text')
    auc = meta.get("auc_retrain") or 0.5
    if not isinstance(auc, (int, float)) or not 0 < auc <= 1:
        raise InputError(f'{path}:1: "auc_retrain" is {auc!r}: give a number from 0 to 1, or drop it')
    return meta


def spaced(rows, limit):
    """At most `limit` of rows, evenly spaced; 0 = all."""
    if not limit:
        return rows
    return rows[::max(1, -(-len(rows) // limit))]


def halves(rows, seed):
    """Indices of two halves of rows without a common fact; a row without one is a fact of its own."""
    named = [str(row.get("fact", f"row {i}")) for i, row in enumerate(rows)]
    order = sorted(set(named))
    random.Random(seed).shuffle(order)
    first = set(order[:len(order) // 2])
    parts = [], []
    for i, fact in enumerate(named):
        parts[fact in first].append(i)
    return parts


# ---- published data sets, for data/*/prepare.py -------------------------------------------------------

def fetch(repo, names, folder=None):
    """The folder that holds a data set: `folder`, or a download of those files of the hub data set `repo`
    whose path starts with one of names."""
    if folder:
        if not Path(folder).is_dir():
            raise InputError(f"--from {folder}: no such folder")
        return Path(folder)
    from huggingface_hub import snapshot_download
    patterns = [f"{name}*" for name in names]
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as e:
        raise InputError(f"{repo} does not download ({e}): put its files in a folder and pass --from FOLDER")


def read_published(folder, names, check, count=None):
    """The rows of the first of names that folder holds, as NAME.EXT or in parts NAME-00000-of-00002.EXT.

    Each goes through check as in read_jsonl. Other than `count` rows, where count is given, is an error.
    """
    for name in names:
        for ending, reader in READERS.items():
            paths = sorted([*folder.glob(name + ending), *folder.glob(f"{name}-*-of-*{ending}")])
            if not paths:
                continue
            rows = []
            for path in paths:
                rows += read_jsonl(path, check, reader)
            if count is not None and len(rows) != count:
                raise InputError(f"{paths[0]}: {len(rows):,} rows, but {count:,} are published: cut off, "
                                 "or another version? Download it again, or take it with --any_count")
            return rows
    raise InputError(f"{folder} has no {' or '.join(names)} ({', '.join(READERS)}): see the data's readme.md")
