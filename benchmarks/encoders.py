"""An encoder by each scheme beside ONNX Runtime's dynamic int8, in one run, to benchmarks/results.

python -m benchmarks.encoders encoder_minilm MODEL --text wiki.test.raw --calibrate-text wiki.valid --batch 64

ONNX Runtime needs `pip install onnxruntime onnx onnxscript`; MODEL is a Hugging Face directory. What is
measured is `mixq eval --protocol embeddings`: rows of the text padded to 128 tokens, rounds in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS, environment
from mixq_compile.cli.evaluating_embeddings import DEFAULT_LENGTH, EncoderEvaluation, encoder_of
from mixq_compile.cli.models import load_model
from mixq_compile.cli.scheme_choice import parse_choice

SCHEMES = ("w8a8", "w8a16", "w8a8o16", "auto8")


class Hidden(nn.Module):
    """The last hidden state of a model, for exporters that take tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T, D]."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def onnx_int8(model: nn.Module, batch: int, folder: Path) -> Any:
    """A call like the model's, of ONNX Runtime with weights and activations quantized dynamically to int8."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, quantized = folder / "model.onnx", folder / "int8.onnx"
    ids = torch.ones(batch, DEFAULT_LENGTH, dtype=torch.int64)
    program = torch.onnx.export(
        Hidden(model).eval(), (ids, torch.ones_like(ids)), dynamo=True, optimize=True, verbose=False
    )
    assert program is not None
    program.save(plain)
    quantize_dynamic(plain, quantized, weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(quantized), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> SimpleNamespace:
        given = dict(zip(names, (input_ids.numpy(), attention_mask.numpy()), strict=True))
        (hidden,) = session.run(None, given)
        return SimpleNamespace(last_hidden_state=torch.from_numpy(hidden))

    return call


def main() -> None:
    """Measures one encoder and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="name of the result file, without .json")
    parser.add_argument("model", help="Hugging Face directory of an encoder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibrate-text", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    import onnxruntime

    loaded = encoder_of(load_model(arguments.model, "cpu", "float32"))
    chosen = [parse_choice(scheme, {}) for scheme in SCHEMES]
    with tempfile.TemporaryDirectory() as folder:
        other = onnx_int8(loaded.model, arguments.batch, Path(folder))
        result = EncoderEvaluation(
            source=arguments.model, text=arguments.text, limit=arguments.batch, window=DEFAULT_LENGTH,
            batch=arguments.batch, stats=None, calibrate_text=arguments.calibrate_text,
            choices=tuple(choice for choice in chosen if choice is not None), force=True,
            lowering="inductor", device="cpu", dtype="float32", output=None,
            others={"ONNX Runtime int8": other},
        ).run()  # fmt: skip
    result |= {"model": Path(arguments.model).name, "text": arguments.text.name}
    versions = {"onnxruntime": onnxruntime.__version__}
    target = RESULTS / f"{arguments.name}.json"
    target.write_text(json.dumps({"environment": environment() | versions, **result}, indent=1) + "\n")
    print(f"wrote {target.relative_to(RESULTS.parent.parent)}")
    for row in result["rows"]:
        figures = f"{1000 * row['seconds']:7.0f} ms {row['relative_error']:.4f} {row['cosine']:.4f}"
        print(f"{row['label']:24} {figures}")


if __name__ == "__main__":
    main()
