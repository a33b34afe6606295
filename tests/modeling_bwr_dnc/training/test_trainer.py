import json
import os
import shutil

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from modeling_bwr_dnc import BwrDncForCausalLM, BwrDncForTokenClassification
from modeling_bwr_dnc.training import BwrDncTrainer, BwrDncTrainingArguments
from modeling_bwr_dnc.training.spans import read_in_spans
from tests.modeling_bwr_dnc.builders import tiny_config, tiny_model
from tests.modeling_bwr_dnc.training.conftest import losses


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(train, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "retention_noise": True}
    whole = train(**options)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = train(resume=True, **options)
    assert losses(resumed) == losses(whole)
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(*map(dict.values, map(weights, (whole, resumed))), strict=True)
    )


def test_two_micro_batches_equal_one_batch(train):
    model = BwrDncForCausalLM(tiny_config(vocab_size=256))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    whole = train(model=model, max_steps=2)
    again = BwrDncForCausalLM(tiny_config(vocab_size=256))
    again.load_state_dict(state)
    split = train(model=again, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)


def test_the_memory_has_a_learning_rate_of_its_own_and_no_decay(train):
    trainer = train(max_steps=1, weight_decay=0.1, memory_learning_rate=0.02)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        mine = {".memory." in names[id(parameter)] for parameter in group["params"]}
        if mine == {True}:
            assert (group["lr"], group["weight_decay"]) == (0.02, 0.0)
        else:
            assert mine == {False} and group["lr"] == 3e-3
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(names)


def test_the_log_shows_the_memory_and_its_gates_moving(train):
    trainer = train(max_steps=2)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < first["memory/evicted"] < 1 and first["memory/fill_0"] == 1.0
    assert first["memory/salience_median"] == 0.0 and second["memory/salience_high"] != 0.0
    for kind in ("salience", "routing", "compressor"):
        assert second[f"memory/{kind}_moved"] > 0


def test_updating_in_the_backward_pass_changes_nothing_but_the_memory_it_takes(train):
    options = {"gradient_spans": 0, "max_grad_norm": 0.0}
    usual, early = train(**options), train(optimizer_in_backward=True, **options)
    assert losses(early) == losses(usual)
    assert all(parameter.grad is None for parameter in early.model.parameters())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"span_length": 32, "gradient_spans": 0}])
def test_salience_costs_what_is_said(train, rows, options):
    """Gradients with the cost, less those without, are those of the mean softplus of all salience logits; the loss is as before."""
    gradients, found = [], []
    for cost in (0.3, 0.0):
        trainer = train(max_steps=1, learning_rate=0.0, salience_cost=cost, **{"span_length": None, **options})
        model, batch = trainer.model, trainer.data_collator([rows[0], rows[1]])
        for name, parameter in model.named_parameters():
            if ".salience." in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        model.zero_grad()
        found.append(trainer.training_step(model, dict(batch)).item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    heard = []
    heads = [module for name, module in model.named_modules() if name.endswith(".salience")]
    hooks = [head.register_forward_hook(lambda module, inputs, output: heard.append(output)) for head in heads]
    torch.manual_seed(1)
    model.train()
    model.zero_grad()
    length = options.get("span_length", 96)
    for _ in read_in_spans(model, dict(batch), length, 256):
        pass
    (0.3 * torch.stack([torch.nn.functional.softplus(salience).mean() for salience in heard]).mean()).backward()
    for hook in hooks:
        hook.remove()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(gradients[0][name] - gradients[1][name], expected, atol=1e-5, rtol=1e-3)


def test_a_salience_margin_costs_the_same_with_layers_computed_again(train, rows):
    gradients = []
    for again in (False, True):
        options = {"salience_cost": 0.3, "salience_margin": 8.0, "span_length": None, "gradient_checkpointing": again}
        trainer = train(max_steps=1, learning_rate=0.0, **options)
        torch.manual_seed(1)
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, dict(trainer.data_collator([rows[0], rows[1]])))
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert any(".salience." in name and gradient.any() for name, gradient in gradients[0].items())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"salience_cost": -1.0}, "salience_cost"),
        ({"salience_margin": -1.0}, "salience_margin"),
        ({"optimizer_in_backward": True}, "max_grad_norm"),
        ({"optimizer_in_backward": True, "max_grad_norm": 0.0, "span_length": 8}, "gradient_spans"),
        ({"span_length": 0}, "span_length"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        BwrDncTrainingArguments(output_dir=str(tmp_path), **settings)


def test_a_loss_that_would_not_be_called_is_refused(tmp_path):
    arguments = BwrDncTrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="compute_loss_func"):
        BwrDncTrainer(tiny_model(tiny_config()), arguments, compute_loss_func=lambda *_, **__: 0)


def test_a_head_that_is_no_language_models_is_refused(tmp_path):
    model = BwrDncForTokenClassification(tiny_config(num_labels=2))
    with pytest.raises(ValueError, match="no language-model head"):
        BwrDncTrainer(model=model, args=BwrDncTrainingArguments(output_dir=str(tmp_path)))


def test_data_without_labels_are_refused(tmp_path, rows):
    unlabelled = rows.remove_columns("labels")
    arguments = BwrDncTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    trainer = BwrDncTrainer(tiny_model(tiny_config(vocab_size=256)), arguments, train_dataset=unlabelled)
    with pytest.raises(ValueError, match="must have `labels`"):
        trainer.train()


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_low_memory_optimizers_step_save_and_resume(train, tmp_path, optim):
    options = {
        "optim": optim,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "config": {"hidden_size": 64},
    }
    whole = train(**options)
    states = {name: whole.optimizer.state[parameter]["state1"] for name, parameter in whole.model.named_parameters()}
    if "8bit" in optim:
        assert states["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    assert all(state.dtype == torch.float32 for name, state in states.items() if ".memory." in name)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert losses(train(resume=True, **options)) == losses(whole)


def test_evaluation_is_the_mean_over_label_tokens(train, rows):
    trainer = train(max_steps=1)
    found = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator([rows[i] for i in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).loss.item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_predictions_are_the_logits_of_whole_rows(train, rows):
    trainer = train(max_steps=1)
    found = trainer.predict(torch.utils.data.Subset(rows, range(4)))
    with torch.no_grad():
        expected = trainer.model.eval()(**trainer.data_collator([rows[i] for i in range(4)]))
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected.logits)
    assert found.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_labels_count_by_their_weights(train, rows, accumulated):
    """With the trainer, the arguments and the collator that users have."""
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 2 // accumulated,
        "gradient_accumulation_steps": accumulated,
    }
    found = []
    for weight in (1.0, 2.0):
        torch.manual_seed(0)
        model = BwrDncForCausalLM(tiny_config(vocab_size=256))
        weighted = rows.add_column("label_weights", [[weight] * len(labels) for labels in rows["labels"]])
        found += losses(train(model=model, data=weighted, **options))
    assert found[1] == pytest.approx(2 * found[0], rel=1e-5)


def test_weights_of_labels_are_refused_where_logits_are_wanted(train, rows):
    trainer = train(max_steps=1)
    batch = trainer.data_collator([rows[0] | {"label_weights": [0.5] * len(rows[0]["labels"])}])
    with pytest.raises(ValueError, match="prediction_loss_only"):
        trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)


@pytest.mark.parametrize("failing", ["model.safetensors", "optimizer.pt"])
def test_a_failed_save_leaves_the_last_checkpoint_intact(train, tmp_path, full_disk, failing):
    train(max_steps=1, save_strategy="steps", save_steps=1)
    folder = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-1").iterdir()}
    assert len(before["optimizer.pt"]) > len(before["model.safetensors"]) + 4096
    with full_disk(len(before[failing]) - 1000), pytest.raises(OSError, match="checkpoint-2 could not be written"):
        train(resume=True, max_steps=2, save_strategy="steps", save_steps=1)
    assert sorted(os.listdir(folder)) == ["checkpoint-1"]
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-1").iterdir()} == before


def test_saved_models_keep_their_cache_switched_on(train, tmp_path, rows):
    """The library switches it off for training, and would save that."""
    train(max_steps=1, save_strategy="steps", save_steps=1, gradient_checkpointing=True)
    model = BwrDncForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert model.config.use_cache
    ids = torch.tensor([rows[0]["input_ids"]])
    written = model.generate(ids, max_new_tokens=3, eos_token_id=-1, do_sample=False, return_dict_in_generate=True)
    assert written.past_key_values.get_seq_length() == ids.shape[1] + 2


def test_the_best_checkpoint_is_named_by_its_final_place(train, tmp_path):
    train(
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        save_total_limit=1,
    )
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-2")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2"]


def test_learned_prompts_are_refused(train, rows, tmp_path):
    model = get_peft_model(
        tiny_model(tiny_config()).float(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="prompt learning"):
        BwrDncTrainer(model=model, args=BwrDncTrainingArguments(output_dir=str(tmp_path)), train_dataset=rows)


def test_of_several_gpus_one_is_used(tmp_path, rows):
    arguments = BwrDncTrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", save_strategy="no")
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    with pytest.warns(UserWarning, match="sees 2 GPUs"):
        trainer = BwrDncTrainer(model=tiny_model(tiny_config()).float(), args=arguments, train_dataset=rows)
    assert trainer.args.n_gpu == 1
