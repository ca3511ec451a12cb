"""Statistics of real images that scores compare with, and the published weights that scores are taken in."""
