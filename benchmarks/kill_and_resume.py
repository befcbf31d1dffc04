"""Kills `mixq quantize` of a directory at random moments, goes on, and compares the bytes with a whole run's.

python -m benchmarks.kill_and_resume SOURCE WORK --kills 50
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import transformers
from transformers import LlamaForCausalLM  # noqa: F401  # so that no child spends its time on imports

from mixq_compile.checkpoints.directory import file_hash
from mixq_compile.runtime.directory_plan import plan_directory
from mixq_compile.runtime.directory_quantization import DirectoryQuantization
from mixq_compile.runtime.options import MixqOptions


def quantize(source: Path, output: Path) -> None:
    """What the command does, without its output."""
    import torch

    device = torch.device("cpu")
    plan = plan_directory(source, MixqOptions.from_user(options={"force": True}), device)
    DirectoryQuantization(plan, output).run(device=device, progress=lambda *_: None)


def child(source: Path, output: Path) -> int:
    """Starts a process that quantizes; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            quantize(source, output)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return process


def hashes(directory: Path) -> dict[str, str]:
    """The hash of each file but the card, which tells the directory's name."""
    return {path.name: file_hash(path) for path in sorted(directory.iterdir()) if path.name != "README.md"}


def main() -> None:
    """Runs as many kills as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    assert os.waitpid(child(options.source, options.work / "whole"), 0)[1] == 0
    seconds = time.perf_counter() - begin
    expected = hashes(options.work / "whole")
    shutil.rmtree(options.work / "whole")
    print(f"transformers {transformers.__version__}: a whole run takes {seconds:.1f} s", flush=True)
    output = options.work / "killed"
    kills = runs = whole = 0
    while kills < options.kills:
        process = child(options.source, output)
        time.sleep(random.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        kills += killed
        complete = (output / "config.json").is_file()
        if not killed or random.random() < 0.5 or complete:
            # Else the next one goes on with what this one has left, and is killed too.
            if not complete:
                assert os.waitpid(child(options.source, output), 0)[1] == 0, "it did not go on"
            found = hashes(output)
            whole += complete
            runs += 1
            assert found == expected, (
                f"after {kills} kills: {sorted(set(found.items()) ^ set(expected.items()))}"
            )
            shutil.rmtree(output)
    digest = hashlib.sha256(repr(sorted(expected.items())).encode()).hexdigest()
    print(
        f"{kills} kills, {runs} resumed or finished runs ({whole} were finished before the kill), all equal "
        f"({digest[:12]}), {time.perf_counter() - begin:.0f} s"
    )
    shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
