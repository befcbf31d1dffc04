"""The backend on a GPU: outliers found inside a captured graph, without waiting for the device."""

import copy

import pytest
import torch

import mixq_compile as mixq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PLANTED_TOKEN = 7
PLANTED_CHANNEL = 5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama_with_hidden_outliers(dtype=torch.bfloat16):
    """A Llama in which one channel is an outlier only where the planted token is read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", dtype).eval().requires_grad_(False)
    embedding = model.model.embed_tokens.weight
    embedding.data.normal_()
    embedding.data[:, PLANTED_CHANNEL] = 0.0
    embedding.data[PLANTED_TOKEN, PLANTED_CHANNEL] = 8.0
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[PLANTED_CHANNEL] = 6.0
    return model


def tokens(planted, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 256, (2, 64), generator=generator)
    if planted:
        ids[1, 10] = PLANTED_TOKEN
    return ids.cuda()


def compiled(model, **options):
    return torch.compile(
        model, backend="mixq", fullgraph=True, options={"force": True, "mode": "reduce-overhead", **options}
    )


def run(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.clone()


def query_columns(model):
    report = mixq.report(model)
    return {row.fqn: row.outlier_columns for row in report.quantized if row.fqn.endswith("q_proj")}


def test_outliers_of_a_later_call_are_found_inside_the_captured_graph():
    model = llama_with_hidden_outliers()
    reference = torch.compile(
        copy.deepcopy(model), backend="mixq", options={"force": True, "lowering": "eager", "kernel": "ref"}
    )
    fast = compiled(model)
    for seed in range(4):
        run(fast, tokens(planted=False, seed=seed))
        run(reference, tokens(planted=False, seed=seed))
    first = "model.layers.0.self_attn.q_proj"
    assert PLANTED_CHANNEL not in query_columns(fast)[first]

    planted = tokens(planted=True, seed=9)
    found, wanted = run(fast, planted), run(reference, planted)

    assert PLANTED_CHANNEL in query_columns(fast)[first], "the replay did not learn the planted column"
    assert query_columns(fast)[first] == query_columns(reference)[first]
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < 0.02, f"the captured graph differs from the eager reference by {error:.4f}"
    full = run(model, planted)
    exact = (found.double() - full.double()).norm() / full.double().norm()
    assert exact < 0.05, f"relative error against the 16-bit model {exact:.4f}"


def test_the_forward_never_waits_for_the_device():
    fast = compiled(llama_with_hidden_outliers())
    for seed in range(4):
        run(fast, tokens(planted=False, seed=seed))
    ids = tokens(planted=True, seed=5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fast, ids)
        run(fast, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_from_one_state_are_identical():
    model = llama_with_hidden_outliers()
    fast = compiled(model)
    for seed in range(3):
        run(fast, tokens(planted=False, seed=seed))
    ids = tokens(planted=True, seed=3)
    outputs = []
    for _ in range(5):
        mixq.reset(model)
        run(fast, tokens(planted=False, seed=1))
        outputs.append(run(fast, ids))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


def test_generate_with_static_cache_decodes_through_the_backend():
    from transformers import CompileConfig

    model = llama_with_hidden_outliers()
    mixq.quantize(model)
    prompt = tokens(planted=True)[:1, :16]
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    eager = model.generate(prompt, disable_compile=True, **settings)
    mixq.reset(model)
    fast = model.generate(
        prompt,
        compile_config=CompileConfig(backend="mixq", fullgraph=True, mode="reduce-overhead"),
        **settings,
    )
    agreed = int((eager == fast).long().cumprod(dim=1).sum()) - prompt.shape[1]
    assert fast.shape == eager.shape
    assert agreed >= 8, f"greedy tokens agree only for {agreed} of 24"


def test_changing_batch_and_length_keep_one_packed_copy():
    model = llama_with_hidden_outliers()
    fast = torch.compile(model, backend="mixq", dynamic=True, options={"force": True})
    for batch, length in ((2, 32), (3, 48), (5, 17)):
        ids = torch.randint(8, 256, (batch, length), device="cuda")
        found, wanted = run(fast, ids), run(model, ids)
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 0.05, f"{batch} x {length}: relative error {error:.4f}"
