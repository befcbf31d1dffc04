"""What a linear is in its network: from its name, and from its size where the name means two things."""

from __future__ import annotations

import functools
import re

Q, K, V, QKV, O = "q", "k", "v", "qkv", "o"  # noqa: E741
GATE, UP, GATE_UP, DOWN = "gate", "up", "gate_up", "down"
LM_HEAD, ROUTER, OTHER = "lm_head", "router", "other"

ROLES = (Q, K, V, QKV, O, GATE, UP, GATE_UP, DOWN, LM_HEAD, ROUTER, OTHER)
"""Every role: attention in and out, the feed-forward's parts, the output head, a router, the rest."""

_ROUTERS = r"router|router\.\w+|shared_expert_gate|gate|wg"
_HEAD_NAMES = (
    r"proj_out|output|output_layer|head|mlp_head|classifier|classification_head|score|logits|to_logits"
)
_LIKE_A_HEAD = re.compile(rf"(?P<path>.*\.)?({_HEAD_NAMES})(\.(\d+|out_proj|decoder|classifier))?")
"""Names that a head has, and many a linear inside a block."""
_INSIDE = re.compile(r"\d+|.*(block|layer|attn|attention|mlp|ffn|feed_forward|expert).*")
"""Parts of a name that say that a linear is one of a stack, or of a block."""

_ATTENTION = r"(attn|attention|mixer)\w*(\.self|\.output)?"
_RULES: tuple[tuple[str, str], ...] = (
    (LM_HEAD, r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|predictions\.decoder|vocab_projector)"),
    (ROUTER, rf"(.*\.)?({_ROUTERS})"),
    (QKV, r".*\b(qkv|qkv_proj|query_key_value|c_attn|wqkv)"),
    (QKV, rf".*{_ATTENTION}\.in_proj"),
    (Q, r".*\b(q|query|q_proj|q_lin|wq)"),
    (K, r".*\b(k|key|k_proj|k_lin|wk)"),
    (V, r".*\b(v|value|v_proj|v_lin|wv)"),
    (O, rf".*{_ATTENTION}\.(o|o_proj|out_proj|out_lin|c_proj|dense|wo|proj|out|to_out\.0)"),
    (GATE_UP, r".*\b(gate_up_proj|gate_and_up_proj|w13)"),
    (GATE, r".*\b(gate_proj|wi_0|w1)"),
    (UP, r".*\b(up_proj|wi_1|wi|w3|fc1|fc_in|c_fc|lin1|linear1|dense_h_to_4h|intermediate[._]dense)"),
    (DOWN, r".*\b(down_proj|wo|w2|fc2|fc_out|lin2|linear2|dense_4h_to_h|output[._]dense)"),
    (DOWN, r".*\b(mlp|ffn|feed_forward)\.c_proj"),
)
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _RULES)


@functools.lru_cache(maxsize=65536)
def role_of(fqn: str, features: tuple[int, int] | None = None) -> str:
    """The role of a linear, such as `down` for `model.layers.3.mlp.down_proj`; `other` if unknown.

    `features` are its outputs and inputs, where they are known: a `gate` with as many outputs as inputs, or
    more, belongs to an ordinary feed-forward, because a router has an output for each expert.
    """
    tail = ".".join(fqn.split(".")[-4:]).lower()
    role = next((role for role, pattern in _COMPILED if pattern.fullmatch(tail)), OTHER)
    if role == ROUTER and fqn.rpartition(".")[2] in ("gate", "wg"):
        outputs, inputs = features or (0, 1)
        return GATE if outputs >= inputs else ROUTER
    return LM_HEAD if role == OTHER and may_be_head(fqn) else role


def may_be_head(fqn: str) -> bool:
    """True for a name that output heads have, such as `model.output` or `classifier`, outside of any block.

    Whether such a linear makes the model's output is known where its graph is.
    """
    match = _LIKE_A_HEAD.fullmatch(fqn.lower())
    parts = (match["path"] or "").split(".") if match is not None else []
    return match is not None and not any(_INSIDE.fullmatch(part) for part in parts)
