"""`--to peft`: the LoRA weights alone, as stock PEFT loads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from rarec.bundle.parts import Parts
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone
from rarec.models.weights import LORA

CLOSE = 1e-5


def write_adapter(parts: Parts, directory: Path) -> dict[str, Any]:
    """Write the adapter; return by how much stock PEFT's hidden states differ from the bundle's, relative to them.

    Raises:
        UserError: the bundle has no LoRA weights, or PEFT reads others from the files.
    """
    bundle = parts.bundle
    if not (bundle.directory / LORA).is_dir():
        problem = f"{bundle.facts['row']}, which {bundle.directory} holds, has no LoRA weights"
        raise UserError(problem, "export a row of a variant with LoRA, such as per_layer_lora+id")
    shutil.copytree(bundle.directory / LORA, directory, dirs_exist_ok=True)
    settings = directory / "adapter_config.json"
    fields = {**json.loads(settings.read_text()), "base_model_name_or_path": bundle.facts["model"]["llm"]["name"]}
    settings.write_text(json.dumps(fields, indent=2, sort_keys=True))
    apart = _apart(parts, directory)
    if apart > CLOSE:
        raise UserError(f"stock PEFT differs from the bundle by {apart:.1e}", "report it: this is a bug")
    return {"adapter_difference": apart}


@torch.no_grad()
def _apart(parts: Parts, directory: Path) -> float:
    from peft import PeftModel

    backbone = parts.encoder.model.backbone
    ids = torch.arange(5, 21)[None].to(backbone.device)
    own = backbone(ids, torch.ones_like(ids))
    stock = PeftModel.from_pretrained(backbone.model.unload(), str(directory))
    other = FrozenBackbone(stock, backbone.pool, sink=backbone.sink).eval()(ids, torch.ones_like(ids))
    return float((own - other).abs().max() / own.abs().max())
