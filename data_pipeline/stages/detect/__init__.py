"""Where the things stand that a caption names: candidate boxes, and how well each noun chunk fits each of them."""
