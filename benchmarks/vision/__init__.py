"""The paper's comparison on images, as far as a small machine goes."""
