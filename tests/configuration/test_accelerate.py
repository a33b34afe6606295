"""The launcher's own loader reads every Accelerate configuration, and the layer that is sharded exists."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import modeling_bwr_dnc.modeling_bwr_dnc as modeling

FOLDER = Path(__file__).parents[2] / "configuration" / "accelerate"
KINDS = {
    "deepspeed_zero2.yaml": "DEEPSPEED",
    "fsdp2.yaml": "FSDP",
    "one_gpu.yaml": "NO",
    "several_gpus.yaml": "MULTI_GPU",
    "two_cpu_processes.yaml": "MULTI_GPU",
}


def test_all_configurations_are_listed_and_documented():
    assert sorted(path.name for path in FOLDER.glob("*.yaml")) == sorted(KINDS)
    assert all(f"`{name}`" in (FOLDER / "README.md").read_text() for name in KINDS)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_launcher_reads_it(name, kind):
    config = load_config_from_file(str(FOLDER / name))
    assert config.distributed_type.value == kind
    assert config.num_processes == {"one_gpu.yaml": 1, "two_cpu_processes.yaml": 2}.get(name, 4)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert hasattr(modeling, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 2
