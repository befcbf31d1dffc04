"""What transformers' `save_pretrained` asks about a model of MixqLinears."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from mixq_compile.runtime.stored_model import stored_state


class StateWriter(HfQuantizer):  # type: ignore[misc]
    """Tells transformers which tensors a directory holds."""

    requires_calibration = False

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradients."""
        return False

    def is_serializable(self, *arguments: Any, **options: Any) -> bool:
        """True."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save_pretrained` writes."""
        return stored_state(model), {}
