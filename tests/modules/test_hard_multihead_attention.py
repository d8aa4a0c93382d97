"""HardMultiheadAttention against nn.MultiheadAttention, whose weights it makes one-hot: choices, scores, gradients."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_attn

from .cases import BATCH, EMBED_DIM, HEADS, MODULES, QUERY_LENGTH, Case, detached, output_from, results

CASES = [
    Case(),
    Case("plain", "cross", "bool", "bool"),
    Case("no_bias", "self", "causal"),
    Case("bias_kv_zero_attn", "cross", "float_per_head", "float"),
    Case("kdim_vdim", "separate", "bool_per_head"),
    Case("plain", "self", "float", "bool", batched=False),
    Case("kdim_bias_kv", "separate", batched=False),
]
SAMPLED = ("reinforce", "straight_through")
Choice = torch_attn.HardAttention


def hard(module: nn.MultiheadAttention, **options: Any) -> torch_attn.HardMultiheadAttention:
    """A hard module with the state of PyTorch's."""
    attributes = {n: getattr(module, n) for n in ("add_zero_attn", "kdim", "vdim", "batch_first")}
    mine = torch_attn.HardMultiheadAttention(
        module.embed_dim,
        module.num_heads,
        bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None,
        dtype=module.out_proj.weight.dtype,
        **attributes,
        **options,
    )
    mine.load_state_dict(module.state_dict(), strict=True)
    return mine.train(module.training)


def inputs_of(case: Case) -> dict[str, Any]:
    return {n: x for n, x in case.inputs().items() if n not in ("need_weights", "average_attn_weights")}


def soft_weights(module: nn.MultiheadAttention, arguments: dict[str, Any]) -> Tensor:
    """PyTorch's weights of every head, (N, H, L, S)."""
    return module(**arguments, need_weights=True, average_attn_weights=False)[1]


def entropy_of(weights: Tensor) -> Tensor:
    """−Σ w log w over the last dimension, with gradient 0 where a key is masked."""
    return torch.special.entr(weights.masked_fill(weights == 0, 1.0)).sum(-1)


def expected_choice(module: nn.MultiheadAttention, arguments: dict[str, Any], indices: Tensor) -> Choice:
    """What reading the keys at ``indices``, one sample of the module's weights, returns."""
    weights = soft_weights(module, arguments)
    one_hot = nn.functional.one_hot(indices, weights.size(-1)).to(weights.dtype)
    log_prob = weights.gather(-1, indices.unsqueeze(-1)).squeeze(-1).log()
    entropy = entropy_of(weights)
    return Choice(output_from(module, arguments["value"], one_hot), indices, log_prob, entropy)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("estimator", [*SAMPLED, "argmax"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluation_reads_the_most_probable_key(case: Case, estimator: str) -> None:
    theirs, arguments = case.build().eval(), inputs_of(case)
    actual = hard(theirs, estimator=estimator, num_samples=3)(**arguments)
    expected = expected_choice(theirs, arguments, soft_weights(theirs, arguments).argmax(-1))
    torch.testing.assert_close(tuple(actual), tuple(expected))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("estimator", SAMPLED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_reads_drawn_keys_and_scores_them(case: Case, estimator: str, num_samples: int) -> None:
    theirs, arguments = case.build(), inputs_of(case)
    choice = hard(theirs, estimator=estimator, num_samples=num_samples)(**arguments)
    samples = zip(*choice[:3], strict=True) if num_samples > 1 else [choice[:3]]
    count = 0
    for output, indices, log_prob in samples:
        expected = expected_choice(theirs, arguments, indices)
        torch.testing.assert_close((output, log_prob, choice.entropy), (expected.output, expected[2], expected.entropy))
        assert expected.log_prob.isfinite().all(), "a masked key was drawn"
        count += 1
    assert count == num_samples


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_top_k_of_all_keys_is_soft_attention(case: Case) -> None:
    theirs, arguments = case.build(), inputs_of(case)
    weights = soft_weights(theirs, arguments)
    expected = results(theirs, {**arguments, "need_weights": False})
    mine = hard(theirs, estimator="top_k", k=weights.size(-1))
    choice = mine(**arguments)
    torch.testing.assert_close(results(Output(mine), detached(arguments)), renamed(expected))
    kept = (choice.indices >= 0).sum(-1)
    assert torch.equal(kept, (weights > 0).sum(-1)), "masked keys have the index −1"


class Output(nn.Module):
    """A hard module in the form that ``results`` takes: output and no weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **arguments: Any) -> tuple[Tensor, None]:
        return self.module(**arguments).output, None


def renamed(named: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = {f"grad_{n}" for n, _ in nn.MultiheadAttention(EMBED_DIM, HEADS, add_bias_kv=True).named_parameters()}
    return {n.replace("grad_", "grad_module.") if n in parameters else n: x for n, x in named.items()}


def test_top_k_weighs_the_best_keys_by_their_probabilities() -> None:
    case = Case(sharing="cross")
    theirs, arguments = case.build().eval(), inputs_of(case)
    choice = hard(theirs, estimator="top_k", k=3)(**arguments)
    best = soft_weights(theirs, arguments).topk(3)
    weights = torch.zeros_like(soft_weights(theirs, arguments)).scatter(
        -1, best.indices, best.values / best.values.sum(-1, keepdim=True)
    )
    torch.testing.assert_close(choice.output, output_from(theirs, arguments["value"], weights))
    torch.testing.assert_close((choice.indices, choice.log_prob), (best.indices, best.values.log()))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_divides_the_scores(temperature: float) -> None:
    case = Case(attn_mask="float")
    theirs, arguments = case.build(), inputs_of(case)
    choice = hard(theirs, temperature=temperature)(**arguments)
    log_probs = (soft_weights(theirs, arguments).log() / temperature).log_softmax(-1)
    torch.testing.assert_close(choice.log_prob, log_probs.gather(-1, choice.indices.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(choice.entropy, entropy_of(log_probs.exp()))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_prob_and_entropy_have_the_gradients_of_the_weights(case: Case) -> None:
    theirs, arguments = case.build(), inputs_of(case)
    mine = hard(theirs, num_samples=2)
    choice = mine(**arguments)
    cotangents = torch.randn_like(choice.log_prob), torch.randn_like(choice.entropy)
    names = [n for n, _ in mine.named_parameters() if not n.startswith("out_proj")]
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]

    def gradients(module: nn.Module, log_prob: Tensor, entropy: Tensor) -> list[Tensor]:
        inputs = [dict(module.named_parameters())[n] for n in names] + leaves
        return torch.autograd.grad((log_prob, entropy), inputs, cotangents, allow_unused=True, materialize_grads=True)

    actual = gradients(mine, choice.log_prob, choice.entropy)
    weights = soft_weights(theirs, arguments)
    log_prob = weights.expand(2, *weights.shape).gather(-1, choice.indices.unsqueeze(-1)).squeeze(-1).log()
    expected = gradients(theirs, log_prob, entropy_of(weights))
    only_one_key = ((weights > 0).sum(-1) <= 1).all()  # what the drawn padding may leave: then nothing has a gradient
    assert only_one_key or any(x.any() for x in expected)
    torch.testing.assert_close(actual, expected)


def test_straight_through_gives_query_and_key_the_gradient_of_soft_attention() -> None:
    case = Case("kdim_vdim", "separate")
    theirs, arguments = case.build(), inputs_of(case)
    mine = hard(theirs, estimator="straight_through")
    cotangent = torch.randn(QUERY_LENGTH, BATCH, EMBED_DIM, dtype=torch.float64)
    names = ("q_proj_weight", "k_proj_weight")
    actual = torch.autograd.grad(mine(**arguments).output, [getattr(mine, n) for n in names], cotangent)
    soft, _ = theirs(**arguments)
    expected = torch.autograd.grad(soft, [getattr(theirs, n) for n in names], cotangent)
    torch.testing.assert_close(actual, expected)


def test_reinforce_gives_query_and_key_no_gradient_through_the_output() -> None:
    case = Case("kdim_vdim", "separate")
    mine, arguments = hard(case.build()), inputs_of(case)
    choice = mine(**arguments)
    leaves = [mine.q_proj_weight, mine.k_proj_weight, mine.v_proj_weight]
    *none, some = torch.autograd.grad(choice.output.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert not any(x.any() for x in none)
    assert some.any()


@pytest.mark.parametrize("estimator", [*SAMPLED, "argmax", "top_k"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_rows_with_nothing_to_attend_read_nothing_and_stay_finite(estimator: str, training: bool) -> None:
    case = Case()
    mine, arguments = hard(case.build().train(training), estimator=estimator, k=2), inputs_of(case)
    arguments["key_padding_mask"] = torch.zeros(BATCH, QUERY_LENGTH, dtype=torch.bool)
    arguments["key_padding_mask"][1] = True
    choice = mine(**arguments)
    assert (choice.indices[1] == -1).all() and (choice.indices[[0, 2]] >= 0).all()
    assert not choice.log_prob[1].any() and not choice.entropy[1].any()
    torch.testing.assert_close(choice.output[1], mine.out_proj.bias.expand_as(choice.output[1]))
    loss = choice.output.sum() + choice.log_prob.sum() + choice.entropy.sum()
    gradient, *others = torch.autograd.grad(loss, [arguments["query"], *mine.parameters()])
    assert not gradient[1].any()
    assert all(x.isfinite().all() for x in (gradient, *others))


def test_each_call_draws_anew_and_a_seed_repeats_it() -> None:
    mine = torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    x = torch.randn(4, 64, EMBED_DIM)  # 512 rows: that two draws agree in all has a chance below 1e-100
    torch.manual_seed(5)
    first, second = mine(x, x, x), mine(x, x, x)
    torch.manual_seed(5)
    again = mine(x, x, x)
    assert torch.equal(first.indices, again.indices) and torch.equal(first.output, again.output)
    assert not torch.equal(first.indices, second.indices)


def test_samples_without_replacement_differ() -> None:
    mine = torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, num_samples=QUERY_LENGTH, replacement=False)
    x = torch.randn(QUERY_LENGTH, BATCH, EMBED_DIM)
    indices = mine(x, x, x).indices
    everyone = torch.arange(QUERY_LENGTH).view(-1, 1, 1, 1).expand_as(indices)
    assert torch.equal(indices.sort(0).values, everyone)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_parameters_and_state_dict_are_those_of_pytorch(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, **options)
    torch.manual_seed(3)
    mine = torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, **options)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in mine.state_dict().items())
    nn.MultiheadAttention(EMBED_DIM, HEADS, **options).load_state_dict(mine.state_dict(), strict=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_options(clone: Any) -> None:
    mine = clone(torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, num_samples=3, temperature=2.0))
    x = torch.randn(QUERY_LENGTH, BATCH, EMBED_DIM)
    assert mine(x, x, x).output.shape == (3, *x.shape)
    assert mine.temperature == 2.0


SHAPES = [
    ("reinforce", 1, ()),
    ("reinforce", 3, (3,)),
    ("straight_through", 2, (2,)),
    ("argmax", 3, ()),
    ("top_k", 3, ()),
]


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(("estimator", "num_samples", "samples"), SHAPES)
def test_shapes_are_the_documented_ones(
    estimator: str, num_samples: int, samples: tuple[int, ...], batched: bool, batch_first: bool
) -> None:
    mine = torch_attn.HardMultiheadAttention(
        EMBED_DIM, HEADS, batch_first=batch_first, estimator=estimator, num_samples=num_samples, k=2
    )
    query = torch.randn(*((BATCH,) if batched else ()), QUERY_LENGTH, EMBED_DIM)
    query = query.transpose(0, 1) if batched and not batch_first else query
    rows = (*((BATCH,) if batched else ()), HEADS, QUERY_LENGTH)
    chosen = (*samples, *rows, *((2,) if estimator == "top_k" else ()))
    choice = mine(query, query, query)
    assert [x.shape for x in choice] == [(*samples, *query.shape), chosen, chosen, rows]
    assert choice.indices.dtype == torch.int64
    assert choice.output.is_contiguous()


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_scripted_module_survives_saving_and_gives_the_same_choice(case: Case) -> None:
    mine, arguments = hard(case.build().eval()), inputs_of(case)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(mine), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    graph = loaded.inlined_graph
    assert graph.findAllNodes("torch_attn::hard_attention", recurse=True)
    actual = loaded(**arguments)
    torch.testing.assert_close(tuple(actual), tuple(mine(**arguments)))
    assert actual._fields == Choice._fields


def test_scripted_module_draws_in_training_and_not_in_evaluation() -> None:
    scripted = torch.jit.script(torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, num_samples=2))
    x = torch.randn(64, 4, EMBED_DIM)
    training, evaluation = scripted.train()(x, x, x), scripted.eval()(x, x, x)
    assert training.indices.shape == (2, *evaluation.indices.shape)
    assert not torch.equal(training.indices[0], training.indices[1])
    assert torch.equal(evaluation.indices, scripted(x, x, x).indices)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_exports_and_compiles_without_graph_break(case: Case) -> None:
    mine, arguments = hard(case.build().eval()), inputs_of(case)
    expected = tuple(mine(**arguments))
    program = torch.export.export(mine, (), arguments)
    torch.testing.assert_close(tuple(program.module()(**arguments)), expected)
    torch._dynamo.reset()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(**arguments)), expected)


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_replace_mha_makes_an_encoder_layer_call_it_in_evaluation(scripted: bool) -> None:
    """Without, the layer's fast path would compute soft attention from the module's weights."""
    layer = nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, batch_first=True)
    layer.self_attn = torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    assert torch_attn.replace_mha(layer) is layer
    assert type(layer.self_attn) is torch_attn.HardMultiheadAttention
    layer.eval()
    x = torch.randn(BATCH, QUERY_LENGTH, EMBED_DIM)
    attended = layer.norm1(x + layer.self_attn(x, x, x).output)
    expected = layer.norm2(attended + layer.linear2(layer.linear1(attended).relu()))
    model = torch.jit.script(layer) if scripted else layer
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_hook_in_an_encoder_layer_sees_the_log_probability() -> None:
    layer = nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, batch_first=True)
    layer.self_attn = torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    choices: list[Choice] = []
    layer.self_attn.register_forward_hook(lambda module, arguments, choice: choices.append(choice))
    layer(torch.randn(BATCH, QUERY_LENGTH, EMBED_DIM))
    torch_attn.reinforce_loss(choices[0].log_prob, torch.randn(BATCH)).backward()
    assert layer.self_attn.in_proj_weight.grad.any()


MISTAKES = {
    "dropout": ({"dropout": 0.1}, "dropout must be 0, as hard attention has no weights to drop, but is 0.1."),
    "estimator": (
        {"estimator": "gumbel"},
        "estimator must be one of reinforce, straight_through, argmax, top_k, but is 'gumbel'.",
    ),
    "num_samples": ({"num_samples": 0}, "num_samples must be at least 1, but is 0."),
    "k": ({"k": 0}, "k must be at least 1, but is 0."),
    "temperature": ({"temperature": 0.0}, "temperature must be positive, but is 0.0."),
    "temperature_nan": ({"temperature": math.nan}, "temperature must be positive, but is nan."),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, **options)
    assert str(error.value) == message


def test_calls_for_what_hard_attention_lacks_are_refused() -> None:
    mine = torch_attn.HardMultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    x = torch.randn(BATCH, QUERY_LENGTH, EMBED_DIM)
    with pytest.raises(ValueError, match="need_weights must be False: hard attention has no weights"):
        mine(x, x, x, need_weights=True)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :2]])
    with pytest.raises(ValueError, match="must be dense, but one is a NestedTensor: pad it and give key_padding_mask"):
        mine(nested, nested, nested)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        mine(x, x, x, is_causal=True)
