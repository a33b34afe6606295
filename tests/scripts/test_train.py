import importlib.util
import json
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.training.data import DataSource
from modeling_bwr_dnc.training.recipe import read_recipe
from modeling_bwr_dnc.training.run import GeneratedTasks, load_rows
from scripts import finetune, train
from tests.modeling_bwr_dnc.builders import tiny_config
from tests.scripts.conftest import REPOSITORY
from tests.tiny_sources import byte_tokenizer

TEXT = "\n\n".join(pydoc_data.topics.topics.values())


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT[:6000], encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path, book):
    """A YAML file of a short run from scratch on real text."""
    shape = tmp_path / "shape"
    tiny_config(vocab_size=260, hidden_dropout=0.1).save_pretrained(shape)
    byte_tokenizer().save_pretrained(shape)
    description = {
        "model": str(shape),
        "data": {"sources": [str(book)], "sequence_length": 64, "validation_fraction": 0.1},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "span_length": 16,
            "retention_noise": True,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    path = tmp_path / "training.yaml"
    path.write_text(yaml.safe_dump(description))
    return path


def history(run):
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    entries = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_training_from_scratch_writes_a_model_that_loads(call, recipe, tmp_path):
    code, output, errors = call(train, "--config", recipe, "training.learning_rate=1e-2")
    assert code == 0, errors
    assert "held-out loss" in output and str(tmp_path / "run" / "model") in output
    model = BwrDncForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.use_cache
    found = history(tmp_path / "run")
    assert len(found) == 4 and found[-1] < found[0]


def test_a_stopped_run_goes_on_with_the_same_losses(call, recipe, tmp_path):
    assert call(train, "--config", recipe)[0] == 0
    whole = history(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    # What a kill in the middle of saving leaves behind.
    left = tmp_path / "run" / ".incomplete" / "checkpoint-3"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    code, _, errors = call(train, "--config", recipe, "--resume")
    assert code == 0, errors
    assert history(tmp_path / "run") == whole
    assert not left.exists()


@pytest.mark.parametrize("length", ["training.max_steps=2", "training.num_train_epochs=0.05"])
def test_a_finished_run_takes_no_further_step(call, recipe, tmp_path, length):
    limited = ("--config", recipe, "training.max_steps=-1", length, "training.lr_scheduler_type=constant")
    code, said, errors = call(train, *limited)
    assert code == 0, errors
    model = tmp_path / "run" / "model"
    before, checkpoints = (model / "model.safetensors").read_bytes(), sorted((tmp_path / "run").glob("checkpoint-*"))
    shutil.rmtree(model)
    for _ in range(2):
        code, again, errors = call(train, *limited, "--resume")
        assert code == 0, errors
        assert (model / "model.safetensors").read_bytes() == before
        assert sorted((tmp_path / "run").glob("checkpoint-*")) == checkpoints
        # There is no training loss, and the held-out one is that of before.
        assert "mean training loss" not in again and again.splitlines()[-2:] == said.splitlines()[-2:]


@pytest.mark.slow
def test_a_run_killed_in_a_step_and_then_while_saving_loses_no_checkpoint(call, recipe, tmp_path):
    options = ("training.max_steps=12", "training.save_steps=1", "training.save_total_limit=3")
    command = [sys.executable, "-m", "scripts.train", "--config", str(recipe), *options, "--resume"]
    run = tmp_path / "run"
    staged = run / ".incomplete"

    def kill_when(is_the_moment):
        """The process stands still while the moment is judged, so that none is missed."""
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                if is_the_moment():
                    process.send_signal(signal.SIGSTOP)
                    if is_the_moment():
                        return
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.0005)
            raise AssertionError(f"it ended with {process.returncode} before the moment came")
        finally:
            process.kill()
            process.wait()

    def last():
        return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)

    def assert_whole(step):
        assert last() == step and not (run / "model").exists()
        for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
            assert (run / f"checkpoint-{step}" / name).stat().st_size > 0

    kill_when(lambda: last() >= 3 and not staged.exists())
    before = last()
    assert_whole(before)
    # While a later checkpoint is half written.
    kill_when(lambda: last() > before and any(staged.glob("checkpoint-*/model.safetensors")))
    assert any(staged.glob(f"checkpoint-{last() + 1}/model.safetensors"))
    assert_whole(last())
    assert call(train, "--config", recipe, *options, "--resume")[0] == 0
    assert not staged.exists()
    resumed = history(run)
    shutil.rmtree(run)
    assert call(train, "--config", recipe, *options)[0] == 0
    assert resumed == history(run)


def test_lora_on_a_converted_model_lowers_its_held_out_loss(call, recipe, tiny_model, tmp_path):
    settings = ("method=lora", "merge=true", f"model={tiny_model}", "training.max_steps=8", "data.sequence_length=96")
    evaluation = ("training.eval_strategy=steps", "training.eval_steps=1", "training.save_steps=8")
    code, output, errors = call(finetune, "--config", recipe, *settings, *evaluation, "training.learning_rate=1e-2")
    assert code == 0, errors
    entries = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert held_out[-1] < held_out[0]
    merged = BwrDncForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    # What was trained is the adapter, though nothing is left of it by itself.
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert f"{sum(tensor.numel() for tensor in trained.values()):,} of" in output
    adapted = PeftModel.from_pretrained(
        BwrDncForCausalLM.from_pretrained(tiny_model), str(tmp_path / "run" / "adapter")
    )
    ids = torch.arange(80)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_model_is_not_replaced_by_what_is_trained_from_it(assert_refused, recipe, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "run" / "model")
    for method in ("full", "memory", "lora"):
        settings = (f"method={method}", f"merge={str(method == 'lora').lower()}", f"model={model}")
        assert_refused("would remove it; choose an output", finetune, "--config", recipe, *settings)
    assert {path.name for path in model.iterdir()} == {path.name for path in tiny_model.iterdir()}


def test_the_memory_alone_can_be_trained(call, recipe, tiny_model, tmp_path):
    code, output, errors = call(
        finetune, "--config", recipe, "method=memory", f"model={tiny_model}", "training.max_steps=2"
    )
    assert code == 0, errors
    before = BwrDncForCausalLM.from_pretrained(tiny_model).state_dict()
    after = BwrDncForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".memory." in name for name in changed)


def test_a_new_convolution_is_refused_where_it_would_not_be_trained(
    call, assert_refused, recipe, tiny_model, tmp_path
):
    settings = ("--config", recipe, "training.max_steps=1", "model_settings.short_conv_kernel=3")
    for method in ("memory", "lora"):
        assert_refused("short_conv_kernel` is 3, but", finetune, *settings, f"model={tiny_model}", f"method={method}")
    assert call(finetune, *settings, f"model={tiny_model}")[0] == 0
    convolved = (f"model={tmp_path / 'run' / 'model'}", f"training.output_dir={tmp_path / 'memory'}")
    code, _, errors = call(finetune, *settings, *convolved, "method=memory")
    assert code == 0, errors


def test_tasks_are_data(call, recipe):
    task = "data.sources=[{task: copy, options: {length: 32}}]"
    code, _, errors = call(train, "--config", recipe, task, "data.validation_fraction=null", "training.max_steps=2")
    assert code == 0, errors


def test_a_task_of_text_is_written_in_the_tokens_of_the_model():
    tokenizer = byte_tokenizer()
    tasks = GeneratedTasks(tokenizer, vocab_size=260, segment_length=8, batch_size=1, seed=0)
    row = next(iter(tasks.examples(DataSource(task="passkey", options={"length": 400}))))
    assert "The pass key is" in tokenizer.decode(row["input_ids"])


def test_a_run_reports_to_tensorboard(call, recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert call(train, "--config", recipe, "training.report_to=tensorboard")[0] == 0
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(history(tmp_path / "run"), rel=1e-3)
    assert board.Scalars("train/memory/salience_moved")[0].value > 0
    # The last evaluation belongs to the run, and is not another one.
    assert [event.step for event in board.Scalars("eval/loss")] == [4]
    assert len(list((tmp_path / "board").iterdir())) == 1


@pytest.mark.parametrize(
    ("library", "setting", "words"),
    [
        *((logger, f"report_to={logger}", f"pip install {logger}") for logger in ("tensorboard", "wandb", "trackio")),
        ("galore_torch", "optim=galore_adamw", "galore_torch"),
    ],
)
def test_a_library_that_is_missing_is_named(assert_refused, recipe, library, setting, words):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed, so that nothing is missing")
    assert_refused(words, train, "--config", recipe, f"training.{setting}")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(assert_refused, recipe, tiny_model):
    settings = ("--config", recipe, f"model={tiny_model}", "tokenizer=bwr-dnc-bpe-50k")
    assert_refused("but the tokenizer 50000", finetune, *settings)


def test_a_curriculum_follows_the_model_and_goes_on_where_it_was(call, recipe, book, tmp_path):
    options = (
        "first_length: 32, vocab_size: 40, segment_length: 8, every: 1, num_rows: 2, promote_at: 0.0, demote_at: 0.0"
    )
    sources = f"data.sources=[{{task: curriculum, options: {{{options}}}}}, {book}]"
    arguments = (sources, "data.validation_fraction=null", "training.max_steps=8", "training.save_steps=4")
    code, _, errors = call(train, "--config", recipe, *arguments)
    assert code == 0, errors
    run = tmp_path / "run"

    def steps():
        entries = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        return [
            (entry["curriculum/step"], entry["curriculum/length"]) for entry in entries if "curriculum/step" in entry
        ]

    # A rate of 0 is enough here, so every look moves it on, from 32 to 128 tokens.
    assert steps() == [(1, 32), (2, 32), (3, 64), (4, 64), (5, 64), (6, 128), (7, 128), (8, 128)]
    whole = history(run)
    shutil.rmtree(run / "checkpoint-8")
    assert call(train, "--config", recipe, *arguments, "--resume")[0] == 0
    assert history(run) == whole and len(steps()) == 8


def test_validation_takes_each_row_of_several_sources_once(recipe, tmp_path):
    (tmp_path / "short.txt").write_text(TEXT[:20])
    (tmp_path / "long.txt").write_text(TEXT[:1000])
    files = f"{tmp_path / 'short.txt'}, {tmp_path / 'long.txt'}"
    overrides = ["data.validation_fraction=null", "data.sequence_length=16"]
    tokenizer = byte_tokenizer()
    tasks = GeneratedTasks(tokenizer, vocab_size=260, segment_length=8, batch_size=1, seed=0)
    for sources, others in ((f"[{files}]", 0), (f"[{files}, {{task: copy, options: {{length: 32}}}}]", 256)):
        described = read_recipe(recipe, [*overrides, f"data.validation={sources}"])
        rows = [row["input_ids"] for row in load_rows(described, tokenizer, 0, tasks)[1]]
        texts = len(rows) - others
        written = tokenizer.decode(sum(rows[:texts], []), skip_special_tokens=True)
        assert written == TEXT[:20] + TEXT[:1000]


def test_a_task_validates(call, recipe, tmp_path):
    task = "{task: lookup, options: {length: 64, num_pairs: 4, num_queries: 2}}"
    arguments = (f"data.sources=[{task}]", f"data.validation=[{task}]", "data.validation_fraction=null")
    evaluating = ("training.max_steps=1", "training.eval_strategy=steps", "training.per_device_eval_batch_size=64")
    code, _, errors = call(train, "--config", recipe, *arguments, *evaluating)
    assert code == 0, errors
    entries = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in entries)


def test_a_curriculum_follows_a_model_with_adapters(call, recipe, tiny_model, tmp_path):
    options = "first_length: 32, vocab_size: 40, segment_length: 8, every: 1, num_rows: 2"
    sources = f"data.sources=[{{task: curriculum, options: {{{options}}}}}]"
    settings = ("method=lora", f"model={tiny_model}", sources, "data.validation_fraction=null")
    code, _, errors = call(finetune, "--config", recipe, *settings, "training.max_steps=2")
    assert code == 0, errors
    entries = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in entries if "curriculum/success" in entry] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.sources=[{task: curriculum, options: {nonsense: 1}}]"], "nonsense"),
        (
            [
                "data.sources=[{task: curriculum}]",
                "data.validation_fraction=null",
                "training.dataloader_num_workers=1",
            ],
            "be 0 with a curriculum",
        ),
        (["training.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["dta.packing=true"], "did you mean 'data'?"),
        (["data.sources=missing.txt"], "no file or folder missing.txt"),
        (["data.sources=[]"], "`data.sources` is empty"),
        (["data.sources=[{task: nonsense}]"], "no task 'nonsense'"),
        (
            ["data.sources=[{task: lookup, options: {num_pairs: many}}]"],
            "`num_pairs` of the task 'lookup' is 'many', but must be",
        ),
        (["data.sources=[{task: mqar}]"], "uses 8192 token ids, but the model has 260"),
        (["data.sources=[{task: curriculum, options: {vocab_size: 300}}]"], "uses 300 token ids"),
        (["method=lora"], "use scripts.finetune"),
        (["model=nowhere"], "no preset or model folder nowhere"),
        (["model_settings.memory_slot=[1,1,1]"], "memory_slot"),
        (["model_settings.vocab_size=100"], "the tokenizer"),
        (["training.span_length=-1"], "span_length"),
        (["training.eval_strategy=steps", "data.validation_fraction=null"], "data.validation"),
        (["training.report_to=nowhere"], "nowhere"),
        (["nonsense"], "key=value"),
        (["data.sequence_length=1"], "sequence_length"),
    ],
)
def test_what_cannot_work_is_one_clear_line(assert_refused, recipe, overrides, words):
    assert_refused(words, train, "--config", recipe, *overrides)


def test_an_earlier_run_is_not_overwritten_nor_mixed_up(call, assert_refused, recipe):
    assert call(train, "--config", recipe, "training.max_steps=2")[0] == 0
    assert_refused("go on with --resume", train, "--config", recipe)
    other = "model_settings.memory_slots=[6,4,3]"
    assert_refused("belongs to another model: memory_slots", train, "--config", recipe, other, "--resume")


def test_fine_tuning_goes_on_when_the_tokenizer_has_other_special_tokens(call, recipe, tiny_model):
    settings = ("--config", recipe, f"model={tiny_model}", "model_settings.pad_token_id=0")
    assert call(finetune, *settings, "training.max_steps=2")[0] == 0
    code, _, errors = call(finetune, *settings, "--resume")
    assert code == 0, errors


def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_named(call, assert_refused, recipe, tiny_model, tmp_path):
    lora = ("--config", recipe, f"model={tiny_model}", "method=lora", "training.max_steps=2")
    assert call(finetune, *lora)[0] == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    words = "checkpoint-2 is damaged, or of another model or method"
    assert_refused(words, finetune, *lora, "adapter={r: 4}", "--resume")
    assert_refused(words, finetune, *lora, "method=full", "--resume")
    for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:300])
        # The library may speak before.
        code, _, errors = call(finetune, *lora, "training.max_steps=4", "--resume")
        assert code == 2 and words in errors.splitlines()[-1]
        (checkpoint / name).write_bytes(whole)
    (checkpoint / "trainer_state.json").write_text("{")
    assert_refused("checkpoint-2 is damaged", finetune, *lora, "--resume")


def test_a_model_of_another_kind_is_refused(assert_refused, recipe, tiny_source):
    assert_refused("convert it first", finetune, "--config", recipe, f"model={tiny_source}")
    assert_refused("has no weights", finetune, "--config", recipe, "model=bwr-dnc-tiny")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_from_two", [False, True])
def test_two_processes_have_the_losses_of_one(recipe, call, tmp_path, checkpoint_from_two):
    plain = ("model_settings.hidden_dropout=0.0", "training.retention_noise=false", "data.validation_fraction=null")
    plain += ("training.lr_scheduler_type=constant",)
    one = (*plain, "training.per_device_train_batch_size=4")
    assert call(train, "--config", recipe, *one, f"training.output_dir={tmp_path / 'one'}")[0] == 0
    accelerate = str(REPOSITORY / "configuration" / "accelerate" / "two_cpu_processes.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate, "scripts/train.py"]
    steps = ["training.max_steps=2"] if checkpoint_from_two else []
    command = [*launch, "--config", str(recipe), *plain, *steps, f"training.output_dir={tmp_path / 'two'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    if checkpoint_from_two:
        resumed = (*one, "--resume", f"training.output_dir={tmp_path / 'two'}")
        code, _, errors = call(train, "--config", recipe, *resumed)
        assert code == 0, errors
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)
