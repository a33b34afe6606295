"""The model card that a conversion writes: Hub metadata, usage that runs, and what the model cannot do."""

from pathlib import Path

from huggingface_hub import ModelCardData

TAGS = ["bwr-dnc", "state-bank", "bounded-memory", "custom_code"]


def write_model_card(path: Path, source, record) -> None:
    """Write README.md for a converted model.

    Args:
        source: the `Source` that was converted (licence, languages and base model go into the metadata, where known).
        record: the `Conversion` that describes the result.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source.base_model,
        license=source.license,
        language=list(source.languages) or None,
        tags=TAGS,
    )
    is_chat = source.tokenizer is not None and source.tokenizer.chat_template is not None
    path.write_text(f"---\n{metadata.to_yaml()}\n---\n\n{_body(source, record, is_chat)}", encoding="utf-8")


def _body(source, record, is_chat: bool) -> str:
    raw, twofold, fourfold = record.memory_slots
    by_layer = ""
    if record.slot_shares is not None:
        by_layer = f", times {min(record.slot_shares):g} to {max(record.slot_shares):g} by layer"
    proof = f"Measured at conversion: {record.proof}." if record.proof else "This was not measured at conversion."
    adapter = (
        f"{len(record.memory_adapter)} memory tensors come from a trained adapter."
        if record.memory_adapter
        else "The memory parameters are neutral: nothing has been trained, measured attention alone ranks what stays."
    )
    banks = [layer_type == "state_bank_attention" for layer_type in record.layer_types]
    which = "" if all(banks) else f", in {sum(banks)} of {len(banks)} layers,"
    levels = [(raw, "raw"), (twofold, "twofold"), (fourfold, "fourfold compressed")]
    held = " and ".join(f"{count} {level}" for count, level in levels if count) or "no"
    lossless = record.lossless_length if record.proof is None else min(record.lossless_length, record.proof.length)
    beyond = "the model forgets and compresses" if twofold else "the model forgets"
    prompt = (
        '[{"role": "user", "content": "What is the capital of France?"}]' if is_chat else '"The capital of France is"'
    )
    notices = "".join(f"* {notice}\n" for notice in record.notices)
    return f"""# {source.name}, converted to BWR-DNC

The weights of `{source.name}` in a decoder whose past is bounded: every layer sees {record.num_sink_tokens} sink tokens, an exact
window of {record.segment_length} to {2 * record.segment_length} tokens, and{which} a StateBank of {held} slots{by_layer}. Once the bank
is full, memory per sequence and time per token no longer grow.

Up to {lossless:,} tokens the model equals its source's full attention. {proof} {adapter}

## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO", trust_remote_code=True)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator({prompt}, max_new_tokens=40)[0]["generated_text"])
```

The memory budget is a run-time setting: pass `segment_length=`, `memory_slots=[raw, 2x, 4x]` (the same in every layer) or
`num_sink_tokens=` to `from_pretrained`.

## Limits

* Past {record.lossless_length:,} tokens {beyond}. Exact recall needs a raw slot: what is in no slot is gone.
* It knows and errs as its source does; licence and intended use are the source's.
* The code in this folder runs on your machine (`trust_remote_code=True`); read it first.
{notices}
## Numbers

| | |
|---|---|
| parameters | {record.num_parameters:,}, of which memory {record.num_memory_parameters:,} |
| weights | {record.dtype} |
| segment, sinks, slots | {record.segment_length}, {record.num_sink_tokens}, {raw}/{twofold}/{fourfold}{by_layer} |
| lossless length | {record.lossless_length:,} tokens |
"""
