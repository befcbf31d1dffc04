"""How far the vectors of an encoder, and the embeddings made of them, are from those in full precision."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mixq_compile.evaluation.fidelity import mean_cosine, relative_error


@dataclass(frozen=True)
class Reference:
    """The model's output in fp32, which others are compared with."""

    output: Tensor
    """[B, T, ...]: the last hidden state of an encoder, the logits of a decoder."""
    kept: Tensor
    """[B, T] bool: the tokens that are no padding."""
    is_encoder: bool

    def compare(self, output: Tensor) -> tuple[float, float]:
        """Relative error of the tokens' vectors; mean cosine of the embeddings, or of a decoder's logits."""
        error = relative_error(self.output[self.kept], output[self.kept])
        if not self.is_encoder:
            return error, mean_cosine(self.output[self.kept], output[self.kept])
        return error, mean_cosine(embeddings(self.output, self.kept), embeddings(output, self.kept))


def embeddings(hidden: Tensor, kept: Tensor) -> Tensor:
    """One vector of length 1 for each text `[B, D]`: the mean of hidden `[B, T, D]` over its tokens."""
    weights = kept[..., None].float()
    mean = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
    return nn.functional.normalize(mean, dim=-1)
