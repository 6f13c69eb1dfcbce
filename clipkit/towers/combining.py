"""Make one model of two: the image tower of one, and the text tower and space of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipkit import checkpoint
from clipkit.durable import whole_folder
from clipkit.errors import InputError, ModelError
from clipkit.towers.encoder import DualEncoder
from clipkit.towers.loading import load

_NO_TEXTS = {"vocab_size": 1, "width": 8, "heads": 1, "layers": 1}  # in place of one that is there


def combine(image: str, text: str, folder: Path, *, seed: int = 0) -> None:
    """Write a checkpoint of the image tower of `image` and the text tower of `text`, both specs.

    It is a start for training and finds nothing yet: the image tower has not learnt the text tower's
    space. What depends on the space's width, which is the projection, is drawn from `seed` if the widths
    differ. Raises InputError if `folder` exists, ModelError for towers that do not fit together.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    if folder.exists():
        raise InputError(f"{folder} exists; give the combined model another folder")
    pictures = load(image, device="cpu", precision="float32")
    texts = load(text, device="cpu", precision="float32")
    for encoder in (pictures, texts):
        if type(encoder.model) not in (CLIP, CustomTextCLIP):
            raise ModelError(
                f"{encoder.spec} is a {type(encoder.model).__name__}, not a pair of towers; it "
                "cannot be combined"
            )
    model_cfg = _combined_config(pictures, texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CustomTextCLIP(
            model_cfg["embed_dim"],
            model_cfg["vision_cfg"],
            _NO_TEXTS if isinstance(texts.model, CustomTextCLIP) else model_cfg["text_cfg"],
            quick_gelu=model_cfg["quick_gelu"],
        )
    fresh = made.visual.state_dict()
    trained = pictures.model.visual.state_dict()  # type: ignore[union-attr]
    drawn = sorted(name for name in fresh if fresh[name].shape != trained[name].shape)
    made.visual.load_state_dict({**trained, **{name: fresh[name] for name in drawn}})
    made.logit_scale, made.logit_bias = texts.model.logit_scale, texts.model.logit_bias
    if isinstance(texts.model, CustomTextCLIP):
        made.text = texts.model.text
    else:  # the text tower's parts lie beside the image tower
        state = texts.model.state_dict()
        made.text.load_state_dict({name: state[name] for name in made.text.state_dict()})
    combined = DualEncoder(
        made,
        texts._tokenizer,
        spec=str(folder),
        identity=checkpoint.Identity("", ""),
        model_cfg=model_cfg,
        preprocess_cfg=pictures._preprocess_cfg,
        device=torch.device("cpu"),
        precision="float32",
    )
    parents = {
        side: {"spec": encoder.spec, "encoder_id": encoder.encoder_id}
        for side, encoder in (("image", pictures), ("text", texts))
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as temporary:
        combined.save(temporary, provenance={"combined": {**parents, "drawn": drawn, "seed": seed}})


def _combined_config(pictures: DualEncoder, texts: DualEncoder) -> dict[str, Any]:
    """Return the settings of both, as OpenCLIP's model_cfg."""
    vision, text = pictures._model_cfg["vision_cfg"], texts._model_cfg["text_cfg"]
    # One setting is for both towers. Only OpenCLIP's own transformers follow it.
    own_vit = "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int)
    own = [pictures] * own_vit + [texts] * ("hf_model_name" not in text)
    activations = {encoder.config.activation for encoder in own}
    if len(activations) > 1:
        raise ModelError(
            f"{pictures.spec} computes with {pictures.config.activation} and {texts.spec} with "
            f"{texts.config.activation}; OpenCLIP has one activation for both towers of a model"
        )
    return {
        **texts._model_cfg,
        "vision_cfg": {**vision, "timm_model_pretrained": False},
        "quick_gelu": activations == {"quick_gelu"},
        "custom_text": True,
    }
