"""The adapter for lm-evaluation-harness scores as one pass over the whole text does, in blocks and in bounded memory."""

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval, which is no dependency: pip install lm-eval")

from lm_eval.api.instance import Instance

from modeling_bwr_dnc.conversion import convert_checkpoint
from modeling_bwr_dnc.evaluation.harness import BwrDncHarness
from tests.tiny_sources import save_source

CONTEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = save_source(tmp_path_factory.mktemp("source") / "tiny")
    convert_checkpoint(source, source.parent / "model", segment_length=8, num_sink_tokens=2, memory_slots=[16, 8, 4])
    return source.parent / "model"


@pytest.fixture(scope="module")
def harness(folder):
    return BwrDncHarness(pretrained=str(folder), block_length=13)


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def one_pass(harness, ids):
    with torch.no_grad():
        return harness.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def test_loglikelihood_is_that_of_one_pass(harness):
    """Requests share a context, whose memory must not be changed by the first of them."""
    continuations = [" must be", " x", " must be in want of a wife."]
    results = harness.loglikelihood([request("loglikelihood", CONTEXT, text) for text in continuations])
    for text, (score, is_greedy) in zip(continuations, results, strict=True):
        before, after = harness.tok_encode(CONTEXT), harness.tok_encode(text)
        log_probabilities = one_pass(harness, before + after)[len(before) - 1 : -1]
        target = torch.tensor(after)
        assert score == pytest.approx(log_probabilities.gather(1, target[:, None]).sum().item(), abs=1e-3)
        assert is_greedy == bool((log_probabilities.argmax(-1) == target).all())


def test_rolling_loglikelihood_reads_the_whole_text(harness):
    text = CONTEXT * 5
    ids = [harness.prefix_token_id, *harness.tok_encode(text)]
    expected = one_pass(harness, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert harness.loglikelihood_rolling([request("loglikelihood_rolling", text)]) == [
        pytest.approx(expected, rel=1e-4)
    ]


def test_generation_is_greedy_and_stops(harness):
    (text,) = harness.generate_until([request("generate_until", CONTEXT, {"until": [], "max_gen_toks": 12})])
    ids = torch.tensor([harness.tok_encode(CONTEXT)])
    whole = harness.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert text == harness.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    stop = text[len(text) // 2 :][:2]
    options = {"until": [stop], "max_gen_toks": 12}
    (stopped,) = harness.generate_until([request("generate_until", CONTEXT, options)])
    assert stopped == text.split(stop)[0]


def test_memory_is_bounded(harness):
    ids = harness.tok_encode(CONTEXT)
    assert harness.read(ids * 3)[1].nbytes == harness.read(ids * 9)[1].nbytes


def test_the_harness_runs_a_local_task(folder, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"text": f"{CONTEXT} {word}", "choices": [" yes", " no"], "label": 0} for word in ("one", "two", "three")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        f"task: local_rows\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    results = lm_eval.simple_evaluate(
        model="bwr_dnc",
        model_args={"pretrained": str(folder), "block_length": 16},
        device="cuda:0",
        tasks=["local_rows"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["local_rows"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    assert results["n-samples"]["local_rows"]["effective"] == 3
