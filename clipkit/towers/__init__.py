"""Load and run the two towers of a model; no other package imports OpenCLIP. A spec names the model:

builtin                            ships inside clipkit; needs no network
ViT-B-32/laion2b_s34b_b79k         an OpenCLIP architecture and pretrained tag
hf-hub:timm/ViT-B-16-SigLIP        an OpenCLIP repository on the Hugging Face hub
path/to/folder                     an OpenCLIP checkpoint folder, such as `save` writes
ViT-B-32:path/to/epoch_1.pt        an architecture and its weights, as open_clip_train saves them
scratch:ViT-B-32                   random weights, to be trained; `clipkit.scratch` has more

encoder = load("builtin")
encoder.encode_texts(["birthday cake"]) @ encoder.encode_images(pictures).T
"""

from clipkit.towers.combining import combine
from clipkit.towers.encoder import DTYPES, DualEncoder, Precision, use_one_torch_thread
from clipkit.towers.loading import choose_device, choose_precision, load

__all__ = [
    "DTYPES",
    "DualEncoder",
    "Precision",
    "choose_device",
    "choose_precision",
    "combine",
    "load",
    "use_one_torch_thread",
]
