"""Cuts of an adapter, measured: against dense models with the cut update merged, and against what gates predict."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import BertConfig, BertForSequenceClassification

from msplora_core import MSPLoraConfig
from msplora_core.data.evaluation import metric_value
from msplora_core.errors import TrainingError
from msplora_core.measure.ablation import ablate
from msplora_core.measure.cuts import Bases, Closed, Cut
from msplora_core.measure.recording import record_moments
from msplora_core.measure.updates import updates_of
from msplora_core.moments import ModuleMoments, Moments

from .conftest import make_bert, make_gpt2, make_llama, make_t5

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
METHODS = {
    "lora": lambda targets: LoraConfig(r=4, lora_alpha=6, target_modules=targets),
    "msplora": lambda targets: MSPLoraConfig(r=4, lora_alpha=6, target_modules=targets),
}


def adapted(kind, method, size=0.3, layers=3):
    torch.manual_seed(3)
    base = make_bert(layers) if kind == "bert" else make_llama(layers)
    model = get_peft_model(base, METHODS[method](TARGETS[kind])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(".B"):
                parameter.normal_(0, size)
    return model


def batches_of(kind, examples=24):
    """Batches of two lengths, padded; a causal model learns the last tokens of each example."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for length in (5, 9):
        tokens = torch.randint(3, 60, (examples // 2, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[::3, -2:] = 0
        labels = torch.randint(0, 2, (len(tokens),), generator=generator)
        if kind == "llama":
            labels = tokens.where((mask == 1) & (torch.arange(length) > 1), -100)
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches


def moments_of(model, seed=0):
    """Moments of chosen second moments C and G; returns these too, dense, by module."""
    rng = np.random.default_rng(seed)
    modules, dense = {}, {}
    for name, update in updates_of(model).items():
        a, b = update.a().double().numpy(), update.b().double().numpy()
        c, g = (np.cov(rng.normal(size=(n, 3 * n)) * rng.uniform(0.1, 5, (n, 1))) for n in (a.shape[1], b.shape[0]))
        columns = [update.columns(scale) for scale in update.scales]
        norms = np.array([[(a[own] ** 2).sum(), (b[:, own] ** 2).sum()] for own in columns])
        modules[name] = ModuleMoments(update.scales, update.ranks, a @ c @ a.T, b.T @ g @ b, norms.T, {})
        dense[name] = c, g
    return Moments(modules), dense


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def leading(matrix, k):
    u, sigma, vt = np.linalg.svd(matrix)
    return u[:, :k] * sigma[:k] @ vt[:k]


def what_stays(model, cut, dense):
    """The dense updates that a cut should leave, from the factors of the layers themselves."""
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    layers = {name: module for name, module in named.items() if hasattr(module, "get_delta_weight")}
    left = {}
    for name, layer in layers.items():
        scales = {"layer": layer.get_delta_weight("default")}
        if hasattr(layer, "pairs"):
            scaling = layer.scaling["default"]
            pairs = {scale: layer.pairs(scale)["default"] for scale in scaling}
            scales = {scale: scaling[scale] * pair.B @ pair.A for scale, pair in pairs.items()}
        scales = {scale: delta.detach().double().numpy() for scale, delta in scales.items()}
        whole = sum(scales.values())
        gone = {
            "module": name == cut.what,
            "layer": name.startswith(f"{cut.what}."),
            "type": name.endswith(f".{cut.what}"),
            "scale": cut.what == "total",
        }
        if gone.get(cut.cut, False):
            left[name] = np.zeros_like(whole)
        elif cut.cut == "scale":
            left[name] = whole - scales[cut.what]
        elif cut.cut == "only_scale":
            left[name] = scales[cut.what]
        elif cut.cut == "rank":
            left[name] = leading(whole, cut.rank)
        elif cut.cut == "rank_task":
            c, g = dense[name]
            left[name] = power(g, -0.5) @ leading(power(g, 0.5) @ whole @ power(c, 0.5), cut.rank) @ power(c, -0.5)
        else:
            left[name] = whole
    return left


def logits_of(model, updates, batches):
    """Logits of a model without PEFT, the updates added to its weights."""
    base = copy.deepcopy(model).unload().double()
    with torch.no_grad():
        for name, update in updates.items():
            base.get_submodule(name).weight += torch.from_numpy(update)
        return [base(**{k: v for k, v in batch.items() if k != "labels"}).logits.numpy() for batch in batches]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TARGETS)
def test_every_cut_measures_what_a_dense_model_with_that_update_gives(kind, method):
    model, batches = adapted(kind, method), batches_of(kind)
    moments, dense = moments_of(model)
    found = ablate(model, batches, moments=moments, ranks=(1, 3))
    table = found.table("perplexity" if kind == "llama" else "matthews_correlation")

    kinds = ["none", "module", "layer", "type", "scale", "only_scale", "rank", "rank_task"]
    assert list(table["cut"].unique()) == kinds
    whole = logits_of(model, what_stays(model, Cut("none"), dense), batches)
    for (_, row), cut in zip(table.iterrows(), found.cuts, strict=True):
        logits = logits_of(model, what_stays(model, cut, dense), batches)
        kl, loss, right = [], 0.0, []
        for batch, p, q in zip(batches, whole, logits, strict=True):
            labels = batch["labels"].numpy()
            log_p, log_q = log_softmax(p, -1), log_softmax(q, -1)
            divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
            if kind == "llama":
                learnt = labels[:, 1:] != -100
                kl += list((divergence[:, :-1] * learnt).sum(1))
                loss -= np.take_along_axis(log_q[:, :-1], labels[:, 1:, None].clip(0), -1)[..., 0][learnt].sum()
                right += [1] * learnt.sum()
            else:
                kl += list(divergence)
                loss -= np.take_along_axis(log_q, labels[:, None], -1).sum()
                right += list(zip(labels, q.argmax(-1), strict=True))
        np.testing.assert_allclose(row["kl"], np.mean(kl), rtol=2e-4, atol=1e-9, err_msg=str(cut))
        np.testing.assert_allclose(row["loss"], loss / len(right), rtol=1e-5)
        metric = np.exp(loss / len(right)) if kind == "llama" else matthews_corrcoef(*zip(*right, strict=True))
        np.testing.assert_allclose(row["metric"], metric, rtol=1e-5, atol=1e-12)


def state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [(m.training, m.forward, sorted(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_as_it_was_also_after_an_error(method):
    model, batches = adapted("bert", method), batches_of("bert")
    model.train()
    shared = {id(p) for p in model.parameters()}
    before = state(model)

    class Wrong(Exception):
        pass

    def stop():
        calls.append(1)
        if len(calls) == 7:
            raise Wrong

    calls: list[int] = []
    with pytest.raises(Wrong):
        ablate(model, batches, progress=stop)
    ablate(model, batches)
    after = state(model)
    assert before[1] == after[1]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert shared == {id(p) for p in model.parameters()}


def test_leaving_out_a_shared_scale_of_one_module_leaves_the_others_whole():
    model, batches = adapted("bert", "msplora"), batches_of("bert")
    names = list(updates_of(model))
    cut = Cut("mine", closed={names[0]: Closed("scale_plain", range(4))})  # the global scale of r = 4
    kl = ablate(model, batches, cuts=[cut]).measured.kl[1]
    whole, updates = what_stays(model, Cut("none"), {}), what_stays(model, Cut("none"), {})
    layer = model.get_base_model().get_submodule(names[0])
    pair = layer.pairs("global")["default"]
    updates[names[0]] -= layer.scaling["default"]["global"] * (pair.B @ pair.A).detach().double().numpy()
    p, q = (log_softmax(np.concatenate(logits_of(model, each, batches)), -1) for each in (whole, updates))
    np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-3, atol=1e-9)


def with_exact_scores(model, batches):
    """Moments whose scores are each example's gradient at the gates, labels in expectation rather than sampled."""
    moments, _ = moments_of(model)
    updates = updates_of(model)
    bases = Bases(updates, moments)
    names = ["plain", "task", *(["scale_plain"] if len(next(iter(updates.values())).parts) > 1 else [])]
    rows = {name: {basis: [] for basis in names} for name in updates}
    base = copy.deepcopy(model).unload().requires_grad_()
    for name, update in updates.items():
        base.get_submodule(name).weight.data += update.b() @ update.a()
    for batch in batches:
        for i in range(len(batch["labels"])):
            example = {key: value[i : i + 1] for key, value in batch.items() if key != "labels"}
            for label in (0, 1):
                log_p = torch.log_softmax(base(**example).logits[0], -1)
                base.zero_grad()
                log_p[label].backward()
                # two rows an example, whose mean of squares is the expectation over its labels
                weight = (2 * log_p[label].exp().item()) ** 0.5
                for name, update in updates.items():
                    gradient = base.get_submodule(name).weight.grad
                    core = (update.b().T @ gradient @ update.a().T).double().numpy()
                    for basis in names:
                        left, right = bases.of(name, basis)
                        rows[name][basis].append(weight * np.einsum("ak,ab,kb->k", left, core, right))
    modules = {
        name: ModuleMoments(m.scales, m.ranks, m.s_a, m.s_b, m.norms, {b: np.float32(rows[name][b]) for b in names})
        for name, m in moments.modules.items()
    }
    return Moments(modules)


@pytest.mark.parametrize("method", METHODS)
def test_small_cuts_cost_what_the_gates_predict(method):
    model, batches = adapted("bert", method, size=1e-3).double(), batches_of("bert", examples=8)
    moments = with_exact_scores(model, batches)
    table = ablate(model, batches, moments=moments, ranks=(1, 2)).table("accuracy")
    cut = table[table["kl"] > 0]
    assert len(cut) > 12
    np.testing.assert_allclose(cut["predicted_kl"], cut["kl"], rtol=0.02)


@pytest.mark.slow
def test_of_a_regression_the_squared_difference_is_measured_and_predicted():
    torch.manual_seed(3)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=60, num_labels=1
    )
    model = get_peft_model(BertForSequenceClassification(config), METHODS["lora"](TARGETS["bert"])).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3)
    batches = [{**batch, "labels": batch["labels"].double() * 2.5} for batch in batches_of("bert")]
    recorded = record_moments(model, batches, labels="sampled", draws=400)
    found = ablate(model, batches, moments=recorded, ranks=(1,))
    table = found.table("pearson")

    whole = np.concatenate(logits_of(model, what_stays(model, Cut("none"), {}), batches))[:, 0]
    labels = np.concatenate([batch["labels"] for batch in batches])
    for row, cut in zip(table.itertuples(), found.cuts, strict=True):
        if cut.cut != "rank_task":
            output = np.concatenate(logits_of(model, what_stays(model, cut, {}), batches))[:, 0]
            np.testing.assert_allclose(row.kl, np.mean((output - whole) ** 2), rtol=1e-3, atol=1e-16)
            np.testing.assert_allclose(row.loss, np.mean((output - labels) ** 2), rtol=1e-6)
            np.testing.assert_allclose(row.metric, pearsonr(output, labels)[0], rtol=1e-4)
    cut = table[table["kl"] > 0]
    np.testing.assert_allclose(cut["predicted_kl"], cut["kl"], rtol=0.15)  # sampled


@pytest.mark.parametrize("name", ["accuracy", "matthews_correlation", "pearson", "perplexity"])
def test_metrics_of_samples_are_those_of_the_examples_repeated(name):
    rng = np.random.default_rng(0)
    labels, counts = rng.integers(0, 3, 40), rng.multinomial(40, np.full(40, 1 / 40), 5)
    predictions = rng.normal(size=(40, {"pearson": 1, "perplexity": 2}.get(name, 3))) + (name == "perplexity") * 5
    for found, count in zip(metric_value(name, predictions, labels, counts), counts, strict=True):
        y, x = np.repeat(labels, count), np.repeat(predictions, count, axis=0)
        expected = {
            "accuracy": lambda y, x: accuracy_score(y, x.argmax(1)),
            "matthews_correlation": lambda y, x: matthews_corrcoef(y, x.argmax(1)),
            "pearson": lambda y, x: pearsonr(y, x[:, 0])[0],
            "perplexity": lambda y, x: np.exp(x[:, 0].sum() / x[:, 1].sum()),
        }[name](y, x)
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_intervals_are_of_the_change_over_the_same_examples():
    model, batches = adapted("bert", "lora"), batches_of("bert")
    table = ablate(model, batches).table("accuracy")
    assert (table.loc[table["cut"] == "none", ["metric_change", "low", "high"]] == 0).all(axis=None)
    assert ((table["low"] <= table["metric_change"]) & (table["metric_change"] <= table["high"])).all()
    assert (table["high"] > table["low"]).any()


def test_parameters_are_what_a_cut_leaves():
    def parameters(method):
        table = ablate(adapted("bert", method), batches_of("bert", 4), ranks=(1, 8)).table("accuracy")
        return {(row.cut, row.what if row.cut != "rank" else row.rank): row.parameters for row in table.itertuples()}

    sides = 32 + 32  # of every module, of which there are 2 in each of 3 layers
    lora = parameters("lora")
    assert lora["none", "adapter"] == 6 * 4 * sides == lora["rank", 8]
    assert lora["layer", "bert.encoder.layer.1"] == 4 * 4 * sides
    assert lora["rank", 1] == 6 * sides

    msplora = parameters("msplora")  # ranks 4, 2 and 1; of each type one global pair, and in 3 layers 3 mid pairs
    assert msplora["none", "adapter"] == 2 * (4 + 3 * 2 + 3 * 1) * sides
    assert msplora["module", "bert.encoder.layer.0.attention.self.query"] == msplora["none", "adapter"] - 3 * sides
    assert msplora["scale", "global"] == msplora["none", "adapter"] - 2 * 4 * sides
    assert msplora["scale", "total"] == 0
    assert msplora["rank", 1] == 6 * sides


@pytest.mark.parametrize(
    ("cuts", "told"),
    [
        ([Cut("mine", closed={"encoder.key": Closed("plain", [0])})], "encoder.key"),
        ([Cut("mine", closed={"bert.encoder.layer.0.attention.self.query": Closed("plain", [4])})], "0 to 3"),
        ([Cut("mine", closed={"bert.encoder.layer.0.attention.self.query": Closed("task", [0])})], "moments"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(cuts, told):
    with pytest.raises(TrainingError, match=told):
        ablate(adapted("bert", "lora"), batches_of("bert", 4), cuts=cuts)


def test_moments_of_another_adapter_are_refused():
    model = adapted("bert", "lora")
    moments, _ = moments_of(adapted("bert", "lora", size=0.4))
    with pytest.raises(TrainingError, match="another adapter"):
        ablate(model, batches_of("bert", 4), moments=moments)


@pytest.mark.parametrize("make", [make_gpt2, make_t5], ids=["gpt2", "t5"])
def test_layers_that_a_cut_does_not_change_are_skipped_and_nothing_else(make):
    torch.manual_seed(3)
    base = make().eval()
    targets = {"gpt2": ["c_attn"], "t5": ["q", "v"]}[base.config.model_type]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    tokens = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    found = ablate(model, [batch], ranks=())
    shift = 0 if base.config.model_type == "t5" else 1
    with torch.no_grad():
        whole = model(**batch).logits
        for cut, kl in zip(found.cuts, found.measured.kl, strict=True):
            zeroed = {name: model.get_base_model().get_submodule(name).lora_B["default"] for name in cut.closed}
            kept = {name: b.weight.clone() for name, b in zeroed.items()}
            for b in zeroed.values():
                b.weight.zero_()
            p, q = (logits[:, : 7 - shift].double().log_softmax(-1) for logits in (whole, model(**batch).logits))
            for name, b in zeroed.items():
                b.weight.copy_(kept[name])
            np.testing.assert_allclose(kl, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-3, atol=1e-9, err_msg=cut.what)
