"""What an operator watches: known devices, MFU by hand, gradient norms by group, and all of it in the log of a step."""

import json
import subprocess
import sys
from math import sqrt

import pytest
import torch

from rarec.distributed.hardware import DEVICES, known_device, peak_memory
from rarec.distributed.world import SINGLE
from rarec.training.step_metrics import GROUPS, DeviceMeter, StepAccumulator, StepMetrics, group_of, norms
from tests.ranks import VARIANT, copied, finish


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA A10G", 70),
        ("NVIDIA GH200 480GB", 989),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_devices_are_known_by_what_pytorch_calls_them(name, tflops):
    assert known_device(name).tflops == tflops


@pytest.mark.parametrize(
    ("name", "memory_gb"),
    [
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A100-PCIE-40GB", 40),
        ("Tesla V100-SXM2-16GB", 16),
        ("NVIDIA GH200 480GB", 96),  # of them, the rest is the processor's
        ("NVIDIA L40", 48),
    ],
)
def test_memory_that_a_name_tells_is_believed(name, memory_gb):
    assert known_device(name).memory_gb == memory_gb


def test_no_device_stands_behind_one_whose_name_is_part_of_its_own():
    assert [known_device(device.name) for device in DEVICES] == list(DEVICES)
    assert known_device("some CPU") is None


@pytest.mark.parametrize(("taken", "least", "most"), [("", 5e6, 200e6), ("bytearray(400_000_000); ", 400e6, 700e6)])
def test_peak_memory_is_what_this_process_has_had_and_not_the_one_that_started_it(taken, least, most):
    torch.ones(250_000_000)
    assert peak_memory() > 1e9
    code = f"from rarec.distributed.hardware import peak_memory; {taken}print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert least < int(child.stdout) < most


def step_of_all(**more) -> StepMetrics:
    values = {
        "loss": 1.0,
        "recommendation": 0.8,
        "align": 2.0,
        "distil": 0.0,
        "tokens": 500.0,
        "padded": 800.0,
        "waited": 0.1,
    }
    return StepMetrics(**{**values, "seconds": 0.5, "stops": False, **more})


def test_mfu_is_four_operations_a_weight_and_token_over_the_peak():
    """1,000 tokens/s x 4 x 2 million weights = 8e9 operations a second, of 80e9."""
    machine = DeviceMeter(4 * 2e6, 80e9, torch.device("cpu"))
    figures = machine.figures(step_of_all())
    assert figures["mfu"] == pytest.approx(0.1)
    assert figures["memory"] > 50e6
    assert "mfu" not in DeviceMeter(4 * 2e6, None, torch.device("cpu")).figures(step_of_all())


def test_gradient_norms_by_group():
    named = {
        "user.alignment.sources.id.weight_LDE": torch.tensor([3.0]),
        "item.alignment.sources.id.bias_LD": torch.tensor([4.0]),
        "backbone.model.layers.0.q_proj.lora_A.default.weight": torch.tensor([[1.0, 2.0]]),
        "backbone.model.layers.0.q_proj.lora_B.default.weight": torch.tensor([[2.0]]),
        "log_scale": torch.tensor([12.0]),
        "user.readout.heads.text.weight": torch.tensor([5.0]),
    }
    assert {group_of(name) for name in named} == {*GROUPS}
    measured = norms(named.items())
    expected = {"alignment": 5.0, "lora_A": sqrt(5), "lora_B": 2.0, "heads": 13.0, "all": sqrt(25 + 5 + 4 + 169)}
    assert measured == pytest.approx(expected)


def test_a_step_is_the_mean_of_its_parts():
    step = StepAccumulator()
    step.losses = [torch.tensor([1.0, 0.5, 0.2, 0.1]).double(), torch.tensor([3.0, 1.5, 0.4, 0.5]).double()]
    step.tokens, step.padded, step.waited, step.keys = 75, 100, 0.5, ["1-2", "1-3"]
    of_all = step.reduce(SINGLE, stopping=True)
    assert (of_all.loss, of_all.recommendation, of_all.align, of_all.distil) == pytest.approx((2.0, 1.0, 0.3, 0.3))
    assert (of_all.tokens, of_all.padded, of_all.waited, of_all.samples) == (75, 100, 0.5, 2)
    assert of_all.stops


def test_shares_and_speed_are_of_the_whole_step():
    figures = step_of_all().figures({"all": 5.0, "heads": 4.0})
    assert (figures["tokens_per_s"], figures["data_wait"], figures["padding"]) == pytest.approx((1000, 0.2, 0.375))
    assert (figures["gradient_norm"], figures["gradient_norm/heads"]) == (5.0, 4.0)


@pytest.mark.multiprocess
def test_every_step_on_several_ranks_tells_all_of_it(decoder, tmp_path):
    run = tmp_path / "run"
    overrides = [copied(decoder, run), f"train.variants=[{VARIANT}]", "train.max_steps=3", "train.accumulate=2"]
    finish("train", decoder, overrides, engine="zero2", scratch=tmp_path)
    lines = [json.loads(line) for line in (run / "train" / VARIANT / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert {"recommendation", "align", "tokens_per_s", "data_wait", "padding", "memory", "lr"} <= line.keys()
        groups = [line[f"gradient_norm/{group}"] for group in GROUPS]
        assert sqrt(sum(norm**2 for norm in groups)) == pytest.approx(line["gradient_norm"], rel=1e-5)
        assert 0 <= line["padding"] < 1
        assert line["samples"] == 32
    assert list((run / "train" / VARIANT).rglob("events.out.tfevents*")), "and to the tracker"
