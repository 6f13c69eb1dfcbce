"""The towers: the only place that knows OpenCLIP. A model is named by a spec:

builtin                            ships inside clipkit; needs no network
ViT-B-32/laion2b_s34b_b79k         an OpenCLIP architecture and pretrained tag
hf-hub:timm/ViT-B-16-SigLIP        an OpenCLIP repository on the Hugging Face hub
path/to/folder                     an OpenCLIP checkpoint folder, such as `save` writes

encoder = load("builtin")
encoder.encode_texts(["birthday cake"]) @ encoder.encode_images(pictures).T
"""

from clipkit.towers.encoder import DualEncoder, Precision
from clipkit.towers.loading import choose_device, choose_precision, load

__all__ = ["DualEncoder", "Precision", "choose_device", "choose_precision", "load"]
