"""Texts and their tokens: windows for calibration, and the documentation of Python for the demo."""

from __future__ import annotations

import ast
import itertools
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 256
"""Token ids that a text has without a tokenizer: its bytes."""


def read_text(path: Path) -> str:
    """The text of a file, line ends as they are; bytes that are no UTF-8 become replacement characters.

    Raises OptionError for a file without text.
    """
    text = path.read_bytes().decode(errors="replace")
    if not text.strip():
        raise OptionError(f"{path} holds no text: give a file with some of it.")
    return text


def windows(tokenizer: Any, text: str, length: int, limit: int) -> list[list[int]]:
    """The first `limit` windows of at most `length` tokens, each with the tokenizer's special tokens.

    Documents between `<|endoftext|>` are cut on their own.
    """
    from mixq_compile.evaluation.protocols import STORY_SEPARATOR

    found: list[list[int]] = []
    for document in text.split(STORY_SEPARATOR):
        if not document.strip():
            continue
        cut = tokenizer(document.strip(), truncation=True, max_length=length, return_overflowing_tokens=True)
        ids = cut["input_ids"]
        found.extend([ids] if ids and isinstance(ids[0], int) else ids)
        if len(found) >= limit:
            break
    return found[:limit]


def batches(ids: list[list[int]], batch: int) -> list[dict[str, Tensor]]:
    """Batches of windows of equal length: padding would be seen by the linears as if it were text."""
    import torch

    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for window in ids:
        by_length[len(window)].append(window)
    return [
        {"input_ids": torch.tensor(group[start : start + batch], dtype=torch.int64, device="cpu")}
        for group in by_length.values()
        for start in range(0, len(group), batch)
    ]


def documentation(count: int, words: int) -> list[str]:
    """So many texts of at least so many words from the documentation strings of Python's standard library.

    The same for the same Python: the first text of each module, then the second of each, and so on.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    texts: list[str] = []
    kept: list[Iterator[str]] = [_joined(path, words) for path in modules]
    while kept and len(texts) < count:
        remaining = []
        for source in kept:
            text = next(source, None)
            if text is not None:
                texts.append(text)
                remaining.append(source)
            if len(texts) == count:
                break
        else:
            kept = remaining
    return list(itertools.islice(itertools.cycle(texts), count))


def _joined(path: Path, words: int) -> Iterator[str]:
    """Documentation strings of one module, each with as many after it as make up so many words."""
    text = ""
    for docstring in _docstrings(path):
        text = f"{text}\n\n{docstring}" if text else docstring
        if len(text.split()) >= words:
            yield text
            text = ""


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def encode(texts: list[str], tokenizer: Any | None, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Ids and mask `[len(texts), length]`; without a tokenizer a text's bytes are its tokens."""
    import torch

    if tokenizer is None:
        rows = [list(text.encode()) for text in texts]
        limit = min(vocabulary, BYTES)
        ids = [[byte % limit for byte in (row * (length // len(row) + 1))[:length]] for row in rows]
        mask = [[1] * length for _ in ids]
    else:
        ids, mask = [], []
        padding = tokenizer.pad_token_id or 0
        for text in texts:
            row = tokenizer(text, truncation=True, max_length=length)["input_ids"]
            ids.append(row + [padding] * (length - len(row)))
            mask.append([1] * len(row) + [0] * (length - len(row)))
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device="cpu"),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device="cpu"),
    }
