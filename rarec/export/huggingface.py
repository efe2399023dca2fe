"""`--to peft`: the LoRA weights alone, as stock PEFT loads them; `--to hub`: a model hub's repository."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from rarec.bundle.bundle import Bundle
from rarec.bundle.parts import Parts
from rarec.errors import UserError
from rarec.export import Target
from rarec.models.backbone import FrozenBackbone
from rarec.models.build import LORA
from rarec.storage.artefacts import MANIFEST

CLOSE = 1e-5


@dataclass(frozen=True)
class Peft(Target):
    """The folder of the adapter. Figure: by how much the hidden states of stock PEFT differ, relative to the bundle's.

    Raises:
        UserError: the bundle has no LoRA weights, or PEFT reads others from the files.
    """

    alone = True

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        bundle = parts.bundle
        if not (bundle.directory / LORA).is_dir():
            problem = f"{bundle.facts['row']}, which {bundle.directory} holds, has no LoRA weights"
            raise UserError(problem, "export a row of a variant with LoRA, such as per_layer_lora+id")
        shutil.copytree(bundle.directory / LORA, directory, dirs_exist_ok=True)
        settings = directory / "adapter_config.json"
        fields = {**json.loads(settings.read_text()), "base_model_name_or_path": bundle.facts["model"]["llm"]["name"]}
        settings.write_text(json.dumps(fields, indent=2, sort_keys=True))
        difference = _difference(parts, directory)
        if difference > CLOSE:
            raise UserError(f"stock PEFT differs from the bundle by {difference:.1e}", "report it: this is a bug")
        return {"adapter_difference": difference}


@torch.no_grad()
def _difference(parts: Parts, directory: Path) -> float:
    from peft import PeftModel

    backbone = parts.encoder.model.backbone
    ids = torch.arange(5, 21)[None].to(backbone.device)
    own = backbone(ids, torch.ones_like(ids))
    stock = PeftModel.from_pretrained(backbone.model.unload(), str(directory))
    other = FrozenBackbone(stock, backbone.pool, sink=backbone.sink).eval()(ids, torch.ones_like(ids))
    return float((own - other).abs().max() / own.abs().max())


@dataclass(frozen=True)
class Hub(Target):
    """A copy of the bundle, whose card a hub reads; it is checked as any bundle that is opened.

    Attributes:
        push: repository to upload it to, `NAME/REPOSITORY`; it is made, and private, if it is not there.
    """

    push: str | None = None
    alone = True

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        bundle = parts.bundle
        for name in (*bundle.manifest["files"], MANIFEST):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.directory / name, directory / name)
        Bundle.open(directory, bundle.trusted)
        return {}

    def publish(self, directory: Path) -> str:
        """Upload the folder, with the token that `hf auth login` has saved; return its address.

        Raises:
            UserError: the hub refuses, or cannot be reached; the folder stays.
        """
        if self.push is None:
            return ""
        api: Any = HfApi()
        try:
            address = api.create_repo(self.push, private=True, exist_ok=True)
            api.upload_folder(repo_id=self.push, folder_path=str(directory), ignore_patterns=[".*"])
        except Exception as error:  # the hub refuses, its client does, or the network
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            remedy = "log in with hf auth login, check the name, and give --push again with another --out"
            raise UserError(f"--push {self.push}: {first[:200]}", remedy) from None
        return str(address)
