"""Images to latents and back, behind one small class; and what a model sees of stored values.

header   shards.format.header.Header: what lies in the shards, and whose latents they are
Normaliser                     stored values <-> what a model sees
load_autoencoder               identity, sd_vae, va_vae or tiny; weights by path, never a silent download
to_images, from_images         model space <-> uint8 images, once header and weights are known to agree
"""

from selfguide.data.autoencoders.autoencoder import Autoencoder, Identity, KLAutoencoder
from selfguide.data.autoencoders.images import check_header, from_images, to_images
from selfguide.data.autoencoders.load import load_autoencoder
from selfguide.data.normaliser import Normaliser

__all__ = [
    "Autoencoder",
    "Identity",
    "KLAutoencoder",
    "Normaliser",
    "check_header",
    "from_images",
    "load_autoencoder",
    "to_images",
]
