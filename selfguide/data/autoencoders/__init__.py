"""Images to latents and back, behind one small class.

load_autoencoder               identity, sd_vae, va_vae, tiny or small; weights by path, never a silent download
to_images, from_images         model space <-> uint8 images, once header and weights are known to agree
"""

from selfguide.data.autoencoders.autoencoder import Autoencoder, Identity, KLAutoencoder
from selfguide.data.autoencoders.images import check_header, from_images, to_images
from selfguide.data.autoencoders.load import load_autoencoder

__all__ = [
    "Autoencoder",
    "Identity",
    "KLAutoencoder",
    "check_header",
    "from_images",
    "load_autoencoder",
    "to_images",
]
